"""Near-copies: which rows say almost what another says, by their sketches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SHARED = 6
"""Of the eight hashes of a sketch: so many are the same in near-copies."""
# Rows that a row is compared with for each of its hashes: the first that has it, and so many before it. A hash that
# thousands of rows have would otherwise make a pair of each two of them.
_BEFORE = 4
_PAIRS_AT_ONCE = 100_000


def near_pairs(sketches: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(num_pairs, 2) rows that share at least six hashes, the earlier first.

    All of them where no hash is in more than six rows. Of a hash in more, each row is compared with the first and with
    the four before it, so that a chain of pairs still leads from one to the other where they are alike.

    Args:
        sketches: (N, 8) hashes, different ones, 0 for none.
    """
    number, size = sketches.shape
    hashes, rows = sketches.ravel(), np.repeat(np.arange(number), size)
    hashes, rows = hashes[hashes != 0], rows[hashes != 0]
    order = np.argsort(hashes, kind="stable")  # the rows of one hash one after the other, each after the earlier ones
    hashes, rows = hashes[order], rows[order]
    place = np.arange(len(hashes))
    is_first = np.ones(len(hashes), dtype=np.bool_)
    is_first[1:] = hashes[1:] != hashes[:-1]
    first = np.maximum.accumulate(np.where(is_first, place, 0))
    codes = [rows[first] * number + rows]
    for back in range(1, _BEFORE + 1):
        others = place[place - back > first]
        codes.append(rows[others - back] * number + rows[others])
    pairs, times = np.unique(np.concatenate(codes), return_counts=True)
    earlier, later = np.divmod(pairs[times > 1], max(1, number))
    earlier, later = earlier[earlier < later], later[earlier < later]
    starts = range(0, len(earlier), _PAIRS_AT_ONCE)
    parts = [slice(start, start + _PAIRS_AT_ONCE) for start in starts]
    near = [_num_shared(sketches[earlier[part]], sketches[later[part]]) >= SHARED for part in parts]
    is_near = np.concatenate([np.zeros(0, dtype=np.bool_), *near])
    return np.stack([earlier[is_near], later[is_near]], axis=1)


def near_copies(sketches: npt.NDArray[np.int64], text_keys: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(N,) whether a row is a near-copy of an earlier row, and no copy of it.

    Args:
        sketches: as `near_pairs` takes them.
        text_keys: (N,) hashes of the rows' words: copies are told otherwise.
    """
    earlier, later = near_pairs(sketches).T
    alike = np.zeros(len(sketches), dtype=np.bool_)
    alike[later[text_keys[earlier] != text_keys[later]]] = True
    return alike


def joined(number: int, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(number,) the lowest member of each one's group, where a chain of pairs leads from each to every other of it.

    Args:
        pairs: (num_pairs, 2) of 0 ... number - 1.
    """
    lowest = np.arange(number)
    while True:
        before = lowest.copy()
        ends = lowest[pairs]  # each end's lowest so far, which gets the lower of the two as well
        lower = ends.min(axis=1, initial=number)
        for places in (pairs[:, 0], pairs[:, 1], ends[:, 0], ends[:, 1]):
            np.minimum.at(lowest, places, lower)
        lowest = lowest[lowest]  # long chains in few rounds
        if np.array_equal(lowest, before):
            return lowest


def _num_shared(some: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(P,) how many hashes two sketches have in common, of (P, 8) sketches each."""
    shared = np.zeros(len(some), dtype=np.int64)
    for column in range(some.shape[1]):
        one = some[:, column : column + 1]
        shared += ((others == one) & (one != 0)).any(axis=1)
    return shared
