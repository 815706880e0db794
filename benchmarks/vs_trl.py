"""Claim: more tokens/s and less memory than TRL's SFTTrainer, and a saved adapter sooner, at the same losses.

    python benchmarks/vs_trl.py [--rows FILE.jsonl] [--steps 6] [--alternations 5]

On the CPU, with the same model, rows, adapter (rank 16, alpha 32, dropout 0.05, all seven projections), bf16, loss on
the answers only, length limit (1024), AdamW, schedule and conversations per optimizer step (8). Four set-ups run in
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

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.data.encoded import load_data
from lora_core.data.packing import step_rows
from lora_core.model.base import load_tokenizer
from lora_core.report.read import read_run
from lora_core.rows.messages import parse_json_row
from lora_core.runtime.devices import use_all_cores

CONVERSATIONS_PER_STEP = 8
MAX_SEQ_LENGTH = 1024
SEED = 42
LEARNING_RATE = 2e-4
WARM_UP_STEPS = 1
LOSS_TOLERANCE = 0.01  # relative, per step: bf16 has 8 bits
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "268435456"}

SETUPS = OURS, TRL, TRL_BEST, OURS_CHECKPOINTING = "lora_core", "trl", "trl best", "lora_core checkpointing"


@dataclass(frozen=True)
class Workload:
    """What every run gets."""

    model: str
    rows: Path
    """Any accepted rows; lora_core reads them and shuffles on its own."""
    peer_rows: Path
    """The same conversations as messages, in the order in which lora_core takes them."""
    tokens_per_step: list[float]
    mean_tokens: float
    """Of a conversation."""
    steps: int
    peer_python: Path
    dropout: float = 0.05


@dataclass(frozen=True)
class Run:
    """What one process did."""

    setup: str
    peak_memory_bytes: int
    command_to_adapter_s: float
    step_tokens: list[float]
    step_s: list[float]
    losses: list[float]
    grad_norms: list[float]
    threads: int
    load_average_before: float
    versions: dict[str, str]

    @property
    def tokens_per_s(self) -> float:
        """Real tokens of the steps after the warm-up over their seconds."""
        return sum(self.step_tokens[WARM_UP_STEPS:]) / sum(self.step_s[WARM_UP_STEPS:])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def prepare(model: str, rows: Path, steps: int, python: Path, scratch: Path) -> Workload:
    """Find the order in which lora_core takes the rows, and write them down for TRL in that order.

    Raises:
        SystemExit: the rows are too few for so many steps.
    """
    settings = [f"model.name_or_path={model}", f"data.train_file={rows}", f"data.max_seq_length={MAX_SEQ_LENGTH}"]
    config = common.base_config(*settings, f"data.cache_dir={scratch / 'encoded'}")
    data, _ = load_data(config, load_tokenizer(config.model))
    num_rows = len(data.lengths)
    if num_rows < steps * CONVERSATIONS_PER_STEP:
        most = num_rows // CONVERSATIONS_PER_STEP
        raise SystemExit(f"--steps {steps}: {rows} has {num_rows} rows for {most} steps of 8; fix: --steps {most}")
    steps_per_epoch = -(-num_rows // CONVERSATIONS_PER_STEP)
    chosen = [step_rows(num_rows, CONVERSATIONS_PER_STEP, SEED, step) for step in range(steps_per_epoch)]
    lines = rows.read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside a text
    peer_rows = scratch / "rows.jsonl"
    with peer_rows.open("w", encoding="utf-8") as file:
        for row in (int(row) for rows_of_step in chosen for row in rows_of_step):
            conversation = parse_json_row(lines[data.dataset[row]["line"] - 1])
            file.write(json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
    tokens = [float(data.lengths[rows_of_step].sum()) for rows_of_step in chosen[:steps]]
    return Workload(model, rows, peer_rows, tokens, float(data.lengths.mean()), steps, python)


def run_ours(work: Workload, folder: Path, setup: str) -> Run:
    """`launch/train.py` as a user starts it, every file new: no encoded rows are kept from an earlier run."""
    output = folder / "run"
    command = [
        sys.executable,
        str(common.ROOT / "launch" / "train.py"),
        "--cfg",
        str(common.ROOT / "configs" / "base.yaml"),
    ]
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
        f"train.gradient_checkpointing={str(setup == OURS_CHECKPOINTING).lower()}",
        f"train.seed={SEED}",
        f"output_dir={output}",
    ]
    process = spawn(command, {}, folder, output / "adapter")
    steps = read_run(output).train_events
    return Run(
        setup,
        **process,
        step_tokens=work.tokens_per_step,
        step_s=[number / step["tokens_per_s"] for number, step in zip(work.tokens_per_step, steps, strict=True)],
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        threads=our_threads(),
        versions={name: version(name) for name in ("transformers", "peft", "accelerate", "torch")},
    )


def run_trl(work: Workload, folder: Path, setup: str, packed_rows: int | None = None) -> Run:
    """`peers/trl_sft.py`: as it comes, or at its best.

    Args:
        packed_rows: at its best, how many packed rows make a step; None is as many as hold about 8 conversations.
    """
    output = folder / "run"
    environment = {"HF_DATASETS_CACHE": str(folder / "datasets")}
    of_setup: dict[str, Any]
    if setup == TRL_BEST:
        environment |= {**TUNED_MALLOC, "OMP_NUM_THREADS": str(our_threads())}
        about_8 = max(1, round(CONVERSATIONS_PER_STEP * work.mean_tokens / MAX_SEQ_LENGTH))
        of_setup = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": packed_rows or about_8,
            "packing": True,
            "packing_strategy": "bfd",
            "gradient_checkpointing": False,
        }
    else:
        of_setup = {
            "per_device_train_batch_size": CONVERSATIONS_PER_STEP,
            "train_sampling_strategy": "sequential",  # the file has lora_core's order
        }
    settings = {
        "model": work.model,
        "rows": str(work.peer_rows),
        "chat_template": str(common.HERE / "peers" / "smollm2_training.jinja"),
        "result_file": str(folder / "result.json"),
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": work.dropout,
            "target_modules": ALL_SEVEN_PROJECTIONS,
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
            **of_setup,
        },
    }
    settings_file = folder / "settings.json"
    settings_file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    command = [str(work.peer_python), str(common.HERE / "peers" / "trl_sft.py"), str(settings_file)]
    process = spawn(command, environment, folder, output)
    return Run(setup, **process, **json.loads((folder / "result.json").read_text(encoding="utf-8")))


def spawn(command: list[str], environment: dict[str, str], folder: Path, adapter: Path) -> dict[str, Any]:
    """Run a command to its end -> load before, peak resident bytes, seconds to the adapter's file.

    Raises:
        SystemExit: it failed; shows the end of its log.
    """
    kept = {key: value for key, value in os.environ.items() if key not in (*TUNED_MALLOC, "OMP_NUM_THREADS")}
    fixed = {"PYTHONPATH": str(common.ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log, load, started = folder / "log.txt", os.getloadavg()[0], time.time()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=kept | fixed | environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{log.read_text()[-3000:]}")
    return {
        "load_average_before": load,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "command_to_adapter_s": (adapter / "adapter_model.safetensors").stat().st_mtime - started,
    }


def our_threads() -> int:
    """Threads that lora_core uses in one process."""
    use_all_cores()
    return torch.get_num_threads()


def run(work: Workload, scratch: Path, setup: str) -> Run:
    return (run_ours if setup in (OURS, OURS_CHECKPOINTING) else run_trl)(work, new_folder(scratch / "run"), setup)


def new_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check_losses(work: Workload, scratch: Path) -> dict[str, Any]:
    """Train each once without dropout; the losses of the same steps, and how far apart they are, relative."""
    work = replace(work, dropout=0.0)
    ours, trl = run(work, scratch, OURS), run(work, scratch, TRL)
    first_step = work.peer_rows.with_name("first-step.jsonl")
    lines = work.peer_rows.open(encoding="utf-8").readlines()[:CONVERSATIONS_PER_STEP]
    first_step.write_text("".join(lines), encoding="utf-8")
    one_step = replace(work, peer_rows=first_step, steps=1)
    best = run_trl(one_step, new_folder(scratch / "run"), TRL_BEST, packed_rows=CONVERSATIONS_PER_STEP)
    return {
        "ours": ours.losses,
        "trl": trl.losses,
        "trl_best_first_step": best.losses[0],
        "our_grad_norms": ours.grad_norms,
        "trl_grad_norms": trl.grad_norms,
        "largest_difference": max(abs(ratio - 1) for ratio in common.ratios(ours.losses, trl.losses)),
        "best_difference": abs(best.losses[0] / ours.losses[0] - 1),
        "same_tokens": ours.step_tokens == trl.step_tokens and best.step_tokens[0] == ours.step_tokens[0],
    }


def agrees(check: dict[str, Any] | None) -> bool:
    """Only then does the comparison count."""
    if check is None or not check["same_tokens"]:
        return False
    return bool(max(check["largest_difference"], check["best_difference"]) <= LOSS_TOLERANCE)


def describe_check(check: dict[str, Any] | None) -> str:
    if check is None:
        return "The losses were not compared: this comparison does not count."
    verdict = "The losses agree" if agrees(check) else "The losses DISAGREE: this comparison does not count"
    return (
        f"{verdict} (limit {LOSS_TOLERANCE:.0%}): largest difference over {len(check['ours'])} steps "
        f"{check['largest_difference']:.2%}, TRL at its best over one step {check['best_difference']:.2%}; real tokens "
        f"per step {'are the same' if check['same_tokens'] else 'DIFFER'}.\n"
        f"lora_core {[round(loss, 4) for loss in check['ours']]}, TRL {[round(loss, 4) for loss in check['trl']]}, "
        f"TRL packed, step 1: {check['trl_best_first_step']:.4f}"
    )


def tables(runs: Sequence[Run]) -> str:
    """Ratios, mine over the peer's, alternation by alternation; then figures."""

    def of(setup: str, value: Callable[[Run], float]) -> list[float]:
        return [value(run) for run in runs if run.setup == setup]

    measures: dict[str, Callable[[Run], float]] = {
        "tokens/s": lambda run: run.tokens_per_s,
        "peak memory": lambda run: run.peak_memory_bytes / common.GIB,
        "command to saved adapter": lambda run: run.command_to_adapter_s,
    }
    against = [
        [
            f"{name}, {label}",
            *(common.spread(common.ratios(of(mine, value), of(peer, value)), ".2f") for peer in (TRL, TRL_BEST)),
        ]
        for name, value in measures.items()
        for mine, label in ((OURS, "as it comes"), (OURS_CHECKPOINTING, "with checkpointing"))
    ]
    figures = [
        [setup, *(common.spread(of(setup, value), form) for value, form in zip(measures.values(), forms, strict=True))]
        for setup in (OURS, OURS_CHECKPOINTING, TRL, TRL_BEST)
        for forms in [(".0f", ".2f", ".0f")]
    ]
    first = common.markdown(["lora_core / TRL, times", "TRL as it comes", "TRL at its best"], against)
    header = ["set-up", "real tokens/s", "peak memory, GiB", "command to saved adapter, s"]
    return f"{first}\n\n{common.markdown(header, figures)}"


