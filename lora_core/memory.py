"""Predicted peak memory of a run on one device, by component, before any weight is loaded.

Nothing is estimated from parameter counts: the loop's own forward, backward, optimizer step and evaluation run on
tensors without storage (torch's FakeTensorMode), for the largest micro-batch of the run, and what is alive is counted.
A decoder of equal layers is run with 1 and with 2 of them, which is enough to know all: every component grows by the
same bytes a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import bitsandbytes as bnb
import numpy as np
import numpy.typing as npt
import peft  # noqa: F401  # loaded here so that what it takes is in the process before that is measured
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_core.attention import causal_lm_of, segment_attention, takes_short_segments
from lora_core.config import RunConfig
from lora_core.data import EncodedFile
from lora_core.devices import DeviceMemory
from lora_core.lora_linear import ByteMask, use_lean_lora
from lora_core.loss import CausalLMLoss
from lora_core.model import (
    add_adapter,
    keep_4bit_weights_trainable,
    load_model_config,
    quantization_config,
    resolve_name,
)
from lora_core.optimizer import build_optimizer
from lora_core.packing import Batching, eval_batching, step_rows, train_batching
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from peft import PeftModel

Sharding = Literal["ddp", "fsdp"]

# What the C library's heap holds beyond what is alive, once freed blocks are kept for the next tensor
# (`devices.reuse_freed_memory`): holes between live tensors, in part of the live bytes. Over the demo's 50 steps it was
# 0.4, with checkpointing 0.6, with NF4 0.8.
_HEAP_HOLES = 0.5
# The CUDA context and the workspaces of its libraries, which no allocator counts. An assumption: 0.5 to 0.8 GiB is
# what NVIDIA's tools show for an idle PyTorch process.
_CUDA_CONTEXT_BYTES = 768 * 2**20
# Every step of an epoch is looked at for its largest micro-batch, up to so many.
_STEPS_LOOKED_AT = 20_000


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one micro-batch."""

    lengths: tuple[int, ...]
    """Tokens of each conversation in it."""
    num_supervised: int
    packed: bool

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes on one device at the moment when most is held."""

    device: str
    """cpu or cuda."""
    num_processes: int
    sharding: Sharding
    micro_batch: MicroBatch
    components: dict[str, int]
    """weights, adapter, gradients, optimizer, activations, logits, allocator, process: bytes."""
    limit_bytes: int
    """What the device has for this process."""

    @property
    def adapter_file_bytes(self) -> int:
        """The adapter on disk, in float32 as it is trained."""
        return self.components["adapter"] * (self.num_processes if self.sharding == "fsdp" else 1)

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "num_processes": self.num_processes,
            "sharding": self.sharding,
            "micro_batch_rows": len(self.micro_batch.lengths),
            "micro_batch_tokens": self.micro_batch.num_tokens,
            "components": self.components,
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit_bytes,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.components.items() if size)
        return (
            f"{self.total_bytes / 2**30:.1f} GiB at the peak of {self.limit_bytes / 2**30:.1f} GiB ({self.device}, "
            f"micro-batch of {len(self.micro_batch.lengths)} conversations, {self.micro_batch.num_tokens:,} tokens): "
            f"{parts}"
        )


def predict_memory(
    config: RunConfig,
    micro_batch: MicroBatch,
    device: DeviceMemory,
    num_processes: int = 1,
    sharding: Sharding = "ddp",
    eval_micro_batch: MicroBatch | None = None,
) -> MemoryPlan:
    """Predict the peak of one process of the run. Needs the model's config, not its weights.

    Args:
        micro_batch: the largest one of training, and `eval_micro_batch` of evaluation.
        num_processes: of the run; each has its own device, or its share of a CPU machine (`device.limit_bytes`).

    FSDP is worked out from the same counts: weights, adapter, gradients and optimizer state are shared out, two decoder
    layers are whole at a time (one at work, the next on its way). It has not been measured.

    Raises:
        ConfigError: the model's config cannot be read, or a target module matches nothing.
    """
    live, layer_bytes = _live_at_peak(config, micro_batch, eval_micro_batch, device.kind)
    components = {name: live.get(name, 0) for name in ("weights", "adapter", "gradients", "optimizer")}
    if num_processes > 1 and sharding == "fsdp":
        components = {name: -(-size // num_processes) for name, size in components.items()}
        components["weights"] += 2 * layer_bytes
    elif num_processes > 1:
        components["gradients"] *= 2  # DDP keeps a copy in the buckets that it sends
    components |= {name: live.get(name, 0) for name in ("activations", "logits")}
    components["allocator"] = round(_HEAP_HOLES * sum(components.values())) if device.keeps_freed_memory else 0
    components["process"] = device.process_bytes if device.kind == "cpu" else _CUDA_CONTEXT_BYTES
    return MemoryPlan(device.kind, num_processes, sharding, micro_batch, components, device.limit_bytes)


def plan_memory(
    config: RunConfig,
    train_data: EncodedFile,
    eval_data: EncodedFile | None,
    plan: SchedulePlan,
    device: DeviceMemory,
    sharding: Sharding = "ddp",
) -> MemoryPlan:
    """Predict the peak of a run on its own rows.

    Raises:
        ConfigError: as `predict_memory`.
    """
    training = largest_micro_batch(config, train_data, plan)
    evaluation = None
    if eval_data is not None:
        rows = np.arange(len(eval_data.lengths))
        evaluation = _largest(eval_batching(config, 0), rows, eval_data, config.data.max_seq_length, plan.num_processes)
    return predict_memory(config, training, device, plan.num_processes, sharding, evaluation)


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config tells without its weights."""

    module_names: tuple[str, ...]
    """Dotted names of all modules of the first decoder layers."""
    linear_names: tuple[str, ...]
    """Last parts of the names of the linear layers, such as q_proj."""
    head_name: str | None
    embedding_name: str | None
    eos_token_ids: frozenset[int]
    """At which generation stops."""


