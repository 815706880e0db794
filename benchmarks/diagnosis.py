"""The failure this project was born from, the remedy, and a sweep over learning rate and target modules, measured.

    HF_HUB_OFFLINE=1 python benchmarks/diagnosis.py

Run it in the repository root, after `make demo`; it needs matplotlib (the extra `report`). It trains the demo's model
on the 78 rows of `diagnosis_train.jsonl` ten times, one run after another, about 20 minutes on two CPU cores with
nothing else to do. A run that is already finished in the work folder is not run again.

Prints two tables, and writes `benchmarks/diagnosis.json` and `docs/diagnosis_{light,dark}.svg`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lora_core.commands.command_line import quiet_libraries
from lora_core.config.load import load_config
from lora_core.config.schema import ALL_SEVEN_PROJECTIONS, RunConfig
from lora_core.data.encoded import load_data
from lora_core.data.packing import micro_batches, step_rows
from lora_core.model.base import load_tokenizer
from lora_core.preflight.preflight import plan_for
from lora_core.runtime.run_folder import write_json

TARGETS = {"q, v": ["q_proj", "v_proj"], "all seven": ALL_SEVEN_PROJECTIONS}
LEARNING_RATES = ["5e-5", "1e-4", "2e-4", "5e-4"]

Settings = Mapping[str, str]


def target_modules(targets: str) -> str:
    """The value of `lora.target_modules` for a key of `TARGETS`."""
    return f"[{','.join(TARGETS[targets])}]"


# What every run here has in common, whatever configs/demo.yaml says today.
COMMON: Settings = {
    "data.train_file": "benchmarks/diagnosis_train.jsonl",
    "data.eval_file": "benchmarks/diagnosis_eval.jsonl",
    "train.optim": "paged_adamw_8bit",
    "train.bf16": "true",
    "train.num_sample_replies": "0",
}
# As it was. Preflight refuses it, unless the error is allowed by name.
FAILURE: Settings = {
    "train.num_train_epochs": "1",
    "train.per_device_train_batch_size": "8",
    "train.gradient_accumulation_steps": "1",
    "train.learning_rate": "5e-5",
    "train.warmup_steps": "100",
    "train.logging_steps": "20",
    "lora.rank": "8",
    "lora.alpha": "16",
    "lora.target_modules": target_modules("q, v"),
    "data.max_seq_length": "2048",
    "data.packing": "false",
    "preflight.allow": "[warmup_past_end]",
}
# The values of configs/qwen0.5b.yaml.
REMEDY: Settings = {
    "train.num_train_epochs": "5",
    "train.per_device_train_batch_size": "2",
    "train.gradient_accumulation_steps": "4",
    "train.learning_rate": "5e-5",
    "train.warmup_ratio": "0.1",
    "train.logging_steps": "1",
    "lora.rank": "16",
    "lora.alpha": "32",
    "lora.target_modules": target_modules("all seven"),
    "data.max_seq_length": "1024",
    "data.packing": "true",
}


# ---------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder holds it."""

    config: RunConfig
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    finished: datetime

    @property
    def learning_rates(self) -> list[tuple[int, float]]:
        """(optimizer step from 1, the learning rate it used) of every step that was logged."""
        return [(event["step"], event["learning_rate"]) for event in self.metrics if event["event"] == "train"]

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(optimizer steps taken, held-out loss): before the first step, then after each epoch."""
        return [(event["step"], event["loss"]) for event in self.metrics if event["event"] == "eval"]

    @property
    def before(self) -> float:
        return self.held_out[0][1]

    @property
    def after(self) -> float:
        return self.held_out[-1][1]

    @property
    def peak_learning_rate(self) -> float:
        return max(rate for _, rate in self.learning_rates)

    @property
    def change(self) -> str:
        return f"{self.after / self.before - 1:+.1%}"


def run(work: Path, name: str, settings: Settings) -> Run:
    """Train in a process of its own, unless `work/name` holds the same run, finished."""
    folder = work / name
    overrides = [f"{key}={value}" for key, value in {**COMMON, **settings}.items()]
    overrides.append(f"output_dir={folder}")
    config = load_config("demo", overrides)
    if is_finished(folder, config):
        print(f"{name}: already finished in {folder}, not run again", flush=True)
    else:
        print(f"{name}: running", flush=True)
        command = [sys.executable, "launch/train.py", "--cfg", "demo", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {name}: exit code {done.returncode}\n{done.stderr}")
    return read_run(folder, config)


def is_finished(folder: Path, config: RunConfig) -> bool:
    """A run writes `summary.json` once all is done."""
    written = folder / "config.yaml"
    return (folder / "summary.json").is_file() and written.read_text(encoding="utf-8") == config.to_yaml()


def read_run(folder: Path, config: RunConfig) -> Run:
    summary = folder / "summary.json"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Run(
        config,
        json.loads(summary.read_text(encoding="utf-8")),
        [json.loads(line) for line in lines],
        datetime.fromtimestamp(summary.stat().st_mtime, timezone.utc),
    )


def run_sweep(work: Path, remedy: Run) -> dict[tuple[str, str], Run]:
    """(learning rate, key of `TARGETS`) -> run. The remedy is one of them."""
    sweep = {}
    for targets in TARGETS:
        for rate in LEARNING_RATES:
            settings = {**REMEDY, "train.learning_rate": rate, "lora.target_modules": target_modules(targets)}
            name = f"sweep-{rate}-{targets.replace(', ', '-').replace(' ', '-')}"
            sweep[rate, targets] = remedy if settings == REMEDY else run(work, name, settings)
    return sweep


def padding_share(config: RunConfig) -> float:
    """Share of the positions computed over the run that are padding. Packed rows hold none."""
    if config.data.packing:
        return 0.0
    train_data, _ = load_data(config, load_tokenizer(config.model))
    lengths = train_data.lengths
    plan = plan_for(config, len(lengths), num_processes=1)
    tokens = positions = 0
    for step in range(plan.total_optimizer_steps):
        rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, config.train.seed, step)
        for cut in micro_batches(rows, lengths, config.train.per_device_train_batch_size):
            tokens += int(lengths[cut.rows].sum())
            positions += len(cut.rows) * int(lengths[cut.rows].max())
    return 1 - tokens / positions


# ---------------------------------------------------------------------------------------------------------------
# Tables, in GitHub's markdown


def scientific(rate: float) -> str:
    """5e-05 -> 5e-5, as the configurations write it."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def targets_of(config: RunConfig) -> str:
    return next(name for name, modules in TARGETS.items() if modules == config.lora.target_modules)


