"""The checks that run parts of a training step in this process: gradients, a step by variant, the allocator."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from setting import GIB, LORA_RANK, Setting, random_model, set_up_process, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lora_core.config.schema import LoraConfig
from lora_core.data.packing import collate, collate_packed, to_device
from lora_core.model import attention
from lora_core.model.base import add_adapter
from lora_core.model.lora_linear import ByteMask
from lora_core.model.loss import CausalLMLoss

# ---------------------------------------------------------------------------------------------------------------
# Gradients


@dataclass(frozen=True)
class Precision:
    """How one micro-batch is computed, and how far its gradient may be from the CPU's in float32, relative."""

    label: str
    dtype: torch.dtype
    packed: bool
    limit: float


PRECISIONS = (
    Precision("packed, bfloat16", torch.bfloat16, True, 2e-2),
    Precision("padded, bfloat16", torch.bfloat16, False, 2e-2),
    Precision("packed, float32", torch.float32, True, 1e-3),
)


def gradients(setting: Setting) -> None:
    """One micro-batch of a two-layer model: the device's loss and gradient against the CPU's in float32."""
    set_up_process()
    reference = Precision("the CPU in float32", torch.float32, True, 0.0)
    loss, gradient = loss_and_gradient(setting, reference, torch.device("cpu"))
    for precision in PRECISIONS:
        with setting.attempt(precision.label):
            other_loss, other = loss_and_gradient(setting, precision, setting.device)
            off = ((other - gradient).norm() / gradient.norm()).item()
            print(
                f"{precision.label}: loss off by {other_loss / loss - 1:+.1e}, gradient by {off:.1e} "
                f"(limit {precision.limit:.0e})"
            )
            if not off < precision.limit:
                setting.fail(f"{precision.label}: the gradient is off by more than {precision.limit:.0e}")


def loss_and_gradient(setting: Setting, precision: Precision, device: torch.device) -> tuple[float, Tensor]:
    """The summed loss, and the gradient to all of the adapter as one float32 vector on the CPU."""
    model = small_model(setting, precision, device)
    generator = torch.Generator().manual_seed(2)
    vocabulary = setting.shape("0.5b")["vocab_size"]
    rows = [
        {
            "input_ids": torch.randint(1, vocabulary, (length,), generator=generator).tolist(),
            "loss_mask": [False] + [True] * (length - 1),
        }
        for length in (300, 41, 129, 64, 7)
    ]
    batch = collate_packed(rows) if precision.packed else collate(rows, 0)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision.dtype == torch.bfloat16):
        sums = model(**to_device(batch, device))
    sums.loss_sum.backward()
    of_adapter = [
        parameter.grad.flatten().float().cpu() for parameter in model.parameters() if parameter.grad is not None
    ]
    return sums.loss_sum.item(), torch.cat(of_adapter)


