"""Pushing to a stand-in for the hub: what is there afterwards, what is not sent twice, and every refusal a sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load

from lora_core.commands.main import main
from tests.conftest import ROOT
from tests.export.hub_stand_in import TOKEN, StandIn, standing_in

REPO = "someone/tiny"
BASE = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """In place of the hub, for this process; with a token, and uploads by HTTP."""
    with standing_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_an_adapter_with_card_and_report(
    short_run: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(short_run), REPO, "--base-model", BASE]) == 0
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "(private)" in said.out
    repo = hub.repos[REPO]
    assert repo["private"]
    files = repo["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= set(files)
    assert files["report.html"] == (short_run / "report.html").read_bytes()
    assert load(files["adapter_model.safetensors"])
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert str(short_run.parent).encode() not in files["README.md"] + files["adapter_config.json"]
    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == BASE
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "perplexity", "accuracy"}
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 16" in card.text

    assert main(["push", str(short_run), REPO, "--base-model", BASE]) == 0  # nothing is new
    assert hub.num_uploads == 1


def test_what_broke_off_continues(short_run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    hub.broken_uploads = 1
    arguments = ["push", str(short_run), REPO, "--merged", "--no-report"]
    assert main(arguments) == 2
    assert "does not let this token write there (403)" in capsys.readouterr().err
    assert hub.repos[REPO]["files"] == {}
    assert main(arguments) == 0
    files = hub.repos[REPO]["files"]
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "tokenizer.json"} <= set(files)
    assert "report.html" not in files
    assert hub.num_uploads == 1
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert "base_model" not in metadata  # it was a local folder


def test_a_base_model_in_a_folder_is_said_and_not_published(
    short_run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = short_run / "checkpoints/step-000002"
    assert main(["push", str(checkpoint), REPO, "--public", "--no-report"]) == 0
    assert "the base model is a local folder" in capsys.readouterr().out
    files = hub.repos[REPO]["files"]
    assert not hub.repos[REPO]["private"]
    assert {"adapter_model.safetensors", "tokenizer.json"} <= set(files)
    assert "/" not in json.loads(files["adapter_config.json"])["base_model_name_or_path"]
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert "base_model" not in metadata
    assert "model-index" not in metadata  # what was measured is of the last step


def test_refusals_are_sentences(
    short_run: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str, code: int = 2) -> str:
        assert main(["push", *arguments]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert TOKEN not in said
        return said

    run = str(short_run)
    assert "is no name of a repository" in refused(run, "a/b/c")
    assert "does not let this token write there (403)" in refused(run, "else/where")
    assert "--base-model ./x: is no hub id" in refused(run, REPO, "--base-model", "./x")
    hub.repos["someone/open"] = {"private": False, "files": {}}
    assert "someone/open: is public; fix: --public" in refused(run, "someone/open")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 5)
    assert "(401); fix: `hf auth login`" in refused(run, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "there is no token for the hub; fix: `hf auth login`" in refused(run, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refused(run, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused(run, REPO, code=1)


def test_the_command_line_takes_the_endpoint_from_the_environment(short_run: Path, tmp_path: Path) -> None:
    """And the merged folder as it is; no token is in what is printed."""
    shutil.copytree(short_run / "adapter", tmp_path / "adapter")
    with standing_in() as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "lora_core", "push", str(tmp_path / "adapter"), REPO]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert f"pushed: {server.address}" in done.stdout
        assert "report.html" not in server.repos[REPO]["files"]