def main() -> None:
    parser = common.options_of(__doc__, "vs_trl.json", "--rows", "--alternations", "--peer-venv")
    parser.add_argument("--model", default=common.DEMO_MODEL, help="SmolLM2")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps a run; {WARM_UP_STEPS} is not timed")
    parser.add_argument("--cores", type=int, help="pin every run to so many cores; 1 is steadier on a shared machine")
    parser.add_argument("--until", metavar="HH:MM", help="start no further alternation that would end after this")
    parser.add_argument("--no-loss-check", action="store_true", help="time only; the comparison does not count")
    options = parser.parse_args()
    python = common.peer_python(options.peer_venv)
    if options.cores:  # inherited by the runs, which set their threads by it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    scratch = Path(tempfile.mkdtemp(prefix="vs_trl-"))
    model = str(Path(options.model).expanduser())
    work = prepare(model, options.rows.absolute(), options.steps, python, scratch)
    print(f"{options.rows}: {work.mean_tokens:.0f} tokens a conversation, {work.tokens_per_step} a step")
    check = None if options.no_loss_check else check_losses(work, scratch)
    print(describe_check(check), flush=True)
    runs: list[Run] = []
    for alternation in range(1, options.alternations + 1):
        started = time.time()
        for setup in SETUPS:
            runs.append(latest := run(work, scratch, setup))
            print(
                f"{alternation}/{options.alternations} {setup}: {latest.tokens_per_s:.0f} tokens/s, "
                f"{latest.peak_memory_bytes / common.GIB:.2f} GiB, adapter after {latest.command_to_adapter_s:.0f} s",
                flush=True,
            )
        common.write(  # after every alternation, so that a stopped benchmark keeps its runs
            options.output,
            f"{tables(runs)}\n\n{describe_check(check)}",
            cores=options.cores,
            rows=str(options.rows),
            model=Path(model).name,
            steps=work.steps,
            warm_up_steps=WARM_UP_STEPS,
            alternations=alternation,
            mean_tokens_per_conversation=work.mean_tokens,
            counts=agrees(check),
            loss_check=check,
            runs=[run.to_dict() for run in runs],
        )
        ends = time.strftime("%H:%M", time.localtime(2 * time.time() - started))
        if options.until and ends > options.until and alternation < options.alternations:
            print(f"another alternation would end at {ends}, after {options.until}")
            break
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
