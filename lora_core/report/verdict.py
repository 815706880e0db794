"""Whether a run worked, in one sentence: a function of what was measured, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_core.errors import counted
from lora_core.report.read import Run
from lora_core.report.words import (
    eval_losses,
    learning_rate,
    loss_text,
    num_steps,
    rate_text,
    speed,
    steps_taken,
)

# A change of the loss below this share of it is next to nothing; below the second, it is a little.
NEXT_TO_NOTHING, A_LITTLE = 0.01, 0.05
# A change is told from chance when it is so many standard errors away from none (95%, for a normal distribution).
_ERRORS_FROM_NOTHING = 2.0
# Eval loss wavers from one evaluation to the next; only a larger rise counts as one.
_RISE = 0.01
# Of the learning rate asked for, what a healthy run reaches; preflight's limits for steps and learning rates.
_HEALTHY_PEAK, _FEW_STEPS, _LOW_RATE, _HIGH_RATE = 0.9, 30, 1e-5, 1e-3
_MANY_SKIPPED = 0.1
_STEPS_IN_A_MEAN = 5


@dataclass(frozen=True)
class Outcome:
    """What a verdict goes by. None is what was not measured, or not recorded."""

    is_finished: bool = True
    eval_before: float | None = None
    """Mean cross-entropy per loss token of the eval set."""
    eval_after: float | None = None
    eval_error: float | None = None
    """Standard error of after minus before, over examples."""
    num_examples: int | None = None
    """Of the eval set."""
    num_better: int | None = None
    num_worse: int | None = None
    training: TrainingLoss | None = None
    over_fitting: OverFitting | None = None
    learning_rate: float | None = None
    """As asked for."""
    peak_learning_rate: float | None = None
    warmup_steps: int | None = None
    planned_steps: int | None = None
    steps: int | None = None
    """Optimizer steps taken."""
    num_skipped_steps: int = 0
    num_skipped_last: int = 0
    """Of them, those after the last step that was logged."""
    num_loss_tokens: int | None = None
    adapter_norm: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class TrainingLoss:
    """Means over the first and the last few logged steps: single steps are too noisy to compare."""

    first: float
    last: float
    num_steps: int
    """In each of the two means."""


@dataclass(frozen=True)
class OverFitting:
    """Eval loss rose again after its minimum, while training loss went on falling."""

    best_step: int
    best: float
    last_step: int
    last: float
    training_before: float
    """Mean training loss up to the minimum, over as many steps as came after it."""
    training_after: float
    is_best_kept: bool
    """The adapter is that of the minimum."""

    @property
    def fix(self) -> str:
        return f"train.keep_adapter=best, or train.max_steps={self.best_step}"


@dataclass(frozen=True)
class Verdict:
    kind: Literal["good", "poor", "bad", "open"]
    """open: it cannot be said."""
    sentence: str


def judge(outcome: Outcome) -> Verdict:
    """Say whether a run worked, and where it did not, why: from the figures alone."""
    if not outcome.is_finished:
        return Verdict("open", _so_far(outcome))
    if outcome.eval_before and outcome.eval_before > 0 and outcome.eval_after is not None:
        return _with_eval_set(outcome, outcome.eval_before, outcome.eval_after)
    return _without_eval_set(outcome)


def _with_eval_set(outcome: Outcome, before: float, after: float) -> Verdict:
    change = after / before - 1
    error = None if outcome.eval_error is None else outcome.eval_error / before
    spread = f"{change:+.1%}" + ("" if error is None else f" ± {error:.1%}")
    losses = f"eval loss {loss_text(before, after)} ({spread})"
    reasons = "; ".join(_reasons(outcome, change))
    because = f": {reasons}" if reasons else ""
    # A single example has no spread; then the size alone decides.
    is_chance = error is not None and abs(change) < _ERRORS_FROM_NOTHING * error
    if abs(change) >= NEXT_TO_NOTHING and is_chance:
        said = f"{losses}: too few examples ({outcome.num_examples}) to tell it from chance; fix: a larger eval set"
        return Verdict("open", f"this run may have {'learned' if change < 0 else 'made it worse'}: {said}")
    if change >= NEXT_TO_NOTHING:
        return Verdict("bad", f"this run made it worse: {losses}{_on(outcome.num_worse, outcome, 'worse')}{because}")
    if change > -NEXT_TO_NOTHING:
        because = because or ": the run's own figures do not say why"
        return Verdict("bad", f"this run learned next to nothing ({change:+.1%}){because}")
    measured = f"{losses}{_on(outcome.num_better, outcome, 'better')}"
    if change > -A_LITTLE:
        return Verdict("poor", f"learned a little: {measured}{because}")
    lost_the_best = outcome.over_fitting is not None and not outcome.over_fitting.is_best_kept
    return Verdict("poor" if lost_the_best else "good", "; ".join([f"learned: {measured}", *_flaws(outcome)]))


def _without_eval_set(outcome: Outcome) -> Verdict:
    unknown = "without an eval set it cannot be said whether it learned more than its training rows"
    fix = "fix: data.eval_fraction=0.1"
    if outcome.training is None:
        return Verdict("open", f"no loss was recorded, so it cannot be said what this run learned; {fix}")
    first, last, num = outcome.training.first, outcome.training.last, outcome.training.num_steps
    change = last / first - 1 if first > 0 else 0.0
    of = f"means of the first and last {counted(num, 'step')}" if num > 1 else "first and last step"
    losses = f"training loss {loss_text(first, last)} ({change:+.1%}, {of})"
    if change > -NEXT_TO_NOTHING:
        reasons = "; ".join([*_reasons(outcome, change), unknown])
        return Verdict("bad", f"this run seems to have learned next to nothing: {losses}: {reasons}; {fix}")
    return Verdict("open", "; ".join([losses, *_flaws(outcome), unknown, fix]))


def _so_far(outcome: Outcome) -> str:
    planned = f" of {outcome.planned_steps:,}" if outcome.planned_steps else ""
    parts = [f"not finished: {outcome.steps or 0:,}{planned} optimizer steps seen"]
    if outcome.eval_before and outcome.eval_after is not None:
        parts.append(f"eval loss so far {loss_text(outcome.eval_before, outcome.eval_after)}")
    if outcome.training is not None:
        parts.append(f"training loss {loss_text(outcome.training.first, outcome.training.last)}")
    if outcome.tokens_per_s is not None:
        parts.append(f"{outcome.tokens_per_s:,.0f} tokens/s")
    if outcome.num_skipped_last:
        steps = counted(outcome.num_skipped_last, "step")
        parts.append(f"then {steps} whose loss or gradient was not finite")
    return "; ".join(parts)


def _on(number: int | None, outcome: Outcome, what: str) -> str:
    if number is None or outcome.num_examples is None:
        return ""
    return f", {what} on {number:,} of {counted(outcome.num_examples, 'example')}"


def _peaked_low(outcome: Outcome) -> str | None:
    """What to say of a learning rate that never came near the one asked for."""
    asked, peak = outcome.learning_rate, outcome.peak_learning_rate
    if not asked or peak is None or peak >= _HEALTHY_PEAK * asked:
        return None
    return f"the learning rate peaked at {rate_text(peak)}, {peak / asked:.0%} of the {rate_text(asked)} asked for" + (
        f" ({counted(outcome.warmup_steps, 'warmup step')} in a run of {outcome.planned_steps:,})"
        if outcome.warmup_steps and outcome.planned_steps
        else ""
    )


def _skipped(outcome: Outcome) -> str:
    steps = f" of {outcome.steps:,}" if outcome.steps else ""
    verb = "was" if outcome.num_skipped_steps == 1 and not steps else "were"
    return f"{outcome.num_skipped_steps:,}{steps} optimizer steps {verb} not applied: loss or gradient was not finite"


def _reasons(outcome: Outcome, change: float) -> list[str]:
    """Why a loss did not fall (or rose: change > 0), the likeliest first."""
    reasons: list[str] = []
    rate, steps, low = outcome.peak_learning_rate, outcome.steps, _peaked_low(outcome)
    if steps and outcome.num_skipped_steps >= _MANY_SKIPPED * steps:
        reasons.append(_skipped(outcome))
    if low:
        reasons.append(low)
    elif rate is not None and rate < _LOW_RATE:
        reasons.append(f"a learning rate of {rate_text(rate)} is low for LoRA (1e-5 to 1e-3 is usual)")
    if outcome.adapter_norm == 0:
        reasons.append("the adapter did not move: its norm is 0")
    if outcome.over_fitting:
        reasons.append(_over_fitted(outcome.over_fitting))
    elif change > 0 and rate is not None and rate > _HIGH_RATE:
        reasons.append(f"a learning rate of {rate_text(rate)} is high for LoRA (1e-5 to 1e-3 is usual)")
    if change <= 0 and steps and steps < _FEW_STEPS:
        tokens = f" on {counted(outcome.num_loss_tokens, 'loss token')}" if outcome.num_loss_tokens else ""
        reasons.append(f"{counted(steps, 'optimizer step')}{tokens} rarely change an adapter")
    training = outcome.training
    if not reasons and outcome.eval_after is not None and training and training.last < (1 - A_LITTLE) * training.first:
        reasons.append(
            f"training loss fell ({loss_text(training.first, training.last)}), so the training rows do not teach what "
            "the eval set asks for"
        )
    return reasons


def _flaws(outcome: Outcome) -> list[str]:
    """What did not go as it should in a run that learned."""
    low = _peaked_low(outcome)
    return [
        *([_over_fitted(outcome.over_fitting)] if outcome.over_fitting else []),
        *([low] if low else []),
        *([_skipped(outcome)] if outcome.num_skipped_steps else []),
    ]


def _over_fitted(found: OverFitting) -> str:
    end = f"adapter/ is that of step {found.best_step}" if found.is_best_kept else f"fix: {found.fix}"
    return f"it over-fitted after step {found.best_step}, where eval loss was lowest ({found.best:.2f}); {end}"


# ---------------------------------------------------------------------------------------------------------------
# A run folder -> its outcome


def outcome_of(run: Run) -> Outcome:
    """What a run folder says."""
    before, after = eval_losses(run)
    return Outcome(
        is_finished=bool(run.summary),
        eval_before=before,
        eval_after=after,
        eval_error=run.number("summary", "eval_loss_change_error"),
        num_examples=run.count("summary", "num_eval_examples"),
        num_better=run.count("summary", "num_eval_examples_better"),
        num_worse=run.count("summary", "num_eval_examples_worse"),
        training=training_loss(run),
        over_fitting=over_fitting(run),
        learning_rate=learning_rate(run),
        peak_learning_rate=run.number("summary", "peak_learning_rate"),
        warmup_steps=run.count("summary", "warmup_steps"),
        planned_steps=num_steps(run),
        steps=steps_taken(run),
        num_skipped_steps=run.count("summary", "num_skipped_steps") or 0,
        num_skipped_last=sum(step > (steps_taken(run) or 0) for step in run.skipped_steps),
        num_loss_tokens=run.count("summary", "num_supervised_tokens"),
        adapter_norm=run.number("summary", "adapter_norm"),
        tokens_per_s=speed(run),
    )


def training_loss(run: Run) -> TrainingLoss | None:
    """Its means at the start and at the end; None where fewer than two steps were logged."""
    losses = [loss for _, loss in run.points("train_events", "loss")]
    if len(losses) < 2:
        return None
    num = min(_STEPS_IN_A_MEAN, len(losses) // 2)
    return TrainingLoss(_mean(losses[:num]), _mean(losses[-num:]), num)


def over_fitting(run: Run) -> OverFitting | None:
    """Whether eval loss rose again after its minimum while training loss went on falling."""
    measured = run.points("eval_events", "loss")
    if not measured:
        return None
    best_step, best = min(measured, key=lambda point: point[1])
    last_step, last = measured[-1]
    training = run.points("train_events", "loss")
    later = [loss for step, loss in training if step > best_step]
    # As many steps before the minimum as came after it: single steps are too noisy to compare.
    earlier = [loss for step, loss in training if step <= best_step][-len(later) :]
    if last <= best * (1 + _RISE) or not (later and earlier) or _mean(later) >= _mean(earlier):
        return None
    is_kept = run.number("summary", "adapter_step") == best_step
    return OverFitting(best_step, best, last_step, last, _mean(earlier), _mean(later), is_kept)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
