"""A run folder as one HTML page, and several as one comparison.

The page stands alone: no script, no request, readable in light, in dark, on paper and on a phone. What files hold is
untrusted: Jinja escapes every value, and `visible` shows the characters that would otherwise do something. A file
that is missing or broken leaves its part of the page empty and is named on the page.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import yaml

from lora_core.errors import ConfigError, counted
from lora_core.run_folder import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A row or reply with more characters starts folded.
_LONG_TEXT = 600
# A sequence is cut so far to the right of all lengths that its line would leave no room for them.
_FAR = 3.0
# Held-out loss wavers from one evaluation to the next; only a larger rise counts as one.
_RISE = 0.01
_NOT_KNOWN = "not known"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of one run, `report.html` in its folder unless told otherwise; returns its path.

    Raises:
        ConfigError: it is no run folder, the page cannot be written, or matplotlib is missing.
    """
    run = read_run(folder)
    return _write_page(output or folder / "report.html", title=_name(run), report=_report(run))


def compare_reports(folders: Sequence[Path], output: Path) -> Path:
    """Write one page on several runs: what differs in their configurations, their figures, their loss curves.

    Raises:
        ConfigError: as `write_report`.
    """
    runs = [read_run(folder) for folder in folders]
    return _write_page(output, title=f"{len(runs)} runs compared", comparison=_comparison(runs))


# ---------------------------------------------------------------------------------------------------------------
# The run folder, read


