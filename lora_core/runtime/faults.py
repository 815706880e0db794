"""What can happen to a run from outside: signals, memory that runs out, a rank that is lost."""

from __future__ import annotations

import gc
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from lora_core.errors import LoraCoreError, RankFault, RunStopped
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.runtime.ranks import (
    answer_in_time,
    greatest_of_ranks,
    is_alone_with,
    is_connection_failure,
    keeps_store,
    several,
)

_SECONDS_TO_ANSWER = 5.0


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are noted, for the loop to stop after its step.

    Of those that follow, only Ctrl-C acts at once: `accelerate launch` ends at the first Ctrl-C, and its end sends
    SIGTERM here (`end_with_launcher`).

    In a thread that is not the main one, signals are left alone: Python handles them in the main one only.
    """

    def __init__(self) -> None:
        self._received = 0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or number  # the first, which what follows only repeats

    def any_rank(self) -> str | None:
        """The name of a signal that any rank has received; all ranks get the same answer."""
        number = greatest_of_ranks(self._received)
        return signal.Signals(number).name if number else None


@contextmanager
def naming_lack_of_memory(accelerator: Accelerator) -> Iterator[None]:
    """While entered, memory that runs out where no step says so, as in loading and evaluating, becomes a sentence.

    Raises:
        RankFault: there was no memory left.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RankFault(
            f"out of memory on {accelerator.device} (rank {accelerator.process_index}): "
            f"{(str(error).splitlines() or [type(error).__name__])[0].rstrip('.')}; fix: less to hold at once, such as "
            "model.quantization=nf4, or train.per_device_eval_batch_size=1 where it was evaluating"
        ) from error


def free_memory() -> None:
    """Free what a failed step used."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()


@contextmanager
def naming_lost_ranks(timeout_s: int, then: str) -> Iterator[None]:
    """While entered, a failure to reach another rank becomes an error that names it, and a mistake of one rank says so.

    Args:
        timeout_s: train.rank_timeout_s.
        then: what to do once it is known why a rank was lost.

    Raises:
        RankFault: a rank died, or took longer than `timeout_s` to come to the same point.
    """
    try:
        yield
    except LoraCoreError as error:
        is_said = isinstance(error, (RankFault, RunStopped))
        if not is_said and is_alone_with(str(error)):
            error.only_rank = dist.get_rank()
        raise
    except RuntimeError as error:
        if not several() or not is_connection_failure(error):
            raise
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        lost = _silent_ranks(rank, num_ranks)
        who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}" if lost else "a rank"
        raise RankFault(
            f"{who} of {num_ranks} died or did not answer within {timeout_s} s (train.rank_timeout_s), so rank {rank} "
            f"stops; it was doing: {_first_sentence(error)}; fix: read the lost rank's output above, then {then}"
        ) from error


def is_of_the_machine(error: RuntimeError) -> bool:
    """Whether a device, its driver or another rank failed, and not the code that called them: torch says all of it, and
    that shapes do not match too, as a RuntimeError."""
    is_plain = type(error) in (RuntimeError, NotImplementedError)  # devices and ranks have their own, since torch 2.8
    named = any(words in str(error) for words in ("CUDA error", "CUDA driver", "cuDNN error", "NCCL"))
    return not is_plain or named or is_out_of_memory(error) or is_connection_failure(error)


def _silent_ranks(rank: int, num_ranks: int) -> list[int]:
    """Ranks that do not say within some seconds that they are there: they are dead, or hang where no error reaches."""
    store = dist.distributed_c10d._get_default_store()
    waiting = set(range(num_ranks)) - {rank}
    deadline = time.monotonic() + _SECONDS_TO_ANSWER

    def ask() -> None:
        store.set(f"lora_core/alive/{rank}", "")
        while waiting and time.monotonic() < deadline:
            waiting.difference_update([other for other in waiting if store.check([f"lora_core/alive/{other}"])])
            time.sleep(0.05)

    try:
        answer_in_time(ask, 2 * _SECONDS_TO_ANSWER)
    except RuntimeError:  # the store ended, or hangs, with rank 0; if that had answered, it waited for the rest
        return [0] if 0 in waiting and keeps_store(0) else sorted(waiting - {0})
    return sorted(waiting)


def _first_sentence(error: RuntimeError) -> str:
    """Of what torch and gloo say, without the place in their source."""
    line = re.sub(r"^\[\S+:\d+\] ", "", (str(error).splitlines() or [""])[0])
    return line.split(". ")[0].rstrip(".")
