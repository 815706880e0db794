"""The training loop. Read `train` for the whole run, `train_step` for the maths of one optimizer step."""

from __future__ import annotations

import html
import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from lora_core._version import __version__
from lora_core.checkpoint import (
    CheckpointWriter,
    check_same_run,
    data_hash,
    find_checkpoint,
    restore,
    restore_adapter,
    set_aside_newer,
    take_snapshot,
)
from lora_core.config import RunConfig
from lora_core.data import EncodedFile, load_data, pad_id
from lora_core.devices import build_accelerator, end_with_launcher, look_around, peak_memory_bytes, seed_everything
from lora_core.errors import ConfigError, RankFault, RunStopped, TrainingError, counted
from lora_core.evaluate import EvalResult, evaluate, reply_to_all, sample_prompts
from lora_core.faults import StopSignals, free_memory, is_out_of_memory, naming_lost_ranks
from lora_core.findings import Facts
from lora_core.loss import CausalLMLoss, check_head
from lora_core.memory_checks import cheapest_change, micro_batch_limit_that_fits
from lora_core.model import add_adapter, compile_layers, describe_parameters, load_base_model, load_tokenizer
from lora_core.optimizer import build_optimizer, build_scheduler
from lora_core.packing import (
    Batching,
    BatchPrefetcher,
    RowIndices,
    StepBatches,
    eval_batching,
    step_rows,
    to_device,
    train_batching,
)
from lora_core.preflight import gather_facts, refuse_errors, report, run_checks
from lora_core.report import write_report
from lora_core.run_folder import (
    MetricsFile,
    check_run_folder,
    clear_run_folder,
    cut_metrics,
    whole_folder,
    write_json,
    write_text,
)
from lora_core.safe_text import printable, showable, values_without_secrets
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float
    """Mean cross-entropy over the step's supervised tokens, nats."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """That this step used."""
    num_supervised_tokens: int

    @property
    def is_finite(self) -> bool:
        """False: loss or gradient was not, and the step was not applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    batches: Sequence[dict[str, Any]],
    max_grad_norm: float | None,
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    loss = sum over all supervised tokens of all micro-batches and ranks / number of those tokens, so the gradient is
    the same however the step's conversations are cut. If loss or gradient is not finite, parameters and optimizer are
    left as they were; the schedule goes on either way, because it is a function of the step.

    Raises:
        TrainingError: no token is supervised.
    """
    local_tokens = sum(int(batch["loss_mask"][:, 1:].sum()) for batch in batches)
    num_tokens = int(_sum_over_ranks(accelerator, torch.tensor(local_tokens)))
    if num_tokens == 0:
        raise TrainingError("an optimizer step holds no supervised token; rows without any must be dropped before")
    learning_rate = optimizer.param_groups[0]["lr"]

    loss_sum = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            micro_loss_sum = model(**to_device(batch, accelerator.device)).loss_sum
            # DDP and FSDP average gradients over ranks; times their number, the average is the sum.
            accelerator.backward(micro_loss_sum * (accelerator.num_processes / num_tokens))
        loss_sum += micro_loss_sum.detach()
    loss = float(_sum_over_ranks(accelerator, loss_sum)) / num_tokens

    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
    result = StepResult(loss, grad_norm, learning_rate, num_tokens)
    if result.is_finite:
        optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return result


def _sum_over_ranks(accelerator: Accelerator, value: Tensor) -> Tensor:
    total = accelerator.reduce(value.detach().to(accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total


@dataclass
class Progress:
    """What the loop itself remembers from step to step; a checkpoint holds it."""

    step: int = 0
    """Optimizer steps taken."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    train_time_s: float = 0.0
    """Of the steps, over all parts of an interrupted run."""
    before: EvalResult | None = None
    after: EvalResult | None = None
    """The last evaluation."""
    best: EvalResult | None = None
    """The lowest held-out loss since the first step, and its step."""
    best_step: int = 0
    evaluations_since_best: int = 0
    num_skipped_steps: int = 0
    """Steps that were not applied because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    micro_batch_limit: int | None = None
    """`Batching.limit`, where memory was too short for the configured one."""
    replies_before: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        results = {key: EvalResult(**values[key]) for key in ("before", "after", "best") if values[key] is not None}
        return cls(**{**values, **results})

    def note_evaluation(self, result: EvalResult) -> bool:
        """Remember a held-out measurement; returns whether it is the best so far."""
        self.after = result
        is_best = self.best is None or result.loss < self.best.loss
        if is_best:
            self.best, self.best_step = result, self.step
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best


def train(config: RunConfig, resume: str | Path | None = None) -> dict[str, Any]:
    """Fine-tune as the configuration says; returns what is written to `summary.json`.

    Call it in every process of the launch (`accelerate launch`, `torchrun`), or in one process for one device.

    Args:
        resume: a checkpoint's folder, or "newest" for the newest whole one in `config.output_dir`. The run then ends as
            if it had never been stopped.

    Raises:
        RunStopped: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was written.
        LoraCoreError: and nothing else for a mistake in configuration or data; the message names value, limit and fix.
    """
    started = time.monotonic()
    end_with_launcher()
    accelerator = build_accelerator(config)
    with naming_lost_ranks(accelerator, config.train.rank_timeout_s):
        run = _set_up(config, accelerator, resume)
        run.train()
        return run.finish(started)


def _set_up(config: RunConfig, accelerator: Accelerator, resume: str | Path | None) -> _Run:
    """Everything up to the first step, or to the step that a checkpoint was written after."""

    def say(line: str) -> None:
        accelerator.print(showable(line))

    # Data first: it is cheap, and most of what can be wrong is wrong there.
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    with accelerator.main_process_first():
        train_data, eval_data = load_data(config, tokenizer)
    say(f"train: {config.data.train_file}: {train_data.counts}")
    if eval_data is not None:
        say(f"eval:  {config.data.eval_file or f'{config.data.eval_fraction:.0%} held out'}: {eval_data.counts}")
    # What the main process sees decides for all: free memory and disk differ from moment to moment.
    environment = broadcast_object_list([look_around(config, accelerator.num_processes)])[0]
    if resume is not None:  # the run that is there is the one to go on with
        environment = replace(environment, output_dir_problem=None)
    facts = gather_facts(config, environment, tokenizer, train_data, eval_data)
    plan = facts.plan
    say(describe_plan(plan, config))
    say(f"memory: {facts.memory}" if facts.memory else "memory: not predicted")
    findings = run_checks(facts)
    refuse_errors(findings, config.preflight.allow)
    for finding in findings:
        say(str(finding))

    fingerprint = data_hash(train_data, eval_data)
    folder = Path(config.output_dir).expanduser()
    checkpoint = None
    if resume is None:
        check_run_folder(config.output_dir, config.overwrite_output_dir)
    else:
        asked = None if resume == "newest" else Path(resume)
        checkpoint = find_checkpoint(folder, asked, say, accelerator.is_main_process)
        for difference in check_same_run(checkpoint, config, fingerprint, accelerator.num_processes):
            say(f"resume: {difference}")
    accelerator.wait_for_everyone()  # all have looked before one writes

    base = load_base_model(config.model, accelerator.device, config.data.packing)
    adapted = add_adapter(base, config.lora, config.train.seed, config.train.gradient_checkpointing)
    check_head(adapted)
    if config.train.torch_compile:
        compile_layers(adapted)
    if accelerator.is_main_process:  # only now, so that a model that cannot be loaded costs nobody an earlier run
        if checkpoint is None:
            clear_run_folder(folder)
        else:
            cut_metrics(folder / "metrics.jsonl", checkpoint.step)
            for name in set_aside_newer(checkpoint):
                say(f"resume: a later checkpoint is set aside as {name}")
        write_text(folder / "config.yaml", config.to_yaml())
        write_json(folder / "preflight.json", report(facts, findings))
        write_json(folder / "rows.json", rows_as_seen(tokenizer, train_data))
    accelerator.wait_for_everyone()
    say(f"model: {config.model.name_or_path} on {accelerator.device}: {describe_parameters(adapted)}")
    optimizer = build_optimizer(adapted, config.train, accelerator.device, say)
    scheduler = build_scheduler(optimizer, plan)
    model, optimizer = accelerator.prepare(CausalLMLoss(adapted), optimizer)
    seed_everything(config.train.seed, accelerator.process_index)
    run = _Run(
        config=config,
        accelerator=accelerator,
        facts=facts,
        fingerprint=fingerprint,
        folder=folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        batching=train_batching(config, pad_id(tokenizer)),
        metrics=MetricsFile(folder / "metrics.jsonl", accelerator.is_main_process),
        writer=CheckpointWriter(accelerator),
        prompts=sample_prompts(config, eval_data),
        progress=Progress(),
        resumed_at_step=checkpoint.step if checkpoint else None,
    )
    if checkpoint is None:
        run.progress.micro_batch_limit = micro_batch_limit_that_fits(facts)
        run.progress.before = run.progress.after = run.measure()
        run.progress.replies_before = run.reply()
    else:
        run.progress = Progress.from_dict({key: checkpoint.state[key] for key in Progress().to_dict()})
        restore(checkpoint, accelerator, model, optimizer, scheduler)
        say(f"resume: from {checkpoint.path}, at step {run.progress.step} of {plan.total_optimizer_steps}")
    if run.progress.micro_batch_limit is not None:
        run.batching = run.batching.limited(run.progress.micro_batch_limit)
    return run


@dataclass
class _Run:
    """A run between its setup and its summary: the parts, and what is done with them."""

    config: RunConfig
    accelerator: Accelerator
    facts: Facts
    fingerprint: str
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    batching: Batching
    metrics: MetricsFile
    writer: CheckpointWriter
    prompts: list[Any]
    progress: Progress
    resumed_at_step: int | None

    def __post_init__(self) -> None:
        self.prefetcher = BatchPrefetcher(self.batches, self.facts.plan.total_optimizer_steps)

    def train(self) -> None:
        """All steps that are left, with the evaluations and checkpoints between them."""
        config, plan, progress = self.config.train, self.facts.plan, self.progress
        eval_every = config.eval_steps or plan.optimizer_steps_per_epoch
        save_every = config.save_steps or plan.optimizer_steps_per_epoch
        patience = config.early_stopping_patience or math.inf
        self.model.train()
        # disable=None: no bar where the output is not a terminal; the log lines say it all.
        hidden = None if self.accelerator.is_main_process else True
        total = plan.total_optimizer_steps
        bar = tqdm(total=total, initial=progress.step, unit="step", disable=hidden, dynamic_ncols=True)
        with bar, StopSignals() as signals:
            while progress.step < total and progress.evaluations_since_best < patience:
                result, tokens_per_s = self.take_step()
                bar.set_postfix(
                    loss=f"{result.loss:.3f}",
                    lr=f"{result.learning_rate:.1e}",
                    tok_s=f"{tokens_per_s:.0f}",
                    refresh=False,
                )
                bar.update()
                is_last = progress.step == total
                if not result.is_finite:
                    self.note_skipped(result)
                elif progress.step % config.logging_steps == 0 or is_last:
                    _log_step(self.accelerator, self.metrics, plan, progress.step, result, tokens_per_s)
                is_best = False
                if progress.step % eval_every == 0 or is_last:
                    measured = self.measure()
                    is_best = measured is not None and progress.note_evaluation(measured)
                is_last = is_last or progress.evaluations_since_best >= patience
                stopped = signals.any_rank(self.accelerator)
                keeps_best = is_best and config.keep_adapter == "best"
                gives_up = progress.skipped_in_a_row >= config.max_skipped_steps
                if not is_last and (stopped or gives_up or keeps_best or progress.step % save_every == 0):
                    self.save()
                if gives_up:
                    self.finish_saving()
                    raise TrainingError(
                        f"{counted(progress.skipped_in_a_row, 'step')} in a row had a loss or gradient that is not "
                        f"finite (train.max_skipped_steps) and {'was' if progress.skipped_in_a_row == 1 else 'were'} "
                        "not applied; the adapter is as the last good step left it"
                        + ("" if is_last else f", in {self.checkpoint_path(progress.step)}")
                        + ". Fix: the rows above; a lower train.learning_rate; train.bf16=true in place of float16"
                    )
                if stopped and not is_last:
                    self.finish_saving()
                    raise RunStopped(
                        f"stopped by {stopped} after step {progress.step} of {total}; a checkpoint is "
                        f"in {self.folder / 'checkpoints'}; go on with --resume"
                    )
        self.finish_saving()
        if progress.step < total:
            _log(
                self.accelerator,
                f"stopped early: {counted(progress.evaluations_since_best, 'evaluation')} in a row without a lower "
                f"held-out loss than {progress.best.loss if progress.best else math.nan:.4f} at step "
                f"{progress.best_step}; {progress.step} of {total} steps were taken",
            )
        # The plan is the run. This can only fail by a fault in this file, which must not go unseen.
        elif self.scheduler.last_epoch != total:
            raise TrainingError(
                f"{total} optimizer steps were planned and taken; the schedule stands at {self.scheduler.last_epoch}"
            )

    def take_step(self) -> tuple[StepResult, float]:
        """The next optimizer step -> (its result, tokens/s). Where memory runs out, in smaller micro-batches."""
        started = time.monotonic()
        step, lengths = self.progress.step, self.facts.train_data.lengths
        random_state = torch.get_rng_state()
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
                )
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = self.batching.halved(taken.cuts, lengths)
                if smaller is None or self.accelerator.num_processes > 1 or not self.config.train.auto_batch_size:
                    raise self.out_of_memory(error) from error
            # Past the except, whose traceback would hold the step's tensors.
            self.optimizer.zero_grad()
            torch.set_rng_state(random_state)
            self.batching, self.progress.micro_batch_limit = smaller, smaller.limit
            _log(
                self.accelerator,
                f"warning: step {step + 1}: out of memory; again with micro-batches of at most "
                f"{self.batching_limit()} (train.auto_batch_size); same step, same gradient",
            )
            free_memory()
        step_s = time.monotonic() - started
        num_tokens = int(lengths[self.step_rows(step)].sum())
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.progress.num_supervised_tokens += result.num_supervised_tokens
        self.progress.train_time_s += step_s
        self.progress.num_skipped_steps += not result.is_finite
        self.progress.skipped_in_a_row = 0 if result.is_finite else self.progress.skipped_in_a_row + 1
        return result, num_tokens / step_s

    def batches(self, step: int, batching: Batching) -> StepBatches:
        """This rank's share of a step."""
        data, accelerator = self.facts.train_data, self.accelerator
        cuts = batching.cut(self.step_rows(step), data.lengths, accelerator.num_processes, accelerator.process_index)
        return StepBatches(cuts, [batching.tensors(data.dataset, cut) for cut in cuts])

    def step_rows(self, step: int) -> RowIndices:
        """The rows of a step, over all ranks."""
        plan = self.facts.plan
        return step_rows(plan.num_rows, plan.rows_per_optimizer_step, self.config.train.seed, step)

    def say(self, line: str) -> None:
        self.accelerator.print(showable(line))

    def batching_limit(self) -> str:
        return f"{self.batching.limit} {'tokens' if self.config.data.packing else 'rows'}"

    def out_of_memory(self, error: BaseException) -> RankFault:
        """What happened, what was predicted, and the cheapest change."""
        memory = self.facts.memory
        fix, plan = cheapest_change(self.facts) if memory else (None, None)
        return RankFault(
            f"step {self.progress.step + 1}: out of memory on {self.accelerator.device} (rank "
            f"{self.accelerator.process_index}): {(str(error).splitlines() or [type(error).__name__])[0]}\n"
            f"predicted: {memory or 'nothing'}\n"
            f"Fix: {fix or 'a smaller model'}"
            + (f" ({plan.total_bytes / 2**30:.1f} GiB predicted)" if plan else "")
            + ("" if self.config.train.auto_batch_size else ", or train.auto_batch_size=true")
        )

    def note_skipped(self, result: StepResult) -> None:
        """Say which rows the step held that was not applied."""
        dataset = self.facts.train_data.dataset
        lines = sorted(int(dataset[int(row)]["line"]) for row in self.step_rows(self.progress.step - 1))
        self.metrics.write("skipped", step=self.progress.step, lines=lines)
        _log(
            self.accelerator,
            f"warning: step {self.progress.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so "
            f"the step was not applied; its rows: {self.config.data.train_file} lines {lines}",
        )

    def measure(self) -> EvalResult | None:
        """Held-out loss; None without held-out rows."""
        if self.facts.eval_data is None:
            return None
        result = evaluate(
            self.accelerator, self.model, self.facts.eval_data, eval_batching(self.config, pad_id(self.facts.tokenizer))
        )
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"held-out loss at step {self.progress.step} is {result.loss}: the model gives no numbers any more. "
                "Fix: a lower train.learning_rate"
            )
        self.metrics.write("eval", step=self.progress.step, **result.to_dict())
        _log(self.accelerator, f"eval at step {self.progress.step}: {result}")
        return result

    def reply(self) -> list[str]:
        """To the sample prompts, as the model is now."""
        return reply_to_all(
            self.accelerator,
            self.model,
            self.facts.tokenizer,
            self.prompts,
            self.config.train.sample_max_new_tokens,
        )

    def checkpoint_path(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def save(self) -> None:
        """Begin to write a checkpoint of now."""
        self.finish_saving()
        state = {**self.progress.to_dict(), "config": self.config.to_dict(), "data": self.fingerprint}
        snapshot = take_snapshot(self.accelerator, self.model, self.optimizer, self.scheduler, state)
        keeps_best = self.config.train.keep_adapter == "best" and self.progress.best is not None
        best = self.checkpoint_path(self.progress.best_step).name if keeps_best else None
        self.writer.start(self.checkpoint_path(self.progress.step), snapshot, self.config.train.save_total_limit, best)

    def finish_saving(self) -> None:
        """Until the checkpoint that was begun is whole."""
        try:
            self.writer.wait()
        except OSError as error:
            if self.config.train.on_save_error == "error":
                raise TrainingError(f"{error}. Fix: room on the disk, then --resume") from error
            _log(self.accelerator, f"warning: {error}; going on without it (train.on_save_error)")

    def take_best_adapter(self) -> int:
        """Put the best adapter in place of the last where that is asked for; returns the step that it is of."""
        progress, path = self.progress, self.checkpoint_path(self.progress.best_step)
        if self.config.train.keep_adapter == "last" or progress.best is None or progress.best_step == progress.step:
            return progress.step
        if not path.is_dir():  # it could not be written, and train.on_save_error=continue
            _log(self.accelerator, f"warning: {path} is not there, so adapter/ is the last, not the best")
            return progress.step
        restore_adapter(find_checkpoint(self.folder, path, self.say, may_rename=False), self.model)
        progress.after = progress.best
        return progress.best_step

    def finish(self, started: float) -> dict[str, Any]:
        """Adapter, sample replies, summary and report.

        Args:
            started: `time.monotonic()` at the start of the run.
        """
        config, plan, progress, say = self.config, self.facts.plan, self.progress, self.say
        adapter_step = self.take_best_adapter()
        replies_after = self.reply()
        adapter_dir = self.folder / "adapter"
        save_adapter(self.accelerator, self.model, self.facts.tokenizer, config, adapter_dir)
        before, after = progress.before, progress.after
        eval_data = self.facts.eval_data
        summary = {
            "total_optimizer_steps": plan.total_optimizer_steps,
            "warmup_steps": plan.warmup_steps,
            "peak_learning_rate": plan.peak_learning_rate,
            "eval_loss_before": before.loss if before else None,
            "eval_loss_after": after.loss if after else None,
            "eval_perplexity_after": after.perplexity if after else None,
            "eval_token_accuracy_after": after.token_accuracy if after else None,
            "num_train_conversations": plan.num_rows,
            "num_dropped_conversations": self.facts.train_data.counts.dropped,
            "train_rows": self.facts.train_data.counts.to_dict(),
            "eval_rows": eval_data.counts.to_dict() if eval_data else None,
            "num_supervised_tokens": progress.num_supervised_tokens,
            "num_skipped_steps": progress.num_skipped_steps,
            "stopped_early_at_step": progress.step if progress.step < plan.total_optimizer_steps else None,
            "best_step": progress.best_step if progress.best else None,
            "adapter_step": adapter_step,
            "micro_batch_limit": self.batching.limit,
            "world_size": self.accelerator.num_processes,
            "resumed_at_step": self.resumed_at_step,
            "train_time_s": round(progress.train_time_s, 3),
            "tokens_per_s": round(progress.num_tokens / progress.train_time_s, 1),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "adapter_dir": str(adapter_dir),
            "command": shlex.join(sys.argv),
            "versions": versions(),
            "wall_time_s": round(time.monotonic() - started, 3),
        }
        samples = [
            {"prompt": prompt["messages"][-1]["content"], "before": old, "after": new}
            for prompt, old, new in zip(self.prompts, progress.replies_before or [], replies_after, strict=True)
        ]
        for sample in samples:
            self.metrics.write("sample", **sample)
            say(f"\nuser:   {printable(sample['prompt'])}")
            say(f"before: {printable(sample['before'])}\nafter:  {printable(sample['after'])}")
        if before and after:
            of_step = "" if adapter_step == progress.step else f", of step {adapter_step}, the best"
            say(
                f"\nheld-out loss: {before.loss:.4f} before, {after.loss:.4f} after "
                f"({after.loss / before.loss - 1:+.1%}){of_step}"
            )
        self.metrics.close()
        if self.accelerator.is_main_process:
            write_json(self.folder / "summary.json", summary)
            try:
                say(f"report: {write_report(self.folder)}")
            except ConfigError as error:  # a page that cannot be drawn costs nobody the run
                say(f"report: not written: {error}")
        which = f"of step {adapter_step}, the {'best' if config.train.keep_adapter == 'best' else 'last'}"
        say(
            f"done: {progress.step} optimizer steps in {progress.train_time_s:.0f} s, "
            f"{summary['tokens_per_s']:.0f} tokens/s, peak memory "
            f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB; adapter ({which}) in {adapter_dir}"
        )
        if progress.num_skipped_steps:
            say(f"warning: {counted(progress.num_skipped_steps, 'step')} not applied: loss or gradient not finite")
        self.accelerator.wait_for_everyone()
        return summary


# ---------------------------------------------------------------------------------------------------------------
# Setup


def describe_plan(plan: SchedulePlan, config: RunConfig) -> str:
    """Two lines for the log."""
    train = config.train
    return (
        f"plan:  {plan.num_rows} conversations / ({train.per_device_train_batch_size} a device x "
        f"{train.gradient_accumulation_steps} accumulated x {plan.num_processes} processes) = "
        f"{plan.optimizer_steps_per_epoch} steps an epoch, {plan.total_optimizer_steps} optimizer steps in all\n"
        f"       warmup {plan.warmup_steps} steps, peak learning rate {plan.peak_learning_rate:.3g} "
        f"({plan.peak_fraction:.1%} of {train.learning_rate:g})"
    )


# ---------------------------------------------------------------------------------------------------------------
# Steps


def _log(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        tqdm.write(showable(line), file=sys.stdout)
        sys.stdout.flush()


def _log_step(
    accelerator: Accelerator,
    metrics: MetricsFile,
    plan: SchedulePlan,
    step: int,
    result: StepResult,
    tokens_per_s: float,
) -> None:
    memory_bytes = peak_memory_bytes(accelerator.device)
    epoch = step / plan.optimizer_steps_per_epoch
    metrics.write(
        "train",
        step=step,
        epoch=round(epoch, 4),
        loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        num_supervised_tokens=result.num_supervised_tokens,
        tokens_per_s=round(tokens_per_s, 1),
        peak_memory_bytes=memory_bytes,
    )
    _log(
        accelerator,
        f"step {step:>{len(str(plan.total_optimizer_steps))}}/{plan.total_optimizer_steps}  epoch {epoch:.2f}  "
        f"loss {result.loss:.4f}  lr {result.learning_rate:.2e}  grad_norm {result.grad_norm:.3f}  "
        f"{result.num_supervised_tokens} supervised tokens  {tokens_per_s:.0f} tok/s  {memory_bytes / 2**30:.1f} GiB",
    )


# ---------------------------------------------------------------------------------------------------------------
# Results


def save_adapter(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    path: Path,
) -> None:
    """Write the adapter as PEFT does, with tokenizer and model card; the folder appears whole or not at all."""
    adapted = accelerator.unwrap_model(model).model
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        adapter_state = {name.removeprefix("model."): tensor for name, tensor in state.items() if "lora_" in name}
        with whole_folder(path) as folder:
            adapted.save_pretrained(folder, state_dict=adapter_state, save_embedding_layers=False)
            tokenizer.save_pretrained(folder)
            write_text(folder / "README.md", model_card(config))
            # PEFT wrote the model's name into it.
            adapter_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            write_json(folder / "adapter_config.json", adapter_config)
    accelerator.wait_for_everyone()


def model_card(config: RunConfig) -> str:
    """What someone who finds the adapter needs to know. Names are escaped: Markdown may hold HTML."""
    targets = config.lora.target_modules
    modules = html.escape(targets if isinstance(targets, str) else ", ".join(targets))
    front_matter = {
        "base_model": config.model.name_or_path,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_core"],
    }
    train = config.train
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs} epochs"
    return f"""---
{yaml.safe_dump(values_without_secrets(front_matter), sort_keys=False, allow_unicode=True)}---

# LoRA adapter for {html.escape(config.model.name_or_path)}

Rank {config.lora.rank}, alpha {config.lora.alpha}, on {modules}; learning rate {train.learning_rate:g}, {length};
trained with lora_core {__version__}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


def rows_as_seen(tokenizer: PreTrainedTokenizerBase, data: EncodedFile, num_rows: int = 12) -> list[dict[str, Any]]:
    """The first rows as the model sees them: line, numbers of tokens, and spans of text, supervised or not."""

    def spans(row: dict[str, Any]) -> list[tuple[str, bool]]:
        # Decoded in one piece: a character of several tokens has no text of its own in any of them.
        pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
        groups = itertools.groupby(pairs, key=lambda pair: bool(pair[1]))
        return [(str(tokenizer.decode([token for token, _ in group])), supervised) for supervised, group in groups]

    return [
        {
            "line": row["line"],
            "num_tokens": len(row["input_ids"]),
            "num_supervised": sum(row["loss_mask"]),
            "spans": spans(row),
        }
        for row in (data.dataset[index] for index in range(min(num_rows, len(data.lengths))))
    ]


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    return {
        "lora_core": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
