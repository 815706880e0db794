"""What a path is, and that what is loaded from it is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.evaluation.evaluate import evaluate_adapter
from lora_core.inference.evaluation import evaluate_loaded
from lora_core.inference.opened import load_opened, open_model
from tests.conftest import chat
from tests.tiny import make_model, make_tokenizer, write_jsonl


def test_a_run_is_its_adapter_with_its_settings(finished_run: Path, tiny_model_dir: Path) -> None:
    opened = open_model(str(finished_run), ["model.quantization=int8"])
    assert (opened.kind, opened.weights, opened.tokenizer_dir) == ("adapter", *[finished_run / "adapter"] * 2)
    assert opened.config.data.eval_file == str(finished_run.parent / "eval.jsonl")
    assert (opened.config.model.name_or_path, opened.config.model.quantization) == (str(tiny_model_dir), "int8")
    assert str(opened) == f"adapter {finished_run / 'adapter'} on {tiny_model_dir}"
    alone = open_model(str(finished_run / "adapter"))
    assert (alone.kind, alone.weights, alone.config) == (
        "adapter",
        finished_run / "adapter",
        load_config(finished_run / "config.yaml"),
    )


def test_a_run_is_quantized_as_it_was_trained(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run / "adapter", run / "adapter")
    text = (finished_run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("quantization: none", "quantization: int8"), encoding="utf-8")
    loaded = load_opened(open_model(str(run)))
    assert loaded.config.model.quantization == "int8"
    assert loaded.model.get_base_model().is_loaded_in_8bit


def test_a_run_without_an_adapter_is_its_newest_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run / "checkpoints", run / "checkpoints")
    shutil.copy(finished_run / "config.yaml", run)
    opened = open_model(str(run))
    assert (opened.kind, opened.weights) == ("checkpoint", run / "checkpoints/step-000030")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"no adapter/ and no checkpoint yet; fix: "):
        open_model(str(run))


def test_an_adapter_elsewhere_names_its_base_model_and_brings_its_template(
    finished_run: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    shutil.copytree(finished_run / "adapter", tmp_path / "mine")
    tokenizer = make_tokenizer("{{ 'another template' }}")
    tokenizer.save_pretrained(tmp_path / "mine")
    opened = open_model(str(tmp_path / "mine"))
    assert (opened.config.model.name_or_path, opened.config.train.bf16) == (str(tiny_model_dir), "auto")
    assert load_opened(opened).tokenizer.chat_template == "{{ 'another template' }}"
    asked = open_model(str(tmp_path / "mine"), ["data.chat_template=chatml"])
    assert "<|im_start|>" in str(load_opened(asked).tokenizer.chat_template)


def test_a_checkpoint_has_the_eval_loss_that_was_logged_at_its_step(finished_run: Path) -> None:
    lines = map(json.loads, (finished_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    logged = {event["step"]: event["loss"] for event in lines if event["event"] == "eval"}
    found = {}
    for step in (10, 20):
        loaded = load_opened(open_model(str(finished_run / f"checkpoints/step-{step:06d}")))
        found[step] = evaluate_loaded(loaded, 0, 8, print).result.loss
    assert found == pytest.approx({10: logged[10], 20: logged[20]}, abs=1e-5)
    assert logged[10] != pytest.approx(logged[20], abs=1e-3)


def test_an_adapter_has_the_loss_that_evaluate_adapter_finds(finished_run: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    result = evaluate_loaded(load_opened(open_model(str(finished_run))), 0, 8, print).result
    assert result == evaluate_adapter(config, finished_run / "adapter")


def test_a_model_folder_is_a_model_alone(tiny_model_dir: Path, finished_run: Path) -> None:
    opened = open_model(str(tiny_model_dir))
    assert (opened.kind, opened.weights, str(opened)) == ("model", None, f"model {tiny_model_dir}")
    config = load_config(finished_run / "config.yaml")
    merged = open_model(str(tiny_model_dir), config=config)
    assert merged.config == config
    assert open_model("owner/name").config.model.name_or_path == "owner/name"


@pytest.mark.parametrize("given", ["/nowhere", "~/nowhere", "./nowhere", "a/b/c"])
def test_a_path_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder \(working folder: .*\); fix: "):
        open_model(given)


def test_a_folder_with_nothing_to_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run, adapter, checkpoint or model .*; fix: "):
        open_model(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_does_not_name_its_base_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        open_model(str(tmp_path))


def test_a_damaged_checkpoint_is_refused(finished_run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "step-000010"
    shutil.copytree(finished_run / "checkpoints/step-000010", damaged)
    (damaged / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"adapter\.safetensors differs from its manifest\.json; fix: "):
        open_model(str(damaged))


def test_an_adapter_on_a_base_that_it_does_not_fit_is_refused(finished_run: Path, tmp_path: Path) -> None:
    model = make_model(640)
    model.config.hidden_size = 32
    type(model)(model.config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for folder in ("adapter", "checkpoints/step-000010"):
        opened = open_model(str(finished_run / folder), [f"model.name_or_path={tmp_path}"])
        with pytest.raises(ConfigError, match=r"cannot be loaded onto .*; fix: model\.name_or_path=NAME"):
            load_opened(opened)


def test_an_eval_set_alone_needs_no_training_rows(finished_run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "other.jsonl", [chat("red", "stop")])
    settings = [f"data.eval_file={rows}", f"data.train_file={tmp_path}/gone.jsonl"]
    loaded = load_opened(open_model(str(finished_run), settings))
    assert evaluate_loaded(loaded, 0, 8, print).result.num_conversations == 1
