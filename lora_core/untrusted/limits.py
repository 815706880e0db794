"""Bounds on time and memory around code that somebody else wrote: a chat template is a program.

Jinja's sandbox keeps a template from Python's objects and from files, but not from running for ever or asking for ten
gigabytes. `limited` does that, in the process that renders:

    time     a timer of the processor time used; its signal ends the template between two of Python's instructions
    memory   a limit on the address space (Linux), so that Python itself raises MemoryError
    at last  a limit on processor time that ends the process, for what hangs inside a single instruction

Signals reach the main thread only: in another one there is no limit on time. (The processes that encode rows do so in
their main thread.) Windows has none of the three: there the block runs without limits, and a line says so.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None


def allowed_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OutOfTime(BaseException):
    """The time is used up. Not an `Exception`, so that nothing inside takes it for one of its own."""


@contextmanager
def limited(seconds: float, memory_bytes: int) -> Iterator[Callable[[], None]]:
    """Run the block with so many seconds of processor time and so many bytes more than are in use now.

    Yields what gives it the whole time once more. The clock stands until that is called first.

    Raises:
        OutOfTime: the time is used up.
        MemoryError: the memory is.
    """
    if resource is None:
        _say_that_there_are_no_limits()
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    old_handler = signal.signal(signal.SIGVTALRM, _out_of_time)
    old_cpu = resource.getrlimit(resource.RLIMIT_CPU)
    old_memory = resource.getrlimit(resource.RLIMIT_AS)

    def restart_clock() -> None:
        _lower(resource.RLIMIT_CPU, int(time.process_time() + 3 * seconds) + 1, old_cpu)
        # Again every second, should the first one come where Python drops exceptions, such as in a destructor.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)

    try:
        if sys.platform == "linux":
            _lower(resource.RLIMIT_AS, _address_space_bytes() + memory_bytes, old_memory)
        yield restart_clock
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_CPU, old_cpu)
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, old_memory)


@lru_cache(maxsize=1)
def _say_that_there_are_no_limits() -> None:
    logging.getLogger(__name__).warning("no limits on time and memory of chat templates: this system has none to set")


def _out_of_time(*_: object) -> None:
    raise OutOfTime


def _lower(what: int, limit: int, old: tuple[int, int]) -> None:
    """Lower the soft limit; it can be raised again as far as the hard one."""
    assert resource is not None
    soft, hard = old
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(what, (limit, hard))


def _address_space_bytes() -> int:
    assert resource is not None
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * int(resource.getpagesize())
