"""Claim: 78 rows in 10 steps with 100 of warmup learn nothing; the shipped settings on the same rows do.

    HF_HUB_OFFLINE=1 python benchmarks/diagnosis.py [--work DIR] [--rates RATE ...] [--spread RATE ...] [--trial]

Run it in the repository root, after `make demo`; it needs matplotlib (the extra `report`). It trains the demo's model
on the 78 rows of `diagnosis_train.jsonl`, one run after another: the failure this project was born from, the remedy,
and a sweep over learning rate and target modules, 14 runs. On all seven projections each rate of `--spread` is trained
with two more seeds. A run that is already finished in the work folder is not run again. `--trial` takes two steps of
each on two rows, to see that all of it works.

Prints two tables; with all rates, and without `--trial`, it writes `benchmarks/diagnosis.json` and
`docs/diagnosis_{light,dark}.svg` too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from common import DEMO_MODEL, markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.configuration import load_config
from lora_core.data.encoded import load_data
from lora_core.data.packing import micro_batches, step_rows
from lora_core.model.base import load_tokenizer
from lora_core.preflight.model_facts import with_packing
from lora_core.preflight.plan import plan_for
from lora_core.report.read import Run, read_run
from lora_core.runtime.devices import with_precision
from lora_core.runtime.run_folder import write_json

TARGETS = {"q, v": ["q_proj", "v_proj"], "all seven": ALL_SEVEN_PROJECTIONS}
LEARNING_RATES = ["5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3"]
SEEDS = [42, 43, 44]
"""All but the first only for the rates of `--spread`, on all seven projections."""

Settings = Mapping[str, Any]

# The demo's model on rows of its own, under the settings that are shipped for a model of this size.
SHIPPED = "qwen0.5b"
DEMO = {
    "model.name_or_path": DEMO_MODEL,
    "data.train_file": "benchmarks/diagnosis_train.jsonl",
    "data.eval_file": "benchmarks/diagnosis_eval.jsonl",
    "model.dtype": "float32",  # the same on every machine, and fast on a CPU without bfloat16 instructions
    "train.bf16": "false",
    "train.num_sample_replies": "0",
    "train.on_alarm": "warn",  # a rate that is too high runs to its end as well
    "overwrite_output_dir": "true",
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
    "lora.target_modules": TARGETS["q, v"],
    "data.max_seq_length": "2048",
    "data.packing": "false",
    "preflight.allow": "[warmup_past_end]",
}
REMEDY: Settings = {"train.learning_rate": "5e-5", "lora.target_modules": TARGETS["all seven"]}


def learning_rates(run: Run) -> list[tuple[int, float]]:
    """(step, counted from 1; the rate that it used)."""
    return run.points("train_events", "learning_rate")


def peak_learning_rate(run: Run) -> float:
    return max(rate for _, rate in learning_rates(run))


def eval_losses(run: Run) -> list[tuple[int, float]]:
    """(steps taken, loss): before the first step, then after each epoch."""
    return run.points("eval_events", "loss")


def after(run: Run) -> float:
    return eval_losses(run)[-1][1]


def change(run: Run) -> str:
    share = after(run) / eval_losses(run)[0][1] - 1
    return f"{share:+.1%}" if abs(share) >= 0.001 else f"{share:+.2%}"


Sweep = Mapping[tuple[str, str], Sequence[Run]]
"""(learning rate, key of `TARGETS`) -> its runs, one for each seed."""


def mean_after(runs: Sequence[Run]) -> float:
    return statistics.mean(map(after, runs))


def run(work: Path, name: str, settings: Settings) -> Run:
    """Train in a process of its own, unless `work/name` holds the same run, finished."""
    folder = work / name
    values = {**DEMO, **settings, "output_dir": folder}
    overrides = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in values.items()]
    # A run's config.yaml has what `auto` became.
    config = with_packing(with_precision(load_config(SHIPPED, overrides))[0])
    summary, written = folder / "summary.json", folder / "config.yaml"  # a run writes its summary once all is done
    if summary.is_file() and written.read_text(encoding="utf-8") == config.to_yaml():
        print(f"{name}: already finished in {folder}, not run again", flush=True)
    else:
        print(f"{name}: running", flush=True)
        command = [sys.executable, "launch/train.py", "--cfg", SHIPPED, *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {name}: exit code {done.returncode}\n{done.stderr}")
    return read_run(folder)


def run_sweep(work: Path, remedy: Run, rates: Sequence[str], spread: Sequence[str], trial: Settings) -> Sweep:
    """The remedy is one of them, with the first seed."""
    sweep = {}
    for targets, modules in TARGETS.items():
        for rate in rates:
            settings = {"train.learning_rate": rate, "lora.target_modules": modules}
            name = f"sweep-{rate}-{targets.replace(', ', '-').replace(' ', '-')}"
            first = remedy if settings == REMEDY else run(work, name, {**settings, **trial})
            others = SEEDS[1:] if rate in spread and targets == "all seven" else []
            sweep[rate, targets] = [
                first,
                *(run(work, f"{name}-seed-{seed}", {**settings, **trial, "train.seed": seed}) for seed in others),
            ]
    return sweep


def trial_settings(work: Path) -> Settings:
    """Two steps on two of the rows."""
    work.mkdir(parents=True, exist_ok=True)
    for key, number in (("data.train_file", 2), ("data.eval_file", 1)):
        rows = Path(DEMO[key]).read_text(encoding="utf-8").splitlines(keepends=True)[:number]
        (work / f"{key}.jsonl").write_text("".join(rows), encoding="utf-8")
    files = {key: str(work / f"{key}.jsonl") for key in ("data.train_file", "data.eval_file")}
    return {**files, "train.max_steps": "2"}


def padding_share(run: Run) -> float:
    """Share of the positions computed over the run that are padding. Packed rows hold none."""
    config = load_config(run.folder / "config.yaml")
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


def scientific(rate: float) -> str:
    """5e-05 -> 5e-5, as the configurations write it."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def diagnosis_table(failure: Run, remedy: Run, padding: Sequence[float]) -> str:
    """What went wrong beside what puts it right, a line a figure."""
    columns = [diagnosis_column(run, share) for run, share in zip((failure, remedy), padding, strict=True)]
    return markdown(
        ["", "the failure", "the remedy"], [[name, *(each[name] for each in columns)] for name in columns[0]]
    )


