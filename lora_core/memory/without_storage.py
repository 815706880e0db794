"""The model of a run with shapes and no storage: what the memory prediction runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lora_core.config.schema import ModelConfig, RunConfig
from lora_core.errors import ConfigError
from lora_core.model.attention import segment_attention, takes_short_segments, use_attention
from lora_core.model.base import (
    add_adapter,
    base_on_meta,
    keep_4bit_weights_trainable,
    load_model_config,
    quantization_config,
)
from lora_core.model.decoder import attention_for, decoder_layers
from lora_core.model.lora_linear import ByteMask, use_lean_lora

if TYPE_CHECKING:
    from peft import PeftModel


def num_hidden_layers(config: RunConfig) -> int:
    """Decoder layers of the base model.

    Raises:
        ConfigError: its config does not say; it is of another kind of model.
    """
    text_config = load_model_config(config.model).get_text_config()
    number = getattr(text_config, "num_hidden_layers", None)
    if number is None:
        raise ConfigError(
            f"model.name_or_path={config.model.name_or_path}: the config of a {text_config.model_type} model names no "
            "decoder layers (num_hidden_layers); fix: a causal language model",
            "model_unreadable",
        )
    return int(number)


def base_without_storage(config: RunConfig, num_layers: int) -> Any:
    """The base model on the meta device, with so many of its decoder layers; with all where the family's config cannot
    be cut.

    Raises:
        ConfigError: transformers has no causal language model of this family, or it cannot be built.
    """
    whole = load_model_config(config.model)
    try:
        base = _on_meta(config, with_layers(whole, num_layers))
    except ConfigError:  # its config does not add up with fewer layers
        return _on_meta(config, whole)
    return base if len(decoder_layers(base)) == num_layers else _on_meta(config, whole)


def _on_meta(config: RunConfig, model_config: Any) -> Any:
    attention = attention_for(model_config, "sdpa" if config.model.attn_implementation != "eager" else "eager")
    return base_on_meta(config.model, model_config, attention)


def with_layers(model_config: Any, num_layers: int) -> Any:
    """A copy of a model's config with its first so many decoder layers: a list with an entry a layer is shortened."""
    cut = copy.deepcopy(model_config)
    text_config = cut.get_text_config()
    whole = text_config.num_hidden_layers
    values = text_config.to_dict()
    try:
        text_config.num_hidden_layers = num_layers
    except NotImplementedError:  # a family that counts layers by another name
        return cut
    for name, value in values.items():
        if isinstance(value, list) and len(value) == whole > num_layers:
            try:
                setattr(text_config, name, value[:num_layers])
            except AttributeError:  # worked out from others, which are shortened
                continue
    return cut


def num_parameters(config: RunConfig, num_layers: int) -> int:
    return sum(parameter.numel() for parameter in base_without_storage(config, num_layers).parameters())


def quantized_without_storage(base: Any, config: ModelConfig) -> Any:
    """The base model, with bitsandbytes' layers in place of linear ones if `config.quantization` says so."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    quantization = quantization_config(config)
    if quantization is None:
        return base
    # Columns with outliers are found by value, and there are none here; they are few.
    quantization.llm_int8_threshold = 0.0
    with torch.device("meta"):
        base = replace_with_bnb_linear(base, get_keys_to_not_convert(base), quantization)
        keep_4bit_weights_trainable(base)
    return base


def model_without_storage(config: RunConfig, device_kind: str, packed: bool, num_layers: int) -> PeftModel:
    from transformers import AttentionInterface

    base = quantized_without_storage(base_without_storage(config, num_layers), config.model)
    with torch.device("meta"):
        base.requires_grad_(False)
        if packed:
            AttentionInterface.register(_SIMULATED, _segments if device_kind == "cpu" else _fused_attention)
            use_attention(base, _SIMULATED)
        # Whatever A and B begin with: there are no weights here to take it from.
        lora = config.lora.model_copy(update={"init_lora_weights": True})
        model: PeftModel = add_adapter(base, lora, config.train.seed, config.train.gradient_checkpointing)
    use_lean_lora(model, _BitMaskWithoutStorage if device_kind == "cpu" else ByteMask)
    return model


_SIMULATED = "lora_core_simulated"


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention over segments, as on a GPU.

    transformers' own "sdpa" builds a whole mask for tensors without storage, which it does not for real ones.
    """
    apply: Any = _FlashWithoutStorage.apply
    return apply(query, key, value, len(kwargs.get("segment_lengths") or (1,))), None


