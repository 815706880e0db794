"""Checks of where the run is started: processes, precision, libraries, disk, output folder."""

from __future__ import annotations

from collections.abc import Iterator

from lora_core.preflight.findings import Facts, Finding, gib


def check_world_size(facts: Facts) -> Iterator[Finding]:
    """The launcher was asked for another number of processes than are running.

    `accelerate launch --cpu --num_processes 2` silently starts one process: half the batch, twice the steps, and a
    schedule that is not the one you planned.

    On CPUs, `torchrun --nproc_per_node N launch/train.py ...`.
    """
    asked, running = facts.environment.asked_processes, facts.environment.num_processes
    if asked is not None and asked != running:
        yield Finding(
            "world_size_differs",
            "error",
            f"accelerate launch was asked for {asked} processes, and {running} "
            f"{'is' if running == 1 else 'are'} running: on a CPU it starts only one; "
            f"fix: torchrun --nproc_per_node {asked} launch/train.py ...",
            running,
            asked,
            None,
        )


def check_bf16(facts: Facts) -> Iterator[Finding]:
    """`train.bf16` is true and the device has no hardware for bfloat16.

    A GPU without it fails or is slower than in float32. A CPU without it emulates it, many times slower than float32.

    `train.bf16=auto`, which takes float32 there; for a GPU `train.bf16=false model.dtype=float32`.
    """
    bf16 = facts.environment.bf16
    if facts.config.train.bf16 is not True or bf16 == "native":
        return
    yield Finding(
        "bf16_unsupported" if bf16 == "none" else "bf16_slow",
        "error" if bf16 == "none" else "warning",
        "train.bf16=true: the GPU has no bfloat16"
        if bf16 == "none"
        else "train.bf16=true: this CPU has no bfloat16 instructions and emulates them, many times slower than float32",
        bf16,
        "native",
        "train.bf16=false model.dtype=float32" if bf16 == "none" else "train.bf16=auto",
    )


def check_bitsandbytes(facts: Facts) -> Iterator[Finding]:
    """8-bit AdamW, NF4 or int8 is configured, and bitsandbytes is not installed.

    The run would stop when it first needs it, with the model loaded.

    Install it, or choose settings that do not need it: `train.optim=adamw_torch`, `model.quantization=none`.
    """
    needs = [
        name
        for name, on in (
            (f"train.optim={facts.config.train.optim}", facts.config.train.optim != "adamw_torch"),
            (f"model.quantization={facts.config.model.quantization}", facts.config.model.quantization != "none"),
        )
        if on
    ]
    if needs and not facts.environment.has_bitsandbytes:
        without = {"train.optim": "train.optim=adamw_torch", "model.quantization": "model.quantization=none"}
        yield Finding(
            "bitsandbytes_missing",
            "error",
            f"{' and '.join(needs)} need bitsandbytes, which is not installed (pip install bitsandbytes)",
            None,
            "bitsandbytes",
            " ".join(without[name.split("=")[0]] for name in needs),
        )


def check_trackers(facts: Facts) -> Iterator[Finding]:
    """`train.report_to` names a tracker whose package is not installed.

    The run would stop when it starts its trackers, with the model loaded.

    Install it, or leave it out of `train.report_to`.
    """
    missing = facts.environment.missing_trackers
    if missing:
        left = [name for name in facts.config.train.trackers if name not in missing]
        yield Finding(
            "tracker_missing",
            "error",
            f"train.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed "
            f"(pip install {' '.join(missing)})",
            list(missing),
            None,
            f"train.report_to=[{','.join(left)}]",
        )


def check_disk(facts: Facts) -> Iterator[Finding]:
    """The disk has no space for the checkpoints.

    A run that cannot save its adapter is lost.

    Fewer checkpoints, or an `output_dir` on another disk.
    """
    if facts.memory is None:
        return
    # The checkpoints that are kept, one more while the oldest goes, and the adapter at the end; each adapter comes with
    # its tokenizer, of which 15 MB is a large one.
    limit = facts.config.train.save_total_limit
    adapter = facts.memory.adapter_file_bytes
    needed = (limit + 1) * (adapter + facts.memory.components["optimizer"]) + adapter + 15 * 10**6
    free = facts.environment.free_disk_bytes
    if needed > free:
        yield Finding(
            "disk_too_small",
            "error",
            f"{limit + 1} checkpoints and the adapter need {gib(needed)}, and the disk of "
            f"output_dir={facts.config.output_dir} has {gib(free)}",
            free,
            needed,
            "train.save_total_limit=1" if limit > 1 and needed - (limit - 1) * adapter <= free else None,
        )


def check_output_dir(facts: Facts) -> Iterator[Finding]:
    """The output folder contains an earlier run or other files, or cannot be written.

    Nothing in it is replaced unless you ask for it.

    Another `output_dir`, or `overwrite_output_dir=true` to replace an earlier run.
    """
    problem = facts.environment.output_dir_problem
    if problem is not None:
        yield Finding(
            "output_dir_taken",
            "error",
            problem.split("; fix:")[0],
            facts.config.output_dir,
            None,
            f"output_dir={facts.environment.free_output_dir}" if facts.environment.free_output_dir else None,
        )
