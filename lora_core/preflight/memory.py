"""Checks of memory, and the changes that make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_core.config.schema import RunConfig, uses_bitsandbytes
from lora_core.configuration import with_overrides
from lora_core.preflight.findings import Facts, Finding, gib

if TYPE_CHECKING:
    from lora_core.memory.plan import MemoryPlan


def check_memory(facts: Facts) -> Iterator[Finding]:
    """The predicted peak memory is more than the device has.

    The run would stop in its first step, or, on a CPU, be killed without a message.

    The fix is the cheapest change that fits: checkpointing (more time, same result), smaller micro-batches (same
    result), NF4, then shorter rows. Where a family's code cannot run without values, a note says that no prediction was
    made. With `train.auto_batch_size` the run takes smaller micro-batches by itself, if
    they fit, and a note says of what size.
    """
    memory = facts.memory
    if facts.memory_problem is not None:
        yield Finding(
            "memory_unknown",
            "note",
            f"{facts.memory_problem}; the run may not fit",
            facts.memory_problem,
            None,
            None,
        )
    if memory is None or memory.fits:
        return
    limit = micro_batch_limit_that_fits(facts)
    if limit is not None:
        yield Finding(
            "micro_batches_smaller",
            "note",
            f"train.auto_batch_size: predicted peak memory is {gib(memory.total_bytes)} and the device has "
            f"{gib(memory.limit_bytes)}, so a micro-batch has at most {limit} "
            f"{'tokens' if facts.config.data.packing else 'rows'}; same steps, same gradient",
            memory.total_bytes,
            memory.limit_bytes,
            None,
        )
        return
    fix, fixed = cheapest_change(facts)
    largest = sorted(memory.components.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    yield Finding(
        "memory_too_small",
        "error",
        f"predicted peak memory is {gib(memory.total_bytes)} and the device has {gib(memory.limit_bytes)} "
        f"({parts})"
        + (
            f"; with the fix {gib(fixed.total_bytes)}"
            if fixed
            else "; not even checkpointing, small micro-batches, NF4 and half the length fit: use a smaller model"
        ),
        memory.total_bytes,
        memory.limit_bytes,
        fix,
    )


def check_checkpointing(facts: Facts) -> Iterator[Finding]:
    """`train.gradient_checkpointing` is on, and transformers has none for this model.

    transformers refuses it when the model is loaded.

    Leave it off; smaller micro-batches take less memory too, with the same gradient.
    """
    if facts.config.train.gradient_checkpointing and not facts.model.has_checkpointing:
        yield Finding(
            "checkpointing_missing",
            "error",
            f"train.gradient_checkpointing=true: transformers has none for a {facts.model.model_type} model",
            True,
            False,
            "train.gradient_checkpointing=false",
        )


def check_sharding(facts: Facts) -> Iterator[Finding]:
    """Another way to use several GPUs suits this run better: DDP, a whole copy of the model on each, or FSDP, a share.

    Where a copy fits, DDP takes less time: it sends the adapter's gradients once a step, a hundredth of the model, and
    FSDP the frozen weights of every layer twice a micro-batch. Where none fits, FSDP may.

    `accelerate launch` with `configs/accelerate/ddp.yaml`, or with `fsdp2.yaml` (`fsdp2_qlora.yaml` in 4 bits).
    """
    memory, sharding = facts.memory, facts.environment.sharding
    if memory is None or facts.environment.num_processes == 1 or (sharding == "ddp" and memory.fits):
        return
    changes = fsdp_changes(facts.config) if sharding == "ddp" else []
    if changes is None:
        return
    other = facts.predict_memory(with_overrides(facts.config, changes), "ddp" if sharding == "fsdp" else "fsdp")
    if not other.fits:
        return
    predicted = f"{gib(other.total_bytes)} of {gib(other.limit_bytes)} predicted"
    if sharding == "fsdp":
        yield Finding(
            "ddp_fits",
            "note",
            f"the whole model fits on each device ({predicted}), and DDP sends a hundredth of what FSDP sends: "
            "configs/accelerate/ddp.yaml takes less time",
            "fsdp",
            "ddp",
            None,
        )
    else:
        with_what = f" with {' '.join(changes)}" if changes else ""
        yield Finding(
            "fsdp_fits",
            "note",
            f"a copy of the model on each device does not fit, and a share of it does ({predicted}): "
            f"configs/accelerate/{fsdp_file(facts.config)}{with_what}",
            "ddp",
            "fsdp",
            None,
        )


def fsdp_changes(config: RunConfig) -> list[str] | None:
    """The overrides that FSDP needs (`optimizer_cannot_run`, `fsdp_quant_storage`); None where it cannot run at all."""
    if config.train.fp16 or config.lora.changes_base_weights:
        return None
    changes = []
    computes_in = config.model.dtype if config.train.bf16 is False else "bfloat16"
    if config.model.quantization == "int8":
        changes.append("model.quantization=nf4")
    if config.model.quantization != "none" and config.model.quant_storage != computes_in:
        changes.append(f"model.quant_storage={computes_in}")
    if uses_bitsandbytes(config.train.optim):
        changes.append("train.optim=adamw_torch")
    return changes


def fsdp_file(config: RunConfig) -> str:
    """The name in `configs/accelerate/`."""
    return "fsdp2.yaml" if config.model.quantization == "none" else "fsdp2_qlora.yaml"


def micro_batch_limit_that_fits(facts: Facts) -> int | None:
    """The limit (tokens where packed, rows where padded) that `train.auto_batch_size` takes so that the run fits.

    None where the run fits as it is, or no limit makes it fit, or `train.auto_batch_size` is off.
    """
    config, memory = facts.config, facts.memory
    if not config.train.auto_batch_size or memory is None or memory.fits:
        return None
    packed, rows = config.data.packing, config.train.per_device_train_batch_size
    limit = memory.micro_batch.num_tokens if packed else rows
    smallest = int(facts.train_data.lengths.max()) if packed else 1  # smaller ones would still have one row
    while limit > smallest:
        limit = max(limit // 2, smallest)
        overrides = (
            [f"train.max_tokens_per_device_batch={limit}"]
            if packed
            else [
                f"train.per_device_train_batch_size={limit}",
                f"train.gradient_accumulation_steps={-(-rows * config.train.gradient_accumulation_steps // limit)}",
            ]
        )
        if facts.predict_memory(with_overrides(config, overrides)).fits:
            return limit
    return None


def cheapest_change(facts: Facts) -> tuple[str | None, MemoryPlan | None]:
    """The first change that fits alone, else the shortest run of changes that fit together; cheapest first."""
    config, longest, memory = facts.config, int(facts.train_data.lengths.max()), facts.memory
    assert memory is not None
    changes: list[list[str]] = []
    if not config.train.gradient_checkpointing and facts.model.has_checkpointing:
        changes.append(["train.gradient_checkpointing=true"])
    if config.data.packing and memory.micro_batch.num_tokens > longest:
        changes.append([f"train.max_tokens_per_device_batch={longest}"])
    if config.train.per_device_train_batch_size > 1 and not config.data.packing:
        accumulation = config.train.gradient_accumulation_steps * config.train.per_device_train_batch_size
        changes.append(["train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={accumulation}"])
    if config.train.per_device_eval_batch_size > 1 and facts.eval_data is not None:
        changes.append(["train.per_device_eval_batch_size=1"])
    if config.model.quantization == "none":
        changes.append(["model.quantization=nf4"])
    if config.data.max_seq_length >= 256:
        changes.append([f"data.max_seq_length={config.data.max_seq_length // 2}"])
    together = [[change for part in changes[: n + 1] for change in part] for n in range(1, len(changes))]
    for overrides in [*changes, *together]:
        plan = facts.predict_memory(with_overrides(config, overrides))
        if plan.fits:
            return " ".join(overrides), plan
    return None, None
