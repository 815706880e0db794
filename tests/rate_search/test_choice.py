"""Which rates are tried, and which is taken."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.rate_search.choice import (
    Candidate,
    RangeStep,
    candidates_after,
    has_diverged,
    one_more,
    range_rates,
    shortened,
    take,
)
from lora_core.schedule import plan_schedule


@pytest.mark.parametrize(
    ("optimizer", "low", "high"),
    [("adamw_torch", 1e-5, 0.1), ("paged_lion_8bit", 1e-6, 0.01), ("lion_32bit", 1e-6, 0.01), ("sgd", 1e-4, 1.0)],
)
def test_rates_of_a_range_test_grow_by_one_factor(optimizer: str, low: float, high: float) -> None:
    rates = range_rates(optimizer, 30)
    assert (rates[0], rates[-1]) == (pytest.approx(low), pytest.approx(high))
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([(high / low) ** (1 / 29)] * 29)


def test_the_middle_candidate_is_a_quarter_of_where_the_loss_was_lowest() -> None:
    losses = [1.0, 1.0, 0.9, 0.6, 0.5, 0.6, 1.5]
    steps = [RangeStep(rate, loss, 1.0) for rate, loss in zip(range_rates("adamw_torch", 7), losses, strict=True)]
    rates, why = candidates_after(steps, 1e-4)
    assert rates == [5.4e-3, 1.6e-2, 1.8e-3]  # lowest mean of three at 0.0215
    assert "lowest at 2.2e-02 (-43%" in why


def test_where_the_loss_fell_nowhere_the_formula_is_in_the_middle() -> None:
    steps = [RangeStep(rate, 1.0, 1.0) for rate in range_rates("adamw_torch", 12)]
    rates, why = candidates_after(steps, 3e-4)
    assert rates == [3e-4, 9e-4, 1e-4]
    assert "fell nowhere" in why


def test_a_loss_above_the_base_models_or_not_a_number_ends_the_range_test() -> None:
    fine = [RangeStep(1e-4, 0.9, 1.0)] * 3
    assert not has_diverged(fine)
    assert not has_diverged([*fine, RangeStep(1e-2, 1.2, 1.0)])  # one bad step among good ones
    assert has_diverged([*fine, *[RangeStep(1e-2, 1.4, 1.0)] * 2])
    assert has_diverged([*fine, RangeStep(1e-2, math.nan, 1.0)])


def test_the_lowest_eval_loss_is_taken_where_the_candidates_are_whole_runs() -> None:
    low, best = Candidate(1e-4, 1.02, 0.02, 0.05), Candidate(3e-4, 1.0)
    assert take([low, best], share=1, middle=3e-4) == (best, None)


def test_of_rates_that_cannot_be_told_apart_the_lowest_is_taken_for_a_longer_run() -> None:
    low, best, high = Candidate(1e-4, 1.02, 0.02, 0.05), Candidate(3e-4, 1.0), Candidate(9e-4, 1.01, 0.01, 0.05)
    taken, why = take([low, best, high], share=0.5, middle=3e-4)
    assert taken is low
    assert why is not None
    assert "0.020 ± 0.050" in why
    far = Candidate(1e-4, 1.2, 0.2, 0.05)
    assert take([far, best, high], share=0.5, middle=3e-4) == (best, None)


def test_of_very_short_trainings_none_above_the_middle_is_taken() -> None:
    low, middle, best = Candidate(1e-4, 2.0, 1.0, 0.1), Candidate(3e-4, 1.5, 0.5, 0.1), Candidate(9e-4, 1.0)
    taken, why = take([low, middle, best], share=0.1, middle=3e-4)
    assert taken is middle
    assert why is not None
    assert "trained on 10% of the examples" in why
    assert take([low, middle, best], share=0.5, middle=3e-4) == (best, None)


def test_beyond_the_edge_one_more_is_tried() -> None:
    rates = (1e-4, 3e-4, 9e-4)
    for losses, expected in (((1, 2, 3), 3.3e-5), ((3, 2, 1), 2.7e-3), ((2, 1, 2), None)):
        assert one_more([Candidate(r, loss) for r, loss in zip(rates, losses, strict=True)]) == expected
    assert one_more([Candidate(0.2, 2.0), Candidate(0.6, 1.0)]) is None  # no rate is above 1


@given(st.integers(1, 60), st.sampled_from(["linear", "cosine", "constant"]), st.floats(1e-6, 1))
def test_as_many_steps_as_the_run_are_the_runs_own_rates(steps: int, kind: str, rate: float) -> None:
    plan = plan_schedule(
        100, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=steps, lr_scheduler_type=kind
    )
    scaled = [each * rate / plan.learning_rate for each in plan.learning_rates()]
    assert shortened(plan, steps, rate) == pytest.approx(scaled)
    assert len(shortened(plan, max(1, steps // 3), rate)) == max(1, steps // 3)
