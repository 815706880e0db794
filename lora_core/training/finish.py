"""The end of a run: adapter, replies, the losses of the eval examples, summary, report and verdict."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_core.checkpoints.adapter_folder import save_adapter
from lora_core.checkpoints.card import write_card
from lora_core.checkpoints.checkpoint import find_checkpoint, restore_adapter
from lora_core.errors import ConfigError, counted
from lora_core.evaluation.evaluate import Comparison, finish_examples
from lora_core.evaluation.generation import Reply
from lora_core.report.page import write_report
from lora_core.report.read import read_run
from lora_core.report.verdict import judge, outcome_of
from lora_core.runtime.ranks import from_first_rank, meet
from lora_core.runtime.run_folder import write_json
from lora_core.training.loop import EVAL_EXAMPLES, Run
from lora_core.untrusted.text import printable
from lora_core.watch.summary import Summary, adapter_norm, command_again, git_commit, hardware, versions
from lora_core.watch.trackers import Trackers


def finish(run: Run, started: float) -> Summary:
    """Write all that a run leaves behind and say whether it worked; every rank returns the same.

    Args:
        started: `time.monotonic()` at the start of the run.
    """
    progress, say = run.progress, run.say
    run.average(True)
    adapter_step = take_best_adapter(run)
    # Measured already, unless the best step was before a resume.
    examples = run.example_losses.get(adapter_step) or run.measure_examples()
    replies = run.reply("after")
    run.keep_replies(replies, adapter_step)
    adapter_dir = run.folder / "adapter"
    save_adapter(run.accelerator, run.model, run.facts.tokenizer, run.config, run.facts.train_data.counts, adapter_dir)
    summary, peak_memory = None, run.peak_memory_bytes()
    if run.accelerator.is_main_process:
        comparison = finish_examples(run.folder / EVAL_EXAMPLES, examples) if examples is not None else None
        for sample in _samples(run, replies):
            run.journal.record("sample", sample)
            say(f"\nuser:     {printable(sample['prompt'])}", "event")
            for name in ("before", "after", "expected"):
                cut_off = " (cut off)" if sample.get(f"{name}_ended") is False else ""
                say(f"{name + ':':<9} {printable(sample[name])}{cut_off}", "event")
        run.journal.metrics.close()
        summary = _summary(run, adapter_step, adapter_dir, comparison, started, peak_memory)
        seen = replace(read_run(run.folder), summary=summary.to_dict())
        summary = replace(summary, verdict=judge(outcome_of(seen)).sentence)
        write_json(run.folder / "summary.json", summary.to_dict())
        write_card(adapter_dir, run.config, run.facts.train_data.counts, summary.to_dict())
        say("", "event")
        try:
            say(f"report: {write_report(run.folder)}")
        except ConfigError as error:  # a page that cannot be drawn costs nobody the run
            say(f"report: not written: {error}")
        which = f"of step {adapter_step}, the {'best' if run.config.train.keep_adapter == 'best' else 'last'}"
        say(
            f"done: {counted(progress.step, 'optimizer step')} in {progress.train_time_s:.0f} s, "
            f"{summary.tokens_per_s:.0f} tokens/s, peak memory {summary.peak_memory_bytes / 2**30:.1f} GiB; "
            f"adapter ({which}) in {adapter_dir}"
        )
        if progress.num_skipped_steps:
            skipped = counted(progress.num_skipped_steps, "step")
            say(f"warning: {skipped} not applied: loss or gradient not finite", "always")
        for alarm in progress.watch.raised:
            say(f"alarm at step {alarm['step']}: {alarm['message']}  [{alarm['id']}]", "always")
        say(summary.verdict, "always")
    summary = from_first_rank(lambda: summary)  # the others wait here until all is written
    meet()  # the main process must not end before each has it
    assert isinstance(summary, Summary)
    run.journal.ended(summary)
    return summary


def take_best_adapter(run: Run) -> int:
    """Put the best adapter in place of the last where that is asked for; returns the step that it is of."""
    progress, path = run.progress, run.checkpoint_path(run.progress.best_step)
    if run.config.train.keep_adapter == "last" or progress.best is None or progress.best_step == progress.step:
        return progress.step
    best = from_first_rank(
        lambda: find_checkpoint(run.folder, path, run.say, may_rename=False) if path.is_dir() else None
    )
    if best is None:  # it could not be written, and train.on_save_error=continue
        run.say(f"warning: {path} is missing, so adapter/ is of the last step, not of the best one", "always")
        return progress.step
    restore_adapter(best, run.model)
    progress.after = progress.best
    return progress.best_step


def _samples(run: Run, replies: list[Reply]) -> list[dict[str, Any]]:
    """Each prompt with the replies before and after, and with what its example says."""
    before = dict(enumerate(run.progress.replies_before or []))
    ended_before = dict(enumerate(run.progress.ended_before or []))
    return [
        {
            "prompt": prompt["messages"][-1]["content"],
            "before": before.get(number, "(not recorded: train.num_sample_replies was lower when the run began)"),
            "before_ended": ended_before.get(number),
            "after": reply.text,
            "after_ended": reply.is_whole,
            "expected": prompt["expected"],
            "from": prompt["from"],
            "line": prompt["line"],
        }
        for number, (prompt, reply) in enumerate(zip(run.prompts, replies, strict=True))
    ]


def _summary(
    run: Run, adapter_step: int, adapter_dir: Path, comparison: Comparison | None, started: float, peak_memory: int
) -> Summary:
    """All but the verdict, which goes by it."""
    plan, progress, facts = run.facts.plan, run.progress, run.facts
    before, after = progress.before, progress.after
    return Summary(
        verdict="",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        hardware=hardware(run.accelerator.num_processes),
        data_hash=run.fingerprint,
        learning_rate=plan.learning_rate,
        peak_learning_rate=plan.peak_learning_rate,
        total_optimizer_steps=plan.total_optimizer_steps,
        warmup_steps=plan.warmup_steps,
        eval_loss_before=before.loss if before else None,
        eval_loss_after=after.loss if after else None,
        eval_loss_change_error=comparison.standard_error if comparison else None,
        num_eval_examples=after.num_conversations if after else None,
        num_eval_examples_better=comparison.num_better if comparison else None,
        num_eval_examples_worse=comparison.num_worse if comparison else None,
        eval_perplexity_after=after.perplexity if after else None,
        eval_token_accuracy_after=after.token_accuracy if after else None,
        num_train_conversations=plan.num_rows,
        num_dropped_conversations=facts.train_data.counts.dropped,
        train_rows=facts.train_data.counts.to_dict(),
        eval_rows=facts.eval_data.counts.to_dict() if facts.eval_data and run.config.data.eval_file else None,
        num_supervised_tokens=progress.num_supervised_tokens,
        num_skipped_steps=progress.num_skipped_steps,
        stopped_early_at_step=progress.step if progress.step < plan.total_optimizer_steps else None,
        best_step=progress.best_step if progress.best else None,
        adapter_step=adapter_step,
        adapter_norm=adapter_norm(adapter_dir),
        alarms=progress.watch.raised,
        tracker_failures=_tracker_failures(run),
        git_commit=git_commit(),
        micro_batch_limit=run.batching.limit,
        world_size=run.accelerator.num_processes,
        resumed_at_step=run.resumed_at_step,
        train_time_s=round(progress.train_time_s, 3),
        wall_time_s=round(time.monotonic() - started, 3),
        tokens_per_s=round(progress.num_tokens / progress.train_time_s, 1),
        peak_memory_bytes=peak_memory,
        adapter_dir=str(adapter_dir),
        working_dir=str(Path.cwd()),
        command=command_again(sys.argv, run.config),
        versions=versions(),
    )


def _tracker_failures(run: Run) -> dict[str, int]:
    """Calls that a tracker failed at so far."""
    trackers = (callback for callback in run.journal.callbacks if isinstance(callback, Trackers))
    return {name: number for each in trackers for name, number in each.failures.items()}
