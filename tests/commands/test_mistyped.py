"""What people mistype on the command line is named, with what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_core.checkpoints.adapter_folder import adapter_on
from lora_core.checkpoints.checkpoint import find_checkpoint
from lora_core.commands.main import main
from lora_core.config.schema import ModelConfig
from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError, DataError
from lora_core.inference.opened import open_model
from lora_core.model.base import load_model_config
from lora_core.sources.files import as_jsonl
from tests.conftest import ROOT, chat


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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows, a run and a model's config."""
    monkeypatch.chdir(tmp_path)
    Path("my chats.jsonl").write_text("{}")
    Path("ddp.yaml").write_text((ROOT / "configs/accelerate/ddp.yaml").read_text(encoding="utf-8"))
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("outputs/demo/adapter").mkdir(parents=True)
    Path("outputs/demo/config.yaml").write_text("extends: demo\n")
    Path("outputs/demo/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "my model"}')
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my chats.jsonl", "holds rows and no configuration; fix: --cfg base 'data.train_file=my chats.jsonl'"),
        ("outputs/demo", "is a run's folder; fix: --cfg outputs/demo/config.yaml"),
        ("model", "is a model's folder; fix: --cfg base model.name_or_path=model"),
        (
            "ddp.yaml",
            "is a file for accelerate launch, and holds no run's settings; fix: accelerate launch --config_file "
            "ddp.yaml -m lora_core train --cfg qwen7b",
        ),
    ],
)
def test_another_thing_in_place_of_a_configuration(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value) == f"--cfg {name}: {expected}"


def test_the_name_of_a_file_for_accelerate_in_place_of_a_configuration() -> None:
    with pytest.raises(ConfigError, match="--cfg fsdp2: is a file for accelerate launch"):
        load_config("fsdp2")
    with pytest.raises(ConfigError, match="is a file for accelerate launch"):  # TRL's files have an fsdp_config too
        read_translation(str(ROOT / "configs/accelerate/fsdp2.yaml"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my chats.jsonl", "is a file; fix: model.name_or_path=FOLDER or a hub id"),
        ("outputs/demo", "is an adapter and no model; fix: 'model.name_or_path=my model' model.adapter=outputs/demo"),
        ("./outputs/demo/adapter", "fix: 'model.name_or_path=my model' model.adapter=./outputs/demo/adapter"),
    ],
)
def test_another_thing_in_place_of_a_model(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model_config(ModelConfig(name_or_path=name))
    assert str(caught.value).endswith(expected)


@pytest.mark.usefixtures("folder")
def test_another_thing_in_place_of_a_run() -> None:
    with pytest.raises(ConfigError, match="no such run; outputs holds 1; fix: outputs/demo"):
        open_model("outputs/demos")
    Path("chats").touch()
    with pytest.raises(ConfigError, match="chats: is a file; fix: a folder such as outputs/demo"):
        open_model("chats")
    with pytest.raises(ConfigError, match="holds no adapter_model"):
        adapter_on(torch.nn.Linear(1, 1), "outputs/demo/adapter")
    with pytest.raises(ConfigError, match="--resume outputs/none: no such folder; fix: --resume without a path"):
        find_checkpoint(Path("outputs/demo"), Path("outputs/none"), print, may_rename=False)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["merge", "gone", "--output", "merged"], "gone: no such folder"),
        (["push", "gone", "a/b"], "gone: no such folder"),
        (["export", "gone", "--gguf", "--output", "gguf"], "gone: no such folder"),
        (
            ["preflight", "--cfg", "demo", "--write", "my chats.jsonl"],
            "chats.jsonl: exists, and would be lost",
        ),
        (["preflight", "--cfg", "demo", "--write", "none/a.yaml"], "--write none/a.yaml: no folder none; fix: make it"),
        (["preflight", "--cfg", "demo", "--gpu-memory-gib", "0"], "--gpu-memory-gib 0: must be above 0; fix: --gpu"),
        (["prescribe", "--model", "model", "--data", "a", "--write", "none/a.yaml"], "--write none/a.yaml: no folder"),
        (["prescribe", "--model", "model", "--data", "a", "--gpu-memory-gib", "-3"], "--gpu-memory-gib -3: must be"),
    ],
)
def test_what_cannot_be_read_or_written_is_a_sentence(
    given: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    assert expected in capsys.readouterr().err
    assert Path("my chats.jsonl").read_text() == "{}"


def test_tools_that_are_no_list_have_one_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tools.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n')
    assert main(["chat", "outputs/demo", "--tools", str(tmp_path / "tools.jsonl")]) == 2
    assert capsys.readouterr().err.count("fix: ") == 1


def test_prescribe_names_its_own_option(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("{}")
    assert main(["prescribe", "--model", str(tiny_model_dir), "--data", "chat.jsonl"]) == 2
    assert capsys.readouterr().err.endswith("fix: --data chats.jsonl\n")