def diagnosis_column(run: Run, padding: float) -> dict[str, str]:
    train, lora, data = (run.config[section] for section in ("train", "lora", "data"))
    asked, peak = train["learning_rate"], peak_learning_rate(run)
    targets = next(name for name, modules in TARGETS.items() if modules == lora["target_modules"])
    batch = f"{train['per_device_train_batch_size']} x {train['gradient_accumulation_steps']}"
    return {
        "epochs, batch x accumulation": f"{train['num_train_epochs']}, {batch}",
        "optimizer steps": str(run.summary["total_optimizer_steps"]),
        "warmup steps": str(run.summary["warmup_steps"]),
        "learning rate asked for": scientific(asked),
        "peak learning rate reached": f"{scientific(peak)} ({peak / asked:.0%})",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']}, on {targets}",
        "`max_seq_length`": str(data["max_seq_length"]),
        "padding": "none, packed" if data["packing"] else f"{padding:.1%} of all positions",
        "log lines": f"{len(learning_rates(run))} (`logging_steps` {train['logging_steps']})",
        "eval loss before -> after": f"{eval_losses(run)[0][1]:.4f} -> {after(run):.4f} ({change(run)})",
    }


def sweep_table(sweep: Sweep) -> str:
    """Final eval loss by learning rate and target modules, the lowest in bold."""

    def cell(rate: str, targets: str) -> str:
        runs = sweep[rate, targets]
        text = f"{mean_after(runs):.4f}"
        if len(runs) > 1:
            losses = [after(each) for each in runs]
            text += f" ± {statistics.stdev(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}, {len(runs)} seeds)"
        else:
            text += f" ({change(runs[0])})"
        return f"**{text}**" if (rate, targets) == lowest(sweep) else text

    rates = dict.fromkeys(rate for rate, _ in sweep)
    rows = [[rate, *(cell(rate, targets) for targets in TARGETS)] for rate in rates]
    return markdown(["learning rate", *TARGETS], rows)


def sweep_notes(sweep: Sweep) -> str:
    """What the table does not show: where eval loss rose again, and whether the best rate was within the sweep."""
    notes = []
    for (rate, targets), runs in sweep.items():
        after_epochs = [loss for _, loss in eval_losses(runs[0])[1:]]
        notes += [
            f"Over-fitting at {rate} on {targets}: eval loss rose from {old:.4f} after epoch {epoch} to {new:.4f} an "
            f"epoch later, and is {after(runs[0]):.4f} at the end."
            for epoch, (old, new) in enumerate(pairwise(after_epochs), start=1)
            if new > old
        ]
    notes = notes or ["Eval loss fell in every epoch of every run."]
    rate, _ = lowest(sweep)
    rates = [rate for rate, _ in sweep]
    if rate in (rates[0], rates[-1]):
        notes.append(f"The lowest is at the edge of the sweep, {rate}: the best rate may lie beyond.")
    return "\n".join(notes)


