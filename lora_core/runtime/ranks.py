"""What the ranks of a run tell each other: counts, sums, signals, files, as CPU tensors.

Over gloo, also where gradients go over NCCL: no step waits for a device, and a rank that is gone is an error in Python,
where NCCL would end the process from within. With one rank, all of this is that rank's own value.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from lora_core.errors import LoraCoreError

T = TypeVar("T")
_turns = itertools.count()  # of `first_on_each_machine`, the same in all ranks


def backend() -> str | None:
    """For `torch.distributed`: one backend for the device, and gloo for the CPU; None leaves it to Accelerate.

    Accelerate takes a backend for a process of a launch alone, and none of a GPU where it was told to use the CPU.
    """
    if "LOCAL_RANK" not in os.environ or on_cpu():
        return None
    if torch.cuda.is_available():
        return "cuda:nccl,cpu:gloo"
    return "xpu:xccl,cpu:gloo" if torch.xpu.is_available() else None


def on_cpu() -> bool:
    """Whether the run computes on the CPU: the machine has nothing else, or `accelerate launch` was told so."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def several() -> bool:
    """Whether the run has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on the CPU."""
    total = value.detach().cpu().clone()
    if several():
        total = total.to(_exchange_device())
        dist.all_reduce(total)
    return total.cpu()


def greatest_of_ranks(number: int) -> int:
    """The greatest of the ranks' numbers."""
    greatest = torch.tensor(number)
    if several():
        greatest = greatest.to(_exchange_device())
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def gather_from_ranks(value: T) -> list[T]:
    """The values of all ranks, in order, in all ranks."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` gives in rank 0, in all ranks. The others do not call it: they may be on machines without the files.

    Raises:
        LoraCoreError: in all ranks, what `make` raised.
    """
    if not several():
        return make()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except LoraCoreError as mistake:
            outcome[1] = mistake
    dist.broadcast_object_list(outcome)
    value, raised = outcome
    if raised is not None:
        raise raised
    result: T = value
    return result


def meet() -> None:
    """Go on when all ranks are here."""
    sum_over_ranks(torch.zeros(1))


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """The first rank of each machine runs the block, then the machine's others; all leave it together.

    They wait by asking the store that the ranks met at: a barrier would take a wait of half an hour, which the rows
    of a large file may need, for a lost rank.
    """
    if not several():
        yield
        return
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    store = dist.distributed_c10d._get_default_store()
    turn = f"lora_core/turn-{next(_turns)}"
    this_machine = f"{turn}/{rank - local_rank}"
    if local_rank > 0:
        _wait_for(store, this_machine)
    try:
        yield
    finally:
        # A mistake too: the others then find it by themselves.
        if local_rank == 0:
            store.set(this_machine, "done")
        if store.add(f"{turn}/arrived", 1) == dist.get_world_size():
            store.set(f"{turn}/all", "done")
    _wait_for(store, f"{turn}/all")


def leave() -> None:
    """End the process group: NCCL warns of one that is left to the end of the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _wait_for(store: Any, key: str) -> None:
    while not store.check([key]):
        time.sleep(0.1)


def _exchange_device() -> torch.device:
    """The CPU, but for a process group without a backend for it, which a program of its own may have started."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device
