"""Memory that runs out in the middle of a step, and ranks that are lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lora_core.configuration import load_config
from lora_core.errors import RankFault
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.runtime.devices import random_states
from lora_core.runtime.launcher import _ACCELERATE
from lora_core.training.setup import train
from lora_core.training.step import StepResult, train_step
from tests.conftest import ROOT, chat
from tests.forked import start_ranks
from tests.tiny import run_settings

pytestmark = pytest.mark.usefixtures("without_page")


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"question {i}", f"answer {i}") for i in range(22)])
    return [
        *run_settings(tmp_path, tiny_model_dir, rows),
        "overwrite_output_dir=true",
        "train.num_sample_replies=0",
        "train.bf16=false",
        "model.dtype=float32",
        "lora.dropout=0",
    ]


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    with pytest.raises(RuntimeError) as no_memory:
        torch.empty(2**50)
    assert is_out_of_memory(no_memory.value)
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as wrong_shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(wrong_shapes.value)
    for said in (
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "NCCL error: unhandled cuda error. ncclUnhandledCudaError: Last error: Cuda failure 1 'invalid argument'",
        "NCCL error: remote process exited or there was a network error. ncclRemoteError",
        "out of resource: shared memory, Required: 163840, Hardware limit: 101376",  # Triton, of one kernel
        "Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
        "CUDA error: device-side assert triggered",
    ):
        assert not is_out_of_memory(RuntimeError(said)), said


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "NCCL error: ncclUnhandledCudaError: Call to CUDA function failed.\nFailed to CUDA calloc 6291456 bytes",
        "HIP error: out of memory",
        "HIP error: hipErrorOutOfMemory",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "rocblas_status_memory_error",
        "miopenStatusAllocFailed",
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
        "MPS backend out of memory (MPS allocated: 18.00 GB)",
        "Invalid buffer size: 24.00 GiB",
        "NPU out of memory. Tried to allocate 2.00 GiB",
        "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1073741824",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 1024 bytes.",
        "unable to mmap 1024 bytes from file: Cannot allocate memory (12)",
        "std::bad_alloc",
    ],
)
def test_a_lack_of_memory_is_known_by_all_the_names_that_it_has(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


@pytest.fixture
def too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that hold more than two rows in a micro-batch ask for more memory than there is, once under way."""

    def step(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, batches: Any, *rest: Any) -> StepResult:
        for batch in batches:
            model(**batch).loss_sum.backward()  # what a step leaves behind when it fails
            if len(batch.get("segment_lengths", batch["input_ids"])) > 2:
                torch.empty(2**50)
        optimizer.zero_grad()
        return train_step(accelerator, model, optimizer, scheduler, batches, *rest)

    monkeypatch.setattr(sys.modules["lora_core.training.loop"], "train_step", step)


def test_memory_that_runs_out_says_what_was_predicted_and_what_to_do(
    settings: list[str], too_little_memory: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFault) as refused:
        train(load_config("demo", settings))
    said = str(refused.value)
    # The figures depend on what this process already holds: at the start and now they have to be the same.
    (at_the_start,) = re.findall(r"^predicted peak memory: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert "step 1: out of memory on cpu (rank 0): [enforce fail" in said
    assert f"predicted peak memory: {at_the_start}\n" in said
    assert re.search(r"Fix: train\.gradient_checkpointing=true \(\d+\.\d GiB predicted\)", said)
    assert "train.auto_batch_size=true" in said


def test_memory_that_runs_out_between_steps_is_a_sentence_too(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_: Any) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(sys.modules["lora_core.training.loop"], "evaluate_examples", evaluate)
    with pytest.raises(RankFault, match=r"out of memory on cpu \(rank 0\): .*; fix: .*per_device_eval_batch_size=1"):
        train(load_config("demo", settings))
    assert "out of memory on cpu" in json.loads((tmp_path / "run/state.json").read_text())["reason"]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_smaller_micro_batches_take_the_same_steps(
    settings: list[str], packing: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1", f"data.packing={packing}"]
    config = load_config("demo", [*settings, *cut, "train.auto_batch_size=true", "train.max_steps=5"])
    wanted = train(config)
    request.getfixturevalue("too_little_memory")
    capsys.readouterr()
    got = train(config)
    assert capsys.readouterr().out.count("out of memory; repeated with micro-batches of at most") == 2
    assert got.micro_batch_limit < wanted.micro_batch_limit
    assert got.eval_loss_after == pytest.approx(wanted.eval_loss_after, rel=1e-5)
    assert got.total_optimizer_steps == wanted.total_optimizer_steps == 5


def test_a_step_that_is_repeated_draws_what_it_drew_before(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, torch.Tensor]] = []

    def step(*arguments: Any) -> StepResult:
        drawn.append(random_states())
        if len(drawn) == 1:
            torch.rand(3)
            torch.empty(2**50)
        return train_step(*arguments)

    monkeypatch.setattr(sys.modules["lora_core.training.loop"], "train_step", step)
    train(load_config("demo", [*settings, "train.auto_batch_size=true", "train.max_steps=5", "lora.dropout=0.1"]))
    first, again = drawn[:2]
    assert first.keys() == again.keys()
    assert all(torch.equal(state, again[kind]) for kind, state in first.items())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to the launcher", "Ctrl-C, which both get"])
def test_training_ends_with_its_launcher_and_leaves_a_checkpoint(
    settings: list[str], tmp_path: Path, to_all: bool
) -> None:
    log = tmp_path / "log"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
    command = [*accelerate, "launch/train.py", "--cfg", "demo", *settings, "train.num_train_epochs=500"]
    with log.open("w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for_step(3, log, [launcher])
        (training,) = psutil.Process(launcher.pid).children()
        os.killpg(launcher.pid, signal.SIGINT) if to_all else launcher.terminate()
        launcher.wait(timeout=120)
        gone, _ = psutil.wait_procs([training], timeout=120)
        assert gone == [training]
        by = "SIGINT" if to_all else "SIGTERM"
        assert re.search(rf"error: stopped by {by} after step \d+ of 1500", log.read_text())
        assert list((tmp_path / "run/checkpoints").glob("step-*/manifest.json"))
    finally:
        with suppress(ProcessLookupError):  # it should be gone
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        (["python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["bash", "/home/me/accelerate/run.sh"], False),
        (["bash", "-c", "nohup python launch/train.py --cfg accelerated &"], False),
    ],
)
def test_only_accelerate_launch_is_followed(command: list[str], is_launcher: bool) -> None:
    assert any(_ACCELERATE.search(part) for part in command[:4]) is is_launcher


def wait_for_step(step: int, log: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 300
    while not re.search(rf"step +{step}/", log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        assert all(process.poll() is None for process in processes), log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(("doomed", "fault"), [(1, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["dies", "hangs"])
def test_a_lost_rank_is_named_by_the_one_that_is_left(settings: list[str], doomed: int, fault: signal.Signals) -> None:
    command = ["launch/train.py", "--cfg", "demo", *settings, "train.num_train_epochs=500", "train.rank_timeout_s=15"]
    ranks = start_ranks(2, *command)  # without torchrun's watch, which would end the other before it can speak
    try:
        assert any(re.match(r"step +3/", line) for line in ranks[0].stdout)
        os.kill(ranks[doomed].pid, fault)
        left = ranks[1 - doomed].wait()
        assert left.returncode == 1
        assert f"error: rank {doomed} of 2 died or did not answer within 15 s" in left.stderr
        assert "Traceback" not in left.stdout + left.stderr
    finally:
        for rank in ranks:
            rank.process.kill()
