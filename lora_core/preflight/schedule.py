"""Checks of the plan: would so many steps, with this learning rate over them, learn anything?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lora_core.errors import counted
from lora_core.preflight.findings import Facts, Finding


def check_warmup_past_end(facts: Facts) -> Iterator[Finding]:
    """Warmup is as long as the run or longer: the learning rate never gets to what was asked for.

    The failure this project was born from. Steps, warmup and rates all look right on their own, the loss curve is flat,
    and nothing says why.

    Shorten the warmup, or make the run longer.
    """
    plan = facts.plan
    if plan.warmup_steps >= plan.total_optimizer_steps:
        healthy = plan.total_optimizer_steps // 10
        lost = 1 - plan.learning_rate_integral() / plan.with_warmup(healthy).learning_rate_integral()
        yield Finding(
            "warmup_past_end",
            "error",
            "the model would learn next to nothing: the run has "
            f"{counted(plan.total_optimizer_steps, 'optimizer step')}, warmup takes {plan.warmup_steps}, and the "
            f"learning rate would only reach {plan.peak_learning_rate:.3g}, {plan.peak_fraction:.1%} of the "
            f"{plan.learning_rate:g} asked for ({lost:.0%} of all learning lost)",
            plan.warmup_steps,
            healthy,
            f"train.warmup_steps={healthy}",
        )


def check_warmup_long(facts: Facts) -> Iterator[Finding]:
    """Warmup takes more than 30% of the run.

    The steps of a warmup run below the learning rate that was asked for; a third of the run spent so is a third of it
    half lost.

    10% of the steps is usual.
    """
    plan = facts.plan
    limit = math.floor(0.3 * plan.total_optimizer_steps)
    # One step of warmup is the least there is, and the default of a very short run.
    if max(limit, 1) < plan.warmup_steps < plan.total_optimizer_steps:
        share = plan.warmup_steps / plan.total_optimizer_steps
        yield Finding(
            "warmup_long",
            "warning",
            f"warmup takes {plan.warmup_steps} of {plan.total_optimizer_steps} optimizer steps ({share:.0%}); "
            "10% is usual",
            plan.warmup_steps,
            limit,
            f"train.warmup_steps={math.ceil(0.1 * plan.total_optimizer_steps)}",
        )


def check_few_steps(facts: Facts) -> Iterator[Finding]:
    """The run has fewer than 30 optimizer steps.

    Each step moves the adapter by about the learning rate; a handful of them does not take it far, whatever the data.

    More epochs, or fewer conversations a step.
    """
    plan = facts.plan
    if plan.total_optimizer_steps < 30:
        by_epochs = f"train.num_train_epochs={math.ceil(30 / plan.optimizer_steps_per_epoch)}"
        yield Finding(
            "few_steps",
            "warning",
            f"the run has only {counted(plan.total_optimizer_steps, 'optimizer step')}; adapters want 30 or more",
            plan.total_optimizer_steps,
            30,
            "train.max_steps=30" if facts.config.train.max_steps else by_epochs,
        )


def check_single_pass(facts: Facts) -> Iterator[Finding]:
    """A small file (under 500 rows) is seen once or less.

    Few rows teach little in one pass; large instruction sets are trained for one epoch, small ones for three to five.

    More epochs, and held-out rows to see when it is enough.
    """
    plan, train = facts.plan, facts.config.train
    if plan.num_rows < 500 and plan.total_optimizer_steps <= plan.optimizer_steps_per_epoch and plan.num_rows > 1:
        steps = max(30, 3 * plan.optimizer_steps_per_epoch)
        epochs = max(3, math.ceil(30 / plan.optimizer_steps_per_epoch))
        yield Finding(
            "single_pass",
            "warning",
            f"the {plan.num_rows} conversations are seen once at most; 3 to 5 passes are usual for so few",
            plan.total_optimizer_steps / plan.optimizer_steps_per_epoch,
            3,
            f"train.max_steps={steps}" if train.max_steps else f"train.num_train_epochs={epochs}",
        )


def check_batch_larger_than_data(facts: Facts) -> Iterator[Finding]:
    """One optimizer step would take more conversations than there are.

    Every epoch is then a single step, and a larger batch or more accumulation changes nothing any more.

    Less accumulation, a smaller batch, or fewer processes.
    """
    plan, train = facts.plan, facts.config.train
    if plan.rows_per_optimizer_step > plan.num_rows:
        # A quarter of the rows a step: four steps an epoch, if accumulation alone can bring that about.
        accumulation = max(1, plan.num_rows // (train.per_device_train_batch_size * plan.num_processes) // 4)
        fix: str | None = f"train.gradient_accumulation_steps={accumulation}"
        if accumulation == train.gradient_accumulation_steps:
            fix = "train.per_device_train_batch_size=1" if train.per_device_train_batch_size > 1 else None
        yield Finding(
            "batch_larger_than_data",
            "warning",
            f"an optimizer step takes up to {plan.rows_per_optimizer_step} conversations, but there are only "
            f"{plan.num_rows}: every epoch is a single step",
            plan.rows_per_optimizer_step,
            plan.num_rows,
            fix,
        )


def check_small_last_step(facts: Facts) -> Iterator[Finding]:
    """The last optimizer step of each epoch holds under a quarter of the conversations that the others hold.

    Its gradient is noisier and moves the adapter as far as any other.

    Nothing has to be done; another batch or accumulation divides the rows more evenly.
    """
    plan = facts.plan
    if plan.optimizer_steps_per_epoch > 1 and plan.last_step_rows * 4 < plan.rows_per_optimizer_step:
        yield Finding(
            "small_last_step",
            "note",
            f"the last optimizer step of each epoch holds {counted(plan.last_step_rows, 'conversation')}, the others "
            f"{plan.rows_per_optimizer_step}; its gradient is noisier and counts as much",
            plan.last_step_rows,
            math.ceil(plan.rows_per_optimizer_step / 4),
            None,
        )


def check_intervals_past_end(facts: Facts) -> Iterator[Finding]:
    """Log lines, evaluations or checkpoints would first come after the end of the run.

    A run of 10 steps that logs every 20 shows nothing of how it went.

    A shorter interval; a tenth of the run is usual, and every step for short ones.
    """
    total = facts.plan.total_optimizer_steps
    for name in ("logging_steps", "eval_steps", "save_steps"):
        interval = getattr(facts.config.train, name)
        if interval is not None and interval > total:
            yield Finding(
                f"{name}_past_end",
                "warning",
                f"train.{name}={interval}, but the run has {counted(total, 'optimizer step')}: it would come once, at "
                "the end, or never",
                interval,
                total,
                f"train.{name}={max(1, total // 10)}",
            )
