"""How long a run will still take: its steps, and the evaluations, checkpoints and replies between and after them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Part = Literal["step", "evaluation", "film", "save", "replies"]
# The first steps are slow, and memory pressure or another program may change the pace: only the last ones count.
_LAST = 20


@dataclass(frozen=True)
class PartsLeft:
    """What is still to do after a step."""

    step: int
    evaluation: int
    film: int
    """Replies between the first and the last."""
    save: int
    replies: int


def parts_left(
    step: int, total: int, eval_every: int, save_every: int, has_eval_set: bool, has_replies: bool
) -> PartsLeft:
    """Count what comes after `step` of `total` optimizer steps.

    Args:
        eval_every: steps between evaluations; the last step has one too.
        save_every: steps between checkpoints; the last step has one too.
        has_replies: sample replies are made at the end.
    """
    evaluations = -(-total // eval_every) - step // eval_every if step < total else 0
    return PartsLeft(
        step=total - step,
        evaluation=evaluations if has_eval_set else 0,
        film=max(0, evaluations - 1) if has_replies else 0,
        save=-(-total // save_every) - step // save_every if step < total else 0,
        replies=int(has_replies),
    )


class Pace:
    """Seconds that each part of a run has taken in this process."""

    def __init__(self) -> None:
        self._seconds: dict[Part, deque[float]] = {}

    def note(self, part: Part, seconds: float) -> None:
        self._seconds.setdefault(part, deque(maxlen=_LAST)).append(seconds)

    @contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.note(part, time.monotonic() - started)

    def seconds_left(self, left: PartsLeft) -> float | None:
        """Number of each part left times its mean; None before the first step.

        A part that has not been seen yet, as the first checkpoint, counts for nothing.
        """
        if "step" not in self._seconds:
            return None
        return sum(float(getattr(left, part)) * sum(seen) / len(seen) for part, seen in self._seconds.items())
