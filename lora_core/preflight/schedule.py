"""Checks of the plan: would so many steps, with this learning rate over them, learn anything?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_core.errors import counted
from lora_core.preflight.findings import Facts, Finding

ENOUGH_STEPS = 30
_FEW_ROWS = 500
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 5  # that are usual on few rows


@dataclass(frozen=True)
class _Remedy:
    """Overrides for a step and a length that leave none of the findings below, so that their fixes agree."""

    step: str
    length: str
    is_enough: bool
    """Whether the run then has enough steps; otherwise it needs more rows."""
    smaller_steps: str
    """`step`, with `length` where `max_steps` of smaller steps would see the rows once at most."""


def _remedy(facts: Facts) -> _Remedy:
    """Smaller steps first, then more epochs, up to the usual."""
    plan, train = facts.plan, facts.config.train
    batch_size, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps

    def rows_a_step(size: int, micro_batches: int) -> int:
        return size * micro_batches * plan.num_processes

    def steps_an_epoch(size: int, micro_batches: int) -> int:
        return math.ceil(math.ceil(plan.num_rows / (size * plan.num_processes)) / micro_batches)

    step_sizes = [(batch_size, n) for n in range(accumulation, 0, -1)] + [(n, 1) for n in range(batch_size - 1, 0, -1)]
    # An epoch of four steps, where there are as many examples.
    step_sizes = [pair for pair in step_sizes if 4 * rows_a_step(*pair) <= plan.num_rows] or [(1, 1)]
    fewest_epochs = _MOST_EPOCHS if train.max_steps else train.num_train_epochs
    if _is_single_pass(facts):
        fewest_epochs = max(fewest_epochs, _FEWEST_EPOCHS)
    epochs_tried = range(fewest_epochs, max(fewest_epochs, _MOST_EPOCHS) + 1)
    lengths = ((epochs, pair) for epochs in epochs_tried for pair in step_sizes)
    enough = next((each for each in lengths if each[0] * steps_an_epoch(*each[1]) >= ENOUGH_STEPS), None)
    epochs, (size, micro_batches) = enough or (fewest_epochs, step_sizes[0])
    changed = {
        "train.per_device_train_batch_size": (batch_size, size),
        "train.gradient_accumulation_steps": (accumulation, micro_batches),
    }
    step = _overrides(changed)
    if not train.max_steps:
        length = _overrides({"train.num_train_epochs": (train.num_train_epochs, epochs)})
        return _Remedy(step, length, enough is not None, smaller_steps=step)
    pass_steps = steps_an_epoch(size, micro_batches)
    becomes_single_pass = _has_few_rows(facts) and train.max_steps <= pass_steps
    passes = _FEWEST_EPOCHS * pass_steps if becomes_single_pass else 0
    wanted = max(train.max_steps, passes, ENOUGH_STEPS if enough else 0)
    length = _overrides({"train.max_steps": (train.max_steps, wanted)})
    smaller_steps = f"{step} {length}" if becomes_single_pass else step
    return _Remedy(step, length, enough is not None, smaller_steps.strip())


def _overrides(changed: Mapping[str, tuple[int, int]]) -> str:
    """What differs, as the command line takes it."""
    return " ".join(f"{key}={value}" for key, (before, value) in changed.items() if value != before)


def _has_few_rows(facts: Facts) -> bool:
    return 1 < facts.plan.num_rows < _FEW_ROWS


def _is_single_pass(facts: Facts) -> bool:
    return _has_few_rows(facts) and facts.plan.total_optimizer_steps <= facts.plan.optimizer_steps_per_epoch


def check_warmup_past_end(facts: Facts) -> Iterator[Finding]:
    """Warmup is as long as the run or longer: the learning rate never reaches `train.learning_rate`.

    The failure that this project began with. Steps, warmup and rates each look right, the loss curve is flat, and
    nothing says why.

    Shorten the warmup, or make the run longer.
    """
    plan = facts.plan
    if plan.warmup_steps >= plan.scheduled_steps:
        healthy = plan.scheduled_steps // 10
        lost = 1 - plan.learning_rate_integral() / plan.with_warmup(healthy).learning_rate_integral()
        yield Finding(
            "warmup_past_end",
            "error",
            "the model would learn next to nothing: the run has "
            f"{counted(plan.scheduled_steps, 'optimizer step')}, warmup takes {plan.warmup_steps}, and the "
            f"learning rate would only reach {plan.peak_learning_rate:.3g}, {plan.peak_fraction:.1%} of the "
            f"configured {plan.learning_rate:g} ({lost:.0%} of all learning lost)",
            plan.warmup_steps,
            healthy,
            f"train.warmup_steps={healthy}",
        )


def check_warmup_long(facts: Facts) -> Iterator[Finding]:
    """Warmup takes more than 30% of the run.

    Warmup steps run below the configured learning rate, at half of it on average; 30% of warmup loses 15% of the run.

    10% of the steps is usual.
    """
    plan = facts.plan
    limit = math.floor(0.3 * plan.scheduled_steps)
    # One step of warmup is the least there is, and the default of a very short run.
    if max(limit, 1) < plan.warmup_steps < plan.scheduled_steps:
        share = plan.warmup_steps / plan.scheduled_steps
        yield Finding(
            "warmup_long",
            "warning",
            f"warmup takes {plan.warmup_steps} of {plan.scheduled_steps} optimizer steps ({share:.0%}); 10% is usual",
            plan.warmup_steps,
            limit,
            f"train.warmup_steps={math.ceil(0.1 * plan.scheduled_steps)}",
        )


def check_decay_past_end(facts: Facts) -> Iterator[Finding]:
    """Warmup and the decay of `warmup_stable_decay` together are longer than the run.

    The decay is counted back from the last step, so the rate would jump down where warmup ends and never be at its
    configured value.

    A shorter decay; a fifth of the steps or less is usual.
    """
    plan = facts.plan
    if plan.lr_scheduler_type != "warmup_stable_decay":
        return
    decay = int(plan.lr_scheduler_kwargs["num_decay_steps"])
    left = plan.scheduled_steps - plan.warmup_steps
    if 0 < left < decay:
        settings = {**plan.lr_scheduler_kwargs, "num_decay_steps": max(1, plan.scheduled_steps // 5)}
        words = ", ".join(f"{name}: {value}" for name, value in settings.items())
        yield Finding(
            "decay_past_end",
            "error",
            f"warmup takes {plan.warmup_steps} of {counted(plan.scheduled_steps, 'optimizer step')}, and "
            f"num_decay_steps={decay} more than the {left} that are left: the rate would jump down after warmup",
            decay,
            left,
            f"'train.lr_scheduler_kwargs={{{words}}}'",
        )


def check_single_pass(facts: Facts) -> Iterator[Finding]:
    """A small file (under 500 rows) is seen once or less.

    Few rows teach little in one epoch; large instruction sets are trained for one epoch, small ones for three to five.

    More epochs, and an eval set to see when it is enough.
    """
    plan = facts.plan
    if _is_single_pass(facts):
        yield Finding(
            "single_pass",
            "warning",
            f"the {plan.num_rows} examples are seen once at most; {_FEWEST_EPOCHS} to {_MOST_EPOCHS} epochs are usual "
            "for so few",
            plan.total_optimizer_steps / plan.optimizer_steps_per_epoch,
            _FEWEST_EPOCHS,
            _remedy(facts).length,
        )


def check_few_steps(facts: Facts) -> Iterator[Finding]:
    """The run has fewer than 30 optimizer steps.

    Each step moves the adapter by about the learning rate; a few steps do not change it much, whatever the data.

    Smaller steps (less accumulation, a smaller batch), then up to 5 epochs; where that is not enough, more rows.
    """
    plan = facts.plan
    if plan.total_optimizer_steps < ENOUGH_STEPS:
        remedy = _remedy(facts)
        smallest = math.ceil(plan.num_rows / plan.num_processes)
        yield Finding(
            "few_steps",
            "warning",
            f"the run has only {counted(plan.total_optimizer_steps, 'optimizer step')}; fewer than {ENOUGH_STEPS} "
            "steps rarely change an adapter"
            + (
                ""
                if remedy.is_enough
                else f", and {counted(plan.num_rows, 'example')} give at most {_MOST_EPOCHS * smallest} in the usual "
                f"{_MOST_EPOCHS} epochs: it needs more rows"
            ),
            plan.total_optimizer_steps,
            ENOUGH_STEPS,
            f"{remedy.step} {remedy.length}".strip() if remedy.is_enough else None,
        )


def check_batch_larger_than_data(facts: Facts) -> Iterator[Finding]:
    """One optimizer step would take more examples than there are.

    Every epoch is then a single step, and a larger batch or more accumulation changes nothing.

    Fewer accumulation steps, a smaller batch, or fewer processes.
    """
    plan = facts.plan
    if plan.rows_per_optimizer_step > plan.num_rows:
        has_too_many = plan.num_processes > plan.num_rows
        too_many = f", whatever the settings: {plan.num_processes:,} processes are more than there are examples"
        yield Finding(
            "batch_larger_than_data",
            "warning",
            f"an optimizer step takes up to {plan.rows_per_optimizer_step} examples, but there "
            f"{'is' if plan.num_rows == 1 else 'are'} only {plan.num_rows}: every epoch is a single step"
            + (too_many if has_too_many else ""),
            plan.rows_per_optimizer_step,
            plan.num_rows,
            None if has_too_many else _remedy(facts).smaller_steps or None,
        )


def check_batch_large_for_rows(facts: Facts) -> Iterator[Finding]:
    """One optimizer step takes more than a quarter of the examples.

    An epoch is then two or three steps. LoRA loses more by large batches than full fine-tuning does, whatever its rank
    ("LoRA Without Regret", https://thinkingmachines.ai/blog/lora/), and few rows give few steps.

    A smaller step: less accumulation, or a smaller batch.
    """
    plan, train = facts.plan, facts.config.train
    per_device = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if per_device > 1 and plan.num_rows < 4 * plan.rows_per_optimizer_step <= 4 * plan.num_rows:
        yield Finding(
            "batch_large_for_rows",
            "warning",
            f"an optimizer step takes {plan.rows_per_optimizer_step} of {counted(plan.num_rows, 'example')}: an epoch "
            f"is {counted(plan.optimizer_steps_per_epoch, 'step')}, and LoRA learns less from few large steps",
            plan.rows_per_optimizer_step,
            plan.num_rows // 4,
            _remedy(facts).smaller_steps,
        )


def check_small_last_step(facts: Facts) -> Iterator[Finding]:
    """The last optimizer step of each epoch has fewer than a quarter of the examples of the other steps.

    Its gradient is noisier and moves the adapter as far as any other.

    No action is needed; another batch size or accumulation divides the rows more evenly.
    """
    plan = facts.plan
    if plan.optimizer_steps_per_epoch > 1 and plan.last_step_rows * 4 < plan.rows_per_optimizer_step:
        yield Finding(
            "small_last_step",
            "note",
            f"the last optimizer step of each epoch has {counted(plan.last_step_rows, 'example')}, the others "
            f"{plan.rows_per_optimizer_step}; its gradient is noisier and counts as much",
            plan.last_step_rows,
            math.ceil(plan.rows_per_optimizer_step / 4),
            None,
        )


def check_intervals_past_end(facts: Facts) -> Iterator[Finding]:
    """Log lines, evaluations or checkpoints would first come after the end of the run.

    A run of 10 steps that logs every 20 shows nothing of its course.

    A shorter interval; a tenth of the run is usual, and every step for short ones.
    """
    total = facts.plan.total_optimizer_steps
    for name in ("logging_steps", "eval_steps", "save_steps"):
        interval = getattr(facts.config.train, name)
        if interval is not None and interval > total:
            yield Finding(
                f"{name}_past_end",
                "warning",
                f"train.{name}={interval}, but the run has {counted(total, 'optimizer step')}: it would happen once, "
                "at the end, or never",
                interval,
                total,
                f"train.{name}={max(1, total // 10)}",
            )
