"""Checks: the plan is the run, and a run that was killed and resumed ends the same."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.packing import RowIndices
from lora_core.errors import ConfigError, TrainingError, counted
from lora_core.preflight.plan import plan_for
from lora_core.training.setup import train
from lora_core.verification.gradients import short_rows
from lora_core.verification.table import Check

_NUM_EVAL_ROWS = 8
_MAX_BATCH_SIZE, _MAX_ACCUMULATION = 4, 4
_SHORT_RUN_STEPS = 5
RATE_LIMIT = 1e-12


@dataclass(frozen=True)
class ShortRun:
    """The user's run over a few of its rows and steps."""

    config: RunConfig
    num_rows: int
    settings: str
    """What differs from the user's run, for the reader."""


def short_run(config: RunConfig, train_data: EncodedFile, eval_data: EncodedFile | None, folder: Path) -> ShortRun:
    """Write a few rows to `folder`, and the configuration that trains on them."""
    batch_size = min(config.train.per_device_train_batch_size, _MAX_BATCH_SIZE)
    accumulation = min(config.train.gradient_accumulation_steps, _MAX_ACCUMULATION)
    # Two whole steps and a smaller one an epoch, so that the run crosses an epoch's end with a part of a step left.
    rows_per_step = batch_size * accumulation
    rows = short_rows(train_data.lengths, 2 * rows_per_step + -(-rows_per_step // 2))
    _copy_lines(train_data.places.path, train_data, rows, folder / "train.jsonl")
    if eval_data is None:
        eval_rows, from_file = rows[:_NUM_EVAL_ROWS], "of the same rows as eval set, because there is none"
        _copy_lines(train_data.places.path, train_data, eval_rows, folder / "eval.jsonl")
    else:
        eval_rows, from_file = short_rows(eval_data.lengths, _NUM_EVAL_ROWS), "rows of the eval set"
        _copy_lines(eval_data.places.path, eval_data, eval_rows, folder / "eval.jsonl")
    overrides = [
        f"train.max_steps={_SHORT_RUN_STEPS}",
        "train.save_steps=1",
        "train.logging_steps=1",
        "train.eval_steps=null",
        "train.num_sample_replies=0",
        "train.on_alarm=warn",
        "train.report_to=[]",
        "train.on_save_error=error",
        f"train.per_device_train_batch_size={batch_size}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]
    # A warmup that suits the user's run may be longer than this one; no other error is allowed.
    allowed = list(dict.fromkeys([*config.preflight.allow, "warmup_past_end"]))
    files = [
        f"data.train_file={json.dumps(str(folder / 'train.jsonl'))}",
        f"data.eval_file={json.dumps(str(folder / 'eval.jsonl'))}",
        "data.eval_fraction=0.0",
        f"data.cache_dir={json.dumps(str(folder / 'cache'))}",
        f"preflight.allow=[{','.join(allowed)}]",
        "overwrite_output_dir=false",
    ]
    changed = [override for override in overrides if with_overrides(config, [override]) != config]
    settings = (
        f"plan, resume, reload: a run over {counted(len(rows), 'row')} of the shorter ones and {len(eval_rows)} "
        f"{from_file}; {', '.join(changed)}; everything else as you set it"
    )
    return ShortRun(with_overrides(config, [*overrides, *files]), len(rows), settings)


def _copy_lines(source: Path, data: EncodedFile, rows: RowIndices, target: Path) -> None:
    wanted = {int(data.dataset[int(row)]["line"]) for row in rows}
    with source.open("rb") as file, target.open("wb") as copy:
        for number, line in enumerate(file, start=1):
            if number in wanted:
                copy.write(line.rstrip(b"\r\n") + b"\n")


@dataclass(frozen=True)
class Interrupted:
    """A run that was killed and resumed."""

    folder: Path
    killed_after_step: int
    problem: str | None
    """Why it could not be resumed."""


def run_interrupted(short: ShortRun, folder: Path) -> Interrupted:
    """Start the run as a user does, kill it once its first checkpoint is there, and resume it.

    Raises:
        ConfigError: the run was refused.
        TrainingError: it ended before it wrote a checkpoint.
    """
    config = with_overrides(short.config, [f"output_dir={json.dumps(str(folder))}"])
    config_file = folder.with_suffix(".yaml")
    config_file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "lora_core", "train", "--cfg", str(config_file)]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not _checkpoints(folder):
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    if not _checkpoints(folder):
        said = _last_error(log)
        if process.returncode == 2:
            raise ConfigError(said)
        raise TrainingError(f"the short run ended (exit code {process.returncode}) without a checkpoint: {said}")
    killed_after_step = int(_checkpoints(folder)[-1].name.removeprefix("step-"))
    with log.open("w", encoding="utf-8") as file:
        returncode = subprocess.run([*command, "--resume"], stdout=file, stderr=subprocess.STDOUT).returncode
    problem = None if returncode == 0 else f"--resume ended with exit code {returncode}: {_last_error(log)}"
    return Interrupted(folder, killed_after_step, problem)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def _last_error(log: Path) -> str:
    """The error that a command printed last, without its log."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    _, found, message = text.rpartition("\nerror: ")
    return message if found else (text.splitlines() or ["it printed nothing"])[-1]


def run_whole(short: ShortRun, folder: Path) -> str | None:
    """The run in this process, silently; returns why it did not end, None if it did."""
    config = with_overrides(short.config, [f"output_dir={json.dumps(str(folder))}"])
    with redirect_stdout(io.StringIO()):
        try:
            train(config)
        except TrainingError as error:
            return str(error)
    return None


def check_plan(short: ShortRun, folder: Path, problem: str | None) -> Check:
    """The steps and learning rates that were taken, against the plan's arithmetic."""
    plan = plan_for(short.config, short.num_rows, 1)
    planned = plan.learning_rates()
    steps = [event for event in events(folder) if event["event"] == "train"]
    largest = max(planned) or 1.0
    difference = max(
        (abs(event["learning_rate"] - rate) / largest for event, rate in zip(steps, planned, strict=False)), default=0.0
    )
    if problem is None and [event["step"] for event in steps] != list(range(1, plan.total_optimizer_steps + 1)):
        problem = f"{plan.total_optimizer_steps} steps were planned, the steps {[e['step'] for e in steps]} were taken"
    if problem is None and not difference <= RATE_LIMIT:
        problem = f"planned {planned}, taken {[event['learning_rate'] for event in steps]}"
    return Check.judged(
        "plan",
        f"steps and learning rates, {plan.optimizer_steps_per_epoch} an epoch",
        f"{plan.total_optimizer_steps} steps, {RATE_LIMIT:g} of rate",
        f"{len(steps)} steps, {difference:.1e}",
        problem,
    )


def check_resume(whole: Path, interrupted: Interrupted, problem: str | None) -> Check:
    """The killed and resumed run against the one that was not."""
    compared = "killed and resumed: adapter, losses"
    if problem is not None:
        return Check.not_applicable("resume", compared, "the uninterrupted run did not end")
    if interrupted.problem is not None:
        return Check.judged("resume", compared, "every bit", "-", interrupted.problem)
    same_adapter = _adapter_file(whole).read_bytes() == _adapter_file(interrupted.folder).read_bytes()
    pairs = list(zip(_losses(whole), _losses(interrupted.folder), strict=False))
    same = sum(ours == theirs for ours, theirs in pairs)
    total = max(len(_losses(whole)), len(_losses(interrupted.folder)))
    measured = (
        f"killed after step {interrupted.killed_after_step}: adapter {'same' if same_adapter else 'differs'}, "
        f"{same} of {total} losses same"
    )
    if same_adapter and same == total:
        return Check.judged("resume", compared, "every bit", measured)
    if torch.accelerator.is_available():
        reason = f"bit-identity is promised on a CPU; here, {measured}"
        return Check("resume", compared, "every bit", measured, "not applicable", reason)
    return Check.judged("resume", compared, "every bit", measured, "the resumed run ended differently")


def _adapter_file(folder: Path) -> Path:
    return folder / "adapter/adapter_model.safetensors"


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(folder: Path) -> list[tuple[Any, ...]]:
    measured = [event for event in events(folder) if event["event"] in ("train", "eval")]
    return [(event["event"], event["step"], event["loss"], event.get("grad_norm")) for event in measured]
