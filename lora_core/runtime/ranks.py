"""What the ranks of a run tell each other: counts, sums, signals, files, as CPU tensors.

Over gloo, also where gradients go over NCCL: no step waits for a device, and a rank that is gone is an error in Python,
where NCCL would end the process from within. With one rank, all of this is that rank's own value.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from lora_core.errors import LoraCoreError

T = TypeVar("T")
_turns = itertools.count()  # of `first_on_each_machine`, the same in all ranks
_SECONDS_TO_SPEAK = 5.0


class SilentRank(torch.distributed.DistError):
    """A rank gave no sign of life for as long as ranks wait for each other."""


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
    of a large file may need, for a lost rank. Each rank gives a sign of life meanwhile.

    Raises:
        SilentRank: one gave none for as long as ranks wait for each other: it died, or hangs.
    """
    if not several():
        yield
        return
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    turn = _Turn(dist.distributed_c10d._get_default_store(), f"lora_core/turn-{next(_turns)}", rank)
    first_here = rank - local_rank
    with turn.alive():
        if local_rank > 0:
            turn.wait_for(f"{first_here}", [first_here])
        try:
            yield
        finally:
            # A mistake too: the others then find it by themselves.
            turn.leave(is_first=local_rank == 0)
        # Rank 0 looks after all, so that a thousand ranks do not all ask after each other.
        turn.wait_for("all", range(dist.get_world_size()) if rank == 0 else [0])


class _Turn:
    """One use of `first_on_each_machine`, in one rank."""

    def __init__(self, store: Any, name: str, rank: int) -> None:
        self._store = store
        self._name = name
        self._rank = rank
        self._timeout_s: float = store.timeout.total_seconds()  # of the process group
        self._between_signs_s = min(1.0, self._timeout_s / 4)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """While entered, a thread says that this process runs: one that is stopped, or killed, says nothing."""
        ended = threading.Event()

        def say() -> None:
            while not ended.is_set():
                try:
                    self._store.add(f"{self._name}/alive/{self._rank}", 1)
                except RuntimeError:  # the store ended with rank 0, which whoever waits finds out
                    return
                ended.wait(self._between_signs_s)

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(self._between_signs_s)

    def leave(self, is_first: bool) -> None:
        """Let the others of the machine go on, where this is its first rank, and all where it is the last of all."""

        def say() -> None:
            if is_first:
                self._store.set(f"{self._name}/{self._rank}", "done")
            self._store.set(f"{self._name}/left/{self._rank}", "")
            if self._store.add(f"{self._name}/num_left", 1) == dist.get_world_size():
                self._store.set(f"{self._name}/all", "done")

        answer_in_time(say, self._timeout_s)

    def wait_for(self, key: str, others: Iterable[int]) -> None:
        """Until a key is set; meanwhile look after other ranks.

        Raises:
            SilentRank: one of them, or one that another rank looks after, gave no sign of life for too long.
        """
        signs = dict.fromkeys(others, 0)
        heard = dict.fromkeys(signs, time.monotonic())
        next_look = 0.0

        def is_set() -> bool:
            nonlocal next_look
            if self._store.check([f"{self._name}/{key}"]):
                return True
            if self._store.check([f"{self._name}/lost"]):
                raise SilentRank("waiting for the rows to be encoded")
            now = time.monotonic()
            if now >= next_look:
                next_look = now + self._between_signs_s
                for other in signs:
                    sign = self._store.add(f"{self._name}/alive/{other}", 0)
                    if sign > signs[other] or self._store.check([f"{self._name}/left/{other}"]):
                        signs[other], heard[other] = sign, now
                if any(now - last > self._timeout_s for last in heard.values()):
                    self._store.set(f"{self._name}/lost", "")
            return False

        while not answer_in_time(is_set, self._timeout_s):
            time.sleep(0.1)


def answer_in_time(ask: Callable[[], T], timeout_s: float) -> T:
    """What `ask` gets from the store, which waits without end where the rank that keeps it hangs.

    Raises:
        SilentRank: there is no answer in time.
    """
    answer: Future[T] = Future()

    def ask_store() -> None:
        try:
            answer.set_result(ask())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask_store, daemon=True).start()
    if not wait([answer], timeout_s).done:
        raise SilentRank("asking the store that ranks meet at")
    return answer.result()


def is_alone_with(mistake: str) -> bool:
    """Whether the first rank of this machine, which says what all find, does not say within some seconds that it has
    found the same mistake. Of that rank itself: False."""
    if not several():
        return False
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    key = f"lora_core/mistake/{rank - local_rank}"
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + _SECONDS_TO_SPEAK

    def is_alone() -> bool:
        if local_rank == 0:
            store.set(key, mistake)
            return False
        while not store.check([key]):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return bool(store.get(key).decode() != mistake)

    try:
        return answer_in_time(is_alone, 2 * _SECONDS_TO_SPEAK)
    except SilentRank:
        return local_rank > 0
    except RuntimeError:  # the store ended with rank 0, which has said what it found
        return False


def is_connection_failure(error: RuntimeError) -> bool:
    """Whether another rank could not be reached."""
    said = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in said or "Connection" in said


def keeps_store(rank: int) -> bool:
    """Whether the store that ranks meet at ends with this rank: with rank 0, unless torchrun keeps it."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def leave() -> None:
    """End the process group: NCCL warns of one that is left to the end of the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _exchange_device() -> torch.device:
    """The CPU, but for a process group without a backend for it, which a program of its own may have started."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device
