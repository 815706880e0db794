"""What people mistype on the command line is named, with what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, DataError
from lora_core.sources.files import as_jsonl
from tests.conftest import chat


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--cgf demo", "no such option: --cgf; fix: --cfg"),
        ("-cfg demo", "no such option: -cfg; fix: --cfg"),
        ("--config demo", "no such option: --config; fix: --cfg"),
        ("--cfg demo --learning-rate=1e-4", "no such option: --learning-rate; fix: train.learning_rate=1e-4"),
        ("--cfg demo --data.train_file chats.jsonl", "no such option: --data.train_file; fix: data.train_file=VALUE"),
        ("--cfg demo --lora_r 8", "no such option: --lora_r; fix: lora.rank=VALUE"),
        ("--cfg demo --wings", "no such option: --wings; keys of a configuration are given as key=value, without"),
        ("--cfg demo --json-lines=a", "ignored explicit argument"),
    ],
)
def test_an_option_that_there_is_not(given: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *given.split()])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def test_only_what_is_required_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat"])
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN\n")


def test_a_run_that_is_not_there_is_no_folder_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "outputs/nothing-here", "--prompt", "Hi"]) == 2
    said = capsys.readouterr().err
    assert f"no such folder here (working folder: {Path.cwd()}), and from the hub the config cannot be loaded" in said


def test_values_that_begin_with_a_dash_are_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "demo", "train.seed=-1", "--quiet"]) == 2
    assert "train.seed = -1: must be an int" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train_files=a.jsonl"], "for one; fix: data.train_files=[a.jsonl]"),
        (["preflight.allow=few_steps"], "fix: preflight.allow=[few_steps]"),
        (["data.train_file", "=", "a.jsonl"], "'data.train_file': must be key=value, without spaces around =, such as"),
        (["data.columns={prompt:question}"], "needs a space after each colon, as in {a: b}"),
    ],
)
def test_a_setting_that_is_almost_right(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("chats.json", "data.train_file", "fix: data.train_file='{folder}/my chats.jsonl'"),
        ("other.jsonl", "data.train_file", "fix: data.train_file=PATH"),
        ("eval.jsonl", "data.eval_file", "fix: data.eval_file=PATH, or data.eval_file=null for no eval set"),
        ("eval.jsonl", "--file", "fix: --file PATH"),
        ("eval.jsonl", "FILE", "fix: PATH"),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, name: str, key: str, expected: str) -> None:
    (tmp_path / "my chats.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        as_jsonl(tmp_path / name.replace("chats", "my chats"), tmp_path, key=key)
    assert str(caught.value).endswith(expected.format(folder=tmp_path))


def test_rows_names_the_file_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(str(chat("a", "b")), encoding="utf-8")
    new = tmp_path / "new.jsonl"
    assert main(["convert", str(tmp_path / "row.jsonl"), "--output", str(new)]) == 2
    assert f"fix: {tmp_path / 'rows.jsonl'}\n" in capsys.readouterr().err
    assert not new.exists()
