"""The training loop. Read `train` for the whole run, `train_step` for the maths of one optimizer step."""

from __future__ import annotations

import html
import itertools
import json
import math
import platform
import shlex
import signal
import sys
import threading
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
from lora_core.checkpoint import check_same_run, data_hash, find_checkpoint, keep_newest, restore, save_checkpoint
from lora_core.config import RunConfig
from lora_core.data import EncodedFile, load_data, pad_id
from lora_core.devices import build_accelerator, look_around, peak_memory_bytes, seed_everything
from lora_core.errors import ConfigError, RunStopped, TrainingError
from lora_core.evaluate import EvalResult, evaluate, reply_to_all, sample_prompts
from lora_core.loss import CausalLMLoss, check_head
from lora_core.model import add_adapter, describe_parameters, load_base_model, load_tokenizer
from lora_core.optimizer import build_optimizer, build_scheduler
from lora_core.packing import eval_batching, step_rows, to_device, train_batching
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
    the same however the step's conversations are cut.

    Raises:
        TrainingError: loss or gradient is not finite; the parameters are left as they were.
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
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise TrainingError(f"loss {loss}, gradient norm {grad_norm}: not finite, so the step was not applied")
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return StepResult(loss, grad_norm, learning_rate, num_tokens)


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
    replies_before: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        results = {key: EvalResult(**values[key]) for key in ("before", "after") if values[key] is not None}
        return cls(**{**values, **results})


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
    accelerator = build_accelerator(config)

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
    if accelerator.is_main_process:  # only now, so that a model that cannot be loaded costs nobody an earlier run
        if checkpoint is None:
            clear_run_folder(folder)
        else:
            cut_metrics(folder / "metrics.jsonl", checkpoint.step)
        write_text(folder / "config.yaml", config.to_yaml())
        write_json(folder / "preflight.json", report(facts, findings))
        write_json(folder / "rows.json", rows_as_seen(tokenizer, train_data))
    accelerator.wait_for_everyone()
    metrics = MetricsFile(folder / "metrics.jsonl", accelerator.is_main_process)
    say(f"model: {config.model.name_or_path} on {accelerator.device}: {describe_parameters(adapted)}")
    optimizer = build_optimizer(adapted, config.train, accelerator.device, say)
    scheduler = build_scheduler(optimizer, plan)
    model, optimizer = accelerator.prepare(CausalLMLoss(adapted), optimizer)
    batching = train_batching(config, pad_id(tokenizer))
    seed_everything(config.train.seed, accelerator.process_index)

    def measure(step: int) -> EvalResult | None:
        if eval_data is None:
            return None
        result = evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer)))
        metrics.write("eval", step=step, **result.to_dict())
        _log(accelerator, f"eval at step {step}: {result}")
        return result

    def save() -> None:
        path = folder / "checkpoints" / f"step-{progress.step:06d}"
        state = {**progress.to_dict(), "config": config.to_dict(), "data": fingerprint}
        try:
            save_checkpoint(path, accelerator, model, optimizer, scheduler, state)
        except OSError as error:
            problem = f"{path} could not be written: {error}; the checkpoints before it are whole"
            if config.train.on_save_error == "error":
                raise TrainingError(f"{problem}. Fix: room on the disk, then --resume") from error
            _log(accelerator, f"warning: {problem}; going on without it (train.on_save_error)")
        if accelerator.is_main_process:
            keep_newest(folder / "checkpoints", config.train.save_total_limit)

    prompts = sample_prompts(config, eval_data)
    if checkpoint is None:
        progress = Progress()
        progress.before = progress.after = measure(0)
        progress.replies_before = reply_to_all(
            accelerator, model, tokenizer, prompts, config.train.sample_max_new_tokens
        )
    else:
        progress = Progress.from_dict({key: checkpoint.state[key] for key in Progress().to_dict()})
        restore(checkpoint, accelerator, model, optimizer, scheduler)
        say(f"resume: from {checkpoint.path}, at step {progress.step} of {plan.total_optimizer_steps}")

    eval_every = config.train.eval_steps or plan.optimizer_steps_per_epoch
    save_every = config.train.save_steps or plan.optimizer_steps_per_epoch
    model.train()
    # disable=None: no bar where the output is not a terminal; the log lines say it all.
    hidden = None if accelerator.is_main_process else True
    bar = tqdm(total=plan.total_optimizer_steps, initial=progress.step, unit="step", disable=hidden, dynamic_ncols=True)
    with StopSignals() as signals:
        for step in range(progress.step, plan.total_optimizer_steps):
            step_started = time.monotonic()
            rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, config.train.seed, step)
            cuts = batching.cut(rows, train_data.lengths, accelerator.num_processes, accelerator.process_index)
            batches = [batching.tensors(train_data.dataset, cut) for cut in cuts]
            try:
                result = train_step(accelerator, model, optimizer, scheduler, batches, config.train.max_grad_norm)
            except TrainingError as error:
                lines = sorted(int(train_data.dataset[int(row)]["line"]) for row in rows)
                raise TrainingError(
                    f"step {step + 1}: {error}; its rows: {config.data.train_file} lines {lines}"
                ) from error
            step_s = time.monotonic() - step_started
            num_tokens = int(train_data.lengths[rows].sum())
            progress.step += 1
            progress.num_tokens += num_tokens
            progress.num_supervised_tokens += result.num_supervised_tokens
            progress.train_time_s += step_s
            bar.set_postfix(
                loss=f"{result.loss:.3f}",
                lr=f"{result.learning_rate:.1e}",
                tok_s=f"{num_tokens / step_s:.0f}",
                refresh=False,
            )
            bar.update()
            is_last = progress.step == plan.total_optimizer_steps
            if progress.step % config.train.logging_steps == 0 or is_last:
                _log_step(accelerator, metrics, plan, progress.step, result, num_tokens / step_s)
            if progress.step % eval_every == 0 or is_last:
                progress.after = measure(progress.step)
            stopped = signals.any_rank(accelerator)
            if not is_last and (stopped or progress.step % save_every == 0):
                save()
            if stopped and not is_last:
                raise RunStopped(
                    f"stopped by {stopped} after step {progress.step} of {plan.total_optimizer_steps}; a checkpoint is "
                    f"in {folder / 'checkpoints'}; go on with --resume"
                )
    bar.close()

    # The plan is the run. This can only fail by a fault in this file, which must not go unseen.
    if progress.step != plan.total_optimizer_steps or scheduler.last_epoch != plan.total_optimizer_steps:
        raise TrainingError(
            f"{plan.total_optimizer_steps} optimizer steps were planned, {progress.step} were taken and the schedule "
            f"stands at {scheduler.last_epoch}"
        )

    replies_after = reply_to_all(accelerator, model, tokenizer, prompts, config.train.sample_max_new_tokens)
    adapter_dir = folder / "adapter"
    save_adapter(accelerator, model, tokenizer, config, adapter_dir)
    before, after = progress.before, progress.after
    summary = {
        "total_optimizer_steps": plan.total_optimizer_steps,
        "warmup_steps": plan.warmup_steps,
        "peak_learning_rate": plan.peak_learning_rate,
        "eval_loss_before": before.loss if before else None,
        "eval_loss_after": after.loss if after else None,
        "eval_perplexity_after": after.perplexity if after else None,
        "eval_token_accuracy_after": after.token_accuracy if after else None,
        "num_train_conversations": plan.num_rows,
        "num_dropped_conversations": train_data.counts.dropped,
        "train_rows": train_data.counts.to_dict(),
        "eval_rows": eval_data.counts.to_dict() if eval_data else None,
        "num_supervised_tokens": progress.num_supervised_tokens,
        "world_size": accelerator.num_processes,
        "resumed_at_step": checkpoint.step if checkpoint else None,
        "train_time_s": round(progress.train_time_s, 3),
        "tokens_per_s": round(progress.num_tokens / progress.train_time_s, 1),
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "adapter_dir": str(adapter_dir),
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "wall_time_s": round(time.monotonic() - started, 3),
    }
    samples = [
        {"prompt": prompt["messages"][-1]["content"], "before": old, "after": new}
        for prompt, old, new in zip(prompts, progress.replies_before or [], replies_after, strict=True)
    ]
    for sample in samples:
        metrics.write("sample", **sample)
        say(f"\nuser:   {printable(sample['prompt'])}")
        say(f"before: {printable(sample['before'])}\nafter:  {printable(sample['after'])}")
    if before and after:
        say(f"\nheld-out loss: {before.loss:.4f} before, {after.loss:.4f} after ({after.loss / before.loss - 1:+.1%})")
    metrics.close()
    if accelerator.is_main_process:
        write_json(folder / "summary.json", summary)
        try:
            say(f"report: {write_report(folder)}")
        except ConfigError as error:  # a page that cannot be drawn costs nobody the run
            say(f"report: not written: {error}")
    say(
        f"done: {plan.total_optimizer_steps} optimizer steps in {progress.train_time_s:.0f} s, "
        f"{summary['tokens_per_s']:.0f} tokens/s, peak memory "
        f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB; adapter in {adapter_dir}"
    )
    accelerator.wait_for_everyone()
    return summary


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are noted, for the loop to stop after its step; a second acts at once.

    In a thread that is not the main one, signals are left alone: Python handles them in the main one only.
    """

    def __init__(self) -> None:
        self._received = 0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = number

    def any_rank(self, accelerator: Accelerator) -> str | None:
        """The name of a signal that any rank has received; all ranks get the same answer."""
        number = self._received
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
            assert isinstance(numbers, Tensor)
            number = int(numbers.max())
        return signal.Signals(number).name if number else None


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
