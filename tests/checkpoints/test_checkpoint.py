"""Interrupted equals uninterrupted; a checkpoint is whole or absent."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from lora_core.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    _restore_optimizer,
    find_checkpoint,
    take_snapshot,
)
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, RunStopped
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.loss import CausalLMLoss
from lora_core.model.optimizer import build_optimizer, build_scheduler
from lora_core.runtime.devices import build_accelerator
from lora_core.schedule import plan_schedule
from lora_core.training.setup import train
from lora_core.training.step import StepResult, train_step
from tests.conftest import ROOT, chat
from tests.forked import Forked, on_ranks, python
from tests.tiny import run_settings

pytestmark = pytest.mark.usefixtures("without_page")


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"question {i}", f"answer {i}") for i in range(22)])
    return [
        *run_settings(tmp_path, tiny_model_dir, rows),
        "train.num_sample_replies=1",
        "train.sample_max_new_tokens=4",
        "train.num_train_epochs=3",
        "train.learning_rate=1e-3",
        "train.save_steps=2",
        "train.save_total_limit=9",
    ]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(event["event"], event.get("step"), event.get("loss"), event.get("grad_norm")) for event in lines]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.optim=paged_adamw_8bit"], (2, 6)),
        (["data.packing=false", "train.optim=adamw_torch"], (4,)),
        (["model.quantization=nf4", "train.optim=paged_adamw_8bit", "train.eval_steps=1"], (4,)),
        (
            [
                "train.keep_adapter=best",
                "train.optim=paged_adamw_8bit",
                "train.eval_steps=1",
                "train.learning_rate=0.3",
                "train.on_alarm=warn",  # it is far too high, and that is meant
            ],
            (2, 6),
        ),
    ],
    ids=["packed-8bit", "padded-torch", "nf4", "best"],
)
def test_a_run_resumed_anywhere_ends_as_if_it_had_never_stopped(
    settings: list[str], overrides: list[str], steps: tuple[int, ...]
) -> None:
    config = load_config("demo", [*settings, *overrides])
    folder = Path(config.output_dir)
    whole = train(config)
    expected = adapter(folder), losses(folder)
    examples = (folder / "eval_examples.json").read_bytes()
    assert whole.num_eval_examples_better is not None
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names >= {f"step-{step:06d}" for step in (2, 4, 6, 8)}  # of 9 steps, three an epoch
    for step in steps:
        shutil.rmtree(folder / "adapter")
        resumed = train(config, folder / f"checkpoints/step-{step:06d}")
        assert (adapter(folder), losses(folder)) == expected
        assert resumed.resumed_at_step == step
        differ = ("date", "resumed_at_step", "train_time_s", "wall_time_s", "tokens_per_s", "peak_memory_bytes")
        same = {key: value for key, value in whole.to_dict().items() if key not in differ}
        assert {key: value for key, value in resumed.to_dict().items() if key not in differ} == same
        assert (folder / "eval_examples.json").read_bytes() == examples


TRAIN = ["launch/train.py", "--cfg", "demo"]


def test_a_signal_ends_the_step_saves_and_resumes(settings: list[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = python(*TRAIN, *settings, *arguments)
        return done.returncode, done.stderr

    folder = tmp_path / "run"
    assert run()[0] == 0
    expected = adapter(folder), losses(folder)
    shutil.rmtree(folder)
    started = Forked(*TRAIN, *settings)
    for line in started.stdout:
        if line.startswith("step 3/"):
            os.kill(started.pid, signal.SIGTERM)
            break
    stopped = started.wait()
    assert stopped.returncode == 75, stopped.stderr
    assert "fix: --resume" in stopped.stderr
    assert run("--resume") == (0, "")
    assert (adapter(folder), losses(folder)) == expected


@pytest.mark.parametrize("doomed", [1, 3])
def test_a_signal_between_two_micro_batches_drops_the_step(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, doomed: int
) -> None:
    config = load_config("demo", [*settings, "data.packing=false"])  # four micro-batches a step
    folder = Path(config.output_dir)
    train(config)
    expected = adapter(folder), losses(folder)
    shutil.rmtree(folder)
    steps = []

    def signalled_step(*arguments: Any) -> StepResult:
        steps.append(1)
        if len(steps) == doomed:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(sys.modules["lora_core.training.loop"], "train_step", signalled_step)
    with pytest.raises(RunStopped, match=f"stopped by SIGTERM after step {doomed - 1} of 9"):
        train(config)
    assert len(steps) == doomed
    resumed = train(config, "newest")
    assert resumed.resumed_at_step == doomed - 1
    assert (adapter(folder), losses(folder)) == expected


def test_two_ranks_resume_bit_for_bit_when_told_and_by_themselves(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert [rank.returncode for rank in on_ranks(2, *TRAIN, *settings)] == [0, 0]
    expected = adapter(folder), losses(folder)
    checkpoint = folder / "checkpoints/step-000002"
    assert [rank.returncode for rank in on_ranks(2, *TRAIN, *settings, "--resume", str(checkpoint))] == [0, 0]
    assert (adapter(folder), losses(folder)) == expected

    shutil.rmtree(folder)  # the first start of the next command finds nothing
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, *TRAIN, *settings, "--resume", "auto"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    elastic = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    assert elastic.stdout is not None
    for line in elastic.stdout:
        if line.startswith("step 3/"):
            rank_1 = [rank for rank in psutil.Process(elastic.pid).children() if rank.environ()["RANK"] == "1"]
            rank_1[0].kill()
            break
    said, complaints = elastic.communicate(timeout=300)
    assert elastic.returncode == 0, complaints
    assert "resume: from" in said
    assert (adapter(folder), losses(folder)) == expected


def test_auto_starts_where_nothing_would_be_lost_and_otherwise_resumes(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("demo", [*settings, "train.max_steps=3", "overwrite_output_dir=false"])
    folder = Path(config.output_dir)
    # What a run that was killed in its first save leaves behind.
    (folder / "checkpoints" / f".step-000002.{'0' * 32}").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    first = train(config, "auto")
    assert first.resumed_at_step is None
    assert "has no checkpoint yet, so the run starts" in capsys.readouterr().out
    expected = adapter(folder), losses(folder)
    shutil.rmtree(folder / "checkpoints/step-000003")
    assert train(config, "auto").resumed_at_step == 2
    assert (adapter(folder), losses(folder)) == expected
    assert train(config, "auto").resumed_at_step == 3  # it had ended
    assert adapter(folder) == expected[0]
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    with pytest.raises(ConfigError, match="has no whole checkpoint"):
        train(config, "auto")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match="has no whole checkpoint"):
        train(config, "auto")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(ConfigError, match="contains files that are no run"):
        train(config, "auto")


def test_damage_anywhere_is_named_and_the_checkpoint_before_is_taken(settings: list[str], tmp_path: Path) -> None:
    config = load_config("demo", [*settings, "train.max_steps=5"])
    folder = Path(config.output_dir)
    train(config)
    names = sorted(path.name for path in (folder / "checkpoints/step-000004").iterdir())
    assert len(names) == 5
    for name in names:
        for damage in ("flip", "cut", "missing"):
            copy = tmp_path / f"{name}-{damage}"
            shutil.copytree(folder / "checkpoints", copy / "checkpoints", ignore=lambda *_: ["step-000005"])
            file = copy / "checkpoints/step-000004" / name
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0x55
            if damage == "missing":
                file.unlink()
            else:
                file.write_bytes(content if damage == "flip" else content[:-1])
            said: list[str] = []
            assert find_checkpoint(copy, None, said.append, may_rename=True).step == 2
            assert name in said[0]
            assert (copy / "checkpoints/damaged-step-000004").is_dir()
            with pytest.raises(ConfigError, match=r"manifest"):
                find_checkpoint(copy, copy / "checkpoints/damaged-step-000004", said.append, may_rename=False)


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(settings: list[str]) -> None:
    config = load_config("demo", [*settings, "train.save_total_limit=1"])
    folder = Path(config.output_dir)
    train(load_config("demo", settings))
    expected = adapter(folder), losses(folder)
    train(config, folder / "checkpoints/step-000002")  # keeps one: the newest of this run, not of the other
    assert (adapter(folder), losses(folder)) == expected
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000009", *(f"superseded-step-{step:06d}" for step in (4, 6, 8, 9))]


def test_only_what_changes_nothing_may_differ(settings: list[str], write_rows: Any) -> None:
    config = load_config("demo", [*settings, "train.max_steps=5"])
    train(config)
    other = load_config("demo", [*settings, "train.max_steps=5", "train.learning_rate=2e-3", "lora.dropout=0.1"])
    with pytest.raises(ConfigError) as refused:
        train(other, "newest")
    assert "lora.dropout: 0.05 before, 0.1 now" in str(refused.value)
    assert "train.learning_rate: 0.001 before, 0.002 now" in str(refused.value)
    write_rows([chat("another", "row")] * 22)
    with pytest.raises(ConfigError, match="are not the same"):
        train(config, "newest")


def test_an_automatic_rate_is_a_number_in_the_run_folder_and_the_run_resumes(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("demo", [*settings, "train.max_steps=3", "train.learning_rate=auto"])
    summary = train(config)
    said = capsys.readouterr().out
    assert "learning rate: 0.00075 (train.learning_rate=auto): 5e-4 x (2000 / 2048)^0.0775 x 1.5" in said
    folder = Path(config.output_dir)
    assert load_config(folder / "config.yaml").train.learning_rate == summary.learning_rate == 7.5e-4
    shutil.rmtree(folder / "adapter")
    train(config, "newest")
    assert (folder / "adapter").is_dir()


def test_the_state_of_an_optimizer_goes_where_its_parameter_is() -> None:
    """The counter of steps too, which a fused optimizer on a GPU refuses on the CPU."""
    parameter = nn.Parameter(torch.zeros(2, 3, device="meta"))
    optimizer = torch.optim.SGD([parameter])
    tensors = {"a/step": torch.tensor(4.0), "a/exp_avg": torch.ones(2, 3), "a/qmap1": torch.ones(256)}
    checkpoint = Checkpoint(Path("step-000004"), {"optimizer": {}}, {"optimizer.safetensors": tensors})
    _restore_optimizer(checkpoint, {"a": parameter}, optimizer)
    assert {key: value.device.type for key, value in optimizer.state[parameter].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "qmap1": "meta",
    }


def test_resuming_nothing_says_so(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="has no whole checkpoint"):
        train(load_config("demo", settings), "newest")


def test_a_disk_that_is_full_leaves_the_checkpoint_before_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = load_config("demo", [f"model.name_or_path={tiny_model_dir}", "train.optim=adamw_torch"])
    accelerator = build_accelerator(config)
    base = load_base_model(config.model, accelerator.device)
    model = CausalLMLoss(add_adapter(base, config.lora, seed=0))
    optimizer = build_optimizer(model, config.train, accelerator.device)
    scheduler = build_scheduler(
        optimizer, plan_schedule(8, per_device_train_batch_size=1, gradient_accumulation_steps=1)
    )
    ids = torch.arange(16)[None]
    model(input_ids=ids, loss_mask=ids > 4).loss_sum.backward()
    optimizer.step()
    writer = CheckpointWriter(accelerator)

    def save(step: int) -> None:
        path = tmp_path / f"checkpoints/step-{step:06d}"
        writer.start(path, take_snapshot(accelerator, model, optimizer, scheduler, {"step": step}), limit=2)
        writer.wait()

    save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow larger
    try:
        with pytest.raises(
            OSError,
            match=r"step-000002 could not be written: .*too large.* \(it takes 0\.\d MiB and the disk has .* MiB left",
        ):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert find_checkpoint(tmp_path, None, print, may_rename=False).step == 1
