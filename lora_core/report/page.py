"""A run folder as one HTML page, and several as one comparison.

The page stands alone: no script, no request, readable in light, in dark, on paper and on a phone. What files hold is
untrusted: Jinja escapes every value, and `visible` shows the characters that would otherwise do something. A file
that is missing or broken leaves its part of the page empty and is named on the page.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.report.plots import PLOTS, draw_losses, plot
from lora_core.report.read import Run, read_run
from lora_core.report.verdict import OverFitting, judge, outcome_of
from lora_core.report.words import (
    NOT_KNOWN,
    bytes_text,
    change_text,
    duration_text,
    eval_losses,
    learning_rate,
    model_text,
    num_examples,
    num_steps,
    number_text,
    peak_memory,
    rate_text,
    run_name,
    run_state,
    setting_text,
    speed,
    steps_taken,
    visible,
)
from lora_core.runtime.run_folder import write_text

# An example with more characters is folded on its own.
_LONG_TEXT = 600


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of one run, `report.html` in its folder unless told otherwise; returns its path.

    Raises:
        ConfigError: it is no run folder, the page cannot be written, or matplotlib is missing.
    """
    run = read_run(folder)
    return write_page(output or folder / "report.html", title=run_name(run), report=_report(run))


def compare_reports(folders: Sequence[Path], output: Path) -> Path:
    """Write one page on several runs: what differs in their configurations, their figures, their loss curves.

    Raises:
        ConfigError: as `write_report`.
    """
    runs = [read_run(folder) for folder in folders]
    return write_page(output, title=f"{len(runs)} runs compared", comparison=_comparison(runs))


def _report(run: Run) -> dict[str, Any]:
    outcome = outcome_of(run)
    plots = {title: plot(title, partial(draw, run)) for title, draw in PLOTS.items()}
    return {
        "folder": str(run.folder),
        "verdict": judge(outcome),
        "over_fitting": _over_fitting(outcome.over_fitting),
        "gaps": run.gaps,
        "loss": plots.pop("Loss"),
        "alarms": [_finding(alarm) | {"step": alarm.get("step", "?")} for alarm in run.alarms],
        "samples": [_sample(sample) for sample in run.samples],
        "film": _film(run),
        "samples_from": _samples_from(run),
        "facts": _facts(run),
        "about": {"heads": ["", "this run"], "rows": _about(run)},
        "next": _next_commands(run),
        "findings": _findings(run),
        "plots": list(plots.values()),
        "rows": [_row(row) for row in run.rows if isinstance(row, dict)],
        "counts": _counts(run),
        "config_text": run.config_text,
        "versions": {
            "heads": ["package", "version"],
            "rows": [(name, [version]) for name, version in (run.get("summary", "versions") or {}).items()],
        },
    }


def _over_fitting(found: OverFitting | None) -> str | None:
    if found is None:
        return None
    return (
        f"Over-fitting: eval loss was lowest at step {found.best_step} ({found.best:.4f}) and rose to {found.last:.4f} "
        f"by step {found.last_step}, while training loss went on falling ({found.training_before:.4f} to "
        f"{found.training_after:.4f}); "
        + (f"adapter/ is that of step {found.best_step}" if found.is_best_kept else f"fix: {found.fix}")
    )


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """The texts of a reply; an earlier version recorded fewer of them."""

    def text(key: str) -> str:
        shown: str = sample.get(key, "not recorded") or "(empty)"
        return shown + (" … (cut off)" if sample.get(f"{key}_ended") is False else "")

    return {key: text(key) for key in ("prompt", "before", "after", "expected")}


def _film(run: Run) -> dict[str, Any] | None:
    """One prompt, and how the reply to it changed: only where it was answered between start and end too."""
    frames = {
        round(reply["step"]): (reply.get("reply") or "(empty)") + ("" if reply.get("ended") else " … (cut off)")
        for reply in run.replies
        if reply.get("number") == 0
    }
    if len(frames) < 3:
        return None
    prompts = [reply.get("prompt", "not recorded") for reply in run.replies if reply.get("number") == 0]
    losses = dict(run.points("eval_events", "loss"))
    return {
        "prompt": prompts[0],
        "frames": [
            {"step": step, "reply": frames[step], "loss": number_text(losses[step], ".4f") if step in losses else None}
            for step in sorted(frames)
        ],
    }


