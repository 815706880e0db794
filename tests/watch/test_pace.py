"""How long a run still takes: each step, evaluation, checkpoint and reply that is left, as the loop takes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.watch.pace import Pace, PartsLeft, parts_left

STEPS = st.integers(1, 60)


@given(STEPS, STEPS, STEPS, st.data())
def test_parts_are_counted(total: int, eval_every: int, save_every: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total))
    later = range(step + 1, total + 1)
    evaluations = [each for each in later if each % eval_every == 0 or each == total]
    saves = [each for each in later if each % save_every == 0 or each == total]
    films = [each for each in evaluations if each != total]
    expected = PartsLeft(len(later), len(evaluations), len(films), len(saves), 1)
    assert parts_left(step, total, eval_every, save_every, has_eval_set=True, has_replies=True) == expected
    bare = parts_left(step, total, eval_every, save_every, has_eval_set=False, has_replies=False)
    assert bare == PartsLeft(len(later), 0, 0, len(saves), 0)


def test_the_time_left_is_the_mean_of_each_part_times_what_is_left() -> None:
    pace = Pace()
    left = PartsLeft(step=10, evaluation=2, film=1, save=3, replies=1)
    pace.note("evaluation", 7.0)
    assert pace.seconds_left(left) is None
    for seconds in (1.0, 3.0):
        pace.note("step", seconds)
    pace.note("replies", 4.0)
    assert pace.seconds_left(left) == pytest.approx(10 * 2 + 2 * 7 + 4)
    for _ in range(20):  # only the last ones count
        pace.note("step", 1.0)
    assert pace.seconds_left(left) == pytest.approx(10 + 2 * 7 + 4)