def diagnosis_table(failure: Run, remedy: Run, padding: Sequence[float]) -> str:
    """What went wrong beside what puts it right, a line a figure."""
    lines = ["| | the failure | the remedy |", "|---|---|---|"]
    columns = [diagnosis_column(run, share) for run, share in zip((failure, remedy), padding, strict=True)]
    return "\n".join(lines + [f"| {name} | {columns[0][name]} | {columns[1][name]} |" for name in columns[0]])


def diagnosis_column(run: Run, padding: float) -> dict[str, str]:
    train, lora, data = run.config.train, run.config.lora, run.config.data
    asked, peak = train.learning_rate, run.peak_learning_rate
    return {
        "epochs, batch x accumulation": (
            f"{train.num_train_epochs}, {train.per_device_train_batch_size} x {train.gradient_accumulation_steps}"
        ),
        "optimizer steps": str(run.summary["total_optimizer_steps"]),
        "warmup steps": str(run.summary["warmup_steps"]),
        "learning rate asked for": scientific(asked),
        "peak learning rate reached": f"{scientific(peak)} ({peak / asked:.0%})",
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha}, on {targets_of(run.config)}",
        "`max_seq_length`": str(data.max_seq_length),
        "padding": "none, packed" if data.packing else f"{padding:.1%} of all positions",
        "log lines": f"{len(run.learning_rates)} (`logging_steps` {train.logging_steps})",
        "held-out loss before -> after": f"{run.before:.4f} -> {run.after:.4f} ({run.change})",
        "training time": f"{run.summary['train_time_s']:.0f} s",
    }


def sweep_table(sweep: Mapping[tuple[str, str], Run]) -> str:
    """Final held-out loss by learning rate and target modules, the lowest in bold."""
    lines = [f"| learning rate | {' | '.join(TARGETS)} |", "|---|" + "---|" * len(TARGETS)]
    lowest = lowest_cell(sweep)
    for rate in LEARNING_RATES:
        cells = {targets: f"{sweep[rate, targets].after:.4f} ({sweep[rate, targets].change})" for targets in TARGETS}
        marked = [f"**{text}**" if (rate, targets) == lowest else text for targets, text in cells.items()]
        lines.append(f"| {rate} | {' | '.join(marked)} |")
    return "\n".join(lines)