def _samples_from(run: Run) -> str | None:
    sources = {str(sample.get("from")) for sample in run.samples}
    if sources == {"train"}:
        return (
            "To training examples: the model has seen the answers, so these replies cannot show that it learned more."
        )
    return "To examples of the eval set, which were not trained on." if sources == {"eval"} else None


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """(what, figure, what to see it beside)."""
    before, after = eval_losses(run)
    better = run.number("summary", "num_eval_examples_better")
    beside = f"of {number_text(run.number('summary', 'num_eval_examples'))}; ± is the standard error over them"
    is_finished = bool(run.summary)
    return [
        (
            "eval loss" if is_finished else "eval loss so far",
            number_text(after, ".4f"),
            f"before: {number_text(before, '.4f')} ({change_text(before, after)})",
        ),
        (
            "eval examples",
            NOT_KNOWN if better is None else f"{better:,} better",
            "" if better is None else beside,
        ),
        (
            "training time",
            duration_text(run.number("summary", "train_time_s")),
            f"whole run: {duration_text(run.number('summary', 'wall_time_s'))}",
        ),
        (
            "tokens/s" if is_finished else "tokens/s so far",
            number_text(speed(run), ",.0f"),
            f"processes: {number_text(run.number('summary', 'world_size'))}",
        ),
        (
            "peak memory",
            bytes_text(peak_memory(run)),
            f"predicted: {bytes_text(run.number('preflight', 'memory', 'total_bytes'))}",
        ),
    ]


def _about(run: Run) -> list[tuple[str, list[str]]]:
    asked, peak = learning_rate(run), run.number("summary", "peak_learning_rate")
    adapter_step, norm = run.count("summary", "adapter_step"), run.number("summary", "adapter_norm")
    which = "" if adapter_step is None else f" (of step {adapter_step:,})"
    rates = "" if peak is None or asked is None else f", peak {rate_text(peak)} ({peak / asked:.0%})"
    steps = f"{number_text(steps_taken(run))} of {number_text(num_steps(run))}"
    skipped = run.count("summary", "num_skipped_steps")
    about = {
        "model": model_text(run),
        "training file": setting_text(
            run.get("config", "data", "train_files") or run.get("config", "data", "train_file")
        ),
        "training examples": number_text(num_examples(run)),
        "loss tokens trained on": number_text(run.number("summary", "num_supervised_tokens")),
        "optimizer steps": steps + (f", {skipped:,} not applied: loss or gradient was not finite" if skipped else ""),
        "learning rate": (NOT_KNOWN if asked is None else rate_text(asked)) + rates,
        "LoRA": f"rank {setting_text(run.get('config', 'lora', 'rank'))}, on "
        f"{setting_text(run.get('config', 'lora', 'target_modules'))}",
        "norm of the adapter's update": NOT_KNOWN if norm is None else f"{norm:.3g}, from 0",
        "adapter": f"{_text(run, 'adapter_dir')}{which}",
        "date": _text(run, "date"),
        "hardware": _text(run, "hardware"),
        "data hash": _text(run, "data_hash"),
    }
    return [(name, [value]) for name, value in about.items()]


def _text(run: Run, key: str) -> str:
    value = run.get("summary", key)
    return value if isinstance(value, str) else NOT_KNOWN


def _next_commands(run: Run) -> list[tuple[str, str]]:
    """(what for, what to paste)."""
    folder = run.folder.absolute()
    from_where = run.get("summary", "working_dir")
    cd = f"cd {shlex.quote(from_where)} && " if isinstance(from_where, str) else ""
    config = shlex.quote(str(folder / "config.yaml"))
    if not run.summary:
        return [("Resume it, in the folder that it was started in", f"lora-core train --cfg {config} --resume")]
    adapter, quoted_folder = str(folder / "adapter"), shlex.quote(str(folder))
    commands = [("Chat with it, the base model beside it", f"lora-core chat {quoted_folder} --compare")]
    if run.number("summary", "eval_loss_after") is not None:
        evaluate = f"{cd}lora-core evaluate --cfg {config} --adapter {shlex.quote(adapter)}"
        commands.append(("Measure the adapter again", evaluate))
    load = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({adapter!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})"
    )
    merge = f"lora-core merge {quoted_folder} --output {shlex.quote(f'{folder}-merged')}"
    commands += [("Load it in Python, with PEFT", load), ("Merge it into its base model", merge)]
    return [*commands, ("Run it again", _text(run, "command"))]