def small_model(setting: Setting, precision: Precision, device: torch.device) -> CausalLMLoss:
    """Two layers, made on the CPU so that each device gets the same, with an adapter that already does something."""
    shape = setting.shape("0.5b", num_hidden_layers=2)
    base = random_model(shape, torch.device("cpu"), torch.float32).to(precision.dtype).to(device).requires_grad_(False)
    if precision.packed:
        attention.use_segment_attention(base)
    adapted = add_adapter(base, LoraConfig(dropout=0.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros at the start, through which no gradient would reach lora_A
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return CausalLMLoss(adapted).train()


# ---------------------------------------------------------------------------------------------------------------
# A step, by variant


@dataclass(frozen=True)
class Variant:
    """What differs from the step as it comes."""

    label: str
    dropout: float = 0.05
    loop: bool = False
    """Segments one after the other, in place of one kernel for all."""
    peft_layers: bool = False
    liger: bool = False
    """Liger's kernels for norms, positions and the MLP, which stay in transformers until this process ends."""


AS_IT_COMES = Variant("as it comes")
VARIANTS = (
    AS_IT_COMES,
    Variant("segments in a loop", loop=True),
    Variant("without dropout", dropout=0.0),
    Variant("PEFT's own layers", peft_layers=True),
    Variant("Liger's kernels", liger=True),  # last, as they stay
)
POSITIONS_PER_CHUNK = (55, 512, 2048)
"""Whose logits the head has in memory at a time."""
TOKENS = (2048, 8192)
TOKENS_PER_SEGMENT = 205
LAYERS_OF_7B = 14  # half of them: with all, the largest step would not fit without checkpointing


def step(setting: Setting, model: str) -> None:
    """An optimizer step of one packed micro-batch: time, kernels, and how much of the time the GPU is busy."""
    set_up_process()
    for variant in VARIANTS:
        if variant.liger and (setting.dry_run or find_spec("liger_kernel") is None):
            print(f"{variant.label}: left out; they need a GPU and `pip install liger-kernel`")
            continue
        with setting.attempt(variant.label):
            step_of_variant(setting, model, variant)
        setting.free_memory()
    measure_dropout(setting, model)


def step_of_variant(setting: Setting, model: str, variant: Variant) -> None:
    loss_model = training_model(setting, model, variant)
    in_a_loop = patch.object(attention, "has_varlen_kernel", lambda *_: False)
    with in_a_loop if variant.loop else nullcontext():
        for tokens in (256,) if setting.dry_run else TOKENS:
            measure_step(setting, model, variant.label, loss_model, tokens)
    if variant == AS_IT_COMES:
        for positions in POSITIONS_PER_CHUNK:
            assert hasattr(loss_model, "_logits_per_chunk")  # a new attribute would change nothing
            loss_model._logits_per_chunk = positions * setting.shape(model)["vocab_size"]
            label = f"head in chunks of {positions} positions"
            measure_step(setting, model, label, loss_model, 256 if setting.dry_run else TOKENS[-1])


def training_model(setting: Setting, model: str, variant: Variant = AS_IT_COMES, layers: int | None = None) -> Any:
    """A model of random weights with an adapter, as a run trains it."""
    if variant.liger:
        liger: Any = import_module("liger_kernel.transformers")
        liger.apply_liger_kernel_to_qwen2(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    layers = layers or (LAYERS_OF_7B if model == "7b" else None)
    shape = setting.shape(model, **({} if layers is None else {"num_hidden_layers": layers}))
    base = random_model(shape, setting.device).requires_grad_(False)
    attention.use_segment_attention(base)
    rank = LORA_RANK[model]
    adapted = add_adapter(base, LoraConfig(rank=rank, alpha=2 * rank, dropout=variant.dropout), seed=0)
    if variant.peft_layers:
        for module in adapted.modules():
            vars(module).pop("forward", None)  # what `use_lean_lora` put before the class's own
    return CausalLMLoss(adapted).train()


def random_batch(setting: Setting, model: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    """A packed micro-batch, half of it loss tokens."""
    device, tokens = setting.device, sum(lengths)
    return {
        "input_ids": torch.randint(setting.shape(model)["vocab_size"], (1, tokens), device=device),
        "loss_mask": torch.rand(1, tokens, device=device) < 0.5,
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "segment_lengths": lengths,
    }


def measure_step(setting: Setting, model: str, label: str, loss_model: Any, tokens: int) -> None:
    """Print the median over steps; on a GPU also what the profiler sees of one more, all of it in a JSON file."""
    length = 64 if setting.dry_run else TOKENS_PER_SEGMENT
    lengths = (length,) * (tokens // length)
    batch = random_batch(setting, model, lengths)
    parameters = [parameter for parameter in loss_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def one_step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16):
            sums = loss_model(**batch)
        sums.loss_sum.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    setting.free_memory()
    warm_up, measured = (1, 1) if setting.dry_run else (3, 8)
    times = [setting.milliseconds(one_step) for _ in range(warm_up + measured)][warm_up:]
    median = statistics.median(times)
    line = f"{label}, {sum(lengths)} tokens: {spread(times)} ms a step, {sum(lengths) / median * 1e3:,.0f} tokens/s"
    if setting.device.type == "cuda":
        line += f", peak memory {torch.cuda.max_memory_allocated() / GIB:.1f} GiB"
        line += profile_step(setting, f"{model} {label} {sum(lengths)}", one_step, median)
    print(line)


def profile_step(setting: Setting, label: str, one_step: Callable[[], None], usual_ms: float) -> str:
    """Profiled, a step takes longer, so that the share of busy time is of a step that was not."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        one_step()
        setting.synchronize()
    kernels = [event for event in profiled.events() or [] if event.device_type.name == "CUDA"]
    by_name: Counter[str] = Counter()
    for kernel in kernels:
        by_name[kernel.name] += kernel.time_range.elapsed_us() / 1e3
    busy = sum(by_name.values())
    path = setting.output / f"kernels-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}.json"
    path.write_text(json.dumps(dict(by_name.most_common(60)), indent=2) + "\n", encoding="utf-8")
    return f"; {len(kernels)} kernels, GPU busy {busy:.1f} ms ({busy / usual_ms:.0%})"


def measure_dropout(setting: Setting, model: str) -> None:
    """What a mask over the input of one projection costs."""
    x = torch.randn(TOKENS[-1], setting.shape(model)["hidden_size"], device=setting.device, dtype=torch.bfloat16)
    kept, _ = ByteMask.draw(x, 0.05)
    ways: dict[str, Callable[[], Any]] = {
        "drawn": lambda: ByteMask.draw(x, 0.05),
        "applied": lambda: ByteMask.apply(x, kept),
        "torch's native_dropout": lambda: torch.native_dropout(x, 0.05, True),
    }
    times = {name: [setting.milliseconds(way) for _ in range(22)][2:] for name, way in ways.items()}
    print(f"dropout of {tuple(x.shape)}, ms: " + ", ".join(f"{name} {spread(each)}" for name, each in times.items()))


# ---------------------------------------------------------------------------------------------------------------
# Allocator


def allocator(setting: Setting) -> None:
    """Micro-batches of many lengths: how much more the allocator reserves than it ever gave out."""
    set_up_process()
    loss_model = training_model(setting, "7b", layers=8)
    rng = random.Random(0)
    for _ in range(2 if setting.dry_run else 40):
        tokens = rng.randrange(100, 200) if setting.dry_run else rng.randrange(1500, 8192)
        with torch.autocast(setting.device.type, torch.bfloat16):
            sums = loss_model(**random_batch(setting, "7b", (tokens // 2, tokens - tokens // 2)))
        sums.loss_sum.backward()
        loss_model.zero_grad()
    print(f"PYTORCH_CUDA_ALLOC_CONF={os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}: {setting.memory()}")
