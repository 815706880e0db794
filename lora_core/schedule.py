"""Rows -> micro-batches -> optimizer steps -> warmup -> learning rate. Arithmetic only; imports no torch.

The failure that this project began with, in numbers: 78 rows, batch 8, 1 epoch is 10 optimizer steps. With
`warmup_steps=100` step k of 10 runs at k/100 of the learning rate, k from 0 to 9: the largest rate that any update
used is 9.0% of the configured one. (The scheduler object then shows 10%, for a step 11 that never comes.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


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

    @property
    def peak_learning_rate(self) -> float:
        """The largest learning rate that any of the planned steps uses."""
        # Rises to step `warmup_steps`, then falls: the peak is there, or at the last step if that comes first.
        return self.learning_rate_at(min(self.warmup_steps, self.total_optimizer_steps - 1))

    @property
    def peak_fraction(self) -> float:
        """`peak_learning_rate` over the configured learning rate; 1.0 in a healthy run."""
        return self.peak_learning_rate / self.learning_rate

    def learning_rate_at(self, optimizer_step: int) -> float:
        """The learning rate of a step, counted from 0.

        The formula of transformers' `get_linear_schedule_with_warmup`: up from 0 over `warmup_steps`, then down to
        reach 0 just past the last step. Step 0 of a warmup therefore runs at learning rate 0.
        """
        if optimizer_step < self.warmup_steps:
            return self.learning_rate * (optimizer_step / max(1, self.warmup_steps))
        steps_left = self.total_optimizer_steps - optimizer_step
        return self.learning_rate * max(0.0, steps_left / max(1, self.total_optimizer_steps - self.warmup_steps))

    def learning_rate_integral(self) -> float:
        """Sum of all planned learning rates: what the run has to learn with."""
        return sum(self.learning_rates())

    def with_warmup(self, warmup_steps: int) -> SchedulePlan:
        """The same plan with another warmup."""
        return replace(self, warmup_steps=warmup_steps)

    def learning_rates(self) -> list[float]:
        """One learning rate per planned step."""
        return [self.learning_rate_at(step) for step in range(self.total_optimizer_steps)]


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
    if problems:
        raise ValueError("; ".join(problems))

    rows_per_micro_batch = per_device_train_batch_size * num_processes
    micro_batches_per_epoch = math.ceil(num_rows / rows_per_micro_batch)
    optimizer_steps_per_epoch = math.ceil(micro_batches_per_epoch / gradient_accumulation_steps)
    total = optimizer_steps_per_epoch * num_train_epochs if max_steps is None else max_steps
    rows_per_step = rows_per_micro_batch * gradient_accumulation_steps
    return SchedulePlan(
        num_rows=num_rows,
        num_processes=num_processes,
        rows_per_optimizer_step=rows_per_step,
        last_step_rows=num_rows - (optimizer_steps_per_epoch - 1) * rows_per_step,
        micro_batches_per_epoch=micro_batches_per_epoch,
        optimizer_steps_per_epoch=optimizer_steps_per_epoch,
        total_optimizer_steps=total,
        warmup_steps=warmup_steps if warmup_steps is not None else math.ceil(total * (warmup_ratio or 0.0)),
        learning_rate=learning_rate,
    )


def _is_int(value: float, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