def sweep_notes(sweep: Mapping[tuple[str, str], Run]) -> str:
    """What the table does not show: where held-out loss rose again, and whether the best rate was within the sweep."""
    notes = [
        f"Over-fitting at {rate} on {targets}: held-out loss rose from {old:.4f} after epoch {epoch} to {new:.4f} an "
        f"epoch later, and is {run.after:.4f} at the end."
        for (rate, targets), run in sweep.items()
        for epoch, old, new in rises_of(run)
    ]
    if not notes:
        notes.append("Held-out loss fell in every epoch of every run.")
    rate, _ = lowest_cell(sweep)
    if rate in (LEARNING_RATES[0], LEARNING_RATES[-1]):
        notes.append(f"The lowest stands at the edge of the sweep, {rate}: the best rate may lie beyond.")
    return "\n".join(notes)


def lowest_cell(sweep: Mapping[tuple[str, str], Run]) -> tuple[str, str]:
    return min(sweep, key=lambda cell: sweep[cell].after)


def rises_of(run: Run) -> list[tuple[int, float, float]]:
    """(epoch, held-out loss after it, after the next) wherever the second is the higher one."""
    losses = [loss for _, loss in run.held_out[1:]]
    return [(epoch, old, new) for epoch, (old, new) in enumerate(pairwise(losses), start=1) if new > old]


# ---------------------------------------------------------------------------------------------------------------
# JSON


def describe(run: Run) -> dict[str, Any]:
    """A run's settings and figures."""
    return {
        "learning_rate": run.config.train.learning_rate,
        "target_modules": run.config.lora.target_modules,
        "total_optimizer_steps": run.summary["total_optimizer_steps"],
        "warmup_steps": run.summary["warmup_steps"],
        "peak_learning_rate": run.peak_learning_rate,
        "eval_loss_before": run.before,
        "eval_loss_after": run.after,
        "eval_loss_by_step": dict(run.held_out),
    }


def describe_fully(run: Run, padding: float) -> dict[str, Any]:
    """`describe`, and what the sweep does not vary."""
    train = run.config.train
    return {
        **describe(run),
        "num_train_epochs": train.num_train_epochs,
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "logging_steps": train.logging_steps,
        "rank": run.config.lora.rank,
        "alpha": run.config.lora.alpha,
        "max_seq_length": run.config.data.max_seq_length,
        "packing": run.config.data.packing,
        "padding_share": padding,
        "learning_rate_by_step": dict(run.learning_rates),
        "train_time_s": run.summary["train_time_s"],
    }


# ---------------------------------------------------------------------------------------------------------------
# Plots


@dataclass(frozen=True)
class Theme:
    """Colours for one of GitHub's colour schemes, told apart by colour-blind readers (Okabe and Ito)."""

    text: str
    faint: str
    failure: str
    remedy: str
    q_v: str


THEMES = {
    "light": Theme(text="#1f2328", faint="#59636e", failure="#d55e00", remedy="#0072b2", q_v="#a3527f"),
    "dark": Theme(text="#f0f6fc", faint="#9198a1", failure="#e69f00", remedy="#56b4e9", q_v="#e29ac4"),
}


def draw(
    theme: Theme,
    failure: Run,
    failure_rates: Sequence[tuple[int, float]],
    remedy: Run,
    sweep: Mapping[tuple[str, str], Run],
) -> Figure:
    """Learning rate by step, held-out loss by step, and the sweep, side by side; 1100 x 330 pixels at 96 an inch."""
    figure = Figure(figsize=(11.46, 3.44), layout=ConstrainedLayoutEngine(w_pad=0.12), facecolor="none")
    left, middle, right = figure.subplots(1, 3)
    draw_learning_rates(left, theme, failure_rates, remedy)
    draw_held_out(middle, theme, failure, remedy)
    draw_sweep(right, theme, remedy.before, sweep)
    return figure