@dataclass(frozen=True)
class Run:
    """What a run folder holds. What is missing is empty here and named in `gaps`."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    preflight: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Any]
    train_events: list[dict[str, Any]]
    """One an optimizer step, in order; of a step that was taken again after a resume, the later."""
    eval_events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    gaps: list[str]
    """Sentences on files that are missing or broken."""

    def get(self, file: str, *keys: str) -> Any:
        """`run.get("config", "lora", "rank")`: the value, or None if any of the keys is missing."""
        value = getattr(self, file)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, file: str, *keys: str) -> float | None:
        """As `get`; None also for what is no number."""
        value = self.get(file, *keys)
        return value if _is_number(value) else None

    def points(self, events: str, key: str) -> list[tuple[int, float]]:
        """(optimizer step, value) of every event that has a number there."""
        return [(event["step"], event[key]) for event in getattr(self, events) if _is_number(event.get(key))]


def read_run(folder: Path) -> Run:
    """Read what there is of a run.

    Raises:
        ConfigError: there is no config.yaml, which every run writes first.
    """
    if not (folder / "config.yaml").is_file():
        problem = "holds no config.yaml, so it is no run" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {problem}; fix: name the output_dir of a run, such as outputs/demo")
    gaps: list[str] = []
    config_text, config = _read_config(folder / "config.yaml", gaps)
    events = _read_events(folder / "metrics.jsonl", gaps)
    return Run(
        folder=folder,
        config_text=config_text,
        config=config,
        preflight=_read_json(folder / "preflight.json", dict, gaps),
        summary=_read_json(folder / "summary.json", dict, gaps),
        rows=_read_json(folder / "rows.json", list, gaps),
        train_events=_last_of_each_step(events, "train"),
        eval_events=_last_of_each_step(events, "eval"),
        samples=[event for event in events if event.get("event") == "sample"],
        gaps=gaps,
    )


_Kind = TypeVar("_Kind", dict[str, Any], list[Any])


def _read_json(path: Path, kind: type[_Kind], gaps: list[str]) -> _Kind:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read: {error}.")
    else:
        if isinstance(value, kind):
            return value
        gaps.append(f"{path.name} holds a {type(value).__name__} where a {kind.__name__} was expected; left out.")
    return kind()


def _read_config(path: Path, gaps: list[str]) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        gaps.append(f"{path.name} is not valid YAML: {error}.")
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_events(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        gaps.append(f"{path.name} is missing.")
        return []
    # Not splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines):
                gaps.append(f"{path.name} ends in the middle of line {number}, as when a run is killed; left out.")
            else:
                gaps.append(f"{path.name} line {number} is not valid JSON; left out.")
            continue
        events.append(event)
    return [event for event in events if isinstance(event, dict)]


def _last_of_each_step(events: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    by_step = {event["step"]: event for event in events if event.get("event") == kind and _is_number(event.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------
# Words


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


def _words(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(value: float | None, form: str = ",") -> str:
    return _NOT_KNOWN if value is None else format(value, form)


def _bytes(value: float | None) -> str:
    if value is None:
        return _NOT_KNOWN
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _duration(value: float | None) -> str:
    if value is None:
        return _NOT_KNOWN
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{value:.3g} s"


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _held_out_loss(run: Run) -> tuple[float | None, float | None]:
    """(before, after or so far): from the summary, or from the evaluations of a run without one."""
    points = run.points("eval_events", "loss")
    if not run.summary and points:
        return (points[0][1] if points[0][0] == 0 else None), points[-1][1]
    return run.number("summary", "eval_loss_before"), run.number("summary", "eval_loss_after")


def _change(before: float | None, after: float | None) -> str:
    return f"{after / before - 1:+.1%}" if before and after is not None else _NOT_KNOWN


def _peak_memory(run: Run) -> float | None:
    """Measured bytes."""
    seen = [value for _, value in run.points("train_events", "peak_memory_bytes")]
    return run.number("summary", "peak_memory_bytes") or max(seen, default=None)


def _num_steps(run: Run) -> float | None:
    """Optimizer steps of the whole run."""
    planned = run.number("preflight", "plan", "total_optimizer_steps")
    return run.number("summary", "total_optimizer_steps") or planned


def _num_rows(run: Run) -> float | None:
    return run.number("summary", "num_train_conversations") or run.number("preflight", "plan", "num_rows")


def _state(run: Run) -> str:
    if run.summary:
        return "finished"
    last = run.train_events[-1]["step"] if run.train_events else 0
    steps = _num_steps(run)
    return f"not finished: {last:,}{f' of {steps:,}' if steps else ''} optimizer steps seen"


def _verdict(run: Run) -> str:
    """What was trained on what, and what came of it, in one sentence."""
    model = _words(run.get("config", "model", "name_or_path"))
    quantization = run.get("config", "model", "quantization")
    if quantization not in (None, "none"):
        model += f" ({quantization})"
    rows, steps = (_number(number) for number in (_num_rows(run), _num_steps(run)))
    before, after = _held_out_loss(run)
    results = ["held-out loss was not measured"]
    if after is not None:
        results = [f"held-out loss {_number(before, '.4f')} before, {after:.4f} after ({_change(before, after)})"]
    if run.summary:
        results.append(f"{_duration(run.number('summary', 'train_time_s'))} of training")
        results.append(f"{_number(run.number('summary', 'tokens_per_s'), ',.0f')} tokens/s")
        results += _what_else(run)
    return (
        f"{model} {'was' if run.summary else 'was being'} trained on {_words(run.get('config', 'data', 'train_file'))} "
        f"(rows: {rows}, optimizer steps: {steps}, LoRA rank: {_words(run.get('config', 'lora', 'rank'))}, "
        f"on {_words(run.get('config', 'lora', 'target_modules'))}): {'; '.join(results)}; "
        f"peak memory {_bytes(_peak_memory(run))}."
    )


def _what_else(run: Run) -> list[str]:
    """What did not go as planned, or is not the last step's."""
    step, stopped, skipped = (
        run.number("summary", key) for key in ("adapter_step", "stopped_early_at_step", "num_skipped_steps")
    )
    said = []
    if stopped:
        said.append(f"stopped early at step {stopped:.0f}")
    if step and step != (stopped or _num_steps(run)):
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


# ---------------------------------------------------------------------------------------------------------------
# Plots: each draws what there is on its axes and returns the caption

# matplotlib writes colours as they are; these stand-ins become CSS variables, which follow light and dark.
_VARIABLES = ("ink", "grid", "page", *(f"series-{i}" for i in range(1, 9)))


def _colour(variable: str) -> str:
    return f"#c0de{_VARIABLES.index(variable):02x}"


_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_core",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "grid.color": _colour("grid"),
    "grid.linewidth": 0.6,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _colour("ink")),
}


def _plot(title: str, draw: Callable[[Axes], str]) -> dict[str, Any]:
    """`draw`'s plot as inline SVG. svg is None if it drew nothing."""
    # Here, so that everything but plots does without: matplotlib is an extra.
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ConfigError(
            f"a report needs matplotlib, which is not installed ({error}); fix: pip install 'lora_core[report]'"
        ) from error
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        caption = draw(axes)
        if not axes.has_data():
            return {"title": title, "caption": "Nothing recorded.", "svg": None}
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator"), None))
    return {"title": title, "caption": caption, "svg": _inline(file.getvalue(), title)}