def model_facts(config: RunConfig) -> ModelFacts:
    """Look at the model's modules.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    from transformers import GenerationConfig

    base = _base_without_storage(config, min(2, num_hidden_layers(config)))
    named = dict(base.named_modules())
    name_of = {id(module): name.rsplit(".", 1)[-1] for name, module in named.items()}
    load: Any = GenerationConfig.from_pretrained
    revision = {} if config.model.revision is None else {"revision": config.model.revision}
    try:
        stops = load(resolve_name(config.model), **revision).eos_token_id
    except OSError:  # a model need not have one; its config then says where to stop
        stops = base.config.get_text_config().eos_token_id
    return ModelFacts(
        module_names=tuple(named),
        linear_names=tuple(dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in named.items() if isinstance(m, nn.Linear))),
        head_name=name_of.get(id(base.get_output_embeddings())),
        embedding_name=name_of.get(id(base.get_input_embeddings())),
        eos_token_ids=frozenset([stops] if isinstance(stops, int) else stops or ()),
    )


def largest_micro_batch(config: RunConfig, data: EncodedFile, plan: SchedulePlan) -> MicroBatch:
    """The micro-batch of the run with the most computed tokens, in the run's own order of rows."""
    steps = min(plan.total_optimizer_steps, max(plan.optimizer_steps_per_epoch, 50), _STEPS_LOOKED_AT)
    batching, limit = train_batching(config, 0), config.data.max_seq_length
    candidates = (
        _largest(
            batching,
            step_rows(plan.num_rows, plan.rows_per_optimizer_step, config.train.seed, step),
            data,
            limit,
            plan.num_processes,
        )
        for step in range(steps)
    )
    return max(candidates, key=lambda micro_batch: micro_batch.num_tokens)


