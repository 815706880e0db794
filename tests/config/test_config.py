from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from lora_core.config import synonyms
from lora_core.config.keys import config_keys, json_schema
from lora_core.config.schema import ALL_SEVEN_PROJECTIONS, RunConfig, TrainConfig
from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.learning_rate import suggest_learning_rate
from tests.conftest import ROOT

SHIPPED = {  # rank, alpha, dropout, epochs, batch, accumulation
    "qwen0.5b": (16, 32, 0.05, 5, 2, 4),
    "qwen1.5b": (8, 16, 0.05, 4, 1, 4),
    "qwen7b": (8, 16, 0.05, 3, 1, 4),
}
LEGACY = """\
Qwen/Qwen2.5-0.5B-Instruct:
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 4
  num_train_epochs: 5
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.05
Qwen/Qwen2.5-7B-Instruct:
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 4
  num_train_epochs: 3
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.1
"""


def problems(*overrides: str, cfg: str | Path = "qwen0.5b", model: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cfg, overrides, model)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_values(name: str) -> None:
    config = load_config(name)
    lora, train = config.lora, config.train
    assert (
        lora.rank,
        lora.alpha,
        lora.dropout,
        train.num_train_epochs,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    ) == SHIPPED[name]
    assert lora.target_modules == ALL_SEVEN_PROJECTIONS
    assert (train.learning_rate, train.warmup_ratio, train.bf16, train.optim) == (5e-5, 0.1, True, "paged_adamw_8bit")
    assert (config.data.max_seq_length, train.logging_steps) == (1024, 1)
    assert (config.model.quantization == "nf4") == (name == "qwen7b")
    assert config.output_dir == f"outputs/{name}"


def test_base_yaml_holds_every_default_and_a_word_on_each() -> None:
    text = (ROOT / "configs/base.yaml").read_text(encoding="utf-8")
    written = yaml.load(re.sub(r": (\d)e-", r": \1.0e-", text), yaml.SafeLoader)
    defaults = RunConfig().model_dump(mode="json")
    del defaults["output_dir"]  # comes from the config's name
    assert written == defaults
    for key, meaning in config_keys().items():
        assert f"  # {meaning.split(', default ')[0]}" in text, key
        assert key == "output_dir" or meaning.rsplit(": ", 1)[-1] in text, key


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        "qwen7b", ["train.learning_rate=3e-6", "data.eval_fraction=0.1", "lora.target_modules=all-linear"]
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


def test_command_line_wins_and_numbers_read_as_people_write_them() -> None:
    config = load_config("qwen0.5b", ["train.num_train_epochs=3", "train.learning_rate=2e-4", "data.eval_file=~"])
    assert (config.train.num_train_epochs, config.train.learning_rate, config.data.eval_file) == (3, 2e-4, None)


def test_a_value_that_the_locale_does_not_know_names_the_locale() -> None:
    # As Python reads "ø" where the encoding is ASCII.
    assert "in this locale it is not UTF-8; fix: PYTHONUTF8=1 before the command" in problems("output_dir=\udcc3\udcb8")


def test_one_kind_of_warmup_replaces_the_other() -> None:
    train = load_config("qwen0.5b", ["train.warmup_steps=5"]).train
    assert (train.warmup_steps, train.warmup_ratio) == (5, None)
    assert "fix: set one" in problems("train.warmup_steps=5", "train.warmup_ratio=0.1")


def test_every_problem_is_reported_at_once_with_place_value_limit_and_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  learning_rte: 5e-5\n  bf16: maybe\nlora:\n  rank: 0\n")
    text = problems("train.max_steps=1.5", "nonsense", cfg=file)
    assert f"{file}:2  train.learning_rte = 5e-05: unknown key; nearest: train.learning_rate (a float in (0, 1]" in text
    assert f"{file}:3  train.bf16 = 'maybe': must be a bool" in text
    assert f"{file}:5  lora.rank = 0: must be an int >= 1" in text
    assert "command line  train.max_steps = 1.5: must be an int >= 1 or null" in text
    assert "command line  'nonsense': must be key=value" in text
    assert "5 problems" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("train: [1]", "train = [1]: a section, which holds keys"),
        ("- a", "must hold `key: value` lines"),
        ("train: {bf16: true, bf16: false}", "train.bf16: set twice"),
        ("a: [", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("extends: missing.yaml", "there is no"),
        ("extends: 3", "must be the name of a file"),
        ("? [a]\n: b", "a key must be a plain string"),
        ("data: {eval_file: a.jsonl, eval_fraction: 0.1}", "both name an eval set"),
        ("lora: {target_modules: [1]}", "must be a list of str or a str"),
        ("learning_rat: 1e-4", "nearest: train.learning_rate"),
    ],
)
def test_broken_files_give_one_clear_error(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert expected in problems(cfg=file)


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    assert "extends itself" in problems(cfg=tmp_path / "a.yaml")


def test_an_unknown_name_lists_what_there_is() -> None:
    text = problems(cfg="qwen8b")
    assert "qwen0.5b, qwen1.5b, qwen7b" in text
    assert "nearest: --cfg qwen7b" in text


def test_legacy_training_args_work_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "training_args.yaml"
    file.write_text(LEGACY)
    config = load_config(file, ["train.seed=1"], model="Qwen/Qwen2.5-7B-Instruct")
    assert config.model.name_or_path == "Qwen/Qwen2.5-7B-Instruct"
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.1)
    assert (config.train.per_device_train_batch_size, config.train.num_train_epochs, config.train.seed) == (1, 3, 1)
    assert config.output_dir == "outputs/Qwen2.5-7B-Instruct"
    assert "--model Qwen/Qwen2.5-0.5B-Instruct" in problems(cfg=file)
    assert "--model x/y is not among them" in problems(cfg=file, model="x/y")
    file.write_text(LEGACY.replace("lora_rank: 8", "lora_rnk: 8"))
    assert "lora_rnk = 8: unknown key; nearest: lora_rank, which is lora.rank" in problems(
        cfg=file, model="Qwen/Qwen2.5-7B-Instruct"
    )
    assert "only for a file keyed by model id" in problems(cfg="qwen7b", model="x/y")


