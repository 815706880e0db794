"""What the C library does with freed memory on a CPU: given back while weights are loaded, kept while a model computes.

With another C library than glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import platform

# From malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> None:
    """Keep freed blocks for the next tensor; otherwise each step unmaps and faults them in again.

    About a third of a step's time. Blocks of 32 MiB or more, the most that glibc lets one set, are given back at once
    all the same: that costs one or two parts in a hundred, and a weight that was widened from 4 bits leaves no hole
    that smaller tensors then break up (the first step of a 7B model in 4 bits took 21 GB, and takes less than 10).
    """
    _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: -1, _TOP_PAD: 256 * 2**20})


def give_back_freed_memory() -> None:
    """Give each freed tensor back at once: glibc's own way, for blocks from 1 MiB on.

    Where blocks are kept, a layer that is made 4 bits wide leaves a hole that the next one does not fit into, because
    its small result was put there: a 7B model took 22 GB to load in place of 8.
    """
    _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**20, _TRIM_THRESHOLD: 128 * 2**10, _TOP_PAD: 128 * 2**10})


def _set(options: dict[int, int]) -> None:
    if platform.system() != "Linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        for option, value in options.items():
            mallopt(option, value)