def lowest(sweep: Sweep) -> tuple[str, str]:
    return min(sweep, key=lambda cell: mean_after(sweep[cell]))


SWEPT = ("learning_rate", "target_modules")
NOT_SWEPT = (
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"),
    *("rank", "alpha", "max_seq_length", "packing"),
)


def describe(run: Run, padding: float | None = None) -> dict[str, Any]:
    """A run's settings and figures; with its share of padding, those too that the sweep does not vary."""
    settings = {**run.config["train"], **run.config["lora"], **run.config["data"]}
    described = {
        **{key: settings[key] for key in SWEPT},
        "total_optimizer_steps": run.summary["total_optimizer_steps"],
        "warmup_steps": run.summary["warmup_steps"],
        "peak_learning_rate": peak_learning_rate(run),
        "eval_loss_before": eval_losses(run)[0][1],
        "eval_loss_after": after(run),
        "eval_loss_by_step": dict(eval_losses(run)),
        "hardware": run.summary["hardware"],
    }
    if padding is not None:
        described |= {key: settings[key] for key in NOT_SWEPT}
        described |= {"padding_share": padding, "learning_rate_by_step": dict(learning_rates(run))}
    return described


def describe_spread(rate: str, targets: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One rate with several seeds."""
    losses = [after(run) for run in runs]
    return {
        "learning_rate": rate,
        "target_modules": TARGETS[targets],
        "seeds": [run.config["train"]["seed"] for run in runs],
        "hardware": sorted({run.summary["hardware"] for run in runs}),
        "eval_loss_after": losses,
        "mean": statistics.mean(losses),
        "standard_deviation": statistics.stdev(losses),
        "min": min(losses),
        "max": max(losses),
    }


@dataclass(frozen=True)
class Theme:
    """Colours for one of GitHub's colour schemes, told apart by colour-blind readers (Okabe and Ito)."""

    text: str
    faint: str
    failure: str
    remedy: str
    q_v: str

    @property
    def style(self) -> dict[str, Any]:
        """For matplotlib. Text stays text, and equal figures make equal files."""
        colors = {"axes.titlecolor": self.text, "axes.labelcolor": self.text, "axes.edgecolor": self.faint}
        colors |= {"xtick.color": self.faint, "ytick.color": self.faint, "axes.facecolor": "none"}
        shape = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "font.size": 11}
        return {"svg.fonttype": "none", "svg.hashsalt": "lora_core", **colors, **shape}


THEMES = {
    "light": Theme(text="#1f2328", faint="#59636e", failure="#d55e00", remedy="#0072b2", q_v="#a3527f"),
    "dark": Theme(text="#f0f6fc", faint="#9198a1", failure="#e69f00", remedy="#56b4e9", q_v="#e29ac4"),
}


