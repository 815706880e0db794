"""Alarms: signs, while a run is at work, that it does not learn. Each has the number and the likely cause.

Pure functions over what was seen so far. An alarm is a finding: an error is certain and stops the run
(`train.on_alarm=stop`), a warning may pass. Each is raised once in a run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_core.errors import counted
from lora_core.preflight.findings import Finding

_WINDOW = 5
"""Steps in a mean of losses: single steps are too noisy to compare."""
_ZERO_GRADIENTS = 3
_STEPS_TO_MOVE = 3
_CLIPPED_STEPS, _CLIPPED_SHARE = 30, 0.95
_RISE, _EXPLOSION = 0.1, 2.0
"""Of a mean loss: a rise by this share is one; at so many times the first losses the model is lost."""
_ERRORS_FROM_NOTHING, _ERRORS_FROM_NOISE = 2.0, 3.0
"""Standard errors: of the eval loss, paired (95%); of two means over five steps each, whose rows differ."""
_NEXT_TO_NOTHING, _MUCH_WORSE = 0.01, 0.1
"""Shares of the eval loss before training."""
_EVALUATIONS_WITHOUT_END = 2
_LEAKED = 0.35
"""Of the loss after other prompts: a 135M model gave a fifth of it to replies that stood in their prompts."""


@dataclass(frozen=True)
class StepSeen:
    """An optimizer step that was applied."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass
class Watch:
    """What the alarms look back on. A checkpoint holds it, so that a resumed run raises what it would have raised."""

    base: list[float] = field(default_factory=list)
    """Losses of the base model: those of the steps before the first update with a learning rate above 0."""
    first: list[StepSeen] = field(default_factory=list)
    """The first few steps."""
    recent: list[StepSeen] = field(default_factory=list)
    """The last few."""
    evaluations_without_end: int = 0
    """In a row, in which no sample reply ended."""
    raised: list[dict[str, Any]] = field(default_factory=list)
    """Alarms, as `Finding.to_dict` gives them, with the step."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Watch:
        steps = {name: [StepSeen(**step) for step in values[name]] for name in ("first", "recent")}
        return cls(**{**values, **steps})

    def note_step(self, seen: StepSeen) -> None:
        if all(earlier.learning_rate == 0 for earlier in self.first):
            self.base = [*self.base, seen.loss]
        self.first = [*self.first, seen][:_WINDOW]
        self.recent = [*self.recent, seen][-_CLIPPED_STEPS:]

    def note_replies(self, any_can_end: bool, any_ended: bool) -> None:
        """Of an evaluation.

        Args:
            any_can_end: there is a prompt that the base model answered to the end, and whose expected reply fits.
        """
        if any_can_end:
            self.evaluations_without_end = 0 if any_ended else self.evaluations_without_end + 1

    def new(self, findings: Sequence[Finding | None], step: int) -> list[Finding]:
        """Those that were not raised before, which are from now on."""
        known = {alarm["id"] for alarm in self.raised}
        fresh = [finding for finding in findings if finding is not None and finding.id not in known]
        self.raised += [{"step": step, **finding.to_dict()} for finding in fresh]
        return fresh

    @property
    def certain(self) -> list[dict[str, Any]]:
        """The errors among the alarms that were raised."""
        return [alarm for alarm in self.raised if alarm["severity"] == "error"]


# ---------------------------------------------------------------------------------------------------------------
# Before the first step


def labels_leak(num_examples: int, num_verbatim: int, loss: float, exchanged_loss: float) -> Finding | None:
    """Replies stand in their own prompts, and the base model reads them off: there is nothing to learn but copying.

    Args:
        num_examples: that were looked at, `num_verbatim` of them with the reply in the prompt, word for word.
        loss: of these replies, before training.
        exchanged_loss: of the same replies, each after the prompt of another example.
    """
    if 2 * num_verbatim < num_examples or loss > _LEAKED * exchanged_loss:
        return None
    return Finding(
        "labels_leak",
        "error",
        f"the prompt holds the reply: word for word in {num_verbatim} of {counted(num_examples, 'example')} that were "
        f"looked at, whose replies have a loss of {loss:.2f} before training, and of {exchanged_loss:.2f} after the "
        "prompts of other examples; served without the reply in its prompt, the model would know nothing",
        loss,
        _LEAKED * exchanged_loss,
        None,
    )


# ---------------------------------------------------------------------------------------------------------------
# After a step


def step_alarms(watch: Watch, warmup_steps: int, max_grad_norm: float | None) -> list[Finding | None]:
    """All alarms that losses and gradients can raise."""
    return [
        gradient_zero(watch.recent),
        loss_exploded(watch.base, watch.recent),
        loss_rising(watch.first, watch.recent, warmup_steps),
        gradient_clipped(watch.recent, max_grad_norm),
    ]


def gradient_zero(recent: Sequence[StepSeen]) -> Finding | None:
    """The gradient's norm was exactly 0 in the last steps: nothing that trains has a part in the loss."""
    last = recent[-_ZERO_GRADIENTS:]
    if len(last) < _ZERO_GRADIENTS or any(seen.grad_norm != 0 for seen in last):
        return None
    return Finding(
        "gradient_zero",
        "error",
        f"the gradient is exactly 0 in {counted(len(last), 'step')} in a row, to step {last[-1].step}: nothing that "
        "trains has a part in the loss, as with an adapter whose two matrices are both 0, or on modules that the model "
        "does not use",
        0.0,
        None,
        None,
    )


