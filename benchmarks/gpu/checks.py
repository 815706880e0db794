"""Claim: on a GPU, a run computes what it computes on a CPU, resumes to the same bits, and takes the memory predicted.

    python benchmarks/gpu/checks.py all
    python benchmarks/gpu/checks.py command attention --budget-s 300
    python benchmarks/gpu/checks.py all --dry-run

And what a step takes its time for, kernel by kernel, and beside TRL. Weights are random, in the shapes of Qwen2.5 0.5B
and 7B, so that nothing is downloaded. README.md says what each part tells.

Parts run in the order of what they tell, each in a process of its own with a time limit; what it prints is shown as it
comes. A dry run takes tiny shapes on the CPU: it finds mistakes in these files, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from attention_kernels import attention
from commands import command, distributed, nf4, trl
from setting import ROOT, Setting, make, run_limited
from training import allocator, gradients, step

from lora_core.commands.command_line import quiet_libraries

DRY_RUN_PATIENCE = 3
"""A CPU may take so many times as long."""
SHORTEST_S = 15
"""A part is not begun with less time left."""


@dataclass(frozen=True)
class Part:
    """One check."""

    name: str
    """With what it is of after a dash, such as step-7b; `step` then means all of its kind."""
    seconds: float
    """Allowed."""
    run: Callable[[Setting], None]
    needs: str | None = None
    """A model that must have been made."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """By which it can be asked for."""
        return (self.name, self.name.split("-")[0])


PARTS = (
    Part("make-0.5b", 60, partial(make, model="0.5b")),
    Part("gradients", 90, gradients),
    Part("command", 300, command, needs="0.5b"),
    Part("attention", 120, attention),
    Part("step-0.5b", 150, partial(step, model="0.5b")),
    Part("step-7b", 150, partial(step, model="7b")),
    Part("make-7b", 90, partial(make, model="7b")),
    Part("nf4", 200, nf4, needs="7b"),
    Part("distributed", 200, distributed, needs="0.5b"),
    Part("allocator-plain", 60, allocator),
    Part("allocator-expandable", 60, allocator, None, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
    Part("trl", 240, trl, needs="0.5b"),
)
NAMES = sorted({name for part in PARTS for name in part.names})


def chosen(asked: Sequence[str], setting: Setting) -> list[Part]:
    """The parts that were asked for, and those that make the models that they need and that are not there yet."""
    parts = [part for part in PARTS if "all" in asked or set(part.names) & set(asked)]
    names = {part.name for part in parts}
    for part in parts:
        if part.needs is not None and not (setting.model_folder(part.needs) / "tokenizer.json").exists():
            names.add(f"make-{part.needs}")
    return [part for part in PARTS if part.name in names]


def run_all(parts: Sequence[Part], setting: Setting, budget_s: float | None) -> bool:
    """Run each in its own process, and say at the end what became of it -> whether all went well."""
    started = time.monotonic()
    outcomes: dict[str, str] = {}
    for part in parts:
        spent = time.monotonic() - started
        left = float("inf") if budget_s is None else budget_s - spent
        if left < SHORTEST_S:
            outcomes[part.name] = "not run: no time left"
            continue
        print(f"\n=== {part.name}, {spent:.0f} s after the start", flush=True)
        outcome = run_in_process(part, setting, left)
        outcomes[part.name] = f"{outcome}, {time.monotonic() - started - spent:.0f} s"
    print(f"\n=== {time.monotonic() - started:.0f} s in all")
    for name, outcome in outcomes.items():
        print(f"{name:<21} {outcome}")
    return all(outcome.startswith("done") for outcome in outcomes.values())


def run_in_process(part: Part, setting: Setting, seconds_left: float) -> str:
    """What became of it: done, FAILED or CUT OFF."""
    words = [sys.executable, __file__, part.name, "--in-this-process"]
    words += ["--output", str(setting.output), "--scratch", str(setting.scratch)] + ["--dry-run"] * setting.dry_run
    environment = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **part.environment,
    }
    if setting.dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    seconds = part.seconds * (DRY_RUN_PATIENCE if setting.dry_run else 1)
    status = run_limited(words, min(seconds, seconds_left), environment)
    if status is None:
        return "CUT OFF"
    return "FAILED" if status else "done"


def describe_machine() -> str:
    """Commit, torch and the card. By nvidia-smi: a process that asks torch for the card's name holds memory on it."""
    questions = {
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        "card": ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
    }
    answers = [
        f"{name} {subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or 'unknown'}"
        for name, words in questions.items()
        if shutil.which(words[0])
    ]
    return ", ".join([*answers, f"torch {torch.__version__}", f"{os.cpu_count()} cores"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *NAMES], metavar="PART", help=f"all, {', '.join(NAMES)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "outputs" / "benchmarks" / "gpu",
        metavar="FOLDER",
        help="logs of commands, and the kernels of each step",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "lora_core-gpu-checks",
        metavar="FOLDER",
        help="models, rows and runs, 20 GB; kept, so that a later call finds the models made",
    )
    parser.add_argument("--budget-s", type=float, help="seconds for all parts together; no limit unless said")
    parser.add_argument("--in-this-process", action="store_true", help="run the one part named here, without a limit")
    options = parser.parse_args()
    scratch = options.scratch if options.in_this_process or not options.dry_run else options.scratch / "dry-run"
    setting = Setting(options.dry_run, options.output.absolute(), scratch.absolute())
    setting.output.mkdir(parents=True, exist_ok=True)
    setting.scratch.mkdir(parents=True, exist_ok=True)
    if options.in_this_process:
        (part,) = (part for part in PARTS if [part.name] == options.parts)
        quiet_libraries()
        part.run(setting)
        sys.exit(1 if setting.failures else 0)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; fix: --dry-run, which measures nothing")
    print(describe_machine(), flush=True)
    sys.exit(0 if run_all(chosen(options.parts, setting), setting, options.budget_s) else 1)


if __name__ == "__main__":
    main()
