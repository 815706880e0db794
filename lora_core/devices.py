"""Devices, precision, processes and memory: what the run has to work with."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_core.config import RunConfig
from lora_core.errors import ConfigError


def build_accelerator(config: RunConfig) -> Accelerator:
    """Devices, precision and processes as the launcher set them.

    Raises:
        ConfigError: bf16 was asked for and the device has none, or the launcher's backend is not supported.
    """
    if config.train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"train.bf16=true: {torch.cuda.get_device_name()} has no bfloat16; fix: train.bf16=false")
    if not torch.accelerator.is_available():
        use_all_cores()
        if platform.system() == "Linux":
            reuse_freed_memory()
    # A second run in one process may ask for another precision; the process group stays.
    AcceleratorState._reset_state()
    # Accumulation is ours: a value above 1 here would make Accelerate divide the loss once more.
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.bf16 else "no",
        gradient_accumulation_steps=1,
        # Not said, Accelerate runs each rank of a CPU launch as if it were alone.
        cpu=not torch.accelerator.is_available(),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but they run as {accelerator.num_processes}: each would train "
            f"on its own and overwrite the others; fix: torchrun --nproc_per_node {launched} launch/train.py ..."
        )
    if accelerator.distributed_type.value in ("DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ConfigError(
            f"distributed_type {accelerator.distributed_type.value}: not supported, its engine counts optimizer steps "
            "on its own; fix: MULTI_GPU (DDP) or FSDP in the accelerate config"
        )
    return accelerator


def use_all_cores() -> None:
    """Share the cores that this process may use among the ranks of this machine.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1, which leaves all cores but one idle.
    """
    import psutil  # comes with Accelerate

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)  # two threads of one core share its arithmetic
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def reuse_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next tensor; otherwise each step unmaps and faults them in again.

    About a third of a step's time on a CPU. The same as MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1
    MALLOC_TOP_PAD_=268435456 in the environment. Does nothing with another C library.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 256 * 2**20)


def seed_everything(seed: int, rank: int) -> None:
    """Dropout masks differ by rank and repeat from run to run. (Row order and initial adapter have the plain seed.)"""
    torch.manual_seed(seed + rank)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed + rank)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU what its allocator gave out, on a CPU its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
