"""What the page says: figures with units, and what came of the run."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from lora_core.report.read import Run

# Held-out loss wavers from one evaluation to the next; only a larger rise counts as one.
_RISE = 0.01
NOT_KNOWN = "not known"


def visible(value: Any) -> Any:
    """Text with the characters that cannot be seen as escapes: controls, bidirectional marks, lone surrogates.

    Newline and tab stay, and so do the two joiners that emoji and several scripts are written with.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(repr(character)[1:-1] if _is_hidden(character) else character for character in value)


def _is_hidden(character: str) -> bool:
    if character in "\n\t\u200c\u200d":
        return False
    return unicodedata.category(character)[0] == "C" or character in "\u2028\u2029"


def setting_text(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def number_text(value: float | None, form: str = ",") -> str:
    return NOT_KNOWN if value is None else format(value, form)


def bytes_text(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration_text(value: float | None) -> str:
    if value is None:
        return NOT_KNOWN
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{value:.3g} s"


def run_name(run: Run) -> str:
    return run.folder.resolve().name


def held_out_loss(run: Run) -> tuple[float | None, float | None]:
    """(before, after or so far): from the summary, or from the evaluations of a run without one."""
    points = run.points("eval_events", "loss")
    if not run.summary and points:
        return (points[0][1] if points[0][0] == 0 else None), points[-1][1]
    return run.number("summary", "eval_loss_before"), run.number("summary", "eval_loss_after")


def change_text(before: float | None, after: float | None) -> str:
    return f"{after / before - 1:+.1%}" if before and after is not None else NOT_KNOWN


def peak_memory(run: Run) -> float | None:
    """Measured bytes."""
    seen = [value for _, value in run.points("train_events", "peak_memory_bytes")]
    return run.number("summary", "peak_memory_bytes") or max(seen, default=None)


def num_steps(run: Run) -> float | None:
    """Optimizer steps of the whole run."""
    planned = run.number("preflight", "plan", "total_optimizer_steps")
    return run.number("summary", "total_optimizer_steps") or planned


def num_rows(run: Run) -> float | None:
    return run.number("summary", "num_train_conversations") or run.number("preflight", "plan", "num_rows")


def run_state(run: Run) -> str:
    if run.summary:
        return "finished"
    last = run.train_events[-1]["step"] if run.train_events else 0
    steps = num_steps(run)
    return f"not finished: {last:,}{f' of {steps:,}' if steps else ''} optimizer steps seen"


def verdict(run: Run) -> str:
    """What was trained on what, and what came of it, in one sentence."""
    model = setting_text(run.get("config", "model", "name_or_path"))
    quantization = run.get("config", "model", "quantization")
    if quantization not in (None, "none"):
        model += f" ({quantization})"
    train_file = setting_text(run.get("config", "data", "train_file"))
    rows, steps = (number_text(value) for value in (num_rows(run), num_steps(run)))
    before, after = held_out_loss(run)
    results = ["held-out loss was not measured"]
    if after is not None:
        results = [
            f"held-out loss {number_text(before, '.4f')} before, {after:.4f} after ({change_text(before, after)})"
        ]
    if run.summary:
        results.append(f"{duration_text(run.number('summary', 'train_time_s'))} of training")
        results.append(f"{number_text(run.number('summary', 'tokens_per_s'), ',.0f')} tokens/s")
        results += _what_else(run)
    return (
        f"{model} {'was' if run.summary else 'was being'} trained on {train_file} "
        f"(rows: {rows}, optimizer steps: {steps}, LoRA rank: {setting_text(run.get('config', 'lora', 'rank'))}, "
        f"on {setting_text(run.get('config', 'lora', 'target_modules'))}): {'; '.join(results)}; "
        f"peak memory {bytes_text(peak_memory(run))}."
    )


def _what_else(run: Run) -> list[str]:
    """What did not go as planned, or is not the last step's."""
    step, stopped, skipped = (
        run.number("summary", key) for key in ("adapter_step", "stopped_early_at_step", "num_skipped_steps")
    )
    said = []
    if stopped:
        said.append(f"stopped early at step {stopped:.0f}")
    if step and step != (stopped or num_steps(run)):
        said.append(f"the adapter is that of step {step:.0f}, the best")
    if skipped:
        said.append(f"steps left out because loss or gradient was not finite: {skipped:.0f}")
    return said


def over_fitting(run: Run) -> str | None:
    """A sentence if held-out loss rose again after its minimum while training loss went on falling."""
    held_out = run.points("eval_events", "loss")
    if not held_out:
        return None
    best_step, best = min(held_out, key=lambda point: point[1])
    last_step, last = held_out[-1]
    training = run.points("train_events", "loss")
    later = [loss for step, loss in training if step > best_step]
    # As many steps before the minimum as came after it: single steps are too noisy to compare.
    earlier = [loss for step, loss in training if step <= best_step][-len(later) :]
    if last <= best * (1 + _RISE) or not (later and earlier) or _mean(later) >= _mean(earlier):
        return None
    return (
        f"Over-fitting: held-out loss was lowest at step {best_step} ({best:.4f}) and rose to {last:.4f} by step "
        f"{last_step}, while training loss went on falling ({_mean(earlier):.4f} to {_mean(later):.4f}); "
        + (
            f"adapter/ is that of step {best_step}"
            if run.number("summary", "adapter_step") == best_step
            else f"fix: train.keep_adapter=best, or train.max_steps={best_step}"
        )
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
