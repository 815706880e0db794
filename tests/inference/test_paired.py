"""Differences of two models, against the definition and computations by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluation.evaluate import compare_examples
from lora_core.inference.paired import LossDifference, compare_exact, loss_difference


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=10))
def test_mcnemars_p_value_is_the_share_of_coin_tosses_that_are_as_uneven(pairs: list[tuple[bool, bool]]) -> None:
    found = compare_exact([a for a, _ in pairs], [b for _, b in pairs])
    different = [a for a, b in pairs if a != b]
    uneven = abs(2 * sum(different) - len(different))
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=len(different))]
    share = sum(abs(2 * heads - len(different)) >= uneven for heads in tosses) / len(tosses)
    assert found.p_value == pytest.approx(share)
    assert (found.only_first, found.only_second) == (sum(different), len(different) - sum(different))
    assert found.first - found.second == found.only_first - found.only_second
    assert found.num_questions == len(pairs)


def test_exact_replies_by_hand() -> None:
    first, second = [True] * 6 + [False] * 4, [True] * 5 + [False] + [True] * 4 + []
    found = compare_exact(first, second)
    # Of 5 that one alone has right, 1 is the first's: p = 2 * (1 + 5) / 32.
    assert (found.first, found.second, found.only_first, found.only_second) == (6, 9, 1, 4)
    assert found.p_value == 2 * (1 + 5) / 32
    assert str(found) == (
        "exact replies 6 and 9 of 10: 1 by the first alone, 4 by the second alone (McNemar's exact test: p = 0.38)"
    )
    assert compare_exact([True], [True]).p_value == 1


def test_the_interval_by_hand() -> None:
    first, second, tokens = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 4.0]), np.array([1, 1, 2])
    found = loss_difference(compare_examples(second, first, tokens))
    # d = (-0.5 + 0 - 2) / 4; the residuals t * (difference - d) are 0.125, 0.625 and -0.75.
    error = math.sqrt(3 / 2 * (0.125**2 + 0.625**2 + 0.75**2)) / 4
    assert (found.difference, found.standard_error) == (-0.625, pytest.approx(error))
    low, high = found.interval or (0, 0)
    assert (low, high) == (pytest.approx(-0.625 - 1.959964 * error), pytest.approx(-0.625 + 1.959964 * error))
    assert str(found) == (
        f"loss -0.6250, 95% interval {low:+.4f} to {high:+.4f} (lower on 2 of 3 examples, higher on 0)"
    )
    assert str(loss_difference(compare_examples(first, first, tokens))).endswith("; it holds 0, so this may be chance")
    assert LossDifference(0.5, None, 1, 0, 1).interval is None


@given(st.integers(0, 2**32 - 1))
def test_the_interval_turns_round_with_the_two_models(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second, tokens = random.normal(3, 1, 12), random.normal(3, 1, 12), random.integers(1, 50, 12)
    one = loss_difference(compare_examples(second, first, tokens))
    other = loss_difference(compare_examples(first, second, tokens))
    assert one.difference == pytest.approx(-other.difference)
    assert one.interval == pytest.approx([-end for end in reversed(other.interval or ())])
    assert (one.num_lower, one.num_higher) == (other.num_higher, other.num_lower)


def test_the_interval_holds_the_difference_of_all_rows_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 60, size=20_000)
    second = random.normal(3.0, 0.5, size=20_000)
    first = second - random.normal(0.05, 0.3, size=20_000)
    truth = float(((first - second) * tokens).sum() / tokens.sum())
    held = 0
    for _ in range(400):
        drawn = random.integers(0, 20_000, 80)
        low, high = loss_difference(compare_examples(second[drawn], first[drawn], tokens[drawn])).interval or (0, 0)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98