def _inline(svg: str, title: str) -> Any:
    """matplotlib's SVG file as a part of a page: ids of its own, colours of the page, the page's width."""
    from markupsafe import Markup, escape

    prefix = re.sub(r"\W+", "-", title.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"#c0de([0-9a-f]{2})", lambda match: f"var(--{_VARIABLES[int(match[1], 16)]})", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    tag = f'<svg {view_box[0]} role="img" aria-label="{escape(title)}">'
    return Markup(tag + svg[svg.index(">") + 1 :])  # all text in it is this module's own


def _steps_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _line(axes: Axes, points: Sequence[tuple[int, float]], **style: Any) -> None:
    """A line through the points; up to 40 of them also get a dot, so that a single one is seen."""
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, **{"marker": "o" if len(points) <= 40 else "", "markersize": 3, **style})


def _draw_learning_rate(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    planned = [rate for rate in run.get("preflight", "plan", "learning_rates") or [] if _is_number(rate)]
    used = run.points("train_events", "learning_rate")
    if planned:
        axes.plot(range(1, len(planned) + 1), planned, color=_colour("series-1"), label="planned")
    if used:
        steps, rates = zip(*used, strict=True)
        every = max(1, len(used) // 30)  # more dots would hide the line
        axes.plot(steps, rates, "o", markersize=4, markevery=every, color=_colour("series-2"), label="used")
    if axes.has_data():
        axes.legend()
    if not planned:
        return "Used learning rate."
    off = [step for step, rate in used if step > len(planned) or abs(planned[step - 1] - rate) > 1e-6 * rate]
    if off:
        return f"Planned and used learning rate. They differ in {counted(len(off), 'step')}, first in step {off[0]}."
    return f"Planned and used learning rate. Planned peak {max(planned):.3g}."


def _draw_loss(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    training, held_out = run.points("train_events", "loss"), run.points("eval_events", "loss")
    _line(axes, training, color=_colour("series-1"), label="training", linewidth=1.0)
    _line(axes, held_out, color=_colour("series-2"), label="held-out", linewidth=2.2, marker="s", markersize=4.5)
    if axes.has_data():
        axes.legend()
    lowest = min(held_out, key=lambda point: point[1], default=None)
    return "Nats per supervised token." + (f" Lowest held-out: {lowest[1]:.4f} at step {lowest[0]}." if lowest else "")


def _draw_grad_norm(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    points, limit = run.points("train_events", "grad_norm"), run.number("config", "train", "max_grad_norm")
    _line(axes, points, color=_colour("series-1"))
    if limit is None:
        return "Global norm; not clipped."
    clipped = sum(norm > limit for _, norm in points)
    return f"Global norm before clipping at {limit:g}: clipped in {clipped:,} of {counted(len(points), 'logged step')}."


def _draw_speed(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    points = run.points("train_events", "tokens_per_s")
    _line(axes, points, color=_colour("series-1"))
    axes.set_ylim(bottom=0)
    return "Tokens of all rows in a step over its time, all processes together."


def _draw_lengths(run: Run, axes: Axes) -> str:
    edges = run.get("preflight", "data", "train", "lengths", "histogram", "edges") or []
    counts = run.get("preflight", "data", "train", "lengths", "histogram", "counts") or []
    cut = run.number("config", "data", "max_seq_length")
    if not counts or len(edges) != len(counts) + 1:
        return ""
    axes.stairs(counts, edges, fill=True, color=_colour("series-1"), edgecolor=_colour("page"), linewidth=0.5)
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel("rows")
    if cut is None:
        return "Training rows."
    if cut > _FAR * edges[-1]:
        return f"Training rows. All lie far below the cut at {cut:,} tokens, which is off this plot to the right."
    axes.axvline(cut, color=_colour("series-2"), linestyle="--", label=f"cut at {cut:,}")
    axes.legend()
    return f"Training rows. Longer ones are cut at {cut:,} tokens."


def _draw_memory(run: Run, axes: Axes) -> str:
    components = run.get("preflight", "memory", "components") or {}
    measured = _peak_memory(run)
    limit = run.number("preflight", "memory", "limit_bytes")
    bottom = 0.0
    for index, (name, size) in enumerate(components.items()):
        style: dict[str, Any] = {"color": _colour(f"series-{index % 8 + 1}"), "edgecolor": _colour("page")}
        axes.bar("predicted", size / 2**30, bottom=bottom, width=0.6, label=f"{name} {_bytes(size)}", **style)
        bottom += size / 2**30
    if measured is not None:
        axes.bar("measured", measured / 2**30, width=0.6, color=_colour("ink"), alpha=0.55)
    axes.set_ylabel("GiB")
    axes.grid(axis="x", visible=False)
    if not components:
        return f"Measured {_bytes(measured)}; nothing was predicted."
    handles, labels = axes.get_legend_handles_labels()  # from the top, as they are stacked
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3)
    return (
        f"Peak of one process: predicted {_bytes(bottom * 2**30)}, measured {_bytes(measured)}; "
        f"the device has {_bytes(limit)}."
    )


_PLOTS: dict[str, Callable[[Run, Axes], str]] = {
    "Learning rate": _draw_learning_rate,
    "Loss": _draw_loss,
    "Gradient norm": _draw_grad_norm,
    "Speed, tokens/s": _draw_speed,
    "Row lengths": _draw_lengths,
    "Memory": _draw_memory,
}


def _draw_losses(runs: Sequence[Run], axes: Axes) -> str:
    _steps_axis(axes)
    dashes = ("-", "--", ":", "-.")
    for index, run in enumerate(runs):
        # A number and not the folder's name: what matplotlib writes into the SVG must be this module's own.
        style = {"color": _colour(f"series-{index % 8 + 1}"), "linestyle": dashes[index % 4]}
        _line(axes, run.points("train_events", "loss"), **style, linewidth=0.8, alpha=0.6, marker="")
        _line(axes, run.points("eval_events", "loss"), **style, linewidth=2.2, marker="s", label=f"run {index + 1}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return "Nats per supervised token. Thin: training loss; thick, with squares: held-out loss."


# ---------------------------------------------------------------------------------------------------------------
# Pages: what the template shows


def _report(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "state": None if run.summary else f"This run is {_state(run)}.",
        "verdict": _verdict(run),
        "over_fitting": over_fitting(run),
        "gaps": run.gaps,
        "facts": _facts(run),
        "findings": _findings(run),
        "plots": [_plot(title, partial(draw, run)) for title, draw in _PLOTS.items()],
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
    before, after = _held_out_loss(run)
    return [
        ("held-out loss", _number(after, ".4f"), f"before: {_number(before, '.4f')} ({_change(before, after)})"),
        (
            "training time",
            _duration(run.number("summary", "train_time_s")),
            f"whole run: {_duration(run.number('summary', 'wall_time_s'))}",
        ),
        (
            "tokens/s",
            _number(run.number("summary", "tokens_per_s"), ",.0f"),
            f"processes: {_number(run.number('summary', 'world_size'))}",
        ),
        (
            "peak memory",
            _bytes(_peak_memory(run)),
            f"predicted: {_bytes(run.number('preflight', 'memory', 'total_bytes'))}",
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
    heads = [f"{titles[name]}: {_words(run.get('preflight', 'data', name, 'file'))}" for name in files]
    rows = [
        (label, [_number(run.number("preflight", "data", name, *keys)) for name in files])
        for label, keys in _COUNTS.items()
    ]
    return {"heads": ["", *heads], "rows": rows if files else []}


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    losses = [_held_out_loss(run) for run in runs]
    heads = ["", *(f"run {number}" for number in range(1, len(runs) + 1))]
    figures = [
        ("state", [_state(run) for run in runs]),
        ("training rows", [_number(_num_rows(run)) for run in runs]),
        ("optimizer steps", [_number(_num_steps(run)) for run in runs]),
        ("peak learning rate", [_number(run.number("summary", "peak_learning_rate"), ".3g") for run in runs]),
        ("held-out loss before", [_number(before, ".4f") for before, _ in losses]),
        ("held-out loss after", [_number(after, ".4f") for _, after in losses]),
        ("change", [_change(before, after) for before, after in losses]),
        ("training time", [_duration(run.number("summary", "train_time_s")) for run in runs]),
        ("tokens/s", [_number(run.number("summary", "tokens_per_s"), ",.0f") for run in runs]),
        ("peak memory", [_bytes(_peak_memory(run)) for run in runs]),
    ]
    return {
        "runs": [str(run.folder) for run in runs],
        "config": {"heads": heads, "rows": _config_differences(runs)},
        "figures": {"heads": heads, "rows": figures},
        "plots": [_plot("Loss", partial(_draw_losses, runs))],
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
            yield f"{prefix}{key}", _words(value)


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
