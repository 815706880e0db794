"""The loop's own step on tensors without storage: bytes by component at the peak."""

from __future__ import annotations

from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_core.config.schema import RunConfig
from lora_core.memory.live_bytes import LiveBytes
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.without_storage import (
    frozen_tensors,
    give_fake_weights,
    model_without_storage,
    num_hidden_layers,
    num_parameters,
)
from lora_core.model.attention import causal_lm_of
from lora_core.model.base import load_model_config
from lora_core.model.decoder import decoder_layers
from lora_core.model.lora_settings import differs_by_layer
from lora_core.model.loss import CausalLMLoss
from lora_core.model.optimizer import build_optimizer

_LAYERS_RUN = (1, 2)
_LAYERS_RUN_IF_KINDS_DIFFER = (2, 4)  # an even number between them: some families alternate two kinds of layer


class FrozenBytes(NamedTuple):
    """Frozen weights, in bytes."""

    layer: int
    """Of one decoder layer."""
    root: int
    """Of what is in no layer: embedding, head, last norm."""


class Simulated(NamedTuple):
    """What running the step told."""

    peaks: list[dict[str, int]]
    """Bytes by component at the peaks of a micro-batch, an optimizer step and an evaluation batch."""
    frozen: FrozenBytes
    idle: tuple[str, ...]
    """Dotted names of the modules whose adapter got no gradient from the micro-batch."""


def live_at_peak(
    config: RunConfig, micro_batch: MicroBatch, eval_micro_batch: MicroBatch | None, device_kind: str
) -> tuple[dict[str, int], FrozenBytes, tuple[str, ...]]:
    """(bytes by component at the peak, frozen weights of the parts that FSDP gathers, `Simulated.idle`)."""

    def simulate(num_layers: int) -> Simulated:
        model = model_without_storage(config, device_kind, micro_batch.packed, num_layers)
        return _simulate(model, config, micro_batch, eval_micro_batch, device_kind)

    text_config = load_model_config(config.model).get_text_config()
    one_kind = len(set(getattr(text_config, "layer_types", None) or [""])) == 1
    few, more = _LAYERS_RUN if one_kind else _LAYERS_RUN_IF_KINDS_DIFFER
    num_layers = num_hidden_layers(config)
    if num_layers > more and not differs_by_layer(config.lora):
        first, middle, whole = (num_parameters(config, n) for n in (few, more, num_layers))
        layers_are_equal = (whole - first) * (more - few) == (middle - first) * (num_layers - few)
    if num_layers <= more or differs_by_layer(config.lora) or not layers_are_equal:
        peaks, frozen, idle = simulate(num_layers)
    else:
        (peaks_at_few, frozen, _), (peaks_at_more, _, idle) = simulate(few), simulate(more)
        layers_more = (num_layers - few) / (more - few)
        peaks = [
            {name: round(at_few.get(name, 0) + (at_more[name] - at_few.get(name, 0)) * layers_more) for name in at_more}
            for at_few, at_more in zip(peaks_at_few, peaks_at_more, strict=True)
        ]
    return max(peaks, key=lambda at_peak: sum(at_peak.values())), frozen, idle


def _simulate(
    model: nn.Module,
    config: RunConfig,
    micro_batch: MicroBatch,
    eval_micro_batch: MicroBatch | None,
    device_kind: str,
) -> Simulated:
    bnb.functional.quantize_blockwise(torch.zeros(256))  # its tables are made at first use, and must be real ones
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        give_fake_weights(model)
    optimizer = build_optimizer(model, config.train, torch.device("cpu"), config.lora.loraplus_lr_ratio)
    live = LiveBytes(causal_lm_of(model).config.get_text_config().vocab_size)
    with mode:
        for tensor in frozen_tensors(model):
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
        idle = _without_gradient(model)
        loss = CausalLMLoss(model, device_kind, config.train).train()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16 is not False)
        with live:
            live.num_loss_tokens = micro_batch.num_loss_tokens
            with autocast:
                result = loss(**_fake_batch(micro_batch, device_kind))
            result.loss_sum.backward()
            del result
            peaks = [live.take_peak()]
            optimizer.step()
            peaks.append(live.take_peak())
            if eval_micro_batch is not None:
                loss.eval()
                live.num_loss_tokens = eval_micro_batch.num_loss_tokens
                with torch.no_grad(), autocast:
                    loss(**_fake_batch(eval_micro_batch, device_kind))
                peaks.append(live.take_peak())
    layers = decoder_layers(model)
    layer_bytes = [sum(tensor.untyped_storage().nbytes() for tensor in frozen_tensors(layer)) for layer in layers]
    all_bytes = sum(tensor.untyped_storage().nbytes() for tensor in frozen_tensors(model))
    frozen = FrozenBytes(layer=layer_bytes[0], root=all_bytes - sum(layer_bytes))
    return Simulated(peaks, frozen, tuple(idle))


def _without_gradient(model: nn.Module) -> dict[str, None]:
    """Names of the modules with an adapter; each is taken away when a backward reaches its B."""
    idle: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_B." in name:
            module = name.partition(".lora_B.")[0].removeprefix("base_model.model.")
            idle[module] = None
            parameter.register_post_accumulate_grad_hook(lambda _, module=module: idle.pop(module, None))
    return idle


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
