"""This project against TRL's SFTTrainer: tokens/s, peak memory, time from command to saved adapter.

    python benchmarks/vs_trl.py [--rows FILE.jsonl] [--steps 6] [--alternations 5]

On the CPU, with the same model, rows, adapter (rank 16, alpha 32, dropout 0.05, all seven projections), bf16,
supervised answers, length limit (1024), AdamW, schedule and conversations per optimizer step (8). Four set-ups run in
turn, each in a process of its own, and the turn is repeated:

    lora_core                as it comes
    lora_core checkpointing  with train.gradient_checkpointing=true
    trl                      as it comes: batch 8, padded, gradient checkpointing
    trl best                 bfd packing, no checkpointing, allocator tuned, as many threads as lora_core

Tokens/s are real tokens (no padding) of the steps after the warm-up, over the seconds of those steps. Peak memory is
the largest resident set of the process. The time runs from the start of the command to the adapter's file on disk.

A comparison of programs that do not compute the same thing says nothing, so before the timing both train without
dropout from the same start on the same rows in the same order, and the losses of all steps are compared. Packed rows
of TRL hold other conversations per step, so TRL at its best is compared over one step of the same 8 conversations.

TRL is installed from benchmarks/requirements.txt into an environment of its own. Prints tables, writes vs_trl.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

CONVERSATIONS_PER_STEP = 8
MAX_SEQ_LENGTH = 1024
SEED = 42
LEARNING_RATE = 2e-4
WARM_UP_STEPS = 1
LOSS_TOLERANCE = 0.01  # relative, per step: bf16 has 8 bits
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "268435456"}
GIB = 2**30

OURS, OURS_CHECKPOINTING, TRL, TRL_BEST = "lora_core", "lora_core checkpointing", "trl", "trl best"


@dataclass(frozen=True)
class Workload:
    """What every run gets."""

    model: str
    rows: Path
    """Any accepted rows; lora_core reads them and shuffles on its own."""
    peer_rows: Path
    """The same conversations as messages, in the order in which lora_core takes them."""
    tokens_per_step: tuple[int, ...]
    mean_tokens: float
    """Of a conversation."""
    steps: int
    dropout: float = 0.05


@dataclass(frozen=True)
class Run:
    """What one process did."""

    setup: str
    tokens_per_s: float
    """Real tokens of the steps after the warm-up over their seconds."""
    peak_memory_bytes: int
    command_to_adapter_s: float
    step_tokens: list[float]
    step_s: list[float]
    losses: list[float]
    grad_norms: list[float]
    threads: int
    load_average_before: float
    versions: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------
# Rows


def prepare(model: str, rows: Path, steps: int, work: Path) -> Workload:
    """Find the order in which lora_core takes the rows, and write them down for TRL in that order.

    Raises:
        SystemExit: the rows are too few for so many steps.
    """
    from lora_core.config.load import load_config
    from lora_core.data.encoded import load_data
    from lora_core.data.messages import parse_json_row
    from lora_core.data.packing import step_rows
    from lora_core.model.base import load_tokenizer

    settings = [f"model.name_or_path={model}", f"data.train_file={rows}", f"data.max_seq_length={MAX_SEQ_LENGTH}"]
    config = load_config(ROOT / "configs" / "base.yaml", [*settings, f"data.cache_dir={work / 'encoded'}"])
    data, _ = load_data(config, load_tokenizer(config.model))
    num_rows = len(data.lengths)
    if num_rows < steps * CONVERSATIONS_PER_STEP:
        most = num_rows // CONVERSATIONS_PER_STEP
        raise SystemExit(f"--steps {steps}: {rows} has {num_rows} rows for {most} steps of 8; fix: --steps {most}")
    chosen = [
        step_rows(num_rows, CONVERSATIONS_PER_STEP, SEED, step)
        for step in range(-(-num_rows // CONVERSATIONS_PER_STEP))
    ]
    lines = rows.read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside a text
    peer_rows = work / "rows.jsonl"
    with peer_rows.open("w", encoding="utf-8") as file:
        for row in (row for rows_of_step in chosen for row in rows_of_step):
            conversation = parse_json_row(lines[data.dataset[int(row)]["line"] - 1])
            file.write(json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
    tokens = tuple(int(data.lengths[rows_of_step].sum()) for rows_of_step in chosen[:steps])
    return Workload(model, rows, peer_rows, tokens, float(data.lengths.mean()), steps)


def first_rows(path: Path, number: int) -> Path:
    """A file with the first rows of another, beside it."""
    shorter = path.with_name(f"first-{number}.jsonl")
    shorter.write_text("".join(path.open(encoding="utf-8").readlines()[:number]), encoding="utf-8")
    return shorter


# ---------------------------------------------------------------------------------------------------------------
# Runs


def run_ours(work: Workload, folder: Path, peer_python: Path, checkpointing: bool = False) -> Run:
    """`launch/train.py` as a user starts it, every file new: no encoded rows are kept from an earlier run."""
    output = folder / "run"
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--cfg", str(ROOT / "configs" / "base.yaml")]
    command += [
        f"model.name_or_path={work.model}",
        f"data.train_file={work.rows}",
        f"data.max_seq_length={MAX_SEQ_LENGTH}",
        f"data.cache_dir={folder / 'encoded'}",
        "lora.rank=16",
        "lora.alpha=32",
        f"lora.dropout={work.dropout}",
        f"train.max_steps={work.steps}",
        # As the shipped 1.5B and 7B configs: packed micro-batches of at most max_seq_length tokens.
        "train.per_device_train_batch_size=1",
        f"train.gradient_accumulation_steps={CONVERSATIONS_PER_STEP}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.warmup_steps=0",
        "train.optim=adamw_torch",
        f"train.gradient_checkpointing={str(checkpointing).lower()}",
        f"train.seed={SEED}",
        f"output_dir={output}",
    ]
    load = os.getloadavg()[0]
    seconds, peak = spawn(command, {}, folder / "log.txt", output / "adapter")
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "train"]
    tokens = [float(number) for number in work.tokens_per_step]
    return Run(
        OURS_CHECKPOINTING if checkpointing else OURS,
        command_to_adapter_s=seconds,
        peak_memory_bytes=peak,
        step_tokens=tokens,
        step_s=(step_s := [number / step["tokens_per_s"] for number, step in zip(tokens, steps, strict=True)]),
        tokens_per_s=real_tokens_per_s(tokens, step_s),
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        threads=our_threads(),
        load_average_before=load,
        versions={name: version(name) for name in ("transformers", "peft", "accelerate", "torch")},
    )


def run_trl(work: Workload, folder: Path, peer_python: Path, best: bool = False, one_step: bool = False) -> Run:
    """`peers/trl_sft.py`: as it comes, or at its best.

    Args:
        one_step: all rows of the file in one optimizer step.
    """
    output, result_file = folder / "run", folder / "result.json"
    # A packed row holds several conversations; so many rows a step hold about 8.
    packed_rows = max(1, round(CONVERSATIONS_PER_STEP * work.mean_tokens / MAX_SEQ_LENGTH))
    settings = {
        "model": work.model,
        "rows": str(work.peer_rows),
        "chat_template": str(HERE / "peers" / "smollm2_training.jinja"),
        "result_file": str(result_file),
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": work.dropout,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
        "sft_config": {
            "output_dir": str(output),
            "max_length": MAX_SEQ_LENGTH,
            "max_steps": work.steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "bf16": True,
            "seed": SEED,
            **(
                {
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": CONVERSATIONS_PER_STEP if one_step else packed_rows,
                    "packing": True,
                    "packing_strategy": "bfd",
                    "gradient_checkpointing": False,
                }
                if best
                else {
                    "per_device_train_batch_size": CONVERSATIONS_PER_STEP,
                    "train_sampling_strategy": "sequential",  # the file has lora_core's order
                }
            ),
        },
    }
    folder.joinpath("settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    environment = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    if best:
        environment |= {**TUNED_MALLOC, "OMP_NUM_THREADS": str(our_threads())}
    load = os.getloadavg()[0]
    command = [str(peer_python), str(HERE / "peers" / "trl_sft.py"), str(folder / "settings.json")]
    seconds, peak = spawn(command, environment, folder / "log.txt", output)
    result = json.loads(result_file.read_text(encoding="utf-8"))
    tokens, step_s = ([step[key] for step in result["steps"]] for key in ("tokens", "seconds"))
    return Run(
        TRL_BEST if best else TRL,
        tokens_per_s=0.0 if one_step else real_tokens_per_s(tokens, step_s),
        command_to_adapter_s=seconds,
        peak_memory_bytes=peak,
        step_tokens=tokens,
        step_s=step_s,
        losses=[step["loss"] for step in result["steps"]],
        grad_norms=[step["grad_norm"] for step in result["steps"]],
        threads=result["threads"],
        load_average_before=load,
        versions=result["versions"],
    )


def spawn(command: list[str], environment: dict[str, str], log: Path, adapter: Path) -> tuple[float, int]:
    """Run a command to its end -> (seconds to the adapter's file, peak resident bytes).

    Raises:
        SystemExit: it failed; names the log.
    """
    kept = {key: value for key, value in os.environ.items() if key not in (*TUNED_MALLOC, "OMP_NUM_THREADS")}
    common = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    started = time.time()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=kept | common | environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{log.read_text()[-3000:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (adapter / "adapter_model.safetensors").stat().st_mtime - started, peak


def real_tokens_per_s(tokens: Sequence[float], seconds: Sequence[float]) -> float:
    return sum(tokens[WARM_UP_STEPS:]) / sum(seconds[WARM_UP_STEPS:])


def our_threads() -> int:
    """Threads that lora_core uses in one process."""
    import torch

    from lora_core.runtime.devices import use_all_cores

    use_all_cores()
    return torch.get_num_threads()


SETUPS: dict[str, Callable[[Workload, Path, Path], Run]] = {
    OURS: run_ours,
    TRL: run_trl,
    TRL_BEST: lambda work, folder, python: run_trl(work, folder, python, best=True),
    OURS_CHECKPOINTING: lambda work, folder, python: run_ours(work, folder, python, checkpointing=True),
}


# ---------------------------------------------------------------------------------------------------------------
# Losses


@dataclass(frozen=True)
class LossCheck:
    """Losses of the same steps, without dropout; TRL's loss of step 1 packed stands beside ours of step 1."""

    ours: list[float]
    trl: list[float]
    trl_best_first_step: float
    our_grad_norms: list[float]
    trl_grad_norms: list[float]
    largest_difference: float
    """Relative, over the steps, of trl."""
    best_difference: float
    """Relative, of the one step of trl best."""
    same_tokens: bool
    """Both count the same real tokens in every step."""

    @property
    def agrees(self) -> bool:
        return self.same_tokens and max(self.largest_difference, self.best_difference) <= LOSS_TOLERANCE


def check_losses(work: Workload, folder: Path, python: Path) -> LossCheck:
    """Train each once without dropout and compare."""
    work = replace(work, dropout=0.0)
    ours = run_ours(work, new_folder(folder / "check-ours"), python)
    trl = run_trl(work, new_folder(folder / "check-trl"), python)
    one_step = replace(work, peer_rows=first_rows(work.peer_rows, CONVERSATIONS_PER_STEP), steps=1)
    best = run_trl(one_step, new_folder(folder / "check-trl-best"), python, best=True, one_step=True)
    differences = [abs(a / b - 1) for a, b in zip(ours.losses, trl.losses, strict=True)]
    return LossCheck(
        ours.losses,
        trl.losses,
        best.losses[0],
        ours.grad_norms,
        trl.grad_norms,
        max(differences),
        abs(best.losses[0] / ours.losses[0] - 1),
        ours.step_tokens == trl.step_tokens and best.step_tokens[0] == ours.step_tokens[0],
    )


# ---------------------------------------------------------------------------------------------------------------
# Tables


def ratios(runs: Sequence[Run], mine: str, peer: str, value: Callable[[Run], float]) -> str:
    """Mine over the peer's, alternation by alternation: `4.50 x (4.21 to 4.63)`, the median and the range."""
    pairs = zip(of(runs, mine), of(runs, peer), strict=False)
    each = [value(a) / value(b) for a, b in pairs]
    return f"{statistics.median(each):.2f} x ({min(each):.2f} to {max(each):.2f})"


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def of(runs: Sequence[Run], setup: str) -> list[Run]:
    return [run for run in runs if run.setup == setup]


def tables(runs: Sequence[Run], check: LossCheck | None) -> str:
    """GitHub markdown: ratios, then figures, then what became of the losses."""
    measures: list[tuple[str, Callable[[Run], float]]] = [
        ("tokens/s", lambda run: run.tokens_per_s),
        ("peak memory", lambda run: float(run.peak_memory_bytes)),
        ("command to saved adapter", lambda run: run.command_to_adapter_s),
    ]
    lines = ["| lora_core / TRL | TRL as it comes | TRL at its best |", "|---|---|---|"]
    for name, value in measures:
        for mine, label in ((OURS, "as it comes"), (OURS_CHECKPOINTING, "with checkpointing")):
            lines.append(
                f"| {name}, {label} | {ratios(runs, mine, TRL, value)} | {ratios(runs, mine, TRL_BEST, value)} |"
            )
    lines += ["", "| set-up | real tokens/s | peak memory, GiB | command to saved adapter, s |", "|---|---|---|---|"]
    for setup in (OURS, OURS_CHECKPOINTING, TRL, TRL_BEST):
        chosen = of(runs, setup)
        speed = spread([run.tokens_per_s for run in chosen], 0)
        memory = spread([run.peak_memory_bytes / GIB for run in chosen], 2)
        lines.append(f"| {setup} | {speed} | {memory} | {spread([run.command_to_adapter_s for run in chosen], 0)} |")
    return "\n".join([*lines, "", describe_check(check)])


def describe_check(check: LossCheck | None) -> str:
    if check is None:
        return "The losses were not compared: this comparison does not count."
    verdict = "The losses agree" if check.agrees else "The losses DISAGREE: this comparison does not count"
    return (
        f"{verdict} (limit {LOSS_TOLERANCE:.0%}): largest difference over {len(check.ours)} steps "
        f"{check.largest_difference:.2%}, TRL at its best over one step {check.best_difference:.2%}; real tokens per "
        f"step {'are the same' if check.same_tokens else 'DIFFER'}.\n"
        f"lora_core {[round(loss, 4) for loss in check.ours]}, TRL {[round(loss, 4) for loss in check.trl]}, "
        f"TRL packed, step 1: {check.trl_best_first_step:.4f}"
    )


# ---------------------------------------------------------------------------------------------------------------


def peer_environment(folder: Path) -> Path:
    """TRL's own Python; made and filled if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {HERE / 'requirements.txt'} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")], check=True
        )
        (folder / "installed").touch()
    return python


def new_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "examples" / "train.jsonl", help="rows in any shape")
    parser.add_argument("--model", default="~/.cache/lora_core/models/SmolLM2-135M-Instruct", help="SmolLM2")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps a run; {WARM_UP_STEPS} is not timed")
    parser.add_argument("--alternations", type=int, default=5, help="times that every set-up runs")
    parser.add_argument("--cores", type=int, help="pin every run to so many cores; 1 is steadier on a shared machine")
    parser.add_argument("--until", metavar="HH:MM", help="start no further alternation that would end after this")
    parser.add_argument("--no-loss-check", action="store_true", help="time only; the comparison does not count")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / "outputs" / "benchmarks" / "trl-venv")
    parser.add_argument("--output", type=Path, default=HERE / "vs_trl.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    python = peer_environment(options.peer_venv.absolute())
    if options.cores:  # inherited by the runs, which set their threads by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    scratch = Path(tempfile.mkdtemp(prefix="vs_trl-"))
    model = str(Path(options.model).expanduser())
    work = prepare(model, options.rows.absolute(), options.steps, scratch)
    print(f"{options.rows}: {work.mean_tokens:.0f} tokens a conversation, {list(work.tokens_per_step)} a step")
    check = None if options.no_loss_check else check_losses(work, scratch, python)
    print(describe_check(check), flush=True)
    runs: list[Run] = []
    for alternation in range(options.alternations):
        started = time.time()
        for setup, run_setup in SETUPS.items():
            run = run_setup(work, new_folder(scratch / "run"), python)
            runs.append(run)
            print(
                f"{alternation + 1}/{options.alternations} {setup}: {run.tokens_per_s:.0f} tokens/s, "
                f"{run.peak_memory_bytes / GIB:.2f} GiB, adapter after {run.command_to_adapter_s:.0f} s",
                flush=True,
            )
        write(options.output, options, work, runs, check)
        ends = time.strftime("%H:%M", time.localtime(2 * time.time() - started))
        if options.until and ends > options.until and alternation + 1 < options.alternations:
            print(f"another alternation would end at {ends}, after {options.until}")
            break
    print(f"\n{tables(runs, check)}\n\nwritten: {options.output}")
    shutil.rmtree(scratch)


def write(
    path: Path, options: argparse.Namespace, work: Workload, runs: Sequence[Run], check: LossCheck | None
) -> None:
    """Everything that was measured; rewritten after every alternation, so that a stopped benchmark keeps its runs."""
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu_count": os.cpu_count(),
        "cores": options.cores,
        "commit": commit(),
        "rows": str(options.rows),
        "model": Path(work.model).name,
        "steps": work.steps,
        "warm_up_steps": WARM_UP_STEPS,
        "alternations": len(runs) // len(SETUPS),
        "mean_tokens_per_conversation": work.mean_tokens,
        "counts": bool(check and check.agrees),
        "loss_check": asdict(check) if check else None,
        "table": tables(runs, check),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
