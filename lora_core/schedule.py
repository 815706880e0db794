"""Rows -> micro-batches -> optimizer steps -> warmup -> learning rate. Arithmetic only; imports no torch.

The failure that this project began with, in numbers: 78 rows, batch 8, 1 epoch is 10 optimizer steps. With
`warmup_steps=100` step k of 10 runs at k/100 of the learning rate, k from 0 to 9: the largest rate that any update
used is 9.0% of the configured one. (The scheduler object then shows 10%, for a step 11 that never comes.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_min_lr": ("min_lr_rate", "num_cycles"),
    "warmup_stable_decay": ("num_decay_steps", "min_lr_ratio", "warmup_type", "decay_type", "num_cycles"),
}
"""Each `train.lr_scheduler_type` with what `train.lr_scheduler_kwargs` may set, as transformers names both."""


@dataclass(frozen=True)
class SchedulePlan:
    """What a run will do, before it does it. Steps are optimizer steps; micro-batches are counted per process."""

    num_rows: int
    num_processes: int
    rows_per_optimizer_step: int
    last_step_rows: int
    """Rows in the last step of an epoch: fewer than `rows_per_optimizer_step` if the rows do not divide evenly."""
    micro_batches_per_epoch: int
    optimizer_steps_per_epoch: int
    total_optimizer_steps: int
    warmup_steps: int
    learning_rate: float
    """As configured; reached at the end of warmup, if the run gets there."""
    lr_scheduler_type: str = "linear"
    """A key of `SCHEDULER_KWARGS`."""
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0
    """Steps that were taken before this schedule began, by the plan `before`: those of a run that is extended."""
    before: SchedulePlan | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulePlan:
        """What `dataclasses.asdict` made of a plan."""
        before = values["before"]
        return cls(**{**values, "before": None if before is None else cls.from_dict(before)})

    @property
    def scheduled_steps(self) -> int:
        """Steps of this schedule: all, but those of `before`."""
        return self.total_optimizer_steps - self.first_step

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate that any of the steps of this schedule uses."""
        return max(self.learning_rates()[self.first_step :])

    @property
    def peak_fraction(self) -> float:
        """`peak_learning_rate` over the configured learning rate; 1.0 in a healthy run."""
        return self.peak_learning_rate / self.learning_rate

    def learning_rate_at(self, optimizer_step: int) -> float:
        """The learning rate of a step, counted from 0: `learning_rate` times a factor, as transformers computes it.

        A linear warmup begins at 0, so step 0 of it moves nothing. What follows (u is the share of the rest of the run
        that is over, before this step):

            linear (`get_linear_schedule_with_warmup`)          1 - u
            cosine (`get_cosine_schedule_with_warmup`)          (1 + cos(2 pi num_cycles u)) / 2
            constant, constant_with_warmup                      1
            cosine_with_min_lr                                  min_lr_rate + (1 - min_lr_rate) cosine
            warmup_stable_decay (`get_wsd_schedule`)            1; in the last num_decay_steps to min_lr_ratio
        """
        if self.before is not None and optimizer_step < self.first_step:
            return self.before.learning_rate_at(optimizer_step)
        optimizer_step -= self.first_step
        if self.lr_scheduler_type == "warmup_stable_decay":
            return self.learning_rate * self._warmup_stable_decay(optimizer_step)
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        if optimizer_step < self.warmup_steps:
            return self.learning_rate * (optimizer_step / max(1, self.warmup_steps))
        if self.lr_scheduler_type == "constant_with_warmup":
            return self.learning_rate
        decay_steps = max(1, self.scheduled_steps - self.warmup_steps)
        if self.lr_scheduler_type == "linear":
            return self.learning_rate * max(0.0, (self.scheduled_steps - optimizer_step) / decay_steps)
        least = float(self.lr_scheduler_kwargs.get("min_lr_rate", 0.0))
        factor = _half_cosine((optimizer_step - self.warmup_steps) / decay_steps, self._num_cycles)
        return self.learning_rate * max(0.0, factor * (1 - least) + least)

    def _warmup_stable_decay(self, optimizer_step: int) -> float:
        settings = self.lr_scheduler_kwargs
        least, decay_steps = float(settings.get("min_lr_ratio", 0.0)), int(settings["num_decay_steps"])
        begin = self.scheduled_steps - decay_steps
        if optimizer_step < self.warmup_steps:
            steps_left = self.warmup_steps - optimizer_step
            factor = _falling(settings.get("warmup_type", "linear"), steps_left / self.warmup_steps, 0.5)
        elif optimizer_step < begin:
            return 1.0
        elif optimizer_step < self.scheduled_steps:
            progress = (optimizer_step - begin) / max(1, decay_steps)
            factor = _falling(settings.get("decay_type", "cosine"), progress, self._num_cycles)
        else:
            return least
        return max(0.0, factor * (1 - least) + least)

    @property
    def _num_cycles(self) -> float:
        return float(self.lr_scheduler_kwargs.get("num_cycles", 0.5))

    @property
    def first_step_is_lost(self) -> bool:
        """The first step runs at rate 0, as transformers' warmup does, and that is 1% of the schedule or more."""
        return self.learning_rate_at(self.first_step) == 0 and self.scheduled_steps <= 100

    def learning_rate_integral(self) -> float:
        """Sum of the learning rates of this schedule: what the run has to learn with."""
        return sum(self.learning_rates()[self.first_step :])

    def with_warmup(self, warmup_steps: int) -> SchedulePlan:
        """The same plan with another warmup."""
        return replace(self, warmup_steps=warmup_steps)

    def learning_rates(self) -> list[float]:
        """One learning rate per planned step."""
        return [self.learning_rate_at(step) for step in range(self.total_optimizer_steps)]


