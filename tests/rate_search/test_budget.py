"""What the time allows: never more than there is, never more than the run does, and a refusal whose fix is enough."""

from __future__ import annotations

import re

from hypothesis import assume, given
from hypothesis import strategies as st

from lora_core.errors import ConfigError
from lora_core.rate_search.budget import Speed, Work, allot, with_steps

RUNS = st.builds(Work, st.integers(1, 64), st.integers(1, 5000), st.integers(1, 2000))
SPEEDS = st.builds(Speed, st.floats(1e-3, 60), st.floats(1e-4, 20))


@given(st.floats(1, 7200), SPEEDS, RUNS)
def test_it_fits_and_is_no_more_than_the_run(seconds: float, speed: Speed, run: Work) -> None:
    try:
        work = allot(seconds, speed, run)
    except ConfigError:
        assume(False)
    assert speed.seconds(work) <= seconds * 1.0001
    assert work.rows_per_step <= run.rows_per_step
    assert work.steps <= run.steps
    assert work.eval_examples <= run.eval_examples
    assert work.range_steps >= 12


@given(st.floats(1, 600), SPEEDS, RUNS)
def test_a_refusal_names_minutes_that_are_enough(seconds: float, speed: Speed, run: Work) -> None:
    try:
        allot(seconds, speed, run, spent=30)
        assume(False)
    except ConfigError as error:
        found = re.search(r"fix: --budget-minutes (\d+)", str(error))
        assert found is not None
        allot(60 * int(found[1]) - 30, speed, run, spent=30)


def test_with_time_enough_all_is_done_as_the_run_does_it() -> None:
    assert allot(3600, Speed(0.01, 0.003), Work(8, 50, 40)) == Work(8, 50, 40, 30)


def test_steps_are_cut_first_then_eval_examples_then_examples_of_a_step() -> None:
    speed, run = Speed(0.3, 0.1), Work(8, 50, 40)
    assert allot(300, speed, run) == Work(8, 27, 40, 28)
    assert allot(150, speed, run) == Work(8, 12, 40, 14)
    assert allot(60, speed, run) == Work(4, 8, 30, 12)


def test_time_that_was_gained_goes_into_steps_and_lost_time_takes_them() -> None:
    speed, run = Speed(0.1, 0.01), Work(8, 50, 40)
    work = Work(8, 20, 40, 30)
    assert with_steps(1000, speed, run, work).steps == 50
    assert with_steps(30, speed, run, work).steps == 11
    assert with_steps(0, speed, run, work).steps == 8
