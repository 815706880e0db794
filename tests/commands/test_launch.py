"""The commands as a user runs them: exit codes, sentences in place of tracebacks, nothing but ours on the console."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.commands.command_line import heavy_imports, run_command
from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, DataError, LoraCoreError, RankFault
from lora_core.runtime.ranks import leave
from tests.conftest import ROOT, chat
from tests.equivalence.forked_ranks import free_port
from tests.evaluation.test_evaluate import losses_one_by_one
from tests.forked import on_ranks, python
from tests.tiny import run_settings


def launch(*arguments: str, cwd: Path = ROOT, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(prefix or [sys.executable]), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"q{i}", f"a{i}") for i in range(12)])
    return [
        *run_settings(tmp_path, tiny_model_dir, rows),
        "train.num_sample_replies=1",
        "train.num_train_epochs=1",
    ]


def test_help_lists_every_key_without_loading_torch() -> None:
    done = launch("-X", "importtime", "launch/train.py", "--help")
    assert done.returncode == 0
    assert "train.warmup_ratio" in done.stdout
    assert "lora.target_modules" in done.stdout
    assert "torch" not in done.stderr


def test_imports_are_kept_from_the_collector_which_is_on_again_even_after_one_that_fails() -> None:
    def fail() -> None:
        with heavy_imports():
            assert not gc.isenabled()
            raise ModuleNotFoundError

    kept = [object()]
    try:
        with pytest.raises(ModuleNotFoundError):
            fail()
        assert gc.isenabled()
        assert not any(each is kept for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_train_then_evaluate_and_all_that_is_printed_is_ours(settings: list[str], tmp_path: Path) -> None:
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
    done = launch("launch/train.py", "--cfg", "demo", *settings, prefix=accelerate)
    assert done.returncode == 0, done.stderr
    ours = (
        "importing PyTorch",
        "precision: float32",  # where the CPU has no bfloat16
        "checking the run",
        "loading ",
        "evaluating ",
        "sample replies ",
        "train:",
        "eval:",
        "warning:",
        "note:",
        "eval at",
        "plan:",
        "  ",
        "predicted peak memory:",
        "model:",
        "adapter: on ",
        "reply at ",
        "report:",
        "step",
        "user:",
        "before:",
        "after:",
        "expected:",
        "done:",
        "learned",  # the verdict
        "this run ",
    )
    foreign = [line for line in done.stdout.splitlines() if line and not line.startswith(ours)]
    assert foreign == []
    assert done.stderr == ""
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    report, ended, verdict = done.stdout.splitlines()[-3:]
    assert (report, verdict) == (f"report: {folder / 'report.html'}", summary["verdict"])
    assert ended.startswith("done: 2 optimizer steps in ")
    evaluated = python("launch/evaluate.py", "--cfg", "demo", *settings)
    assert evaluated.returncode == 0, evaluated.stderr
    last_eval = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("eval at step 2"))
    what, result = evaluated.stdout.splitlines()
    assert what.startswith(f"adapter {folder / 'adapter'} on ")
    assert result.strip() == last_eval.removeprefix("eval at step 2: ")
    # Pasted into a shell, the command of the summary starts this very run: here, as far as the refusal.
    again = launch("-c", f"{summary['command']} overwrite_output_dir=false", cwd=tmp_path, prefix=["bash"])
    assert again.stdout.count("plan:") == 1
    assert f"output_dir={folder}: contains an earlier run; fix: output_dir=" in again.stderr


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "speaks"),
    [
        ("8", "0", ConfigError("train.jsonl: no such file; fix: x"), True),  # the first of the second machine
        ("1", "1", ConfigError("train.jsonl: no such file; fix: x"), False),
        ("1", "1", RankFault("rank 0 of 2 died; fix: x"), True),
    ],
)
def test_a_mistake_is_said_once_a_machine_and_a_fault_where_it_is(
    rank: str,
    local_rank: str,
    error: LoraCoreError,
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"WORLD_SIZE": "16", "RANK": rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the command sets

    def fail() -> None:
        raise error

    assert run_command(fail) == error.exit_code
    assert capsys.readouterr().err == (f"\nerror: {error}\n" if speaks else "")


@pytest.mark.usefixtures("without_page")
def test_a_command_that_has_trained_ends_the_process_group(settings: list[str], tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        main(["train", "--cfg", "demo", *settings])
        assert not torch.distributed.is_initialized()
    finally:
        leave()


def test_an_override_after_resume_is_not_taken_for_a_checkpoint() -> None:
    done = python("launch/train.py", "--cfg", "demo", "--resume", "train.max_steps=3")
    assert done.returncode == 2
    assert "--resume took train.max_steps=3 for a checkpoint; fix: put --resume at the end" in done.stderr


def test_two_ranks_train_together_and_only_one_speaks(settings: list[str], tmp_path: Path, write_rows: Any) -> None:
    # Padded batches of two: of nine examples the last is alone, and one rank fills its batch up with nothing.
    measured = write_rows([chat(f"q{i}", "word " * (9 - i)) for i in range(9)], "eval.jsonl")
    exact = ["data.packing=false", "train.bf16=false", "model.dtype=float32", "train.per_device_eval_batch_size=2"]
    settings = [*settings, *exact, f"data.eval_file={measured}", "train.max_steps=3"]
    done, other = on_ranks(2, "launch/train.py", "--cfg", "demo", *settings)
    assert (done.returncode, other.returncode) == (0, 0), done.stderr + other.stderr
    assert other.stdout == ""
    assert done.stdout.count("plan:") == 1
    assert "x 2 processes) = 1 optimizer step per epoch" in done.stdout
    assert done.stdout.count("step 3/3") == 1
    examples = json.loads((tmp_path / "run/eval_examples.json").read_text(encoding="utf-8"))
    wanted = losses_one_by_one(load_config("demo", settings))
    assert examples["loss_before"] == pytest.approx([loss for loss, _ in wanted], abs=1e-5)
    assert examples["num_tokens"] == [num_tokens for _, num_tokens in wanted]
    assert examples["line"] == list(range(1, 10))
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert (summary["num_eval_examples"], summary["world_size"]) == (9, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cfg", "nothing"], "--cfg nothing: no such file"),
        (["--cfg", "demo", "train.lr=1"], "train.lr = 1: unknown key"),
        (["--cfg", "demo", "data.train_file=missing.jsonl"], "missing.jsonl: no such file"),
        (["--cfg", "demo", "model.name_or_path=./missing"], "no such folder"),
        (["--cfg", "demo", "data.chat_template=missing.jinja"], "data.chat_template=missing.jinja: cannot be read"),
    ],
)
def test_mistakes_give_a_sentence_and_exit_code_2(arguments: list[str], expected: str) -> None:
    done = python("launch/train.py", *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_come_are_a_sentence(settings: list[str], rank: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    done = python("launch/train.py", "--cfg", "demo", *settings, "train.rank_timeout_s=2", environment=ranks)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    here = "1 of 2 ranks were there" if rank == 0 else "rank 0 did not answer"
    place = f"127.0.0.1:{address['MASTER_PORT']}"
    assert f"rank {rank} of 2 waited 2 s (train.rank_timeout_s) at {place} for the others, and {here}" in done.stderr


def test_a_mistake_of_one_rank_is_said_by_that_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(only_rank: int | None) -> None:
        error = DataError("no such file; fix: x")
        error.only_rank = only_rank
        raise error

    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run_command(lambda: fail(None)) == 2
    assert capsys.readouterr().err == ""  # the first rank of the machine says it
    assert run_command(lambda: fail(7)) == 2
    assert capsys.readouterr().err == "\nerror: rank 7: no such file; fix: x\n"
