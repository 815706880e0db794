"""Which learning rates to try, and which of them to take. Arithmetic only; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.schedule import SchedulePlan

# Lowest and highest rate of a range test, by the first word of the optimizer: four decades, around what is usual.
_RANGES = {"sgd": (1e-4, 1.0), "lion": (1e-6, 1e-2), "paged_lion": (1e-6, 1e-2)}
_RANGE = (1e-5, 1e-1)
# Between candidates: with three of them, any rate within a factor 5 of the middle one is within sqrt(3) of a candidate.
_SPACING = 3.0
# The loss falls in a range test up to a rate that a whole run does not survive.
_BELOW_LOWEST = 4.0
_WINDOW = 3
"""Steps in a mean: each has other rows."""
_LEAST_FALL = 0.02
LEAST_SHARE = 0.25
"""Of the run's examples: candidates that were trained on fewer say little of rates above the middle one."""
_DIVERGED = 1.1
"""Times the base model's loss on the same rows."""


@dataclass(frozen=True)
class RangeStep:
    """A step of a range test."""

    rate: float
    loss: float
    """Mean over the step's loss tokens."""
    base_loss: float
    """Of the base model, on the same rows."""

    @property
    def ratio(self) -> float:
        """What is left of the base model's loss; infinite where the loss is not a number."""
        return self.loss / self.base_loss if math.isfinite(self.loss) else math.inf


@dataclass(frozen=True)
class Candidate:
    """A rate that was trained, and judged on the eval set."""

    rate: float
    eval_loss: float
    """Infinite where the run did not survive."""
    worse_by: float = 0.0
    """Than the best candidate, in eval loss."""
    standard_error: float | None = None
    """Of `worse_by`, paired over the eval examples; None for the best one, or a single example."""


def range_rates(optimizer: str, num_steps: int) -> list[float]:
    """Rates of a range test, each the same factor above the one before.

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186, with a rate
    that grows exponentially, as fastai's `lr_find` has it.

    Args:
        optimizer: as `train.optim` names it.
        num_steps: 2 or more.
    """
    name = next((name for name in sorted(_RANGES, key=len, reverse=True) if optimizer.startswith(name)), None)
    low, high = _RANGE if name is None else _RANGES[name]
    growth = (high / low) ** (1 / (num_steps - 1))
    return [low * growth**step for step in range(num_steps)]


def smoothed(steps: Sequence[RangeStep]) -> list[float]:
    """The ratio of each step, as the mean over it and the steps just before."""
    ratios = [step.ratio for step in steps]
    windows = [ratios[max(0, index + 1 - _WINDOW) : index + 1] for index in range(len(ratios))]
    return [sum(window) / len(window) for window in windows]


def has_diverged(steps: Sequence[RangeStep]) -> bool:
    """The loss is above the base model's on the same rows, or not a number: higher rates tell nothing more."""
    return bool(steps) and (not math.isfinite(steps[-1].loss) or smoothed(steps)[-1] > _DIVERGED)


def candidates_after(steps: Sequence[RangeStep], fallback: float) -> tuple[list[float], str]:
    """Three rates to train with, the middle one first and the lowest last, and a sentence on why these.

    The middle one is a quarter of the rate at which the loss was lowest in the range test. That alone favours what
    diverges later, so the others are a third and three times it, and the eval set decides.

    Args:
        fallback: the middle one where the loss never fell.
    """
    ratios = smoothed(steps)
    best = min(range(len(steps)), key=lambda index: ratios[index], default=None)
    if best is None or ratios[best] > 1 - _LEAST_FALL:
        why = f"the loss fell nowhere in the range test, so the candidates lie around the formula's {fallback:.1e}"
        return _around(fallback), why
    middle = steps[best].rate / _BELOW_LOWEST
    why = (
        f"in the range test the loss was lowest at {steps[best].rate:.1e} ({ratios[best] - 1:+.0%} beside the base "
        "model's); the candidates lie around a quarter of that rate"
    )
    return _around(middle), why


def _around(middle: float) -> list[float]:
    return [two_digits(rate) for rate in (middle, middle * _SPACING, middle / _SPACING) if two_digits(rate) <= 1]


def two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def one_more(candidates: Sequence[Candidate]) -> float | None:
    """A rate past the best candidate, where that is the lowest or the highest of them; None if it is neither."""
    best = min(candidates, key=lambda candidate: candidate.eval_loss)
    rates = sorted(candidate.rate for candidate in candidates)
    if best.rate == rates[-1] and best.rate * _SPACING <= 1:
        return two_digits(best.rate * _SPACING)
    return two_digits(best.rate / _SPACING) if best.rate == rates[0] else None


def take(candidates: Sequence[Candidate], share: float, middle: float) -> tuple[Candidate, str | None]:
    """The rate of the lowest eval loss; and a line where another one is taken.

    Fewer examples than the run trains on favour higher rates. So where candidates had fewer, the lowest rate is taken
    whose eval loss is not above the best one's by more than its standard error; and where they had less than a quarter,
    none above the middle one, which the range test gave.

    Args:
        share: of the examples that the run trains on, those that a candidate was trained on; 1 for a whole run.
        middle: the middle candidate's rate.
    """
    best = min(candidates, key=lambda candidate: candidate.eval_loss)
    if share >= 1:
        return best, None
    if share < LEAST_SHARE and best.rate > middle:
        return next(candidate for candidate in candidates if candidate.rate == middle), (
            f"{best.rate:g} has the lowest eval loss, but the candidates were trained on {share:.0%} of the examples "
            f"that the run is, and so few favour high rates: the middle one is taken"
        )
    alike = [each for each in candidates if each.standard_error is not None and each.worse_by <= each.standard_error]
    lowest = min([best, *alike], key=lambda candidate: candidate.rate)
    if lowest is best:
        return best, None
    return lowest, (
        f"{best.rate:g} has the lowest eval loss, by less than its uncertainty ({lowest.worse_by:.3f} ± "
        f"{lowest.standard_error:.3f}); the lower rate is taken, as the run has more steps"
    )


def shortened(plan: SchedulePlan, num_steps: int, rate: float) -> list[float]:
    """Rates of a run with this peak and so many steps: the plan's schedule, in fewer steps.

    As many steps as the plan has give the plan's own rates.
    """
    total = plan.total_optimizer_steps
    factors = [rate / plan.learning_rate for rate in plan.learning_rates()]
    return [rate * factors[int((step + 0.5) * total / num_steps)] for step in range(num_steps)]
