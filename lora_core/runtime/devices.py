"""Devices, precision, processes and memory: what the run has to work with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil  # comes with Accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.errors import ConfigError, RankFault, counted
from lora_core.runtime import ranks
from lora_core.runtime.launcher import (
    asked_processes,
    check_launch,
    omp_num_threads,
    own_command,
    refuse_settings_of_the_shell,
)
from lora_core.runtime.run_folder import check_run_folder
from lora_core.runtime.sharding import fsdp_plugin, loads_on_first_rank, uses_fsdp
from lora_core.untrusted.limits import allowed_cores


def with_precision(config: RunConfig) -> tuple[RunConfig, str | None]:
    """The configuration with `train.bf16: auto` decided for this device, and a line that says what was decided.

    A CPU without bfloat16 instructions emulates them, at a small part of the speed of float32. Such a run has float32
    weights too: autocast is what would otherwise bring weights and activations together.
    """
    if config.train.bf16 != "auto":
        return config, None
    # 4-bit weights are multiplied in bfloat16 on any device, unless model.dtype says otherwise.
    if _bf16() == "native" or config.model.quantization == "nf4":
        return with_overrides(config, ["train.bf16=true"]), None
    dtype = ["model.dtype=float32"] if config.model.dtype == "bfloat16" else []
    line = "precision: float32, as this device has no bfloat16 instructions (train.bf16=auto)"
    return with_overrides(config, ["train.bf16=false", *dtype]), line


def build_accelerator(config: RunConfig) -> Accelerator:
    """Devices, precision and processes as the launcher set them.

    Raises:
        ConfigError: bf16 is set and the device does not have it, or the launcher's backend is not supported.
        RankFault: not all ranks have come within train.rank_timeout_s.
    """
    if not dist.is_initialized():  # by a program of its own, which needs no variables
        check_launch()
    config, _ = with_precision(config)
    if config.train.bf16 is True and _bf16() == "none":
        raise ConfigError(
            f"train.bf16=true: {torch.cuda.get_device_name()} has no bfloat16; fix: train.bf16=false",
            "bf16_unsupported",
        )
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _on_cuda() and local_processes > torch.cuda.device_count():
        raise ConfigError(
            f"{local_processes} processes were started on this machine, which has "
            f"{counted(torch.cuda.device_count(), 'GPU')}: each needs one of its own; fix: accelerate launch "
            f"--num_processes {torch.cuda.device_count()} (times the number of machines)"
        )
    kind, _ = _accelerator()
    refuse_settings_of_the_shell("cpu" if kind is None else f"{kind}:{os.environ.get('LOCAL_RANK', '0')}")
    if ranks.on_cpu():
        use_all_cores()
        bound_shape_caches()
    if _on_cuda():
        # It makes a plan for each new length, and packed examples are all of another: 0.1 s an example on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
    # A second run in one process may ask for another precision; the process group stays.
    AcceleratorState._reset_state()
    # Accumulation is ours: a value above 1 here would make Accelerate divide the loss once more. What is compiled is
    # ours too (train.torch_compile). As numbers alone, Accelerate's variables of the environment go before both.
    with _naming_absent_ranks(config.train.rank_timeout_s):
        accelerator = Accelerator(
            mixed_precision="bf16" if config.train.bf16 is True else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            fsdp_plugin=fsdp_plugin(config),
            # Not said, Accelerate runs each rank of a CPU launch as if it were alone.
            cpu=ranks.on_cpu(),
            kwargs_handlers=[
                InitProcessGroupKwargs(ranks.backend(), timeout=timedelta(seconds=config.train.rank_timeout_s)),
                # The same in all ranks: sent, each forward would wait for the slowest, evaluation's too.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}: each would "
            f"train alone and overwrite the others; fix: torchrun --nproc_per_node {launched} {own_command()}",
            "world_size_differs",
        )
    if config.lora.changes_base_weights and accelerator.distributed_type.value == "FSDP":
        raise ConfigError(
            f"lora.init_lora_weights={config.lora.init_lora_weights}: its start cannot be taken out of sharded weights "
            "(FSDP); fix: lora.init_lora_weights=true, or DDP"
        )
    if config.train.fp16 and (accelerator.distributed_type.value == "FSDP" or accelerator.device.type == "mps"):
        raise ConfigError(
            "train.fp16=true: loss scaling is not supported with FSDP or on MPS; fix: train.bf16=true",
            "fp16_unsupported",
        )
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM", "TP", "XLA"):  # of a program of its own
        raise ConfigError(
            f"distributed_type {accelerator.distributed_type.value}: not supported, its engine counts optimizer steps "
            "on its own; fix: MULTI_GPU (DDP) or FSDP in the accelerate config"
        )
    return accelerator


@contextmanager
def _naming_absent_ranks(timeout_s: int) -> Iterator[None]:
    """While entered, ranks that do not meet are an error that says who waited, where and for how long."""
    try:
        yield
    except RuntimeError as error:
        if "RANK" not in os.environ or not ranks.is_connection_failure(error):
            raise
        rank, num_ranks = int(os.environ["RANK"]), os.environ.get("WORLD_SIZE", "1")
        joined = re.search(r"(\d+)/\d+ clients joined", str(error))
        # Rank 0 comes too: the address is its own.
        missing = f"{joined[1]} of {num_ranks} ranks were there" if joined else "rank 0 did not answer"
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankFault(
            f"rank {rank} of {num_ranks} waited {timeout_s} s (train.rank_timeout_s) at {place} for the others, and "
            f"{missing}; fix: read the output of those that did not come, and see that each machine was started, with "
            "the same address and port of the first and the same number of processes"
        ) from error


def build_scaler(config: RunConfig, accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """What scales the loss so that float16 gradients do not vanish; None without `train.fp16`.

    Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740. Torch's own and not Accelerate's, which has it on GPUs
    alone, so that the CPU's can be tested.
    """
    return torch.amp.GradScaler(accelerator.device.type) if config.train.fp16 else None


def use_all_cores() -> None:
    """Share the cores that this process may use among the ranks of this machine.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1, which leaves all cores but one idle. One that the user
    exported is obeyed.
    """
    asked = omp_num_threads()
    if asked is not None:
        torch.set_num_threads(asked)
        return
    allowed = allowed_cores()
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)  # two threads of one core share its arithmetic
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def bound_shape_caches() -> None:
    """Keep oneDNN's compiled kernels for 128 shapes in place of 1,024. Holds for a process that has not multiplied yet.

    Packed micro-batches differ in length, so each brings some thirty new shapes, of up to 0.6 MiB each: 365 MiB over
    twenty steps of the demo model. A micro-batch of sixteen examples goes through about a hundred from layer to
    layer; with 64 it compiled them anew in every layer and took a sixth longer.
    """
    for name in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):  # the second is PyTorch's own, in front of it
        os.environ.setdefault(name, "128")


@dataclass(frozen=True)
class DeviceMemory:
    """What one process of a run may use, in bytes."""

    kind: Literal["cpu", "cuda", "mps"]
    limit_bytes: int
    process_bytes: int = 0
    """On a CPU: what this process holds already (Python, the libraries), which counts against the limit."""
    keeps_freed_memory: bool = False
    """`heap.keep_freed_memory` applies."""


@dataclass(frozen=True)
class Environment:
    """The machine and launch that a run finds."""

    device: DeviceMemory
    num_processes: int
    asked_processes: int | None
    """Processes that `accelerate launch` was asked for; None if it did not start this one."""
    sharding: Literal["ddp", "fsdp"]
    bf16: Literal["native", "emulated", "none"]
    has_bitsandbytes: bool
    has_schedulefree: bool
    free_disk_bytes: int
    """On the disk of output_dir."""
    output_dir_problem: str | None
    free_output_dir: str | None
    """A name beside output_dir that is not taken, where output_dir is."""
    each_rank_loads: bool = False
    """Under FSDP: each rank loads the whole model, as the launcher was told."""
    missing_trackers: tuple[str, ...] = ()
    """Of train.report_to, those whose package is not installed."""
    num_machines: int = 1
    """That the processes are spread over evenly."""


def look_around(
    config: RunConfig, num_processes: int, gpu_memory_gib: float | None = None, num_machines: int = 1
) -> Environment:
    """See what there is.

    Args:
        num_processes: of the run.
        gpu_memory_gib: plan for a GPU of this size in place of this machine's device.
        num_machines: that the processes are spread over evenly.
    """
    folder = Path(config.output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    problem = None
    try:
        check_run_folder(config.output_dir, config.overwrite_output_dir)
    except ConfigError as error:
        problem = str(error)
    return Environment(
        device=device_memory(num_processes // num_machines)
        if gpu_memory_gib is None
        else DeviceMemory("cuda", round(gpu_memory_gib * 2**30)),
        num_processes=num_processes,
        asked_processes=asked_processes(),
        sharding="fsdp" if uses_fsdp() else "ddp",
        bf16="native" if gpu_memory_gib is not None else _bf16(),
        has_bitsandbytes=find_spec("bitsandbytes") is not None,
        has_schedulefree=find_spec("schedulefree") is not None,
        free_disk_bytes=shutil.disk_usage(existing).free,
        output_dir_problem=problem,
        free_output_dir=_free_output_dir(config.output_dir),
        each_rank_loads=uses_fsdp() and not loads_on_first_rank(),
        missing_trackers=tuple(name for name in config.train.trackers if find_spec(name) is None),
        num_machines=num_machines,
    )


def _free_output_dir(asked: str) -> str | None:
    """A folder that a run may have in place of the one that is taken: beside it, or in outputs/."""
    for stem in (asked.rstrip("/"), f"outputs/{Path(asked).name}"):
        for number in range(2, 1000):
            name = f"{stem}-{number}"
            with suppress(ConfigError):
                if not check_run_folder(name, overwrite=False).exists():
                    return name
    return None


def device_memory(num_local_processes: int = 1) -> DeviceMemory:
    """The memory of this machine's device for each of so many processes on it (of a GPU, each has its own)."""
    if _on_cuda():
        free_bytes, _ = torch.cuda.mem_get_info()
        return DeviceMemory("cuda", free_bytes)
    if _on_mps():
        return DeviceMemory("mps", torch.mps.recommended_max_memory())
    process_bytes = psutil.Process().memory_info().rss
    limit = psutil.virtual_memory().available + process_bytes
    with suppress(OSError, ValueError):  # there is no such file outside a container; it may say "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return DeviceMemory("cpu", limit // num_local_processes, process_bytes, platform.system() == "Linux")