def largest_micro_batch(num_rows: int, at_most: int) -> int:
    """The most rows of a micro-batch, at most so many, into which so many rows of a step can be cut evenly."""
    return max(size for size in range(1, min(num_rows, at_most) + 1) if num_rows % size == 0)


def plan_schedule(
    num_rows: int,
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_epochs: int = 1,
    num_processes: int = 1,
    learning_rate: float = 5e-5,
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    max_steps: int | None = None,
    lr_scheduler_type: str = "linear",
    lr_scheduler_kwargs: Mapping[str, Any] | None = None,
) -> SchedulePlan:
    """Work out the steps of a run.

    A micro-batch takes up to `per_device_train_batch_size` rows on each process. A step takes up to
    `gradient_accumulation_steps` micro-batches. Neither crosses the end of an epoch: what is left over there is a
    smaller micro-batch and a smaller step, counted as one of each.

    >>> plan = plan_schedule(78, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=5)
    >>> plan.optimizer_steps_per_epoch, plan.total_optimizer_steps
    (10, 50)

    Args:
        num_rows: examples that are trained on, without dropped rows.
        warmup_steps: optimizer steps; wins over `warmup_ratio`.
        warmup_ratio: share of all optimizer steps, rounded up.
        max_steps: replaces `num_train_epochs`; may stop inside an epoch or go past it.
        lr_scheduler_type: as transformers names it; `constant` has no warmup, whatever the two arguments say.
        lr_scheduler_kwargs: what transformers' schedule of that type takes; see `SCHEDULER_KWARGS`.

    Raises:
        ValueError: a count that is no int or below 1, a warmup or learning rate out of range; names every one.
    """
    counts = {
        "num_rows": num_rows,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_train_epochs": num_train_epochs,
        "num_processes": num_processes,
        "max_steps": 1 if max_steps is None else max_steps,
    }
    problems = [f"{name}={count}: must be an int >= 1" for name, count in counts.items() if not _is_int(count, 1)]
    if warmup_steps is not None and not _is_int(warmup_steps, 0):
        problems.append(f"warmup_steps={warmup_steps}: must be an int >= 0")
    if warmup_ratio is not None and not 0 <= warmup_ratio < 1:
        problems.append(f"warmup_ratio={warmup_ratio}: must be a float in [0, 1)")
    if not 0 < learning_rate < math.inf:
        problems.append(f"learning_rate={learning_rate}: must be a float > 0")
    problem = schedule_problem(lr_scheduler_type, lr_scheduler_kwargs or {})
    problems += [] if problem is None else [problem]
    if problems:
        raise ValueError("; ".join(problems))

    rows_per_micro_batch = per_device_train_batch_size * num_processes
    micro_batches_per_epoch = math.ceil(num_rows / rows_per_micro_batch)
    optimizer_steps_per_epoch = math.ceil(micro_batches_per_epoch / gradient_accumulation_steps)
    total = optimizer_steps_per_epoch * num_train_epochs if max_steps is None else max_steps
    rows_per_step = rows_per_micro_batch * gradient_accumulation_steps
    warmup = warmup_steps if warmup_steps is not None else math.ceil(total * (warmup_ratio or 0.0))
    return SchedulePlan(
        num_rows=num_rows,
        num_processes=num_processes,
        rows_per_optimizer_step=rows_per_step,
        last_step_rows=num_rows - (optimizer_steps_per_epoch - 1) * rows_per_step,
        micro_batches_per_epoch=micro_batches_per_epoch,
        optimizer_steps_per_epoch=optimizer_steps_per_epoch,
        total_optimizer_steps=total,
        warmup_steps=0 if lr_scheduler_type == "constant" else warmup,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        lr_scheduler_kwargs=dict(lr_scheduler_kwargs or {}),
    )


