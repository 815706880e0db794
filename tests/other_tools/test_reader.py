"""Files of other tools: each key is taken, not offered or unknown; what a file leaves open is its tool's default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_core.config.keys import config_keys
from lora_core.config.layers import Setting
from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError
from lora_core.other_tools.axolotl import AXOLOTL
from lora_core.other_tools.llama_factory import LLAMA_FACTORY
from lora_core.other_tools.trainer_keys import SFT_COMMAND, SFT_CONFIG
from lora_core.other_tools.translation import Tool, Translation, translate

TRAINER = {
    "output_dir": "saves/it",
    "logging_steps": 10,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "report_to": "none",
}
FACTORY = TRAINER | {
    "model_name_or_path": "Qwen/Qwen3-4B",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "identity",
    "template": "qwen3",
    "cutoff_len": 1024,
}
OTTER = {
    "base_model": "Qwen/Qwen2.5-3B",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_target_linear": True,
    "datasets": [{"path": "chats.jsonl", "type": "chat_template", "field_messages": "turns"}],
    "sequence_len": 2048,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "learning_rate": 0.0002,
    "lr_scheduler": "cosine",
    "val_set_size": 0.05,
    "flash_attention": True,
    "evals_per_epoch": 1,
    "warmup_steps": 10,
    "special_tokens": {"pad_token": "<|end|>"},
}
COMMAND = TRAINER | {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "somebody/chats",
    "use_peft": True,
    "lora_r": 8,
    "max_length": 512,
}


def write(folder: Path, values: dict[str, Any], name: str = "theirs.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith(".json") else yaml.safe_dump(values, sort_keys=False))
    return path


def translated(path: Path, model: str | None = None) -> Translation:
    translation = read_translation(path, model)
    assert translation is not None
    return translation


def outcomes(translation: Translation) -> dict[str, str]:
    return {reading.key: reading.outcome for reading in translation.readings}


def test_an_unknown_key_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    (reading,) = translated(write(tmp_path, FACTORY | {"cutof_len": 512})).of("unknown")
    assert reading.note.endswith("that is known here; nearest: cutoff_len")


def test_llama_factory(tmp_path: Path) -> None:
    path = write(tmp_path, FACTORY | {"val_size": 0.1, "quantization_bit": 4, "pissa_init": True, "wibble": 3})
    config, said = load_config(path), translated(path)
    assert (config.model.quantization, config.data.eval_fraction, config.data.max_seq_length) == ("nf4", 0.1, 1024)
    # LLaMA-Factory's own defaults: rank 8, alpha twice that, no dropout, checkpointing on.
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16, 0.0)
    assert (config.train.gradient_checkpointing, config.train.save_steps, config.lora.target_modules) == (
        True,
        500,
        "all-linear",
    )
    became = outcomes(said)
    assert (became["report_to"], became["pissa_init"], became["wibble"]) == ("taken", "not offered", "unknown")
    assert set(became) == {*FACTORY, "val_size", "quantization_bit", "pissa_init", "wibble"}
    assert "lora.rank=8" in said.from_defaults()
    assert "dataset = 'identity': a name in data/dataset_info.json" in str(said)


def test_axolotl(tmp_path: Path) -> None:
    path = write(tmp_path, OTTER)
    config, said = load_config(path), translated(path)
    train = config.train
    assert (config.lora.rank, config.lora.target_modules, config.model.quantization) == (32, "all-linear", "nf4")
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.warmup_steps) == (2, 4, 10)
    assert (config.data.train_file, config.data.columns, config.data.truncation) == (
        "chats.jsonl",
        {"messages": "turns"},
        "drop",
    )
    assert (outcomes(said)["lr_scheduler"], train.lr_scheduler_type) == ("taken", "cosine")
    assert "sample_packing = True: packing is on here" in str(said)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"warmup_steps": None}, {"train.warmup_ratio": 0.03}),
        ({"batch_size": 16}, {"train.gradient_accumulation_steps": 8}),
        ({"train_on_inputs": True}, {"data.train_on": "everything"}),
        ({"datasets": [{"path": "a/b", "type": "alpaca", "split": "train[:1%]"}]}, {}),
        (
            {"datasets": [{"path": "a.jsonl", "type": "alpaca"}, {"path": "a/b", "type": "sharegpt", "split": "test"}]},
            {"data.train_files": ["a.jsonl", {"path": "a/b", "split": "test"}]},
        ),
        (
            {"datasets": [{"path": "json", "data_files": "a.jsonl", "type": "completion"}]},
            {"data.train_file": "a.jsonl"},
        ),
        ({"val_set_size": 0, "test_datasets": [{"path": "e.jsonl"}]}, {"data.eval_file": "e.jsonl"}),
        ({"excess_length_strategy": "truncate"}, {"data.truncation": "right"}),
        ({"chat_template": "phi_3"}, {"data.chat_template": "phi3"}),
        ({"optimizer": "adamw_bnb_8bit"}, {"train.optim": "adamw_bnb_8bit"}),
        ({"optimizer": "paged_adamw"}, {"train.optim": "paged_adamw_32bit"}),
        ({"bf16": False, "fp16": True}, {"train.fp16": True, "train.bf16": False}),
        ({"lora_modules_to_save": ["embed_tokens", "lm_head"]}, {"lora.modules_to_save": ["embed_tokens", "lm_head"]}),
        (
            {"lora_target_linear": False, "lora_target_modules": r"model.*\.q_proj"},
            {"lora.target_modules": r"model.*\.q_proj"},
        ),
        ({"loraplus_lr_ratio": 16, "adam_beta2": 0.95}, {"lora.loraplus_lr_ratio": 16, "train.adam_beta2": 0.95}),
        ({"noisy_embedding_alpha": 5}, {"train.neftune_noise_alpha": 5}),
        ({"lora_model_dir": "outputs/earlier"}, {"model.adapter": "outputs/earlier"}),
        ({"streaming": True}, {"data.streaming": True}),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            {
                "train.lr_scheduler_type": "cosine_with_min_lr",
                "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            },
        ),
    ],
)
def test_axolotl_values(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = translated(write(tmp_path, OTTER | values)).settings
    assert {key: settings[key].value for key in expected} == expected


def test_trl_command(tmp_path: Path) -> None:
    path = write(tmp_path, COMMAND)
    config, said = load_config(path), translated(path)
    assert (config.data.train_file, config.data.max_seq_length) == ("somebody/chats", 512)
    # TRL's defaults: adapters on q and v, checkpointing, float32 weights, no warmup unless asked.
    assert (config.lora.target_modules, config.train.gradient_checkpointing) == (["q_proj", "v_proj"], True)
    assert (config.lora.alpha, config.model.dtype, config.train.warmup_ratio) == (32, "float32", 0.1)
    assert "TRL trains on all text of a chat" in str(said)


def test_a_saved_sft_config_in_json(tmp_path: Path) -> None:
    path = write(tmp_path, TRAINER | {"max_length": 256, "optim": "adamw_torch", "_n_gpu": 1}, "config.json")
    assert translated(path).tool == "TRL 1.16's SFTConfig"
    assert load_config(path).data.max_seq_length == 256


@pytest.mark.parametrize(
    ("base", "values", "reason"),
    [
        (FACTORY, {"stage": "dpo"}, "stage: dpo"),
        (FACTORY, {"finetuning_type": "full"}, "finetuning_type: full"),
        (FACTORY, {"do_train": False}, "do_train is not true"),
        (OTTER, {"adapter": None}, "adapter: None"),
        (OTTER, {"rl": "grpo"}, "rl: grpo"),
        (OTTER, {"pretraining_dataset": [{"path": "c4"}]}, "pretraining_dataset"),
        (COMMAND, {"use_peft": False}, "use_peft is false"),
        (COMMAND, {"beta": 0.1}, "beta: a file for preference"),
    ],
)
def test_what_is_not_done_here_is_refused_with_the_reason(
    tmp_path: Path, base: dict[str, Any], values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(write(tmp_path, base | values))


@pytest.mark.parametrize(
    ("base", "values", "key"),
    [
        (FACTORY, {"val_size": 100}, "val_size"),
        (FACTORY, {"quantization_bit": 2}, "quantization_bit"),
        (FACTORY, {"num_train_epochs": 0.5}, "num_train_epochs"),
        (FACTORY, {"optim": "muon"}, "optim"),
        (FACTORY, {"pissa_init": True}, "pissa_init"),
        (FACTORY, {"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        (FACTORY, {"report_to": "neptune"}, "report_to"),
        (OTTER, {"saves_per_epoch": 4}, "saves_per_epoch"),
        (OTTER, {"datasets": [{"path": "a", "type": {"field": "x"}}]}, "datasets"),
        (COMMAND, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        (COMMAND, {"save_strategy": "no"}, "save_strategy"),
        (COMMAND, {"attn_implementation": "flex_attention"}, "attn_implementation"),
    ],
)
def test_a_value_without_a_counterpart_is_not_offered_and_ours_stays(
    tmp_path: Path, base: dict[str, Any], values: dict[str, Any], key: str
) -> None:
    path = write(tmp_path, base | values)
    assert outcomes(translated(path))[key] == "not offered"
    load_config(path)


def test_a_default_of_the_tool_is_taken_and_said(tmp_path: Path) -> None:
    said = str(translated(write(tmp_path, {key: value for key, value in OTTER.items() if key != "datasets"})))
    assert "train.lr_scheduler_type=cosine" not in said.split("by default of")[-1]
    fresh = {key: value for key, value in OTTER.items() if key != "lr_scheduler"}
    assert "train.lr_scheduler_type=cosine" in translated(write(tmp_path, fresh)).from_defaults()


def test_what_neither_file_nor_tool_says_is_named_as_ours(tmp_path: Path) -> None:
    said = translated(write(tmp_path, FACTORY))
    assert said.from_ours() == ["data.train_file=data/train.jsonl"]
    assert "by default of lora_core, as neither says: data.train_file=data/train.jsonl" in str(said)


@pytest.mark.parametrize("tool", [LLAMA_FACTORY, AXOLOTL, SFT_COMMAND, SFT_CONFIG], ids=lambda tool: tool.name)
def test_each_default_of_a_tool_is_read_by_a_rule_of_it(tool: Tool) -> None:
    assert set(tool.defaults) <= {key for rule in tool.rules for key in rule.keys}


@given(
    st.dictionaries(
        st.sampled_from(
            sorted({key for rule in SFT_COMMAND.rules for key in rule.keys} | set(SFT_COMMAND.not_offered))
        ),
        st.one_of(st.integers(-2, 9), st.floats(0, 2), st.sampled_from([None, True, False, "", "auto", "no", []])),
    )
)
def test_every_key_is_accounted_for_and_makes_only_our_keys(values: dict[str, Any]) -> None:
    said = translate("f", SFT_COMMAND, {key: Setting(value, "f:1") for key, value in values.items()})
    assert [reading.key for reading in said.readings] == list(values)
    assert set(said.settings) <= set(config_keys())


def test_a_file_of_ours_is_none_of_theirs(tmp_path: Path) -> None:
    for values in ({"train": {"learning_rate": 1e-4}}, {"learning_rate": 1e-4, "rank": 4}, {"extends": "qwen7b"}):
        assert read_translation(write(tmp_path, values)) is None


def test_a_section_may_be_left_out_where_only_one_has_the_key(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"learning_rate": 1e-4, "rank": 4}), ["packing=false"])
    assert (config.train.learning_rate, config.lora.rank, config.data.packing) == (1e-4, 4, False)
    with pytest.raises(ConfigError, match=r"theirs.yaml:1  train.learning_rate = 'x': must be"):
        load_config(write(tmp_path, {"learning_rate": "x"}))