def _on_cuda() -> bool:
    return torch.cuda.is_available() and not ranks.on_cpu()


def _on_mps() -> bool:
    return torch.backends.mps.is_available() and not ranks.on_cpu()


def _bf16() -> Literal["native", "emulated", "none"]:
    if _on_cuda():
        return "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    if _on_mps():
        return "native"
    return (
        "native"
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        else "emulated"
    )


def seed_everything(seed: int, rank: int) -> None:
    """Dropout masks differ by rank and repeat from run to run. (Row order and initial adapter have the plain seed.)"""
    torch.manual_seed(seed + rank)  # of all devices


def random_states() -> dict[str, Tensor]:
    """The states of this process's random numbers, by kind of device: what dropout draws next."""
    kind, device = _accelerator()
    return {"cpu": torch.get_rng_state()} | ({} if kind is None else {kind: device.get_rng_state()})


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    kind, device = _accelerator()
    if kind in states:  # not in those of a run on a CPU
        device.set_rng_state(states[kind])


def _accelerator() -> tuple[str | None, Any]:
    """("cuda", torch.cuda) where there is such a device, as for xpu, mps, npu; (None, None) where there is none."""
    if ranks.on_cpu():
        return None, None
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type, torch.get_device_module(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the GPU what its allocator gave out, on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # `getrusage` begins with what the process held that started this one, such as a large notebook.
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.is_file() else None
    if peak is not None:
        return int(peak.group(1)) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
