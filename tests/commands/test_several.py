"""`lora-core train --models`: smallest first, what does not fit is skipped, and one page compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config

from lora_core.commands.main import main
from tests.conftest import chat, make_model
from tests.forked import python
from tests.tiny import save_tiny_model


@pytest.fixture
def models(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Two that can be trained, and one of which there is only the configuration: it is looked at and never loaded."""
    folders = {name: tmp_path / name for name in ("small", "wider", "huge")}
    save_tiny_model(folders["small"], tokenizer)
    wider = make_model(len(tokenizer) + 64)
    wider.save_pretrained(folders["wider"])
    tokenizer.save_pretrained(folders["wider"])
    huge = Qwen2Config(vocab_size=len(tokenizer), hidden_size=16384, intermediate_size=65536, num_hidden_layers=40)
    huge.architectures = ["Qwen2ForCausalLM"]
    huge.save_pretrained(folders["huge"])
    tokenizer.save_pretrained(folders["huge"])
    return folders


def test_several_models_in_turn(models: dict[str, Path], tmp_path: Path, write_rows: Any) -> None:
    rows = write_rows([chat(f"q{i}", f"a{i}") for i in range(12)])
    settings = [f"data.train_file={rows}", f"data.eval_file={rows}", f"data.cache_dir={tmp_path / 'cache'}"]
    settings += ["train.max_steps=2", "train.num_sample_replies=0", f"output_dir={tmp_path / 'runs'}"]
    names = ",".join(str(models[name]) for name in ("huge", "wider", "small"))
    command = ["-m", "lora_core", "train", "--cfg", "demo", "--models", names, *settings]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    order = [line.split()[1] for line in lines if line.startswith("training ")]
    assert order == [str(models["small"]), str(models["wider"])]
    skipped = next(line for line in lines if line.startswith(str(models["huge"])))
    assert "M parameters; skipped: predicted peak memory is" in skipped
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"small", "wider", "report.html"}
    page = (tmp_path / "runs/report.html").read_text(encoding="utf-8")
    for name in ("small", "wider"):
        verdict = json.loads((tmp_path / f"runs/{name}/summary.json").read_text(encoding="utf-8"))["verdict"]
        assert verdict in done.stdout
        assert str(tmp_path / "runs" / name) in page
    again = python(*command, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before, in") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", ","], "needs names"),
        (["--models", "a/b,c/b"], "two have the same last name"),
        (["--models", "a,b", "--resume", "step-1"], "with --models each resumes its newest"),
        (["--models", "/nowhere/a"], "no such folder"),
    ],
)
def test_mistakes_are_found_before_any_run(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--cfg", "demo", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
