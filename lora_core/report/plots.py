"""The plots of a page, as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError, counted
from lora_core.report.read import Run, is_number
from lora_core.report.words import bytes_text, peak_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The limit of a sequence's length is so far to the right of all lengths that its line would leave no room for them.
_FAR = 3.0
# A loss axis spans at least this share of the largest loss on it, so that a change of 1% is 2% of the plot's height.
_LOSS_SPAN = 0.5
# matplotlib writes colours as they are; these stand-ins become CSS variables, which follow light and dark.
_VARIABLES = ("ink", "grid", "page", *(f"series-{i}" for i in range(1, 9)))


def colour(variable: str) -> str:
    """A colour of the page, as `plot` knows it: ink, grid, page, series-1 to series-8."""
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
    "grid.color": colour("grid"),
    "grid.linewidth": 0.6,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), colour("ink")),
}


def plot(title: str, draw: Callable[[Axes], str]) -> dict[str, Any]:
    """`draw`'s plot as inline SVG. svg is None if it drew nothing."""
    # Here, so that everything but plots does without: matplotlib is an extra.
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ConfigError(
            f"a report needs matplotlib, which is not installed ({error}); fix: pip install 'lora_core[report]'"
        ) from error
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(4.8, 2.8), dpi=72)  # an SVG's points
        axes = figure.subplots()
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        caption = draw(axes)
        if not axes.has_data():
            return {"title": title, "caption": "Nothing recorded.", "svg": None}
        # As an engine of the figure it would be executed, and the figure drawn, twice.
        ConstrainedLayoutEngine().execute(figure)
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


_LOSS = "Mean cross-entropy per loss token"


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
    planned = [rate for rate in run.get("preflight", "plan", "learning_rates") or [] if is_number(rate)]
    used = run.points("train_events", "learning_rate")
    if planned:
        axes.plot(range(1, len(planned) + 1), planned, color=colour("series-1"), label="planned")
    if used:
        steps, rates = zip(*used, strict=True)
        every = max(1, len(used) // 30)  # more dots would hide the line
        axes.plot(steps, rates, "o", markersize=4, markevery=every, color=colour("series-2"), label="used")
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
    training, measured = run.points("train_events", "loss"), run.points("eval_events", "loss")
    _line(axes, training, color=colour("series-1"), label="training", linewidth=1.0)
    _line(axes, measured, color=colour("series-2"), label="eval set", linewidth=2.2, marker="s", markersize=4.5)
    _loss_axis(axes, [loss for _, loss in training + measured])
    if axes.has_data():
        axes.legend()
    lowest = min(measured, key=lambda point: point[1], default=None)
    return f"{_LOSS}." + (f" Lowest eval loss: {lowest[1]:.4f} at step {lowest[0]}." if lowest else "")


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Round the losses, but never so close that a change next to nothing looks like a slope."""
    if losses:
        low, high = min(losses), max(losses)
        missing = max(0.0, _LOSS_SPAN * abs(high) - (high - low)) / 2
        margin = 0.05 * (high - low + 2 * missing) or 1.0
        axes.set_ylim(low - missing - margin, high + missing + margin)


def _draw_grad_norm(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    points, limit = run.points("train_events", "grad_norm"), run.number("config", "train", "max_grad_norm")
    _line(axes, points, color=colour("series-1"))
    if limit is None:
        return "Global norm; not clipped."
    clipped = sum(norm > limit for _, norm in points)
    return f"Global norm before clipping at {limit:g}: clipped in {clipped:,} of {counted(len(points), 'logged step')}."


def _draw_speed(run: Run, axes: Axes) -> str:
    _steps_axis(axes)
    points = run.points("train_events", "tokens_per_s")
    _line(axes, points, color=colour("series-1"))
    axes.set_ylim(bottom=0)
    return "Tokens of a step's examples, not loss tokens alone, over its time; all processes together."


def _draw_lengths(run: Run, axes: Axes) -> str:
    edges = run.get("preflight", "data", "train", "lengths", "histogram", "edges") or []
    counts = run.get("preflight", "data", "train", "lengths", "histogram", "counts") or []
    limit = run.count("config", "data", "max_seq_length")
    if not counts or len(edges) != len(counts) + 1:
        return ""
    axes.stairs(counts, edges, fill=True, color=colour("series-1"), edgecolor=colour("page"), linewidth=0.5)
    axes.set_xlabel("tokens in an example")
    axes.set_ylabel("examples")
    if limit is None:
        return "Training examples."
    if limit > _FAR * edges[-1]:
        return f"Training examples. All are far below max_seq_length, {limit:,} tokens, which is off this plot."
    axes.axvline(limit, color=colour("series-2"), linestyle="--", label=f"max_seq_length {limit:,}")
    axes.legend()
    return f"Training examples. Longer ones are truncated to {limit:,} tokens."


def _draw_memory(run: Run, axes: Axes) -> str:
    components = run.get("preflight", "memory", "components") or {}
    measured = peak_memory(run)
    limit = run.number("preflight", "memory", "limit_bytes")
    bottom = 0.0
    for index, (name, size) in enumerate(components.items()):
        style: dict[str, Any] = {"color": colour(f"series-{index % 8 + 1}"), "edgecolor": colour("page")}
        axes.bar("predicted", size / 2**30, bottom=bottom, width=0.6, label=f"{name} {bytes_text(size)}", **style)
        bottom += size / 2**30
    if measured is not None:
        axes.bar("measured", measured / 2**30, width=0.6, color=colour("ink"), alpha=0.55)
    axes.set_ylabel("GiB")
    axes.grid(axis="x", visible=False)
    if not components:
        return f"Measured {bytes_text(measured)}; nothing was predicted."
    handles, labels = axes.get_legend_handles_labels()  # from the top, as they are stacked
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3)
    return (
        f"Peak memory of one process: predicted {bytes_text(bottom * 2**30)}, measured {bytes_text(measured)}; "
        f"the device has {bytes_text(limit)}."
    )


PLOTS: dict[str, Callable[[Run, Axes], str]] = {
    "Loss": _draw_loss,
    "Learning rate": _draw_learning_rate,
    "Gradient norm": _draw_grad_norm,
    "Speed, tokens/s": _draw_speed,
    "Example lengths": _draw_lengths,
    "Memory": _draw_memory,
}


def draw_losses(runs: Sequence[Run], axes: Axes) -> str:
    _steps_axis(axes)
    losses: list[float] = []
    dashes = ("-", "--", ":", "-.")
    for index, run in enumerate(runs):
        # A number and not the folder's name: what matplotlib writes into the SVG must be this module's own.
        style = {"color": colour(f"series-{index % 8 + 1}"), "linestyle": dashes[index % 4]}
        training, measured = run.points("train_events", "loss"), run.points("eval_events", "loss")
        _line(axes, training, **style, linewidth=0.8, alpha=0.6, marker="")
        _line(axes, measured, **style, linewidth=2.2, marker="s", label=f"run {index + 1}")
        losses += [loss for _, loss in training + measured]
    _loss_axis(axes, losses)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return f"{_LOSS}. Thin: training loss; thick, with squares: eval loss."