def steps_that_move(recent: Sequence[StepSeen]) -> bool:
    """Whether enough steps with a learning rate were taken for an adapter to have moved."""
    return sum(seen.learning_rate > 0 for seen in recent) >= _STEPS_TO_MOVE


def adapter_still(update_norm: float, step: int, grad_norm: float) -> Finding | None:
    """The adapter is, to the last bit, what it was at the start.

    Args:
        update_norm: Frobenius norm of the adapter's change since the start.
    """
    if update_norm > 0 or grad_norm == 0:  # without a gradient, `gradient_zero` says why
        return None
    return Finding(
        "adapter_still",
        "error",
        f"the adapter did not move: the norm of its change is 0 after step {step}, though the gradient has norm "
        f"{grad_norm:.3g}; the optimizer has other parameters than the model, or its updates are smaller than a number "
        "of this type can show",
        update_norm,
        None,
        None,
    )


def loss_not_finite(step: int, loss: float, grad_norm: float, learning_rate: float) -> Finding:
    """A step's loss or gradient is not a number. `train.max_skipped_steps` of them in a row stop the run."""
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    return Finding(
        "loss_not_finite",
        "warning",
        f"step {step} has {what}, which is not a finite number, and was not applied; the learning rate is too high, or "
        "a row holds what the model cannot compute",
        what,
        None,
        lower_rate(learning_rate) if learning_rate > 0 else None,
    )


def loss_exploded(base: Sequence[float], recent: Sequence[StepSeen]) -> Finding | None:
    """Each of the last steps has a multiple of the base model's loss: the run has diverged.

    Args:
        base: losses of the steps before anything was learned.
    """
    last = recent[-_WINDOW:]
    lowest = min((seen.loss for seen in last), default=0.0)
    if len(last) < _WINDOW or not base or lowest < _EXPLOSION * max(base) or lowest == 0:
        return None
    peak = max(seen.learning_rate for seen in recent)
    return Finding(
        "loss_exploded",
        "error",
        f"the run has diverged: training loss was {max(base):.2f} before anything was learned, and {lowest:.2f} or "
        f"more in each of the last {_WINDOW} steps, to step {last[-1].step}; the learning rate is too high (here up to "
        f"{peak:.1e})",
        lowest,
        _EXPLOSION * max(base),
        lower_rate(peak),
    )


