"""The flat loop takes the same steps as `train`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from lora_core.configuration import load_config
from lora_core.training.setup import train
from tests.conftest import ROOT, chat

pytestmark = pytest.mark.usefixtures("without_page")

ADAPTER = "adapter_model.safetensors"


def test_it_ends_with_the_losses_and_the_adapter_of_train(
    tmp_path: Path, tiny_model_dir: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own defaults against those of the demo, but for 2 epochs: of 3 steps each, the last one smaller."""
    rows = write_rows([chat(f"q{i}", f"a{i % 7}", "and?", "no" * (i % 5 + 1)) for i in range(22)])
    eval_rows = write_rows([chat(f"Q{i}", f"a{i}") for i in range(5)], "eval.jsonl")
    adapter = tmp_path / "adapter"
    files = ["--model", str(tiny_model_dir), "--rows", str(rows), "--eval-rows", str(eval_rows)]
    folders = ["--cache-dir", str(tmp_path / "cache"), "--output", str(adapter)]
    monkeypatch.setattr("sys.argv", ["own_loop.py", *files, *folders, "--epochs", "2"])
    own = runpy.run_path(str(ROOT / "examples/own_loop.py"), run_name="__main__")

    config = load_config(
        "demo",
        [
            f"model.name_or_path={tiny_model_dir}",
            f"data.train_file={rows}",
            f"data.eval_file={eval_rows}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"output_dir={tmp_path / 'run'}",
            "train.num_train_epochs=2",
            "train.num_sample_replies=1",
        ],
    )
    summary = train(config)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]
    assert len(losses) == 6
    assert own["losses"] == losses
    assert own["before"].loss == summary.eval_loss_before
    assert own["after"].loss == summary.eval_loss_after
    assert (adapter / ADAPTER).read_bytes() == (Path(summary.adapter_dir) / ADAPTER).read_bytes()


def test_it_fits_on_two_screens() -> None:
    assert len((ROOT / "examples/own_loop.py").read_text(encoding="utf-8").splitlines()) <= 120
