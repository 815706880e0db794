"""A file's examples in two: those trained on, and a seeded share that becomes the eval set.

Duplicates stay together, and near-copies too. Rows whose tokens or words are the same form a group, and so do rows that
share most of their sketch; a group goes to one side as a whole, so that nothing in the eval set has been trained on.

    rows     a  b  a' c  d        a' has the tokens or the words of a, or almost its words
    groups   0  1  0  2  3
    eval           -> {b} or {c} or {d} for one row, {a, a'} or two of the others for two

A group of more rows than the eval set is to have is trained on. Where such near-copies are more than half of all rows,
they are rows of one form, such as one long prompt with another name in each: an eval set without them would not measure
what is learned. They are then on both sides, as duplicates alone decide, and preflight says so (`eval_alike`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_core.data.alike import joined, near_pairs
from lora_core.data.counts import EncodedFile, RowFacts
from lora_core.errors import DataError


def hold_out(encoded: EncodedFile, fraction: float, seed: int) -> tuple[EncodedFile, EncodedFile]:
    """Split off a seeded share of the examples: (training set, eval set), a group at least on each side.

    The share is as near to the fraction as the sizes of the groups allow. Counts and rows of both are those of the
    whole file.

    Raises:
        DataError: there are fewer than two examples, or all are duplicates of each other.
    """
    num_examples = len(encoded.lengths)
    if num_examples < 2:
        raise DataError(
            f"data.eval_fraction={fraction} needs at least 2 rows, and {num_examples} was kept; "
            "fix: data.eval_fraction=0"
        )
    groups = duplicate_groups(encoded.rows, encoded.indices)
    if not groups.any():
        raise DataError(
            f"data.eval_fraction={fraction} needs at least 2 different rows, and all {num_examples:,} that were kept "
            "are duplicates of each other: the same tokens, or the same words; fix: data.eval_fraction=0, or "
            "data.eval_file=FILE"
        )
    near = near_pairs(encoded.rows.sketch[encoded.indices])
    groups = with_near_copies(groups, near, _num_wanted(num_examples, fraction))
    chosen = choose_groups(np.bincount(groups), fraction, seed)[groups]
    held_out, trained = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    counts = replace(
        encoded.counts,
        eval=len(held_out),
        eval_tokens=int(encoded.lengths[held_out].sum()),
        eval_supervised_tokens=int(encoded.rows.num_supervised[encoded.indices[held_out]].sum()),
    )

    def part(examples: npt.NDArray[Any]) -> EncodedFile:
        return replace(
            encoded,
            dataset=encoded.dataset.select(examples),
            lengths=encoded.lengths[examples],
            indices=encoded.indices[examples],
            counts=counts,
        )

    return part(trained), part(held_out)


def duplicate_groups(rows: RowFacts, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(num_examples,) the number of each example's group: 0, 1, ... in the order of their first examples.

    Two are in one group if they are of one row (data.split_turns), if their tokens are the same or their words, or if a
    chain of such pairs leads from one to the other.
    """
    first = np.arange(len(indices))  # of each example, the earliest one known to be in its group
    keys = [np.unique(key[indices], return_inverse=True)[1] for key in (rows.exact_key, rows.text_key, rows.line)]
    while True:
        before = first.copy()
        for key in keys:
            earliest = np.full(len(first), len(first))
            np.minimum.at(earliest, key, first)
            first = earliest[key]
        first = first[first]  # long chains in few rounds
        if np.array_equal(first, before):
            return np.unique(first, return_inverse=True)[1]


def with_near_copies(groups: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """(num_examples,) the groups, with those made one that near-copies join.

    Where joined groups of more than `most` examples hold more than half of all, they stay apart.

    Args:
        groups: as `duplicate_groups` numbers them.
        pairs: (num_pairs, 2) examples that are near-copies.
        most: examples that the eval set is to have.
    """
    by_group = joined(int(groups.max()) + 1, groups[pairs])
    is_joined, together = (np.bincount(by_group) > 1)[by_group][groups], by_group[groups]
    is_large = is_joined & (np.bincount(together)[together] > most)
    if 2 * int(is_large.sum()) > len(groups):
        together = np.where(is_large, groups, together)
    return np.unique(together, return_inverse=True)[1]


def _num_wanted(num_rows: int, fraction: float) -> int:
    """Rows of the eval set: at least one, and not all."""
    return min(num_rows - 1, max(1, round(num_rows * fraction)))


def choose_groups(sizes: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """(num_groups,) which groups become the eval set.

    In a seeded order each group is taken that still fits. Where that misses the wanted number of rows, as it may with
    few large groups, the nearest number that any choice of groups can give is worked out and taken instead.
    """
    num_rows = int(sizes.sum())
    wanted = _num_wanted(num_rows, fraction)
    order = np.random.default_rng([seed, 0xE7A1]).permutation(len(sizes))
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    left = wanted
    for group in order:
        if sizes[group] <= left:
            chosen[group] = True
            left -= int(sizes[group])
            if left == 0:
                return chosen
    return _nearest(sizes, order, wanted, num_rows)


def _nearest(
    sizes: npt.NDArray[np.int64], order: npt.NDArray[np.int64], wanted: int, num_rows: int
) -> npt.NDArray[np.bool_]:
    """Groups of as near to `wanted` rows as there are, not none and not all; of two that are as near, the fewer.

    Bit n of an int says that n rows can be had. There are few different sizes: s of them take s^2 / 2 rows.
    """
    different, number_of = np.unique(sizes, return_counts=True)
    reachable = [1]  # after the first 0, 1, ... sizes
    for size, number in zip(different.tolist(), number_of.tolist(), strict=True):
        bits, step, left = reachable[-1], 1, number
        while left:  # 1, 2, 4, ... groups at a time
            step = min(step, left)
            bits |= bits << (step * size)
            left -= step
            step *= 2
        reachable.append(bits)
    distances = (wanted + sign * distance for distance in range(num_rows) for sign in (-1, 1))
    total = next(n for n in distances if 0 < n < num_rows and reachable[-1] >> n & 1)
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    for before, size in zip(reachable[-2::-1], different[::-1].tolist(), strict=True):
        members = order[sizes[order] == size]
        number = next(n for n in range(len(members) + 1) if total >= n * size and before >> (total - n * size) & 1)
        chosen[members[:number]] = True
        total -= number * size
    return chosen
