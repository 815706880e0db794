"""How much of a search the time allows. Arithmetic only; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lora_core.errors import ConfigError, counted

NUM_CANDIDATES = 3
FORWARD_SHARE = 1 / 3
"""Of the time of a training step: a forward pass alone."""
_RANGE_STEPS, _LEAST_RANGE_STEPS = 30, 12
_STEPS, _LEAST_STEPS = 60, 8
"""Of each candidate."""
_LEAST_EVAL = 8
_RANGE_SHARE, _EVAL_SHARE = 0.3, 0.2
"""Of the time: at most for the range test, and for evaluations."""


@dataclass(frozen=True)
class Work:
    """What a search does; or what the run itself would do."""

    rows_per_step: int
    steps: int
    """Of each candidate."""
    eval_examples: int
    range_steps: int = _RANGE_STEPS

    def __str__(self) -> str:
        return (
            f"a range test of {counted(self.range_steps, 'step')}, {NUM_CANDIDATES} candidates of "
            f"{counted(self.steps, 'step')}, {counted(self.rows_per_step, 'example')} a step, "
            f"{counted(self.eval_examples, 'eval example')}"
        )


@dataclass(frozen=True)
class Speed:
    """Measured on the first steps."""

    row_s: float
    """Seconds of an example in a training step."""
    eval_example_s: float
    """Seconds of an eval example, without a backward pass."""

    def range_step_s(self, rows: int) -> float:
        """A step, and the base model's loss on its rows."""
        return rows * self.row_s * (1 + FORWARD_SHARE)

    def seconds(self, work: Work) -> float:
        """All of it: the eval set is looked at before, and after each candidate."""
        return (
            work.range_steps * self.range_step_s(work.rows_per_step)
            + NUM_CANDIDATES * work.steps * work.rows_per_step * self.row_s
            + (NUM_CANDIDATES + 1) * work.eval_examples * self.eval_example_s
        )


def allot(seconds: float, speed: Speed, run: Work, spent: float = 0.0) -> Work:
    """What fits into the time: at most the run's own steps and examples, and fewer of each where it must.

    Fewer steps come first, then fewer eval examples; fewer examples a step last, for the best rate depends on them.

    Args:
        seconds: that are left.
        spent: seconds that were used before, for the message.

    Raises:
        ConfigError: not even the least fits; names the minutes that would.
    """
    least = Work(1, min(_LEAST_STEPS, run.steps), min(_LEAST_EVAL, run.eval_examples), _LEAST_RANGE_STEPS)
    if speed.seconds(least) > seconds:
        minutes = math.ceil((spent + 1.2 * speed.seconds(least)) / 60)
        raise ConfigError(
            f"--budget-minutes: {max(0.0, seconds) / 60:.1f} minutes are left for steps that take {speed.row_s:.1f} s "
            f"an example, and the least takes {speed.seconds(least) / 60:.1f}; fix: --budget-minutes {minutes}"
        )
    evaluation_s = (NUM_CANDIDATES + 1) * speed.eval_example_s
    most = min(_EVAL_SHARE * seconds, seconds - speed.seconds(replace(least, eval_examples=0)))
    affordable = int(most / evaluation_s)
    work = replace(least, eval_examples=min(run.eval_examples, max(least.eval_examples, affordable)))
    while speed.seconds(replace(work, rows_per_step=work.rows_per_step + 1)) <= seconds:
        if work.rows_per_step == run.rows_per_step:
            break
        work = replace(work, rows_per_step=work.rows_per_step + 1)
    most = min(_RANGE_SHARE * seconds, seconds - speed.seconds(replace(work, range_steps=0)))
    in_range = int(most / speed.range_step_s(work.rows_per_step))
    work = replace(work, range_steps=max(work.range_steps, min(_RANGE_STEPS, in_range)))
    return with_steps(seconds - work.range_steps * speed.range_step_s(work.rows_per_step), speed, run, work)


def with_steps(seconds: float, speed: Speed, run: Work, work: Work) -> Work:
    """As many steps for each candidate as fit into the time for candidates and evaluations."""
    for_steps = seconds - (NUM_CANDIDATES + 1) * work.eval_examples * speed.eval_example_s
    affordable = int(for_steps / (NUM_CANDIDATES * work.rows_per_step * speed.row_s))
    return replace(work, steps=min(run.steps, _STEPS, max(min(_LEAST_STEPS, run.steps), affordable)))
