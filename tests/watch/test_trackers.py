"""Trackers with their real packages, offline: every figure arrives, no secret does, and none of them ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_core import load_config, train
from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.errors import ConfigError, PreflightError
from lora_core.watch import trackers
from lora_core.watch.summary import git_commit
from tests.conftest import ROOT, chat

pytestmark = pytest.mark.usefixtures("without_page")

SECRETS = {"TEAM_PASSWORD": "correct-horse-battery", "HF_TOKEN": "hf_" + "s3cR" * 6}


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name, value in {**SECRETS, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    rows = write_rows([chat(f"q{i}", f"a{i % 7}") for i in range(16)])
    return load_config(
        "demo",
        [
            f"model.name_or_path={tiny_model_dir}",
            f"data.train_file={rows}",
            f"data.eval_file={rows}",
            f"data.cache_dir={tmp_path / SECRETS['TEAM_PASSWORD']}",
            f"output_dir={tmp_path / 'run'}",
            "train.max_steps=4",
            "train.bf16=false",
            "model.dtype=float32",
            "train.optim=adamw_torch",
            "train.num_sample_replies=0",
            "train.report_to=[tensorboard,wandb]",
        ],
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def wandb_records(folder: Path) -> str:
    """What the one offline run in a folder holds, as text: records in blocks of 32 KiB, each after a header."""
    (file,) = folder.rglob("run-*.wandb")
    data, size = file.read_bytes(), 32 * 1024
    blocks = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join([blocks[0], *(block[7:] for block in blocks[1:])]).decode("latin-1")


def test_tensorboard_and_wandb_get_every_figure_and_no_secret(config: RunConfig, tmp_path: Path) -> None:
    summary = train(config)
    folder = tmp_path / "run"
    assert summary.tracker_failures == {}
    losses = [(event["step"], event["loss"]) for event in events(folder, "train")]
    measured = [(event["step"], event["loss"]) for event in events(folder, "eval")]

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for tag, expected in (("train/loss", losses), ("eval/loss", measured)):
        scalars = board.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [step for step, _ in expected]
        assert [scalar.value for scalar in scalars] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    (hparams,) = (folder / "tensorboard").rglob("hparams.yml")
    about = hparams.read_text(encoding="utf-8")

    records = wandb_records(folder / "wandb")
    assert [loss for _, loss in losses + measured if json.dumps(loss) not in records] == []
    for expected in ("train/loss", "eval/loss", "git_commit", git_commit() or "none", summary.data_hash, "[secret]"):
        assert expected in records
    assert f"data_hash: {summary.data_hash}" in about
    assert "[secret]" in about

    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()] == []


class Fails(TensorBoardTracker):  # type: ignore[misc]
    """The real one, on a disk that is full from the second call on."""

    calls = 0

    def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            raise OSError(28, "No space left on device")
        super().log(values, step, **rest)


def test_a_tracker_that_fails_is_said_once_counted_and_ends_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "tensorboard", Fails)
    summary = train(RunConfig.model_validate({**config.__dict__, "train": with_tensorboard(config)}))
    # A log a step and an evaluation before and after each of the two epochs, of which one call arrived.
    assert summary.tracker_failures == {"tensorboard": 4 + 3 - 1}
    said = capsys.readouterr().out
    assert said.count("tensorboard (train.report_to) failed: OSError: [Errno 28] No space left on device") == 1
    assert "warning: tensorboard failed at 6 calls; metrics.jsonl has all" in said
    assert len(events(tmp_path / "run", "train")) == 4


def with_tensorboard(config: RunConfig) -> TrainConfig:
    return config.train.model_copy(update={"report_to": "tensorboard"})


def test_a_tracker_that_cannot_start_is_a_sentence_before_the_first_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Fails, "start", lambda self: (_ for _ in ()).throw(ValueError("who are you?\nlog in")))
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Fails)
    with pytest.raises(
        ConfigError, match=r"report_to=wandb cannot start: .*fix: WANDB_MODE=offline .* train\.report_to"
    ):
        train(config)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_tracker_that_is_not_installed_is_found_before_the_model_is_loaded(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_core.runtime import devices

    found = devices.find_spec
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(PreflightError) as error:
        train(config)
    assert "train.report_to: wandb is not installed (pip install wandb); fix: train.report_to=[tensorboard]" in str(
        error.value
    )
    assert "loading" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("wandb", ["wandb"]),
        ("none", []),
        ("[]", []),
        ("[mlflow,tensorboard,mlflow]", ["mlflow", "tensorboard"]),
    ],
)
def test_trackers_are_named_as_a_str_or_a_list(value: str, expected: list[str]) -> None:
    assert load_config("demo", [f"train.report_to={value}"]).train.trackers == expected


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"report_to = \['wandbb'\]: must be .*tensorboard, wandb, mlflow, trackio"):
        load_config("demo", ["train.report_to=[wandbb]"])
