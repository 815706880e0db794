"""Checks of where the run is started: processes, precision, libraries, disk, output folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from lora_core.config.schema import uses_bitsandbytes
from lora_core.preflight.findings import Facts, Finding, gib
from lora_core.runtime.launcher import own_command


def check_world_size(facts: Facts) -> Iterator[Finding]:
    """The launcher was asked for another number of processes than are running.

    `accelerate launch --cpu --num_processes 2` silently starts one process: half the batch, twice the steps, and a
    schedule that is not the one you planned.

    On CPUs, torchrun, as the finding writes it. On GPUs, `--multi_gpu`: a file with `distributed_type: "NO"` starts one
    process, whatever its number of processes.
    """
    asked, running = facts.environment.asked_processes, facts.environment.num_processes
    if asked is not None and asked != running:
        on_cpu = facts.environment.device.kind == "cpu"
        launcher = "torchrun --nproc_per_node" if on_cpu else "accelerate launch --multi_gpu --num_processes"
        yield Finding(
            "world_size_differs",
            "error",
            f"accelerate launch was asked for {asked} processes, and {running} {'is' if running == 1 else 'are'} "
            f"running: {'on a CPU' if on_cpu else 'without --multi_gpu or a distributed_type'} it starts only one; "
            f"fix: {launcher} {asked} {own_command()}",
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
        "train.bf16=true: the GPU has no bfloat16 (its 16 bits are train.fp16=true model.dtype=float16)"
        if bf16 == "none"
        else "train.bf16=true: this CPU has no bfloat16 instructions and emulates them, many times slower than float32",
        bf16,
        "native",
        "train.bf16=false model.dtype=float32" if bf16 == "none" else "train.bf16=auto",
    )


def check_float16(facts: Facts) -> Iterator[Finding]:
    """The model's weights are float16, and nothing scales the loss.

    A gradient below 6e-8 is zero in float16. Each step's loss is divided by its number of loss tokens, so that many
    gradients would vanish without a sign of it.

    `train.fp16=true` computes in float16 with loss scaling; bfloat16 and float32 need none.
    """
    train = facts.config.train
    if facts.model.dtype == "float16" and train.bf16 is False and not train.fp16:
        yield Finding(
            "float16_unscaled",
            "error",
            "the weights are float16 (model.dtype), train.bf16=false and train.fp16=false: without loss scaling, small "
            "gradients would be zero",
            "float16",
            None,
            "train.fp16=true",
        )


def check_fp16(facts: Facts) -> Iterator[Finding]:
    """`train.fp16` is on where it cannot run, or gains nothing.

    Loss scaling is not offered under FSDP or on Apple's GPUs. GPUs with bfloat16 need none of it, and a CPU emulates
    float16, many times slower than float32.

    `train.fp16=false train.bf16=auto`.
    """
    environment = facts.environment
    if not facts.config.train.fp16:
        return
    if environment.sharding == "fsdp" or environment.device.kind == "mps":
        where = "under FSDP" if environment.sharding == "fsdp" else "on MPS"
        yield Finding(
            "fp16_unsupported",
            "error",
            f"train.fp16=true: loss scaling is not supported {where}",
            True,
            False,
            "train.fp16=false train.bf16=auto",
        )
    elif environment.device.kind == "cpu":
        yield Finding(
            "fp16_slow",
            "warning",
            "train.fp16=true: this CPU emulates float16, many times slower than float32",
            True,
            False,
            "train.fp16=false train.bf16=auto",
        )


def check_attention(facts: Facts) -> Iterator[Finding]:
    """`model.attn_implementation` names a kernel whose package is not installed, or nothing that transformers has.

    The model could not be loaded. None of these packages is needed: with `sdpa`, packed examples are kept apart by
    lora_core's own attention, which on a GPU is torch's FlashAttention over sequences of any length.

    `model.attn_implementation=sdpa`.
    """
    name = facts.config.model.attn_implementation
    packages = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    if "/" in name:
        package = "kernels"
    elif name in packages:
        package = packages[name]
    elif name in ("sdpa", "eager", "flex_attention"):
        return
    else:
        yield Finding(
            "attention_unknown",
            "error",
            f"model.attn_implementation={name}: must be sdpa, eager, flash_attention_2, flash_attention_3, "
            "flex_attention, or a kernel on the hub such as kernels-community/flash-attn2",
            name,
            "sdpa",
            "model.attn_implementation=sdpa",
        )
        return
    if find_spec(package) is None:
        yield Finding(
            "attention_missing",
            "error",
            f"model.attn_implementation={name} needs the package {package}, which is not installed; sdpa needs none, "
            "and keeps packed examples apart",
            name,
            "sdpa",
            "model.attn_implementation=sdpa",
        )


def check_bitsandbytes(facts: Facts) -> Iterator[Finding]:
    """An optimizer of bitsandbytes, NF4 or int8 is configured, and bitsandbytes is not installed.

    The run would stop when it first needs it, with the model loaded.

    Install it, or choose settings that do not need it: `train.optim=adamw_torch`, `model.quantization=none`.
    """
    needs = [
        name
        for name, on in (
            (f"train.optim={facts.config.train.optim}", uses_bitsandbytes(facts.config.train.optim)),
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


def check_schedule_free(facts: Facts) -> Iterator[Finding]:
    """A schedule-free optimizer is configured, and the package that has it is not installed.

    The run would stop when it first needs it, with the model loaded.

    Install it, or choose an optimizer that does not need it: `train.optim=adamw_torch`.
    """
    optim = facts.config.train.optim
    if optim.startswith("schedule_free") and not facts.environment.has_schedulefree:
        yield Finding(
            "schedulefree_missing",
            "error",
            f"train.optim={optim} needs schedulefree, which is not installed (pip install schedulefree)",
            None,
            "schedulefree",
            "train.optim=adamw_torch",
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
    needed = (limit + 1) * facts.memory.checkpoint_bytes + adapter + 15 * 10**6
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