def _findings(run: Run) -> list[dict[str, Any]] | None:
    """None if preflight left no record, which is not the same as nothing found."""
    findings = run.get("preflight", "findings")
    if not isinstance(findings, list):
        return None
    return [_finding(finding) for finding in findings if isinstance(finding, dict)]


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    return {key: finding.get(key) for key in ("severity", "message", "fix", "id")}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """An example as spans of text, loss tokens or not; a newline gets a mark, for it is a token like others."""
    line = row.get("line")  # a str where the user's file has no lines, or is one of several
    spans = [(str(text).replace("\n", "↵\n"), bool(supervised)) for text, supervised in row.get("spans") or []]
    return {
        "place": line if isinstance(line, str) else f"line {'?' if line is None else line}",
        "num_tokens": row.get("num_tokens", "?"),
        "num_supervised": row.get("num_supervised", "?"),
        "spans": spans,
        "open": sum(len(text) for text, _ in spans) <= _LONG_TEXT,
    }


_COUNTS = {
    "rows read": ("counts", "read"),
    "examples kept": ("counts", "kept"),
    "of them trained on": ("counts", "trained"),
    "of them in the eval set": ("counts", "eval"),
    "rows dropped, unreadable": ("counts", "dropped_bad"),
    "rows dropped, no loss tokens": ("counts", "dropped_unsupervised"),
    "examples truncated to max_seq_length": ("counts", "truncated"),
    "tokens lost by truncation": ("counts", "truncated_tokens"),
    "loss tokens lost by truncation": ("counts", "truncated_supervised_tokens"),
    "tokens kept": ("counts", "tokens"),
    "loss tokens kept": ("counts", "supervised_tokens"),
    "longest before truncation, tokens": ("counts", "longest"),
    "length p50, tokens": ("lengths", "p50"),
    "length p90, tokens": ("lengths", "p90"),
    "length p99, tokens": ("lengths", "p99"),
    "length max, tokens": ("lengths", "max"),
}
# Only where a share of the training file is the eval set.
_OF_A_SPLIT = (("counts", "trained"), ("counts", "eval"))


def _counts(run: Run) -> dict[str, Any]:
    """A table with a column for the training file and one for the eval set, if that is a file of its own."""
    titles = {"train": "training", "eval": "eval set"}
    files = [name for name in titles if run.get("preflight", "data", name, "counts")]
    heads = [f"{titles[name]}: {setting_text(run.get('preflight', 'data', name, 'file'))}" for name in files]
    rows = [
        (label, [number_text(run.number("preflight", "data", name, *keys)) for name in files])
        for label, keys in _COUNTS.items()
        if keys not in _OF_A_SPLIT or run.count("preflight", "data", "train", *keys)
    ]
    return {"heads": ["", *heads], "rows": rows if files else []}


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    losses = [eval_losses(run) for run in runs]
    heads = ["", *(f"run {number}" for number in range(1, len(runs) + 1))]
    figures = [
        ("state", [run_state(run) for run in runs]),
        ("training examples", [number_text(num_examples(run)) for run in runs]),
        ("optimizer steps", [number_text(num_steps(run)) for run in runs]),
        ("peak learning rate", [number_text(run.number("summary", "peak_learning_rate"), ".3g") for run in runs]),
        ("eval loss before", [number_text(before, ".4f") for before, _ in losses]),
        ("eval loss after", [number_text(after, ".4f") for _, after in losses]),
        ("change", [change_text(before, after) for before, after in losses]),
        ("eval examples better", [number_text(run.number("summary", "num_eval_examples_better")) for run in runs]),
        ("training time", [duration_text(run.number("summary", "train_time_s")) for run in runs]),
        ("tokens/s", [number_text(speed(run), ",.0f") for run in runs]),
        ("peak memory", [bytes_text(peak_memory(run)) for run in runs]),
    ]
    return {
        "runs": [(str(run.folder), judge(outcome_of(run))) for run in runs],
        "config": {"heads": heads, "rows": config_differences(runs)},
        "figures": {"heads": heads, "rows": figures},
        "plots": [plot("Loss", partial(draw_losses, runs))],
    }


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
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


def write_page(path: Path, **parts: Any) -> Path:
    """Write a page; returns its path.

    Args:
        parts: the title, and one of report, comparison and search, as the template has them.

    Raises:
        ConfigError: it cannot be written.
    """
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
    if path.is_file() and not _is_page(path):
        problem = "exists, is no report, and would be lost"
    if problem is None:
        try:
            write_text(path, page)
        except OSError as error:
            problem = str(error.strerror)
    if problem:
        raise ConfigError(f"{path}: cannot be written: {problem}; fix: --output FILE.html")
    return path


def _is_page(path: Path) -> bool:
    """Whether a file may be replaced: an HTML page is an earlier report, and anything else somebody's rows or notes."""
    with path.open("rb") as file:
        return file.read(100).lstrip().lower().startswith(b"<!doctype html")
