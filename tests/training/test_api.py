"""`train` as a program calls it: rows from memory, and told what happens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_core import Callback, ConfigError, DataError, RunConfig, load_config, train, with_overrides
from lora_core.data.in_memory import with_rows
from tests.conftest import chat

pytestmark = pytest.mark.usefixtures("without_page")

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(10)]


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> RunConfig:
    settings = [
        f"model.name_or_path={tiny_model_dir}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        "data.eval_file=null",
        "train.num_train_epochs=1",
        "train.num_sample_replies=0",
        "train.save_steps=1",
    ]
    return load_config("demo", settings)


class Told(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_log(self, values: Mapping[str, Any]) -> None:
        self.events.append(("log", values["step"], values["loss"]))

    def on_evaluate(self, values: Mapping[str, Any]) -> None:
        self.events.append(("evaluate", values["step"]))

    def on_save(self, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.events.append(("save", path.name))

    def on_end(self, summary: Any) -> None:
        self.events.append(("end", summary))


def test_rows_from_memory_train_as_the_same_rows_in_a_file_and_callbacks_are_told(
    config: RunConfig, tmp_path: Path, write_rows: Any
) -> None:
    told = Told()
    from_memory = train(config, rows=ROWS, eval_rows=ROWS[:3], callbacks=[told])
    # A checkpoint is written while training continues: when it is whole is not fixed.
    names = [event[0] for event in told.events if event[0] != "save"]
    assert names == ["evaluate", "log", "log", "evaluate", "end"]
    assert [event[1] for event in told.events if event[0] == "log"] == [1, 2]
    assert [event for event in told.events if event[0] == "save"] == [
        ("save", "step-000001"),
        ("save", "step-000002"),
    ]
    assert told.events[-1][1] is from_memory
    files = [f"data.train_file={write_rows(ROWS)}", f"data.eval_file={write_rows(ROWS[:3], 'eval.jsonl')}"]
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    train(with_overrides(config, [*files, f"output_dir={tmp_path / 'second'}"]))
    assert (tmp_path / "second/adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    ("given", "fix"),
    [("qwen0.5b", r"train\(load_config\('qwen0.5b'\)\)"), ({"model": {}}, r'train\(load_config\("qwen0.5b", \[')],
)
def test_what_is_no_configuration_is_refused_with_the_call_that_makes_one(given: Any, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"takes a RunConfig, not a {type(given).__name__}; fix: {fix}"):
        train(given)


def test_a_dataset_is_rows_and_the_same_rows_are_the_same_file(config: RunConfig) -> None:
    from_dataset = with_rows(config, Dataset.from_list(ROWS), None)
    assert from_dataset == with_rows(config, ROWS, None)
    lines = Path(from_dataset.data.train_file).read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(ROWS)
    assert from_dataset.data.eval_file is None
    assert [path.name for path in Path(from_dataset.data.train_file).parent.glob(".*")] == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [([], "rows is empty"), ([{"prompt": "a", "completion": Path("b")}], r"rows\[0\]: cannot be written as JSON")],
)
def test_rows_that_cannot_be_written_are_named(config: RunConfig, rows: list[Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        with_rows(config, rows, None)
