"""Raises the alarms of a run: asks `alarms` after each step, evaluation and reply, and says what is new.

Every rank sees the same figures and raises the same alarms, so that all stop or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.checkpoints.adapter_folder import named_trainable
from lora_core.config.schema import RunConfig
from lora_core.evaluation.evaluate import ExampleLosses, compare_with_before
from lora_core.evaluation.generation import Reply
from lora_core.evaluation.leak import LeakSeen
from lora_core.preflight.findings import Finding
from lora_core.runtime.ranks import from_first_rank, sum_over_ranks
from lora_core.schedule import SchedulePlan
from lora_core.training.step import StepResult
from lora_core.watch.alarms import (
    StepSeen,
    adapter_still,
    eval_loss_worse,
    labels_leak,
    loss_not_finite,
    replies_without_end,
    step_alarms,
    steps_that_move,
)
from lora_core.watch.journal import Journal
from lora_core.watch.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of each trained tensor, so many values are remembered: an update reaches them all.
_VALUES = 1024


class Lookout:
    """Of one run."""

    def __init__(self, config: RunConfig, plan: SchedulePlan, journal: Journal) -> None:
        self._config = config.train
        self._plan = plan
        self._journal = journal
        self._adapter: list[tuple[nn.Parameter, Tensor]] = []
        """What trains, with values of the start; empty once it is known that it moves."""

    def watch_adapter(self, model: nn.Module) -> None:
        """Remember the adapter as it is: at the start, or where a run was resumed."""
        self._adapter = [(parameter, _values(parameter).clone()) for _, parameter in named_trainable(model)]

    def before_training(self, progress: Progress, seen: LeakSeen | None) -> None:
        if seen is not None:
            found = labels_leak(seen.num_examples, seen.num_verbatim, seen.loss, seen.exchanged_loss)
            self._raise(progress, [found])

    def after_step(self, progress: Progress, result: StepResult) -> None:
        step, watch = progress.step, progress.watch
        if result.overflowed:  # how float16's loss scale is found
            return
        if not result.is_finite:
            self._raise(progress, [loss_not_finite(step, result.loss, result.grad_norm, result.learning_rate)])
            return
        watch.note_step(StepSeen(step, result.loss, result.grad_norm, result.learning_rate))
        found = step_alarms(watch, self._plan.first_step + self._plan.warmup_steps, self._config.max_grad_norm)
        # A schedule that begins anew, as that of an extended run, begins at rate 0: such a step moves nothing.
        if self._adapter and result.learning_rate > 0 and steps_that_move(watch.recent):
            found.append(adapter_still(self._update_norm(), step, result.grad_norm))
            self._adapter = []
        self._raise(progress, found)

    def after_evaluation(self, progress: Progress, losses_before: Path, examples: ExampleLosses) -> None:
        """The losses before are in a file, which the main process reads."""
        comparison = from_first_rank(lambda: compare_with_before(losses_before, examples))
        if comparison is not None and progress.before is not None:
            rate = max(self._plan.learning_rates()[: progress.step])
            change, error = comparison.change, comparison.standard_error
            self._raise(progress, [eval_loss_worse(progress.step, progress.before.loss, change, error, rate)])

    def after_replies(
        self,
        progress: Progress,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[dict[str, Any]],
        replies: Sequence[Reply],
    ) -> None:
        """Only prompts count that the base model answered to the end, and whose expected reply fits."""
        limit = self._config.sample_max_new_tokens
        ended_before = progress.ended_before or []
        ended = [
            reply.is_whole
            for prompt, reply, could_end in zip(prompts, replies, ended_before, strict=False)
            if could_end and len(tokenizer(prompt["expected"], add_special_tokens=False)["input_ids"]) < limit
        ]
        progress.watch.note_replies(bool(ended), any(ended))
        self._raise(progress, [replies_without_end(progress.watch, progress.step, limit)])

    def stops(self, progress: Progress) -> bool:
        """Whether an alarm ends the run."""
        return self._config.on_alarm == "stop" and bool(progress.watch.certain)

    def why(self, progress: Progress, kept: str = "") -> str:
        """Why the run stops, for whoever sees only the last lines.

        Args:
            kept: what to add on a checkpoint.
        """
        alarms = progress.watch.certain
        fixes = list(dict.fromkeys(alarm["fix"] for alarm in alarms if alarm["fix"]))
        return (
            f"stopped by an alarm after step {progress.step} of {self._plan.total_optimizer_steps}: "
            + "; ".join(f"{alarm['message']} [{alarm['id']}]" for alarm in alarms)
            + f"{kept}; fix: {', or '.join([*fixes, 'train.on_alarm=warn to train on all the same'])}"
        )

    def _raise(self, progress: Progress, findings: Sequence[Finding | None]) -> None:
        """Say and record those that are new."""
        for finding in progress.watch.new(findings, progress.step):
            self._journal.record("alarm", {"step": progress.step, **finding.to_dict()})
            self._journal.say(f"alarm: {finding}", "always")

    def _update_norm(self) -> float:
        """Frobenius norm of the change of the remembered values, over all ranks."""
        # On the CPU: MPS has no float64.
        squares = [(_values(parameter) - start).cpu().double().square().sum() for parameter, start in self._adapter]
        return math.sqrt(float(sum_over_ranks(torch.stack(squares).sum())))


def _values(parameter: nn.Parameter) -> Tensor:
    """(at most 1,024,) the first values, of a sharded tensor those that are here."""
    here: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    values = here.detach().flatten()[:_VALUES]
    assert isinstance(values, Tensor)
    return values
