"""A run from its first step to its last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from lora_core.checkpoints.checkpoint import CheckpointWriter, take_snapshot
from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import pad_id
from lora_core.data.packing import Batching, BatchPrefetcher, RowIndices, StepBatches, eval_batching, step_rows
from lora_core.errors import RankFault, RunStopped, TrainingError, counted
from lora_core.evaluation.evaluate import EvalResult, ExampleLosses, evaluate_examples, write_examples
from lora_core.evaluation.generation import Reply
from lora_core.evaluation.replies import describe_reply, reply_to_all
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.preflight.findings import Facts
from lora_core.preflight.memory import cheapest_change
from lora_core.report.words import duration_text
from lora_core.runtime.console import Kind
from lora_core.runtime.devices import peak_memory_bytes, random_states, set_random_states
from lora_core.runtime.faults import StopSignals, free_memory
from lora_core.runtime.ranks import greatest_of_ranks
from lora_core.training.lookout import Lookout
from lora_core.training.step import StepDropped, StepResult, train_step
from lora_core.untrusted.text import printable
from lora_core.watch.journal import Journal
from lora_core.watch.pace import Pace, parts_left
from lora_core.watch.progress import Progress

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

EVAL_EXAMPLES = "eval_examples.json"
"""In the run folder: the loss of each eval example, before and after."""


@dataclass
class Run:
    """A run between its setup and its summary: the parts, and what is done with them."""

    config: RunConfig
    asked_config: RunConfig
    """As it was asked for: a run that resumed on another number of processes has other accumulation steps."""
    accelerator: Accelerator
    facts: Facts
    fingerprint: str
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    batching: Batching
    scaler: torch.amp.GradScaler | None
    writer: CheckpointWriter
    prompts: list[Any]
    progress: Progress
    resumed_at_step: int | None
    journal: Journal
    lookout: Lookout

    def __post_init__(self) -> None:
        self.pace = Pace()
        self.example_losses: dict[int, ExampleLosses] = {}
        """Of the eval set, by step: at the last evaluation, and at the best of those before it."""
        self.prefetcher = BatchPrefetcher(self.batches, self.facts.plan.total_optimizer_steps)

    def train(self) -> None:
        """All steps that are left, with the evaluations and checkpoints between them."""
        config, plan, progress = self.config.train, self.facts.plan, self.progress
        eval_every = config.eval_steps or plan.optimizer_steps_per_epoch
        save_every = config.save_steps or plan.optimizer_steps_per_epoch
        patience = config.early_stopping_patience or math.inf
        self.model.train()
        self.lookout.watch_adapter(self.model)
        total = plan.total_optimizer_steps
        with self.progress_bar() as bar, StopSignals() as signals:
            while progress.step < total and progress.evaluations_since_best < patience:
                try:
                    result, tokens_per_s = self.take_step(lambda: signals.any_rank() is not None)
                except StepDropped:
                    self.save()
                    self.stop(signals)
                seconds_left = self.seconds_left()
                bar.set_postfix_str(
                    f"loss {result.loss:.3f}, lr {result.learning_rate:.1e}, {tokens_per_s:.0f} tok/s, "
                    f"{duration_text(seconds_left)} left",
                    refresh=False,
                )
                bar.update()
                is_last = progress.step == total
                if not result.is_finite:
                    self.note_skipped(result)
                elif progress.step % config.logging_steps == 0 or is_last:
                    self.journal.log_step(self.step_values(result, tokens_per_s, seconds_left), total)
                self.lookout.after_step(progress, result)
                is_best = False
                if progress.step % eval_every == 0 or is_last:
                    measured = self.measure()
                    is_best = measured is not None and progress.note_evaluation(measured)
                    if not is_last:
                        self.film()
                is_last = is_last or progress.evaluations_since_best >= patience
                stopped = signals.any_rank() is not None
                keeps_best = is_best and config.keep_adapter == "best"
                gives_up = progress.skipped_in_a_row >= config.max_skipped_steps
                alarmed = self.lookout.stops(progress)
                # The last step too: a longer run, or another one, may start from there.
                saves = is_last or stopped or gives_up or alarmed or keeps_best or progress.step % save_every == 0
                if saves:
                    with self.pace.timing("save"):
                        self.save()
                if gives_up:
                    self.finish_saving()
                    raise TrainingError(
                        f"{counted(progress.skipped_in_a_row, 'step')} in a row had a loss or gradient that is not "
                        f"finite (train.max_skipped_steps) and {'was' if progress.skipped_in_a_row == 1 else 'were'} "
                        "skipped; the adapter is that of the last good step"
                        + f", in {self.checkpoint_path(progress.step)}"
                        + "; fix: the rows above, a lower train.learning_rate, or train.bf16=true or "
                        "model.dtype=float32 in place of float16"
                    )
                if alarmed and not is_last:  # after the last step there is nothing to stop; the verdict says it all
                    self.finish_saving()
                    kept = f"; a checkpoint is in {self.checkpoint_path(progress.step)}"
                    raise TrainingError(self.lookout.why(progress, kept))
                if stopped and not is_last:
                    self.stop(signals)
        self.finish_saving()
        if progress.step < total:
            self.say(
                f"stopped early: {counted(progress.evaluations_since_best, 'evaluation')} in a row without a lower "
                f"eval loss than {progress.best.loss if progress.best else math.nan:.4f} at step "
                f"{progress.best_step}; {progress.step} of {total} steps were taken",
                "always",
            )
        # The plan is the run. This can only fail by a fault in this file, which must not go unseen.
        elif self.scheduler.last_epoch != plan.scheduled_steps:
            raise TrainingError(
                f"{plan.scheduled_steps} optimizer steps were planned and taken, but the schedule is at "
                f"{self.scheduler.last_epoch}"
            )

    def progress_bar(self) -> tqdm[Any]:
        # disable=None: no bar where stderr is not a terminal; the log lines say it all. The time that tqdm would work
        # out itself knows nothing of evaluations.
        return tqdm(
            total=self.facts.plan.total_optimizer_steps,
            initial=self.progress.step,
            disable=None if self.journal.console.has_bar else True,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def seconds_left(self) -> float | None:
        """Of the whole run: steps, evaluations, checkpoints and sample replies."""
        config, plan = self.config.train, self.facts.plan
        eval_every = config.eval_steps or plan.optimizer_steps_per_epoch
        save_every = config.save_steps or plan.optimizer_steps_per_epoch
        has_eval_set, total = self.facts.eval_data is not None, plan.total_optimizer_steps
        left = parts_left(self.progress.step, total, eval_every, save_every, has_eval_set, bool(self.prompts))
        return self.pace.seconds_left(left)

    def stop(self, signals: StopSignals) -> NoReturn:
        """End the run for a signal, with the checkpoint that was begun."""
        self.finish_saving()
        total = self.facts.plan.total_optimizer_steps
        raise RunStopped(
            f"stopped by {signals.any_rank()} after step {self.progress.step} of {total}; "
            f"a checkpoint is in {self.folder / 'checkpoints'}; fix: --resume"
        )

    def take_step(self, should_stop: Callable[[], bool]) -> tuple[StepResult, float]:
        """The next optimizer step -> (its result, tokens/s). Where memory runs out, in smaller micro-batches.

        Raises:
            StepDropped: `should_stop` said so between two micro-batches; all is as it was before the step.
        """
        self.average(False)
        started = time.monotonic()
        step, lengths = self.progress.step, self.facts.train_data.lengths
        states = random_states()
        while True:
            taken = self.prefetcher.take(step, self.batching)
            try:
                result = train_step(
                    self.accelerator,
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    taken.batches,
                    self.config.train.max_grad_norm,
                    self.scaler,
                    should_stop,
                )
                break
            except StepDropped:
                set_random_states(states)
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = self.batching.halved(taken.cuts, lengths)
                # FSDP keeps what a failed step gathered and summed up, where no `zero_grad` reaches it.
                alone = self.accelerator.num_processes == 1 and not self.accelerator.is_fsdp2
                if smaller is None or not alone or not self.config.train.auto_batch_size:
                    raise self.out_of_memory(error) from error
            # Past the except, whose traceback would hold the step's tensors.
            self.optimizer.zero_grad()
            set_random_states(states)
            self.batching, self.progress.micro_batch_limit = smaller, smaller.limit
            self.say(
                f"warning: step {step + 1}: out of memory; repeated with micro-batches of at most "
                f"{self.batching_limit()} (train.auto_batch_size); same step, same gradient",
                "always",
            )
            free_memory()
        step_s = time.monotonic() - started
        self.pace.note("step", step_s)
        num_tokens = int(lengths[self.step_rows(step)].sum())
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.progress.num_supervised_tokens += result.num_supervised_tokens
        self.progress.train_time_s += step_s
        self.progress.num_skipped_steps += not result.is_finite
        # One that overflowed is how a loss scale is found, and no fault.
        is_fault = not result.is_finite and not result.overflowed
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if is_fault else 0
        return result, num_tokens / step_s

    def average(self, on: bool) -> None:
        """Put the average of a schedule-free optimizer in place of the weights that it trains, or back."""
        wrapped: Any = self.optimizer  # Accelerate's, which knows whether there is an average
        wrapped.eval() if on else wrapped.train()

    def batches(self, step: int, batching: Batching) -> StepBatches:
        """This rank's share of a step."""
        data, accelerator = self.facts.train_data, self.accelerator
        cuts = batching.cut(self.step_rows(step), data.lengths, accelerator.num_processes, accelerator.process_index)
        return StepBatches(cuts, [batching.tensors(data.dataset, cut) for cut in cuts])

    def step_rows(self, step: int) -> RowIndices:
        """The rows of a step, over all ranks."""
        plan = self.facts.plan
        return step_rows(plan.num_rows, plan.rows_per_optimizer_step, self.config.train.seed, step)

    def say(self, line: str, kind: Kind = "detail") -> None:
        self.journal.say(line, kind)

    def batching_limit(self) -> str:
        return f"{self.batching.limit} {'tokens' if self.config.data.packing else 'rows'}"

    def out_of_memory(self, error: BaseException) -> RankFault:
        """What happened, the predicted memory, and the cheapest change."""
        memory = self.facts.memory
        fix, plan = cheapest_change(self.facts) if memory else (None, None)
        return RankFault(
            f"step {self.progress.step + 1}: out of memory on {self.accelerator.device} (rank "
            f"{self.accelerator.process_index}): {(str(error).splitlines() or [type(error).__name__])[0]}\n"
            f"{memory or 'predicted peak memory: not known'}\n"
            f"Fix: {fix or 'a smaller model'}"
            + (f" ({plan.total_bytes / 2**30:.1f} GiB predicted)" if plan else "")
            + ("" if self.config.train.auto_batch_size else ", or train.auto_batch_size=true")
        )

    def step_values(self, result: StepResult, tokens_per_s: float, seconds_left: float | None) -> dict[str, Any]:
        """What a step gave, for metrics.jsonl; call it in every rank."""
        return {
            "step": self.progress.step,
            "epoch": round(self.progress.step / self.facts.plan.optimizer_steps_per_epoch, 4),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "num_supervised_tokens": result.num_supervised_tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "peak_memory_bytes": self.peak_memory_bytes(),
            "seconds_left": None if seconds_left is None else round(seconds_left, 1),
            **({} if result.learning_rate_b is None else {"learning_rate_b": result.learning_rate_b}),
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
        }

    def peak_memory_bytes(self) -> int:
        """Of the fullest rank; call it in every rank."""
        return greatest_of_ranks(peak_memory_bytes(self.accelerator.device))

    def note_skipped(self, result: StepResult) -> None:
        """Log the rows of the step that was not applied, or that its loss scale was too large."""
        if result.overflowed:
            self.journal.record("skipped", {"step": self.progress.step, "loss_scale": result.loss_scale})
            self.say(
                f"step {self.progress.step}: the gradient overflowed float16 at a loss scale of {result.loss_scale:g}, "
                "so the step was skipped; the next has half the scale"
            )
            return
        dataset, places = self.facts.train_data.dataset, self.facts.train_data.places
        lines = sorted(int(dataset[int(row)]["line"]) for row in self.step_rows(self.progress.step - 1))
        self.journal.record("skipped", {"step": self.progress.step, "lines": [*map(places.mark, lines)]})
        self.say(
            f"warning: step {self.progress.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so "
            f"the step was skipped; its rows: {self.config.data.train_source} {places.listed(lines)}",
            "always",
        )

    def measure(self) -> EvalResult | None:
        """Eval loss; None without an eval set."""
        if self.facts.eval_data is None:
            return None
        step = self.progress.step
        with self.pace.timing("evaluation"):
            result, examples = self._evaluate(self.facts.eval_data)
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"eval loss at step {step} is {result.loss}, not a finite number; fix: a lower train.learning_rate"
            )
        if step == 0 and self.accelerator.is_main_process:
            write_examples(self.folder / EVAL_EXAMPLES, self.facts.eval_data, examples)
        kept = {best: losses for best, losses in self.example_losses.items() if best == self.progress.best_step}
        self.example_losses = {**kept, step: examples}
        values = {"step": step, **result.to_dict()}
        self.journal.evaluated(values, str(result))
        if step > 0:
            self.lookout.after_evaluation(self.progress, self.folder / EVAL_EXAMPLES, examples)
        return result

    def measure_examples(self) -> ExampleLosses | None:
        """The loss of each eval example, as the model is now; None without an eval set."""
        return None if self.facts.eval_data is None else self._evaluate(self.facts.eval_data)[1]

    def _evaluate(self, eval_data: EncodedFile) -> tuple[EvalResult, ExampleLosses]:
        self.average(True)
        batching = eval_batching(self.config, pad_id(self.facts.tokenizer))
        return evaluate_examples(self.accelerator, self.model, eval_data, batching)

    def reply(self, when: str) -> list[Reply]:
        """To the sample prompts, as the model is now: before or after training."""
        self.average(True)
        if self.prompts:
            self.say(f"sample replies {when} training: {counted(len(self.prompts), 'prompt')} ...")
        with self.pace.timing("replies"):
            return self._reply_to(self.prompts)

    def film(self) -> None:
        """Replies to the first sample prompts, as the model is at this evaluation."""
        with self.pace.timing("film"):
            replies = self._reply_to(self.prompts[: self.config.train.num_eval_replies])
        self.keep_replies(replies, self.progress.step)

    def keep_replies(self, replies: Sequence[Reply], step: int) -> None:
        """Record the replies of a step, and look whether they still end."""
        kept = self.config.train.num_eval_replies
        for number, (prompt, reply) in enumerate(zip(self.prompts[:kept], replies, strict=False)):
            self.journal.record("reply", {"step": step, "number": number, **describe_reply(prompt, reply)})
            self.say(f"reply at step {step}: {printable(reply.text)}{'' if reply.is_whole else ' (cut off)'}", "event")
        if step > 0:
            self.lookout.after_replies(self.progress, self.facts.tokenizer, self.prompts, replies)

    def _reply_to(self, prompts: Sequence[dict[str, Any]]) -> list[Reply]:
        limit = self.config.train.sample_max_new_tokens
        return reply_to_all(self.accelerator, self.model, self.facts.tokenizer, prompts, limit)

    def checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def save(self) -> None:
        """Begin to write a checkpoint of now."""
        self.finish_saving()
        state = {
            **self.progress.to_dict(),
            "config": self.asked_config.to_dict(),
            "plan": asdict(self.facts.plan),
            "rows_per_optimizer_step": self.facts.plan.rows_per_optimizer_step,
            "data": self.fingerprint,
        }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        snapshot = take_snapshot(self.accelerator, self.model, self.optimizer, self.scheduler, state)
        keeps_best = self.config.train.keep_adapter == "best" and self.progress.best is not None
        best = self.checkpoint_path(self.progress.best_step).name if keeps_best else None
        self.writer.start(self.checkpoint_path(self.progress.step), snapshot, self.config.train.save_total_limit, best)

    def finish_saving(self) -> None:
        """Until the checkpoint that was begun is whole."""
        try:
            path = self.writer.wait()
        except OSError as error:
            if self.config.train.on_save_error == "error":
                raise TrainingError(f"{error}; fix: free disk space, then --resume") from error
            self.say(f"warning: {error}; training continues (train.on_save_error=continue)", "always")
            return
        if path is not None:
            self.journal.saved(path)