def _largest(
    batching: Batching, rows: npt.NDArray[np.int64], data: EncodedFile, max_seq_length: int, num_processes: int
) -> MicroBatch:
    lengths = np.minimum(data.lengths, max_seq_length)  # a shorter limit may be asked about than rows were cut at
    supervised_share = data.counts.supervised_tokens / data.counts.tokens
    cuts = [c for rank in range(num_processes) for c in batching.cut(rows, lengths, num_processes, rank)]
    made = (
        MicroBatch(
            tuple(lengths[cut.rows].tolist()),
            max(1, round(supervised_share * int(lengths[cut.rows].sum()))),
            packed=batching.max_tokens is not None,
        )
        for cut in cuts
    )
    return max(made, key=lambda micro_batch: micro_batch.num_tokens)


# ---------------------------------------------------------------------------------------------------------------
# The step, on tensors without storage


_LAYERS_RUN = (1, 2)
_LAYERS_RUN_IF_KINDS_DIFFER = (2, 4)  # an even number between them: some families alternate two kinds of layer


def _live_at_peak(
    config: RunConfig, micro_batch: MicroBatch, eval_micro_batch: MicroBatch | None, device_kind: str
) -> tuple[dict[str, int], int]:
    """(bytes by component at the peak, bytes of one decoder layer's weights)."""

    def simulate(num_layers: int) -> tuple[list[dict[str, int]], int]:
        model = _model_without_storage(config, device_kind, micro_batch.packed, num_layers)
        return _simulate(model, config, micro_batch, eval_micro_batch, device_kind)

    text_config = load_model_config(config.model).get_text_config()
    one_kind = len(set(getattr(text_config, "layer_types", None) or [""])) == 1
    few, more = _LAYERS_RUN if one_kind else _LAYERS_RUN_IF_KINDS_DIFFER
    num_layers = num_hidden_layers(config)
    if num_layers > more:
        first, middle, whole = (_num_parameters(config, n) for n in (few, more, num_layers))
        layers_are_equal = (whole - first) * (more - few) == (middle - first) * (num_layers - few)
    if num_layers <= more or not layers_are_equal:
        peaks, layer_bytes = simulate(num_layers)
    else:
        (peaks_at_few, layer_bytes), (peaks_at_more, _) = simulate(few), simulate(more)
        layers_more = (num_layers - few) / (more - few)
        peaks = [
            {name: round(at_few.get(name, 0) + (at_more[name] - at_few.get(name, 0)) * layers_more) for name in at_more}
            for at_few, at_more in zip(peaks_at_few, peaks_at_more, strict=True)
        ]
    return max(peaks, key=lambda at_peak: sum(at_peak.values())), layer_bytes


def _simulate(
    model: nn.Module,
    config: RunConfig,
    micro_batch: MicroBatch,
    eval_micro_batch: MicroBatch | None,
    device_kind: str,
) -> tuple[list[dict[str, int]], int]:
    """(bytes by component at the peaks of a micro-batch, an optimizer step and an evaluation batch; of one layer)."""
    bnb.functional.quantize_blockwise(torch.zeros(256))  # its tables are made at first use, and must be real ones
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _give_fake_weights(model)
    optimizer = build_optimizer(model, config.train, torch.device("cpu"), lambda _: None)
    live = _LiveBytes(causal_lm_of(model).config.get_text_config().vocab_size)
    with mode:
        for tensor in _frozen_tensors(model):
            live.count(tensor, "weights")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                live.count(parameter, "adapter")
                live.count(parameter.grad, "gradients")
        optimizer.step()  # makes its state
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    live.count(value, "optimizer")
        loss = CausalLMLoss(model).train()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16)
        with live:
            live.num_supervised = micro_batch.num_supervised
            with autocast:
                result = loss(**_fake_batch(micro_batch, device_kind))
            result.loss_sum.backward()
            del result
            peaks = [live.take_peak()]
            optimizer.step()
            peaks.append(live.take_peak())
            if eval_micro_batch is not None:
                loss.eval()
                live.num_supervised = eval_micro_batch.num_supervised
                with torch.no_grad(), autocast:
                    loss(**_fake_batch(eval_micro_batch, device_kind))
                peaks.append(live.take_peak())
    layer = causal_lm_of(model).get_decoder().layers[0]
    return peaks, sum(tensor.untyped_storage().nbytes() for tensor in _frozen_tensors(layer))


