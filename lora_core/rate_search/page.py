"""The page of a search: a table, and two plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.errors import counted
from lora_core.rate_search.choice import smoothed
from lora_core.rate_search.search import RateSearch
from lora_core.report.page import write_page
from lora_core.report.plots import colour, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "learning rate"


def write_search(search: RateSearch, name: str, path: Path) -> Path:
    """Write the page; returns its path.

    Args:
        name: of the configuration.

    Raises:
        ConfigError: it cannot be written, or matplotlib is missing.
    """
    return write_page(path, title=f"{name}: {TITLE}", search=describe(search))


def describe(search: RateSearch) -> dict[str, Any]:
    """What the page shows."""
    return {
        "sentence": f"learning rate {search.rate:g}",
        "remarks": [*search.remarks, in_words(search)],
        "candidates": {
            "heads": ["learning rate", "eval loss", "change", "worse than the best by"],
            "rows": [(row[0], row[1:]) for row in candidate_rows(search)],
        },
        "plots": [
            plot("Range test", lambda axes: _draw_range(search, axes)),
            plot("Candidates", lambda axes: _draw_candidates(search, axes)),
        ],
    }


def in_words(search: RateSearch) -> str:
    """What was done, beside what the run does."""
    return (
        f"Candidates took {counted(search.work.steps, 'step')} of {counted(search.work.rows_per_step, 'example')}, and "
        f"the run takes {search.run.steps:,} of {search.run.rows_per_step:,}; they were judged on "
        f"{counted(search.work.eval_examples, 'eval example')} of {search.run.eval_examples:,}."
    )


def candidate_rows(search: RateSearch) -> list[list[str]]:
    """Rate, eval loss, its change, and the distance from the best."""
    rows = [["before training", f"{search.loss_before:.4f}", "", ""]]
    for candidate in search.candidates:
        mark = " (taken)" if candidate.rate == search.rate else ""
        if not math.isfinite(candidate.eval_loss):
            rows.append([f"{candidate.rate:.1e}{mark}", "diverged", "", ""])
            continue
        error = candidate.standard_error
        behind = "" if candidate.worse_by == 0 else f"{candidate.worse_by:.4f}"
        behind += "" if error is None else f" ± {error:.4f}"
        change = f"{candidate.eval_loss / search.loss_before - 1:+.1%}"
        rows.append([f"{candidate.rate:.1e}{mark}", f"{candidate.eval_loss:.4f}", change, behind])
    return rows


def _draw_range(search: RateSearch, axes: Axes) -> str:
    steps = [step for step in search.range_steps if math.isfinite(step.loss)]
    rates = [step.rate for step in steps]
    axes.plot(rates, [step.ratio for step in steps], "o", markersize=3, color=colour("series-1"), label="step")
    axes.plot(rates, smoothed(steps), color=colour("series-2"), label="mean of three")
    axes.axvline(search.rate, color=colour("ink"), linestyle="--", linewidth=1, label="taken")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.legend()
    return "Training loss over the base model's loss on the same rows, with a rate that grows at every step."


def _draw_candidates(search: RateSearch, axes: Axes) -> str:
    alive = [candidate for candidate in search.candidates if math.isfinite(candidate.eval_loss)]
    axes.plot([c.rate for c in alive], [c.eval_loss for c in alive], "s-", color=colour("series-2"), label="eval loss")
    axes.axhline(search.loss_before, color=colour("ink"), linestyle=":", linewidth=1, label="before training")
    axes.set_xscale("log")
    axes.set_xticks([c.rate for c in alive], [f"{c.rate:.1e}" for c in alive])  # powers of ten are too far apart
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")
    axes.legend()
    gone = len(search.candidates) - len(alive)
    return f"Eval loss after {counted(search.work.steps, 'step')}." + (f" {gone} diverged." if gone else "")