# Of an H100, and no GPU that is meant here has many more.
_MULTIPROCESSORS = 132


class _FlashWithoutStorage(torch.autograd.Function):
    """What FlashAttention 2 keeps, and what its backward takes while it runs.

    To give the same bits each time, the backward sums gradients to queries in one float32 copy for each share of the
    work, as many as fill the GPU (`mha_varlen_bwd` in flash-attention).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_segments: int) -> Tensor:
        """(1, heads, T, D), (1, key heads, T, D) twice -> (1, T, heads, D)."""
        _, heads, length, width = query.shape
        output = query.new_empty(1, length, heads, width)
        ctx.save_for_backward(query, key, value, output, query.new_empty(heads, length, dtype=torch.float32))
        ctx.num_copies = max(1, math.ceil(_MULTIPROCESSORS / (num_segments * heads)))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to query, key and value."""
        query, key, value, output, _ = ctx.saved_tensors
        to_inputs = tuple(map(torch.empty_like, (query, key, value)))
        query.new_empty(ctx.num_copies, *output.shape, dtype=torch.float32)
        if query.shape[1] != key.shape[1]:  # to keys and values, by query head
            query.new_empty(2, *output.shape)
        return *to_inputs, None


def _segments(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`segment_attention` on a CPU, its many short segments at once."""
    lengths = kwargs["segment_lengths"]
    if not takes_short_segments(query, key, lengths, kwargs.get("dropout", 0.0), kwargs.get("softcap")):
        return segment_attention(module, query, key, value, *args, **kwargs)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    apply: Any = _ShortSegmentsWithoutStorage.apply
    return apply(*(tensor.to(dtype) for tensor in (query, key, value)), lengths), None


class _ShortSegmentsWithoutStorage(torch.autograd.Function):
    """What `attention`'s short segments hold, in three operations in place of a dozen a segment."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(1, heads, T, D), (1, key heads, T, D) twice -> (1, T, heads, D)."""
        heads = query.shape[1]
        weights = query.new_empty(heads, sum(length**2 for length in lengths))
        query.new_empty(heads, max(lengths) ** 2)  # scores of one segment
        ctx.save_for_backward(query, key, value, weights)
        ctx.longest = max(lengths)
        return query.new_empty(1, query.shape[2], heads, value.shape[3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to query, key and value."""
        query, key, value, _ = ctx.saved_tensors
        to_inputs = tuple(map(torch.empty_like, (query, key, value)))
        query.new_empty(2, query.shape[1], ctx.longest**2)  # to weights and to scores of one segment
        return *to_inputs, None


class _BitMaskWithoutStorage:
    """`BitMask`, which goes through numpy, for tensors that numpy cannot see."""

    draw, apply = ByteMask.draw, ByteMask.apply

    @staticmethod
    def pack(kept: Tensor) -> Tensor:
        return torch.empty((kept.numel() + 7) // 8, dtype=torch.uint8)

    @staticmethod
    def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=torch.bool)


def give_fake_weights(model: nn.Module) -> None:
    """Meta tensors -> fake CPU tensors, which autocast knows; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake_like(tensor)
                    store[name] = made[id(tensor)]


def _fake_like(tensor: Tensor) -> Any:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, bnb.nn.Params4bit):
        packed, state = bnb.functional.quantize_4bit(
            fake, compress_statistics=tensor.compress_statistics, quant_type=tensor.quant_type
        )
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.quant_state = state
        return weight
    if isinstance(tensor, bnb.nn.Int8Params):
        weight = nn.Parameter(torch.empty(tensor.shape, dtype=torch.int8), requires_grad=False)
        weight.CB, weight.SCB = weight.data, torch.empty(tensor.shape[0], dtype=torch.float32)
        return weight
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every frozen tensor, with the statistics of quantized ones."""
    yield from model.buffers()
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)
        row_scales = getattr(parameter, "SCB", None)
        if row_scales is not None:
            yield row_scales
