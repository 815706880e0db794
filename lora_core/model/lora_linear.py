"""The LoRA branch of a linear layer with no more copies than its maths needs. The layers and their files stay PEFT's.

    y = base(x) + scaling * B A drop(x)        x: (..., in), A: (r, in), B: (out, r)

As PEFT writes it, autograd keeps a float32 copy of x, a mask in float32 and the dropped x for each of the seven
projections of a layer: more than half of what a training step holds. Here it keeps x, which q, k and v (gate and up)
share, the r values of A drop(x), and the mask as one bit a value; drop(x) is made again in the backward. Over a plain
frozen layer, base and branch are one node of the graph, which adds their results inside the products. Everything is
computed in the type of base(x), bfloat16 under autocast, where PEFT goes through float32 before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


class ByteMask:
    """What dropout keeps, a byte a value; drawn by torch on the device of x."""

    @staticmethod
    def draw(x: Tensor, p: float) -> tuple[Tensor, float]:
        """(True where x is kept, the probability of the rest)."""
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p), p

    @staticmethod
    def pack(kept: Tensor) -> Tensor:
        """As it is remembered until the backward."""
        return kept

    @staticmethod
    def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
        """What was packed."""
        return packed

    @staticmethod
    def apply(x: Tensor, kept: Tensor) -> Tensor:
        """x with zeros where it is dropped, not scaled."""
        return x * kept


class BitMask:
    """What dropout keeps, a bit a value, on a CPU.

    torch's own random numbers would cost a fifth of a step there, so numpy's generator draws 8 bits a value. A call
    drops with a multiple of 1 / 256, the one below p or the one above, by chance, so that p is met on average. The
    generator is seeded from torch's at each call: `torch.manual_seed` and a saved torch state fix it, and a
    checkpointed layer that is computed again draws the same.
    """

    @staticmethod
    def draw(x: Tensor, p: float) -> tuple[Tensor, float]:
        """(True where x is kept, the probability of the rest)."""
        generator = np.random.SFC64(int(torch.randint(2**62, ())))
        threshold = min(int(p * 256 + generator.random_raw() / 2**64), 255)
        draws = generator.random_raw((x.numel() + 7) // 8).view(np.uint8)[: x.numel()]
        return torch.from_numpy(draws >= threshold).view(x.shape), threshold / 256

    @staticmethod
    def pack(kept: Tensor) -> Tensor:
        """As it is remembered until the backward."""
        return torch.from_numpy(np.packbits(kept.numpy()))

    @staticmethod
    def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
        """What was packed."""
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel()).view(np.bool_)).view(shape)

    @staticmethod
    def apply(x: Tensor, kept: Tensor) -> Tensor:
        """x with zeros where it is dropped, not scaled."""
        # On the bits: torch multiplies integers by a mask at ten times the speed of bfloat16.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        return (x.contiguous().view(bits) * kept).view(x.dtype)


def mask_for(device_kind: str) -> Any:
    """How dropout remembers what it kept, on this kind of device."""
    return BitMask if device_kind == "cpu" else ByteMask


def use_lean_lora(model: PeftModel, mask: Any = None) -> None:
    """Let every plain LoRA layer over a linear layer take its branch from here.

    DoRA, biased and other variants keep PEFT's own forward.

    Args:
        mask: None is `mask_for` the device that the model is on.
    """
    mask = mask or mask_for(model.device.type)
    for module in model.modules():
        over_linear = isinstance(module, LoraLayer) and hasattr(module.get_base_layer(), "in_features")
        if over_linear and not isinstance(module, ParamWrapper):
            setattr(module, "forward", MethodType(partial(_forward, mask), module))  # noqa: B010


def left_to_peft(model: PeftModel) -> int:
    """Layers that keep PEFT's own forward: those with DoRA, embeddings, tokens and modules that are trained whole."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = [layer for layer in layers if "forward" in vars(layer) and not layer.lora_variant]
    whole = sum(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    return len(layers) - len(plain) + whole


def _forward(mask: Any, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the forward of PEFT's `lora.Linear` and its quantized kin."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (layer.disable_adapters or layer.merged or args or kwargs or layer.lora_variant) and len(names) == 1
    if not plain or layer.lora_bias[names[0]]:
        output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    (name,) = names
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    branch = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], mask, p)
    base = layer.base_layer
    apply: Any = _LoraLinear.apply
    # A layer of 4 or 8 bits, or one that trains, multiplies by itself.
    if type(base) is nn.Linear and not any(parameter.requires_grad for parameter in base.parameters()):
        dtype = _autocast_dtype(x) or base.weight.dtype
        whole: Tensor = apply(x.to(dtype), None, base.weight, base.bias, *branch)
        return whole
    # bitsandbytes takes three dimensions in 8 bits; DeepSeek-V3's latent states have four.
    y = base(x) if x.dim() <= 3 else base(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    # A 4-bit layer answers in the type of x. The branch is computed under autocast, and its backward is not.
    dtype = _autocast_dtype(x) or y.dtype
    branched: Tensor = apply(x.to(dtype), y.to(dtype), None, None, *branch)
    return branched


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _LoraLinear(torch.autograd.Function):
    """y + scaling * B A drop(x), where y = x W^T + bias is given or is computed here, from frozen W and bias.

    Computed here, its gradient to x is added to the branch's inside the product, and so is the branch to y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        mask: Any,
        p: float,
    ) -> Tensor:
        """x: (..., in), y: (..., out), weight: (out, in), bias: (out,), a: (r, in), b: (out, r) -> (..., out)."""
        kept, p = mask.draw(x, p) if p > 0 else (None, 0.0)
        dropped = x if kept is None else mask.apply(x, kept)
        ctx.mask, ctx.scaling = mask, scaling / (1 - p)  # what is kept is scaled up here: on r values, not on `in`
        inner = dropped.flatten(0, -2) @ a.to(x.dtype).t()  # (T, r)
        ctx.save_for_backward(x, None if kept is None else mask.pack(kept), inner, weight, a, b)
        to_output = (inner, b.to(x.dtype).t())
        if y is not None:
            return _in_shape(torch.addmm(y.flatten(0, -2), *to_output, alpha=ctx.scaling), y.shape)
        assert weight is not None
        rows = x.flatten(0, -2)
        output = nn.functional.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        output.addmm_(*to_output, alpha=ctx.scaling)
        return _in_shape(output, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, y, a, b; a's and b's in their own type."""
        x, packed, inner, weight, a, b = ctx.saved_tensors
        kept = None if packed is None else ctx.mask.unpack(packed, x.shape)
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)  # (T, out)
        to_inner = (rows @ b.to(rows.dtype)).mul_(ctx.scaling)  # (T, r)
        dropped = x if kept is None else ctx.mask.apply(x, kept)
        to_a = (to_inner.t() @ dropped.flatten(0, -2)).to(a.dtype)
        to_b = (rows.t() @ inner).to(b.dtype).mul_(ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (to_inner @ a.to(rows.dtype)).view(x.shape)
            to_x = to_x if kept is None else ctx.mask.apply(to_x, kept)
            if weight is not None:
                to_x.flatten(0, -2).addmm_(rows, weight.to(rows.dtype))
        return to_x, gradient if ctx.needs_input_grad[1] else None, None, None, to_a, to_b, None, None, None


def _in_shape(output: Tensor, shape: Sequence[int]) -> Tensor:
    """A new tensor's values in another shape, as a tensor of its own: autograd refuses views that a function of its
    own made where a model changes them in place, as Falcon does with its residual and OLMo with its clamp."""
    reshaped: Tensor = torch.ops.aten._unsafe_view(output, shape)
    return reshaped