def draw_learning_rates(axes: Axes, theme: Theme, failure: Sequence[tuple[int, float]], remedy: Run) -> None:
    asked = remedy.config.train.learning_rate
    axes.axhline(asked, color=theme.faint, linestyle="--", linewidth=1)
    label(axes, f"asked for: {scientific(asked)}", (50, asked), (0, 4), theme.faint, ha="right")
    axes.plot(*zip(*remedy.learning_rates, strict=True), color=theme.remedy, linewidth=2)
    label(axes, "remedy", (28, 0.6 * asked), (0, 0), theme.remedy)
    axes.plot(*zip(*failure, strict=True), "o-", markevery=[-1], color=theme.failure, linewidth=2)
    share = failure[-1][1] / asked
    label(axes, f"failure: {share:.0%}, then it ends", failure[-1], (8, 0), theme.failure)
    axes.set(xlim=(0, 51), ylim=(0, 1.15 * asked))
    axes.set_yticks([n * 1e-5 for n in range(6)], ["0", "1e-5", "2e-5", "3e-5", "4e-5", "5e-5"])
    style(axes, theme, "learning rate", "optimizer step")


def draw_held_out(axes: Axes, theme: Theme, failure: Run, remedy: Run) -> None:
    axes.plot(*zip(*remedy.held_out, strict=True), "o-", color=theme.remedy, linewidth=2)
    label(axes, f"remedy {remedy.change}", remedy.held_out[-3], (8, 2), theme.remedy)
    axes.plot(*zip(*failure.held_out, strict=True), "o-", color=theme.failure, linewidth=2)
    label(axes, f"failure {failure.change}", failure.held_out[-1], (8, -4), theme.failure)
    axes.set(xlim=(-2, 53))
    style(axes, theme, "held-out loss", "optimizer step")


def draw_sweep(axes: Axes, theme: Theme, untrained: float, sweep: Mapping[tuple[str, str], Run]) -> None:
    axes.axhline(untrained, color=theme.faint, linestyle="--", linewidth=1)
    label(axes, "untrained", (5e-4, untrained), (0, -13), theme.faint, ha="right")
    rates = [float(rate) for rate in LEARNING_RATES]
    for targets, color, marker in (("q, v", theme.q_v, "s"), ("all seven", theme.remedy, "o")):
        losses = [sweep[rate, targets].after for rate in LEARNING_RATES]
        axes.plot(rates, losses, marker=marker, color=color, linewidth=2)
        label(axes, targets, (rates[1], losses[1]), (6, 3), color)
    axes.set(xscale="log", xlim=(4.2e-5, 6e-4))
    axes.set_xticks(rates, LEARNING_RATES)
    axes.minorticks_off()
    style(axes, theme, "held-out loss at the end", "learning rate")


def label(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str, ha: str = "left"
) -> None:
    """Text beside a point, `offset` in points of 1/72 inch."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=color, ha=ha)


def style(axes: Axes, theme: Theme, title: str, xlabel: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(title, color=theme.text, loc="left")
    axes.set_xlabel(xlabel, color=theme.text)
    axes.tick_params(colors=theme.faint)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/diagnosis"), metavar="DIR", help="the run folders")
    work: Path = parser.parse_args().work
    quiet_libraries()

    failure = run(work, "failure", FAILURE)
    # The same run with every step logged, for the plot: as it was, its log holds a single line.
    failure_logged = run(work, "failure-logged", {**FAILURE, "train.logging_steps": "1"})
    remedy = run(work, "remedy", REMEDY)
    sweep = run_sweep(work, remedy)
    padding = [padding_share(failure.config), padding_share(remedy.config)]
    print(f"\n{diagnosis_table(failure, remedy, padding)}\n\n{sweep_table(sweep)}\n\n{sweep_notes(sweep)}")

    runs = [failure, failure_logged, remedy, *sweep.values()]
    result = {
        "date": f"{max(run.finished for run in runs):%Y-%m-%d}",
        "cpu_count": os.cpu_count(),
        "versions": remedy.summary["versions"],
        "model": remedy.config.model.name_or_path,
        "train_file": remedy.config.data.train_file,
        "eval_file": remedy.config.data.eval_file,
        "failure": describe_fully(failure, padding[0]),
        "failure_logged": describe_fully(failure_logged, padding[0]),
        "remedy": describe_fully(remedy, padding[1]),
        "sweep": [describe(run) for run in sweep.values()],
    }
    write_json(Path("benchmarks/diagnosis.json"), result)
    Path("docs").mkdir(exist_ok=True)
    # Text stays text, and equal figures make equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora_core", "font.size": 11}):
        for name, theme in THEMES.items():
            figure = draw(theme, failure, failure_logged.learning_rates, remedy, sweep)
            figure.savefig(f"docs/diagnosis_{name}.svg", metadata={"Date": None})
    print("\nwritten: benchmarks/diagnosis.json, docs/diagnosis_light.svg, docs/diagnosis_dark.svg")


if __name__ == "__main__":
    main()