def test_a_users_file_extends_a_shipped_configuration_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: qwen7b\nlora: {rank: 4}\n", encoding="utf-8")
    config = load_config("mine.yaml")
    assert (config.lora.rank, config.lora.alpha, config.model.quantization) == (4, 16, "nf4")
    (tmp_path / "mine.yaml").write_text("extends: qwen8b\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"extends = 'qwen8b': there is no such file .* \(there are: base, demo, qwen"
    ):
        load_config("mine.yaml")


@pytest.mark.parametrize(("theirs", "ours"), [("train.lr", "train.learning_rate"), ("lora_r", "lora.rank")])
def test_what_other_tools_call_a_key_is_known(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"{theirs} = 1: unknown key; nearest: {ours} "):
        load_config("demo", [f"{theirs}=1"])


def test_every_other_name_leads_to_a_key_that_there_is() -> None:
    assert set(synonyms.SAME.values()) <= set(config_keys())


def test_one_warmup_alone_is_enough_in_python_too() -> None:
    assert TrainConfig(warmup_steps=5).warmup_ratio is None
    assert RunConfig.model_validate({"train": {"warmup_steps": 5}}).train.warmup_steps == 5
    with pytest.raises(ValueError, match="both set"):
        TrainConfig(warmup_steps=5, warmup_ratio=0.1)


def test_the_schema_for_editors_is_of_these_models_and_takes_every_shipped_configuration() -> None:
    schema = json.loads((ROOT / "configs/schema.json").read_text(encoding="utf-8"))
    assert schema == json_schema()  # else: python docs/write.py
    for path in (ROOT / "configs").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# yaml-language-server: $schema=schema.json\n")
        values = yaml.load(re.sub(r": (\d)e-(\d)\b", r": \1.0e-\2", text), yaml.SafeLoader)  # YAML 1.2 in 1.1
        jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"warmup": 5}}, schema)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("wandb_project", "nearest: train.tracker_project "),
        ("push_to_hub", "not a key here: nothing is uploaded"),
        ("load_in_4bit", "nearest: model.quantization "),
        ("train.resume_from_checkpoint", "not a key here: lora-core train --resume"),
        ("load_best_model_at_end", "nearest: train.keep_adapter "),
        ("cutoff_len", "nearest: data.max_seq_length "),
        ("val_size", "nearest: data.eval_fraction "),
        ("train.num_train_epoch", "nearest: train.num_train_epochs "),
        ("wibble", "sections: model, lora, data, train, preflight"),
    ],
)
def test_an_unknown_key_is_answered_with_what_is_meant_and_not_with_what_is_spelled_alike(
    theirs: str, said: str
) -> None:
    assert f"{theirs} = 1: unknown key; {said}" in problems(f"{theirs}=1")


@pytest.mark.parametrize(
    ("name", "model_type", "hidden_size", "steps"),
    [
        ("qwen0.5b", "qwen2", 896, 50),
        ("qwen1.5b", "qwen2", 1536, 80),
        ("qwen7b", "qwen2", 3584, 60),
        ("demo", "llama", 576, 50),
    ],
)
def test_each_shipped_config_says_what_auto_would_give(
    name: str, model_type: str, hidden_size: int, steps: int
) -> None:
    lora = load_config(name).lora
    rate = suggest_learning_rate(
        model_type=model_type, hidden_size=hidden_size, alpha=lora.alpha, rank=lora.rank, total_steps=steps
    )
    assert f"auto gives {rate.value:g}" in (ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8")


def test_a_mistake_over_several_sections_is_a_sentence_with_its_place() -> None:
    with pytest.raises(
        ConfigError, match=r"command line  train\.keep_adapter=best needs an eval loss.* fix: data\.eval_f"
    ):
        load_config("qwen0.5b", ["train.keep_adapter=best"])