def draw(theme: Theme, failure: Run, remedy: Run, sweep: Sweep) -> Figure:
    """Learning rate by step, eval loss by step, and the sweep, side by side; 1100 x 330 pixels at 96 an inch.

    Args:
        failure: with every step logged.
    """
    figure = Figure(figsize=(11.46, 3.44), layout=ConstrainedLayoutEngine(w_pad=0.12), facecolor="none")
    left, middle, right = figure.subplots(1, 3)

    asked = remedy.config["train"]["learning_rate"]
    left.axhline(asked, color=theme.faint, linestyle="--", linewidth=1)
    label(left, f"asked for: {scientific(asked)}", (50, asked), (0, 4), theme.faint, ha="right")
    left.plot(*zip(*learning_rates(remedy), strict=True), color=theme.remedy, linewidth=2)
    label(left, "remedy", (28, 0.6 * asked), (0, 0), theme.remedy)
    left.plot(*zip(*learning_rates(failure), strict=True), "o-", markevery=[-1], color=theme.failure, linewidth=2)
    last = learning_rates(failure)[-1]
    label(left, f"failure: {last[1] / asked:.0%}, then it ends", last, (8, 0), theme.failure)
    left.set(xlim=(0, 51), ylim=(0, 1.15 * asked))
    left.set_yticks([n * 1e-5 for n in range(6)], ["0", "1e-5", "2e-5", "3e-5", "4e-5", "5e-5"])
    left.set(title="learning rate", xlabel="optimizer step")

    middle.plot(*zip(*eval_losses(remedy), strict=True), "o-", color=theme.remedy, linewidth=2)
    label(middle, f"remedy {change(remedy)}", eval_losses(remedy)[-3], (8, 2), theme.remedy)
    middle.plot(*zip(*eval_losses(failure), strict=True), "o-", color=theme.failure, linewidth=2)
    label(middle, f"failure {change(failure)}", eval_losses(failure)[-1], (8, -4), theme.failure)
    middle.set(title="eval loss", xlabel="optimizer step", xlim=(-2, 53))

    right.axhline(eval_losses(remedy)[0][1], color=theme.faint, linestyle="--", linewidth=1)
    label(right, "untrained", (2e-3, eval_losses(remedy)[0][1]), (0, -13), theme.faint, ha="right")
    rates = [float(rate) for rate in LEARNING_RATES]
    styles = (("q, v", theme.q_v, "s", (6, 3), "left"), ("all seven", theme.remedy, "o", (-8, -8), "right"))
    for targets, color, marker, offset, side in styles:
        losses = [mean_after(sweep[rate, targets]) for rate in LEARNING_RATES]
        right.plot(rates, losses, marker=marker, color=color, linewidth=2)
        label(right, targets, (rates[2], losses[2]), offset, color, ha=side)
    right.set(xscale="log", xlim=(4.2e-5, 2.4e-3))
    right.set_xticks(rates, LEARNING_RATES)
    right.minorticks_off()
    right.set(title="eval loss at the end", xlabel="learning rate")
    return figure


def label(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], color: str, ha: str = "left"
) -> None:
    """Text beside a point, `offset` in points of 1/72 inch."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=color, ha=ha)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/diagnosis"), metavar="DIR", help="the run folders")
    of_rates: dict[str, Any] = {"nargs": "+", "choices": LEARNING_RATES, "metavar": "RATE"}
    parser.add_argument("--rates", **of_rates, default=LEARNING_RATES, help="of the sweep; all by default")
    parser.add_argument("--spread", **of_rates, default=[], help="rates that are trained with three seeds")
    parser.add_argument("--trial", action="store_true", help="two steps on two rows, and nothing written")
    arguments = parser.parse_args()
    work: Path = arguments.work
    trial = trial_settings(work) if arguments.trial else {}

    failure = run(work, "failure", {**FAILURE, **trial})
    # The same run with every step logged, for the plot: as it was, its log holds a single line.
    failure_logged = run(work, "failure-logged", {**FAILURE, **trial, "train.logging_steps": "1"})
    remedy = run(work, "remedy", {**REMEDY, **trial})
    sweep = run_sweep(work, remedy, arguments.rates, arguments.spread, trial)
    padding = [padding_share(failure), padding_share(remedy)]
    print(f"\n{diagnosis_table(failure, remedy, padding)}\n\n{sweep_table(sweep)}\n\n{sweep_notes(sweep)}")
    if arguments.trial or set(arguments.rates) != set(LEARNING_RATES):
        print("\nnothing is written: --trial, or not all rates")
        return

    runs = [failure, failure_logged, remedy, *chain.from_iterable(sweep.values())]
    finished = max((run.folder / "summary.json").stat().st_mtime for run in runs)
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(finished)),
        "versions": remedy.summary["versions"],
        "model": remedy.config["model"]["name_or_path"],
        "train_file": remedy.config["data"]["train_file"],
        "eval_file": remedy.config["data"]["eval_file"],
        "failure": describe(failure, padding[0]),
        "failure_logged": describe(failure_logged, padding[0]),
        "remedy": describe(remedy, padding[1]),
        "sweep": [describe(of_cell[0]) for of_cell in sweep.values()],
        "spread": [describe_spread(*cell, of_cell) for cell, of_cell in sweep.items() if len(of_cell) > 1],
    }
    write_json(Path("benchmarks/diagnosis.json"), result)
    Path("docs").mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        with matplotlib.rc_context(theme.style):
            figure = draw(theme, failure_logged, remedy, sweep)
            figure.savefig(f"docs/diagnosis_{name}.svg", metadata={"Date": None})
    print("\nwritten: benchmarks/diagnosis.json, docs/diagnosis_light.svg, docs/diagnosis_dark.svg")


if __name__ == "__main__":
    main()
