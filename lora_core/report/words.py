"""Figures as text, and where a run folder keeps them."""

from __future__ import annotations

import json
import statistics
import unicodedata
from typing import Any

from lora_core.report.read import Run

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


def loss_text(before: float, after: float) -> str:
    """`3.42 -> 2.31`; with more digits where two would hide the difference, or make one."""
    form = ".2f" if abs(before - after) >= 0.02 else ".4f"
    return f"{before:{form}} -> {after:{form}}"


def rate_text(rate: float) -> str:
    """A learning rate as people write it: `1e-4`, `2.5e-5`."""
    mantissa, _, exponent = f"{rate:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"


def eval_losses(run: Run) -> tuple[float | None, float | None]:
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


def speed(run: Run) -> float | None:
    """Tokens/s of the whole run; of one that is not finished, the median of its logged steps."""
    seen = [value for _, value in run.points("train_events", "tokens_per_s")]
    return run.number("summary", "tokens_per_s") or (statistics.median(seen) if seen else None)


def learning_rate(run: Run) -> float | None:
    """The one asked for."""
    configured = run.number("config", "train", "learning_rate")
    return run.number("summary", "learning_rate") or configured


def num_steps(run: Run) -> int | None:
    """Optimizer steps of the whole run, as planned."""
    return run.count("summary", "total_optimizer_steps") or run.count("preflight", "plan", "total_optimizer_steps")


def steps_taken(run: Run) -> int | None:
    """Optimizer steps: of a finished run from its summary, else as far as they were logged."""
    if run.summary:
        return run.count("summary", "stopped_early_at_step") or num_steps(run)
    return round(run.train_events[-1]["step"]) if run.train_events else 0


def num_examples(run: Run) -> int | None:
    """That are trained on."""
    return run.count("summary", "num_train_conversations") or run.count("preflight", "plan", "num_rows")


def model_text(run: Run) -> str:
    name = setting_text(run.get("config", "model", "name_or_path"))
    quantization = run.get("config", "model", "quantization")
    return name if quantization in (None, "none") else f"{name} ({setting_text(quantization)})"


def run_state(run: Run) -> str:
    if run.summary:
        return "finished"
    planned = num_steps(run)
    return f"not finished: {steps_taken(run):,}{f' of {planned:,}' if planned else ''} optimizer steps seen"
