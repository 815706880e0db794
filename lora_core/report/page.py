"""A run folder as one HTML page, and several as one comparison.

The page stands alone: no script, no request, readable in light, in dark, on paper and on a phone. What files hold is
untrusted: Jinja escapes every value, and `visible` shows the characters that would otherwise do something. A file
that is missing or broken leaves its part of the page empty and is named on the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.report.plots import PLOTS, draw_losses, plot
from lora_core.report.read import Run, read_run
from lora_core.report.words import (
    bytes_text,
    change_text,
    duration_text,
    held_out_loss,
    num_rows,
    num_steps,
    number_text,
    over_fitting,
    peak_memory,
    run_name,
    run_state,
    setting_text,
    verdict,
    visible,
)
from lora_core.runtime.run_folder import write_text

# A row or reply with more characters starts folded.
_LONG_TEXT = 600


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of one run, `report.html` in its folder unless told otherwise; returns its path.

    Raises:
        ConfigError: it is no run folder, the page cannot be written, or matplotlib is missing.
    """
    run = read_run(folder)
    return _write_page(output or folder / "report.html", title=run_name(run), report=_report(run))


def compare_reports(folders: Sequence[Path], output: Path) -> Path:
    """Write one page on several runs: what differs in their configurations, their figures, their loss curves.

    Raises:
        ConfigError: as `write_report`.
    """
    runs = [read_run(folder) for folder in folders]
    return _write_page(output, title=f"{len(runs)} runs compared", comparison=_comparison(runs))


def _report(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "state": None if run.summary else f"This run is {run_state(run)}.",
        "verdict": verdict(run),
        "over_fitting": over_fitting(run),
        "gaps": run.gaps,
        "facts": _facts(run),
        "findings": _findings(run),
        "plots": [plot(title, partial(draw, run)) for title, draw in PLOTS.items()],
        "rows": [_row(row) for row in run.rows if isinstance(row, dict)],
        "samples": run.samples,
        "counts": _counts(run),
        "command": run.get("summary", "command"),
        "config_text": run.config_text,
        "versions": {
            "heads": ["package", "version"],
            "rows": [(name, [version]) for name, version in (run.get("summary", "versions") or {}).items()],
        },
    }


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, what to see it beside)."""
    before, after = held_out_loss(run)
    return [
        (
            "held-out loss",
            number_text(after, ".4f"),
            f"before: {number_text(before, '.4f')} ({change_text(before, after)})",
        ),
        (
            "training time",
            duration_text(run.number("summary", "train_time_s")),
            f"whole run: {duration_text(run.number('summary', 'wall_time_s'))}",
        ),
        (
            "tokens/s",
            number_text(run.number("summary", "tokens_per_s"), ",.0f"),
            f"processes: {number_text(run.number('summary', 'world_size'))}",
        ),
        (
            "peak memory",
            bytes_text(peak_memory(run)),
            f"predicted: {bytes_text(run.number('preflight', 'memory', 'total_bytes'))}",
        ),
    ]


def _findings(run: Run) -> list[dict[str, Any]] | None:
    """None if preflight left no record, which is not the same as nothing found."""
    findings = run.get("preflight", "findings")
    if not isinstance(findings, list):
        return None
    keys = ("severity", "message", "fix", "id")
    return [{key: finding.get(key) for key in keys} for finding in findings if isinstance(finding, dict)]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as spans of text, supervised or not; a newline gets a mark, for it is a token like others."""
    spans = [(str(text).replace("\n", "↵\n"), bool(supervised)) for text, supervised in row.get("spans") or []]
    return {
        "line": row.get("line", "?"),
        "num_tokens": row.get("num_tokens", "?"),
        "num_supervised": row.get("num_supervised", "?"),
        "spans": spans,
        "open": sum(len(text) for text, _ in spans) <= _LONG_TEXT,
    }


_COUNTS = {
    "rows read": ("counts", "read"),
    "rows kept": ("counts", "kept"),
    "rows dropped, unreadable": ("counts", "dropped_bad"),
    "rows dropped, nothing supervised": ("counts", "dropped_unsupervised"),
    "rows cut at max_seq_length": ("counts", "truncated"),
    "tokens lost by the cut": ("counts", "truncated_tokens"),
    "supervised tokens lost by the cut": ("counts", "truncated_supervised_tokens"),
    "tokens kept": ("counts", "tokens"),
    "supervised tokens kept": ("counts", "supervised_tokens"),
    "longest row before the cut, tokens": ("counts", "longest"),
    "row length p50, tokens": ("lengths", "p50"),
    "row length p90, tokens": ("lengths", "p90"),
    "row length p99, tokens": ("lengths", "p99"),
    "row length max, tokens": ("lengths", "max"),
}


def _counts(run: Run) -> dict[str, Any]:
    """A table with a column for the training rows and one for the held-out rows, if there are any."""
    titles = {"train": "training", "eval": "held-out"}
    files = [name for name in titles if run.get("preflight", "data", name)]
    heads = [f"{titles[name]}: {setting_text(run.get('preflight', 'data', name, 'file'))}" for name in files]
    rows = [
        (label, [number_text(run.number("preflight", "data", name, *keys)) for name in files])
        for label, keys in _COUNTS.items()
    ]
    return {"heads": ["", *heads], "rows": rows if files else []}


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    losses = [held_out_loss(run) for run in runs]
    heads = ["", *(f"run {number}" for number in range(1, len(runs) + 1))]
    figures = [
        ("state", [run_state(run) for run in runs]),
        ("training rows", [number_text(num_rows(run)) for run in runs]),
        ("optimizer steps", [number_text(num_steps(run)) for run in runs]),
        ("peak learning rate", [number_text(run.number("summary", "peak_learning_rate"), ".3g") for run in runs]),
        ("held-out loss before", [number_text(before, ".4f") for before, _ in losses]),
        ("held-out loss after", [number_text(after, ".4f") for _, after in losses]),
        ("change", [change_text(before, after) for before, after in losses]),
        ("training time", [duration_text(run.number("summary", "train_time_s")) for run in runs]),
        ("tokens/s", [number_text(run.number("summary", "tokens_per_s"), ",.0f") for run in runs]),
        ("peak memory", [bytes_text(peak_memory(run)) for run in runs]),
    ]
    return {
        "runs": [str(run.folder) for run in runs],
        "config": {"heads": heads, "rows": _config_differences(runs)},
        "figures": {"heads": heads, "rows": figures},
        "plots": [plot("Loss", partial(draw_losses, runs))],
    }


def _config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) for the keys that differ. Not output_dir: it always does, and heads the table."""
    configs = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "output_dir")
    table = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", setting_text(value)


def _write_page(path: Path, **parts: Any) -> Path:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(parts)
    problem = "is a folder" if path.is_dir() else None
    if problem is None:
        try:
            write_text(path, page)
        except OSError as error:
            problem = str(error.strerror)
    if problem:
        raise ConfigError(f"{path}: cannot be written: {problem}; fix: --output FILE.html")
    return path