def num_hidden_layers(config: RunConfig) -> int:
    """Decoder layers of the base model."""
    return int(load_model_config(config.model).get_text_config().num_hidden_layers)


def _base_without_storage(config: RunConfig, num_layers: int) -> Any:
    """The base model on the meta device, with so many of its decoder layers."""
    from transformers import AutoModelForCausalLM

    model_config = load_model_config(config.model)
    text_config = model_config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:num_layers]
    dtype = model_config.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")


def _num_parameters(config: RunConfig, num_layers: int) -> int:
    return sum(parameter.numel() for parameter in _base_without_storage(config, num_layers).parameters())


def _model_without_storage(config: RunConfig, device_kind: str, packed: bool, num_layers: int) -> PeftModel:
    from transformers import AttentionInterface
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    base = _base_without_storage(config, num_layers)
    quantization = quantization_config(config.model)
    with torch.device("meta"):
        if quantization is not None:
            # Columns with outliers are found by value, and there are none here; they are few.
            quantization.llm_int8_threshold = 0.0
            base = replace_with_bnb_linear(base, get_keys_to_not_convert(base), quantization)
            keep_4bit_weights_trainable(base)
        base.requires_grad_(False)
        if packed:
            AttentionInterface.register(_SIMULATED, _segments if device_kind == "cpu" else _fused_attention)
            base.set_attn_implementation(_SIMULATED)
        model: PeftModel = add_adapter(base, config.lora, config.train.seed, config.train.gradient_checkpointing)
    use_lean_lora(model, ByteMask if device_kind == "cuda" else _BitMaskWithoutStorage)
    return model


_SIMULATED = "lora_core_simulated"


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A flash kernel over one row: what it keeps does not depend on segments, and there is no mask.

    transformers' own "sdpa" builds a whole mask for tensors without storage, which it does not for real ones.
    """
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2).contiguous(), None


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


def _give_fake_weights(model: nn.Module) -> None:
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


def _frozen_tensors(model: nn.Module) -> Iterator[Tensor]:
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


def _fake_batch(micro_batch: MicroBatch, device_kind: str) -> dict[str, Any]:
    """As `packing` makes it. What a CUDA kernel keeps does not depend on segments, so there one row is one segment."""
    rows, longest = (
        (1, micro_batch.num_tokens) if micro_batch.packed else (len(micro_batch.lengths), max(micro_batch.lengths))
    )
    shape = (rows, longest)
    batch: dict[str, Any] = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "loss_mask": torch.zeros(shape, dtype=torch.bool),
    }
    if not micro_batch.packed:
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    elif device_kind == "cpu":
        batch |= {"position_ids": torch.zeros(shape, dtype=torch.long), "segment_lengths": micro_batch.lengths}
    return batch


class _LiveBytes(TorchDispatchMode):
    """Counts the storage that is alive while operations run, by component, and keeps the moment of the peak."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_supervised = 0
        self._at_peak: dict[str, int] = {}
        self._vocab_size = vocab_size
        self._now: dict[str, int] = {}
        self._total = self._peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def count(self, tensor: Tensor, component: str) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._now[component] = self._now.get(component, 0) + size
        self._total += size

        def freed(_: Any) -> None:
            del self._alive[key]
            self._now[component] -= size
            self._total -= size

        self._alive[key] = weakref.ref(storage, freed)
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, dict(self._now)

    def take_peak(self) -> dict[str, int]:
        """Bytes by component at the peak since the last call."""
        at_peak = self._at_peak
        self._peak, self._at_peak = self._total, dict(self._now)
        return at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            # The one operation whose size depends on values: how many tokens are supervised.
            result = torch.empty((self.num_supervised, args[0].dim()), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
                self.count(tensor, "logits" if is_logits else "activations")
        return result
