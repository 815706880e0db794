"""A rate is put into a configuration's file, and all else in it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.rate_search.config_file import check_target, with_rate, write_rate

FILES = [
    ("train:\n  seed: 1\n  learning_rate: 5e-5  # ours\n", "train:\n  seed: 1\n  learning_rate: 0.001  # ours\n"),
    ("# mine\ntrain:\n  seed: 1  # why\n", "# mine\ntrain:\n  learning_rate: 0.001\n  seed: 1  # why\n"),
    ("lora: {rank: 4}\n", "lora: {rank: 4}\ntrain: {learning_rate: 0.001}\n"),
    ("train: {seed: 1}\n", "train: {learning_rate: 0.001, seed: 1}\n"),
    ("train: {}\n", "train: {learning_rate: 0.001}\n"),
    ("train:\nlora:\n  rank: 4\n", "train: {learning_rate: 0.001}\nlora:\n  rank: 4\n"),
    ("learning_rate: auto\n", "learning_rate: 0.001\n"),
    ("", "train:\n  learning_rate: 0.001\n"),
    ("# nothing\n", "# nothing\ntrain:\n  learning_rate: 0.001\n"),
]


@pytest.mark.parametrize(("before", "after"), FILES)
def test_only_the_rate_changes(tmp_path: Path, before: str, after: str) -> None:
    assert with_rate(before, 1e-3) == after
    path = tmp_path / "mine.yaml"
    path.write_text(before)
    write_rate("", path, path, 1e-3)
    assert path.read_text() == after
    assert load_config(path).train.learning_rate == 1e-3


def test_a_new_file_gets_the_whole_configuration(tmp_path: Path) -> None:
    path, new = tmp_path / "mine.yaml", tmp_path / "new.yaml"
    path.write_text("lora: {rank: 4}\n")
    check_target(str(path), path, new)
    write_rate(load_config(path, ["train.seed=7"]).to_yaml(), path, new, 2e-4)
    written = load_config(new)
    assert (written.train.learning_rate, written.train.seed, written.lora.rank) == (2e-4, 7, 4)
    assert path.read_text() == "lora: {rank: 4}\n"


def test_a_file_that_would_be_lost_or_is_another_tools_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    path.write_text("lora: {rank: 4}\n")
    other.write_text("x")
    with pytest.raises(ConfigError, match="would be lost"):
        check_target(str(path), path, other)
    with pytest.raises(ConfigError, match="no folder"):
        check_target(str(path), path, tmp_path / "none" / "new.yaml")
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(yaml.safe_dump({"stage": "sft", "finetuning_type": "lora", "model_name_or_path": "x"}))
    with pytest.raises(ConfigError, match="another tool's"):
        check_target(str(theirs), theirs, theirs)


def test_a_file_that_cannot_take_it_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    text = "some/model:\n  lora_rank: 4\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="by hand"):
        write_rate("", path, path, 1e-3)
    assert path.read_text() == text
