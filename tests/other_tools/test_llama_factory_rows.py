"""`dataset` of a LLaMA-Factory file: which files it names, and what their columns and roles are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_core.configuration import load_config
from lora_core.data.encoded import load_data
from lora_core.model.base import load_tokenizer
from tests.other_tools.examples import all_known, migrates, write
from tests.tiny import write_jsonl

SFT = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "template": "qwen",
}
ROLE_CONTENT = {"role_tag": "role", "content_tag": "content"}


def file_with(folder: Path, entries: dict[str, Any], **values: Any) -> Path:
    info = folder / "data"
    info.mkdir(exist_ok=True)
    (info / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return write(folder, SFT | {"dataset_dir": str(info)} | values)


@pytest.mark.parametrize(
    ("entry", "columns", "roles"),
    [
        ({}, {}, {}),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output"}}, {}, {}),
        (
            {"columns": {"prompt": "q", "response": "a", "system": "told"}},
            {"prompt": "q", "completion": "a", "system": "told"},
            {},
        ),
        ({"formatting": "sharegpt"}, {}, {}),
        ({"formatting": "sharegpt", "columns": {"messages": "dialog", "tools": "tools"}}, {"messages": "dialog"}, {}),
        ({"formatting": "openai", "columns": {"messages": "messages"}, "tags": ROLE_CONTENT}, {}, {}),
        (
            {"formatting": "sharegpt", "tags": ROLE_CONTENT | {"user_tag": "customer", "assistant_tag": "agent"}},
            {},
            {"customer": "user", "agent": "assistant"},
        ),
    ],
)
def test_an_entry_is_a_file_with_its_names(
    entry: dict[str, Any], columns: dict[str, str], roles: dict[str, str], tmp_path: Path
) -> None:
    path = file_with(tmp_path, {"mine": {"file_name": "mine.json"} | entry}, dataset="mine")
    expected = {"data.train_file": str(tmp_path / "data/mine.json"), "data.columns": columns, "data.roles": roles}
    assert "dataset" in [reading.key for reading in migrates(path, expected).of("taken")]


def test_several_entries_are_several_files(tmp_path: Path) -> None:
    entries = {
        "mine": {"file_name": "mine.json"},
        "hub": {"hf_hub_url": "someone/rows", "split": "train_sft", "formatting": "sharegpt"},
        "held_out": {"file_name": "held_out.json"},
    }
    path = file_with(tmp_path, entries, dataset="mine, hub", eval_dataset="held_out", max_samples=50)
    assert not any("data.train_file" in each for each in all_known(path).from_ours())
    data = load_config(path).data
    mine, hub = data.train_files
    assert (mine.path, mine.max_rows) == (str(tmp_path / "data/mine.json"), 50)  # type: ignore[union-attr]
    assert (hub.path, hub.split, hub.max_rows) == ("someone/rows", "train_sft", 50)  # type: ignore[union-attr]
    assert data.eval_file == str(tmp_path / "data/held_out.json")


def test_the_rows_that_it_names_are_those_that_are_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "content", "user_tag": "customer", "assistant_tag": "agent"}
    entry = {"file_name": "mine.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}}
    entry |= {"tags": tags | {"role_tag": "role"}}
    path = file_with(tmp_path, {"mine": entry}, dataset="mine", model_name_or_path=str(tiny_model_dir))
    said = [{"role": "customer", "content": "Hi"}, {"role": "agent", "content": "Hello!"}]
    write_jsonl(tmp_path / "data/mine.jsonl", [{"talk": said}] * 9)
    config = load_config(path, [f"data.cache_dir={tmp_path / 'cache'}", "data.num_proc=1"])
    data, _ = load_data(config, load_tokenizer(config.model))
    assert len(data.lengths) == 9


def test_how_instruction_and_input_are_joined_is_said(tmp_path: Path) -> None:
    entries = {"pairs": {"file_name": "a.json"}, "turns": {"file_name": "b.json", "formatting": "sharegpt"}}
    (remark,) = all_known(file_with(tmp_path, entries, dataset=["pairs", "turns"])).remarks
    assert remark.startswith("dataset: pairs: where a row has an input, LLaMA-Factory puts a line break")


@pytest.mark.parametrize(
    ("entries", "values", "reason"),
    [
        ({}, {"dataset": 5}, "dataset is a list of names; data.train_file=PATH"),
        ({}, {"dataset": [["mine"]]}, "dataset is a list of names"),
        ({"mine": {"file_name": "a.json", "columns": ["q"]}}, {}, "columns of mine is no object"),
        ({}, {"dataset": "mine"}, "has no entry 'mine'; data.train_file=PATH"),
        ({"mine": {"script_url": "mine"}}, {}, "mine is no file and no dataset of the Hugging Face hub"),
        ({"mine": {"hf_hub_url": "a/b", "subset": "en"}}, {}, "subset of mine has no counterpart here"),
        ({"mine": {"file_name": "a.json", "ranking": True}}, {}, "mine holds preference pairs"),
        ({"mine": {"file_name": "a.json", "columns": {"messages": "m", "images": "i"}}}, {}, "mine holds images"),
        ({"mine": {"file_name": "a.json", "columns": {"prompt": "text"}}}, {}, "names no prompt or no response"),
        (
            {"mine": {"file_name": "a.json", "columns": {"prompt": "q", "query": "more", "response": "a"}}},
            {},
            "query of mine is the column input here; rename 'more' in the file",
        ),
        (
            {"mine": {"file_name": "a.json", "formatting": "sharegpt", "tags": {"role_tag": "who"}}},
            {},
            "role_tag of mine is one of from, role here",
        ),
        (
            {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "columns": {"prompt": "q", "response": "a"}}},
            {"dataset": "a,b"},
            "a and b call their columns otherwise",
        ),
        ({"mine": {"file_name": "a.json"}}, {"dataset_dir": "elsewhere"}, "elsewhere/dataset_info.json, which says"),
    ],
)
def test_what_an_entry_asks_for_and_is_not_here_is_said(
    entries: dict[str, Any], values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    translation = all_known(file_with(tmp_path, entries, **{"dataset": "mine"} | values))
    (reading,) = (each for each in translation.readings if each.key == "dataset")
    assert reading.outcome == "not offered"
    assert reason in reading.note
    assert "data.train_file" not in translation.settings


def test_a_file_that_is_no_json_is_said(tmp_path: Path) -> None:
    path = file_with(tmp_path, {}, dataset="mine")
    (tmp_path / "data/dataset_info.json").write_text("{not json", encoding="utf-8")
    (reading,) = (each for each in all_known(path).readings if each.key == "dataset")
    assert "dataset_info.json cannot be read" in reading.note