def extended(before: SchedulePlan, first_step: int, rest: SchedulePlan) -> SchedulePlan:
    """The plan of a run that is extended: `before` up to a step, and from there a schedule of its own.

    Args:
        before: by which the first `first_step` steps were taken.
        rest: of the steps that are left, as if they were a run of their own, with its own warmup.

    >>> sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    >>> plan = extended(plan_schedule(8, **sizes, max_steps=16), 16, plan_schedule(8, **sizes, max_steps=8))
    >>> plan.total_optimizer_steps, plan.scheduled_steps, plan.learning_rate_at(16)
    (24, 8, 5e-05)
    """
    return replace(
        rest, total_optimizer_steps=first_step + rest.total_optimizer_steps, first_step=first_step, before=before
    )


_RANGES = {"min_lr_rate": (0.0, 1.0), "min_lr_ratio": (0.0, 1.0), "num_cycles": (0.0, 100.0)}
_SHAPES = ("linear", "cosine", "1-sqrt")


def schedule_problem(lr_scheduler_type: str, settings: Mapping[str, Any]) -> str | None:
    """What is wrong with `lr_scheduler_type` and `lr_scheduler_kwargs`, with a fix; None if nothing."""
    if lr_scheduler_type not in SCHEDULER_KWARGS:
        return f"lr_scheduler_type={lr_scheduler_type}: must be one of {', '.join(SCHEDULER_KWARGS)}"
    known = SCHEDULER_KWARGS[lr_scheduler_type]
    for name, value in settings.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            return f"lr_scheduler_kwargs: {name}: lr_scheduler_type={lr_scheduler_type} {takes}"
        if name == "num_decay_steps":
            problem = None if _is_int(value, 1) else "an int >= 1"
        elif name in ("warmup_type", "decay_type"):
            problem = None if value in _SHAPES else f"one of {', '.join(_SHAPES)}"
        else:
            low, high = _RANGES[name]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            problem = None if is_number and low <= value <= high else f"a float in [{low:g}, {high:g}]"
        if problem is not None:
            return f"lr_scheduler_kwargs: {name}={value}: must be {problem}"
    needed = {"cosine_with_min_lr": ("min_lr_rate", 0.1), "warmup_stable_decay": ("num_decay_steps", 10)}
    if lr_scheduler_type not in needed or needed[lr_scheduler_type][0] in settings:
        return None
    missing, example = needed[lr_scheduler_type]
    return (
        f"lr_scheduler_type={lr_scheduler_type} needs lr_scheduler_kwargs with {missing}; "
        f"fix: 'train.lr_scheduler_kwargs={{{missing}: {example}}}'"
    )


def _half_cosine(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _falling(shape: str, progress: float, num_cycles: float) -> float:
    """From 1 to 0 as `progress` goes from 0 to 1."""
    if shape == "linear":
        return 1.0 - progress
    return _half_cosine(progress, num_cycles) if shape == "cosine" else 1.0 - math.sqrt(progress)


def _is_int(value: float, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
