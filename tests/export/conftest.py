"""A run of the tiny model, made once: what is merged, published and exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_core.configuration import load_config
from lora_core.training.setup import train
from tests.conftest import chat
from tests.tiny import write_jsonl


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    rows = write_jsonl(folder / "rows.jsonl", [chat(f"q{i}", f"a{i % 7}") for i in range(40)])
    held_out = write_jsonl(folder / "eval.jsonl", [chat(f"Q{i}", f"a{i}") for i in range(6)])
    train(
        load_config(
            "base",
            [
                f"model.name_or_path={tiny_model_dir}",
                "model.dtype=float32",
                f"data.train_file={rows}",
                f"data.eval_file={held_out}",
                f"data.cache_dir={folder / 'cache'}",
                "train.bf16=false",
                "train.learning_rate=0.01",
                "train.max_steps=4",
                "train.save_steps=2",
                "train.num_sample_replies=0",
                f"output_dir={folder / 'run'}",
            ],
        )
    )
    return folder / "run"