def loss_rising(first: Sequence[StepSeen], recent: Sequence[StepSeen], warmup_steps: int) -> Finding | None:
    """The training loss is higher at the learning rate's peak than it was at the start.

    Looked at once, when as many steps came after the end of warmup as are compared with the first ones.
    """
    end_of_warmup = max(warmup_steps, _WINDOW)
    after = [seen for seen in recent if seen.step > end_of_warmup]
    if len(after) != _WINDOW or len(first) < _WINDOW:
        return None
    low, high = _mean(first), _mean(after)
    if high - low < max(_RISE * low, _ERRORS_FROM_NOISE * _spread(first, after)):
        return None
    peak = max(seen.learning_rate for seen in after)
    return Finding(
        "loss_rising",
        "warning",
        f"training loss is higher after warmup than at the start: {low:.3f} -> {high:.3f} ({high / low - 1:+.0%}, "
        f"means of the first {_WINDOW} steps and of the {_WINDOW} after step {end_of_warmup}); a rate of {peak:.1e} "
        "may be too high",
        high,
        low,
        lower_rate(peak),
    )


def gradient_clipped(recent: Sequence[StepSeen], max_grad_norm: float | None) -> Finding | None:
    """Almost every step's gradient is longer than `train.max_grad_norm`, so that all steps have the same length."""
    if max_grad_norm is None or len(recent) < _CLIPPED_STEPS:
        return None
    clipped = sum(seen.grad_norm > max_grad_norm for seen in recent)
    if clipped < _CLIPPED_SHARE * len(recent):
        return None
    median = statistics.median(seen.grad_norm for seen in recent)
    return Finding(
        "gradient_clipped",
        "warning",
        f"the gradient was clipped in {clipped} of the last {len(recent)} steps, to step {recent[-1].step}: its median "
        f"norm is {median:.3g} and train.max_grad_norm is {max_grad_norm:g}; the limit is below what is usual here, or "
        "the learning rate is so high that the loss has no calm place",
        median,
        max_grad_norm,
        f"train.max_grad_norm={2 * median:.2g}",
    )


# ---------------------------------------------------------------------------------------------------------------
# After an evaluation


def eval_loss_worse(
    step: int, before: float, change: float, standard_error: float | None, learning_rate: float
) -> Finding | None:
    """The eval loss is above that before training by more than its uncertainty.

    Args:
        before: eval loss before training.
        change: eval loss now minus before, over the same examples.
        standard_error: of `change`, paired over examples (`evaluate.compare_examples`); None for a single example.
        learning_rate: the highest so far.
    """
    error = standard_error if standard_error is not None else math.inf
    if change < max(_NEXT_TO_NOTHING * before, _ERRORS_FROM_NOTHING * error):
        return None
    much = change >= _MUCH_WORSE * before
    return Finding(
        "eval_loss_much_worse" if much else "eval_loss_worse",
        "error" if much else "warning",
        f"eval loss at step {step} is worse than before training: {before:.3f} -> {before + change:.3f} "
        f"({change / before:+.1%} ± {error / before:.1%}); training takes away more than it teaches, as with a "
        f"learning rate that is too high (here up to {learning_rate:.1e}) or with rows unlike the eval set",
        before + change,
        before,
        lower_rate(learning_rate) if learning_rate > 0 else None,
    )


def replies_without_end(watch: Watch, step: int, max_new_tokens: int) -> Finding | None:
    """No sample reply ends any more, where the base model ended some."""
    if watch.evaluations_without_end < _EVALUATIONS_WITHOUT_END:
        return None
    return Finding(
        "replies_without_end",
        "warning",
        f"no sample reply ended within {counted(max_new_tokens, 'token')} at the last {_EVALUATIONS_WITHOUT_END} "
        f"evaluations, to step {step}, and before training some did: the model unlearns the token that ends a turn, as "
        "with truncated replies or a template whose end of turn is no loss token; `lora-core rows` shows the mask",
        watch.evaluations_without_end,
        _EVALUATIONS_WITHOUT_END,
        None,
    )


def lower_rate(learning_rate: float) -> str:
    """A tenth of it, as the command line takes it."""
    return f"train.learning_rate={learning_rate / 10:.1e}"


def _mean(steps: Sequence[StepSeen]) -> float:
    return sum(seen.loss for seen in steps) / len(steps)


def _spread(first: Sequence[StepSeen], second: Sequence[StepSeen]) -> float:
    """Standard error of the difference of two means: sqrt(s1^2 / n1 + s2^2 / n2)."""
    return math.sqrt(sum(statistics.variance([seen.loss for seen in part]) / len(part) for part in (first, second)))
