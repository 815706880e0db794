"""Two models on the same examples: how much they differ, and how much of that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_core.errors import counted
from lora_core.evaluation.evaluate import Comparison

# The normal distribution's: 95% of it is within so many standard deviations.
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class LossDifference:
    """The eval loss of one model minus that of another, over the same loss tokens."""

    difference: float
    standard_error: float | None
    """Over examples; None for a single one."""
    num_examples: int
    num_lower: int
    """Examples on which the first model's loss is lower."""
    num_higher: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the difference: 1.96 standard errors to each side.

        Miller 2024, "Adding Error Bars to Evals", https://arxiv.org/abs/2411.00640, section 2.1. It comes from the
        normal distribution, so for fewer than some 30 examples it is too narrow.
        """
        if self.standard_error is None:
            return None
        half = _NORMAL_95 * self.standard_error
        return self.difference - half, self.difference + half

    def __str__(self) -> str:
        where = f"lower on {self.num_lower:,} of {counted(self.num_examples, 'example')}, higher on {self.num_higher:,}"
        if self.interval is None:
            return f"loss {self.difference:+.4f}; one example has no interval"
        low, high = self.interval
        said = "" if low > 0 or high < 0 else "; it holds 0, so this may be chance"
        return f"loss {self.difference:+.4f}, 95% interval {low:+.4f} to {high:+.4f} ({where}){said}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval_95": None if self.interval is None else list(self.interval)}


def loss_difference(comparison: Comparison) -> LossDifference:
    """From `compare_examples(second, first, num_tokens)`, which says where its standard error comes from."""
    return LossDifference(
        difference=comparison.change,
        standard_error=comparison.standard_error,
        num_examples=comparison.num_examples,
        num_lower=comparison.num_better,
        num_higher=comparison.num_worse,
    )


@dataclass(frozen=True)
class ExactDifference:
    """Exact replies of two models to the same questions."""

    num_questions: int
    first: int
    """Exact replies of the first model."""
    second: int
    only_first: int
    """Questions that the first model alone answers exactly."""
    only_second: int
    p_value: float
    """Of McNemar's exact test."""

    def __str__(self) -> str:
        return (
            f"exact replies {self.first:,} and {self.second:,} of {self.num_questions:,}: {self.only_first:,} by the "
            f"first alone, {self.only_second:,} by the second alone (McNemar's exact test: p = {self.p_value:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_exact(first: Sequence[bool], second: Sequence[bool]) -> ExactDifference:
    """Compare which questions two models answer exactly.

    Only questions that one model alone answers say which is better. If neither is, each of those n is as likely the
    first's as the second's, so the first's number is binomial(n, 1/2): McNemar's test in its exact conditional form, as
    in Fagerland, Lydersen, Laake 2013, https://doi.org/10.1186/1471-2288-13-91, p = 2 sum(C(n, k) / 2^n) for k from 0
    to the smaller of the two numbers, and at most 1.

    Args:
        first, second: (N,) whether the reply to each question was exact.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    different = only_first + only_second
    tail = sum(math.comb(different, k) for k in range(min(only_first, only_second) + 1))
    return ExactDifference(
        num_questions=len(pairs),
        first=sum(first),
        second=sum(second),
        only_first=only_first,
        only_second=only_second,
        p_value=min(1.0, 2 * tail / 2**different),
    )
