"""LLaMA-Factory's own examples, as keys and values: each migrates, or says why it does not.

What the files in its repository's `examples/` set, written down here by hand; the names are those of the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_core.configuration import load_config, read_translation
from tests.other_tools.examples import all_known, is_refused, migrates, write

# What nearly all of them share.
SHARED = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "max_samples": 1000,
    "preprocessing_num_workers": 16,
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
LATER = {
    "trust_remote_code": True,
    "lora_rank": 8,
    "dataloader_num_workers": 4,
    "save_only_model": False,
    "report_to": "none",
    "resume_from_checkpoint": None,
}
EVAL = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
LLAMA3 = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "overwrite_cache": True,
    "output_dir": "saves/llama3-8b/lora/sft",
}
QWEN3 = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "output_dir": "saves/qwen3-4b/lora/sft",
}
KTRANSFORMERS = {
    "use_kt": True,
    "kt_optimize_rule": "examples/kt_optimize_rules/DeepSeek-V3-Chat-sft-amx-multi-gpu.yaml",
    "cpu_infer": 128,
    "chunk_size": 8192,
}
# What all of SHARED becomes.
AS_SHARED: dict[str, Any] = {
    "train.learning_rate": 1e-4,
    "train.num_train_epochs": 3,
    "train.per_device_train_batch_size": 1,
    "train.gradient_accumulation_steps": 8,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.1,
    "train.logging_steps": 10,
    "train.save_steps": 500,
    "train.bf16": True,
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.0,
    "lora.target_modules": "all-linear",
    "data.max_seq_length": 2048,
    "data.eval_fraction": 0.0,
    "model.quantization": "none",
    "train.gradient_checkpointing": True,
}
AS_EVAL = {"data.eval_fraction": 0.1, "train.eval_steps": 500, "train.per_device_eval_batch_size": 1}

# name -> (the file, what of ours differs from AS_SHARED)
MIGRATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train_lora/llama3_lora_sft": (SHARED | LATER | LLAMA3, {}),
    "train_lora/qwen3_lora_sft": (
        SHARED | LATER | QWEN3 | {"dataset": "identity"},
        {"model.name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "data.num_proc": 16, "train.report_to": []},
    ),
    "train_lora/llama3_lora_sft_ds3": (
        SHARED
        | LLAMA3
        | EVAL
        | {"deepspeed": "examples/deepspeed/ds_z3_config.json", "gradient_accumulation_steps": 2},
        AS_EVAL | {"train.gradient_accumulation_steps": 2},
    ),
    "train_lora/llama3_lora_sft_ray": (
        SHARED
        | LATER
        | LLAMA3
        | {
            "dataset_dir": "REMOTE:llamafactory/demo_data",
            "ray_run_name": "llama3_8b_sft_lora",
            "ray_storage_path": "./saves",
            "ray_num_workers": 4,
            "placement_strategy": "PACK",
            "resources_per_worker": {"GPU": 1},
        },
        {},
    ),
    "train_lora/llama3_lora_sft_gaudi": (
        SHARED | LLAMA3 | {"use_habana": True, "use_lazy_mode": True, "gaudi_config_name": "Habana/llama"},
        {},
    ),
    "train_lora/llama3_lora_newsanalysis": (
        SHARED
        | LLAMA3
        | EVAL
        | {
            "model_name_or_path": "meta-llama/Llama-3.2-3B-Instruct",
            "dataset": "news_analysis",
            "max_samples": 500,
            "save_steps": 100,
            "eval_steps": 100,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 20.0,
        },
        AS_EVAL
        | {
            "train.num_train_epochs": 20,
            "train.gradient_accumulation_steps": 4,
            "train.save_steps": 100,
            "train.eval_steps": 100,
        },
    ),
    "train_lora/llama4_lora_sft_ds3": (
        SHARED
        | LATER
        | LLAMA3
        | {
            "model_name_or_path": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "dataset": "mllm_demo,identity,alpaca_en_demo",
            "template": "llama4",
            "gradient_accumulation_steps": 2,
        },
        {"train.gradient_accumulation_steps": 2},
    ),
    "train_lora/gpt_lora_sft": (
        SHARED | LATER | LLAMA3 | {"model_name_or_path": "openai/gpt-oss-20b", "template": "gpt"},
        {"model.name_or_path": "openai/gpt-oss-20b"},
    ),
    "train_lora/qwen3.5_lora_roleplay": (
        SHARED
        | EVAL
        | {
            "model_name_or_path": "Qwen/Qwen3.5-4B-Instruct",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "dataset": "identity,alpaca_en",
            "template": "qwen3_5",
            "cutoff_len": 2048,
            "save_steps": 100,
            "eval_steps": 100,
            "per_device_train_batch_size": 2,
            "learning_rate": 2.0e-4,
            "output_dir": "saves/qwen3.5-4b/lora/roleplay",
        },
        AS_EVAL
        | {
            "lora.rank": 16,
            "lora.alpha": 32,
            "lora.dropout": 0.1,
            "train.learning_rate": 2e-4,
            "train.per_device_train_batch_size": 2,
            "train.save_steps": 100,
            "train.eval_steps": 100,
        },
    ),
    "train_lora/deepseek3_lora_sft_kt": (
        SHARED
        | LATER
        | LLAMA3
        | KTRANSFORMERS
        | {"model_name_or_path": "opensourcerelease/DeepSeek-V3-bf16", "template": "deepseek", "max_samples": 100000},
        {},
    ),
    "train_lora/qwen3moe_lora_sft_kt": (
        SHARED
        | LATER
        | QWEN3
        | KTRANSFORMERS
        | {"dataset": "identity, alpaca_en_demo", "cutoff_len": 512, "num_train_epochs": 3, "save_steps": 200},
        {"data.max_seq_length": 512, "train.save_steps": 200},
    ),
    "train_lora/qwen3vl_lora_sft": (
        SHARED
        | LATER
        | QWEN3
        | {
            "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct",
            "image_max_pixels": 262144,
            "video_max_pixels": 16384,
            "dataset": "mllm_demo,identity,alpaca_en_demo",
        },
        {},
    ),
    "train_lora/nanbeige42_base_lora_sft": (
        SHARED
        | LATER
        | QWEN3
        | {
            "model_name_or_path": "Nanbeige/Nanbeige4.2-3B-Base",
            "use_fast_tokenizer": False,
            "add_special_tokens": "<|im_start|>,<|im_end|>,<|endoftext|>,<think>,</think>",
            "additional_target": "embed_tokens,lm_head",
        },
        {"lora.modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "train_qlora/llama3_lora_sft_otfq": (
        SHARED | LLAMA3 | EVAL | {"quantization_bit": 4, "quantization_method": "bitsandbytes"},
        AS_EVAL | {"model.quantization": "nf4"},
    ),
    "train_qlora/qwen3_lora_sft_bnb_npu": (
        SHARED | LATER | QWEN3 | {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": False},
        {"model.quantization": "nf4"},
    ),
    "extras/fsdp_qlora/llama3_lora_sft": (
        {key: value for key, value in (SHARED | LLAMA3 | EVAL).items() if key != "bf16"}
        | {"quantization_bit": 4, "lora_target": "q_proj,v_proj", "cutoff_len": 1024, "fp16": True},
        AS_EVAL
        | {
            "model.quantization": "nf4",
            "lora.target_modules": ["q_proj", "v_proj"],
            "data.max_seq_length": 1024,
            "train.fp16": True,
            "train.bf16": False,
        },
    ),
    "extras/loraplus/llama3_lora_sft": (
        SHARED | LLAMA3 | EVAL | {"loraplus_lr_ratio": 16.0},
        AS_EVAL | {"lora.loraplus_lr_ratio": 16.0},
    ),
    "extras/pissa/llama3_lora_sft": (
        SHARED | LATER | LLAMA3 | {"pissa_init": True, "pissa_iter": 16, "pissa_convert": True},
        {"lora.init_lora_weights": True},
    ),
    "ascend/qwen3_5_lora_sft_fsdp2": (
        {key: value for key, value in (SHARED | LATER | QWEN3).items() if key != "num_train_epochs"}
        | {
            "model_name_or_path": "Qwen/Qwen3.5-35B-A3B",
            "use_v1_kernels": True,
            "flash_attn": "fa2",
            "packing": False,
            "logging_steps": 1,
            "save_steps": 2000,
            "max_steps": 2000,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1.0e-5,
            "ddp_timeout": 1800,
            "disable_gradient_checkpointing": True,
        },
        {
            "train.max_steps": 2000,
            "train.logging_steps": 1,
            "train.save_steps": 2000,
            "train.gradient_accumulation_steps": 1,
            "train.learning_rate": 1e-5,
            "train.gradient_checkpointing": False,
            "train.rank_timeout_s": 1800,
            "model.attn_implementation": "flash_attention_2",
        },
    ),
    "extras/hf/hf_hub_push_example": (
        SHARED
        | {
            "model_name_or_path": "dummy-model/placeholder",
            "trust_remote_code": True,
            "dataset": "dummy_dataset",
            "template": "default",
            "cutoff_len": 1024,
            "save_steps": 50,
            "save_total_limit": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2.0e-5,
            "num_train_epochs": 1.0,
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "gradient_checkpointing": True,
            "push_to_hub": True,
            "hub_model_id": "your-user-or-org/your-train-repo",
            "hub_strategy": "end",
            "hub_private_repo": True,
            "hub_always_push": False,
            "export_dir": "output/hf_hub_push_example_export",
            "export_size": 5,
            "export_device": "cpu",
            "export_legacy_format": False,
            "export_hub_model_id": "your-user-or-org/your-export-repo",
        },
        {
            "data.max_seq_length": 1024,
            "train.save_steps": 50,
            "train.save_total_limit": 2,
            "train.gradient_accumulation_steps": 4,
            "train.learning_rate": 2e-5,
            "train.num_train_epochs": 1,
            "train.warmup_ratio": 0.03,
        },
    ),
}
PREFERENCES = {"pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo"}
# name -> (the file, why it is refused)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "train_lora/llama3_lora_pretrain": (SHARED | LLAMA3 | {"stage": "pt"}, "stage: pt; fine-tuning on chats"),
    "train_lora/qwen3_lora_dpo": (SHARED | LATER | QWEN3 | PREFERENCES | {"stage": "dpo"}, "stage: dpo"),
    "train_lora/llama3_lora_predict": (
        LLAMA3
        | {
            "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "stage": "sft",
            "do_predict": True,
            "finetuning_type": "lora",
            "predict_with_generate": True,
        },
        "do_train is not true",
    ),
    "train_lora/llama3_lora_eval": (
        {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "finetuning_type": "lora",
            "task": "mmlu_test",
            "template": "fewshot",
            "lang": "en",
            "n_shot": 5,
            "save_dir": "saves/llama3-8b/lora/eval",
            "batch_size": 4,
        },
        "do_train is not true",
    ),
    "train_lora/llama3_preprocess": (
        LLAMA3 | {"stage": "sft", "do_train": True, "finetuning_type": "full", "tokenized_path": "saves/dataset/sft"},
        "finetuning_type: full",
    ),
    "extras/oft/llama3_oft_sft": (
        SHARED | LATER | LLAMA3 | {"finetuning_type": "oft", "oft_block_size": 32, "oft_target": "all"},
        "finetuning_type: oft; adapters",
    ),
    "extras/badam/llama3_lora_sft": (
        SHARED
        | LLAMA3
        | {
            "finetuning_type": "full",
            "use_badam": True,
            "badam_switch_mode": "descending",
            "badam_verbose": 2,
            "warmup_steps": 0.1,
            "pure_bf16": True,
        },
        "finetuning_type: full",
    ),
    "extras/fp8/llama3_fp8_deepspeed_sft": (
        SHARED | LATER | LLAMA3 | {"finetuning_type": "full", "fp8": True, "fp8_backend": "te"},
        "finetuning_type: full",
    ),
}


@pytest.mark.parametrize("name", MIGRATED)
def test_an_example_migrates_and_every_key_is_known(tmp_path: Path, name: str) -> None:
    values, differing = MIGRATED[name]
    expected = AS_SHARED | differing
    if "train.max_steps" in expected:
        del expected["train.num_train_epochs"]
    assert migrates(write(tmp_path, values), expected).tool == "LLaMA-Factory 0.9.5"


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_that_is_no_training_of_an_adapter_says_so(tmp_path: Path, name: str) -> None:
    values, reason = REFUSED[name]
    path = write(tmp_path, values)
    all_known(path)
    is_refused(path, reason)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"use_swanlab": True, "report_to": "wandb"},
            {"train.report_to": ["wandb", "swanlab"], "train.tracker_project": "llamafactory"},
        ),
        (
            {"use_swanlab": True, "swanlab_project": "slips"},
            {"train.report_to": ["swanlab"], "train.tracker_project": "slips"},
        ),
        ({"lr_scheduler_type": "constant"}, {"train.lr_scheduler_type": "constant", "train.warmup_steps": 0}),
        ({"disable_gradient_checkpointing": True}, {"train.gradient_checkpointing": False}),
        (
            {"disable_gradient_checkpointing": True, "gradient_checkpointing": True},
            {"train.gradient_checkpointing": True},
        ),
    ],
)
def test_keys_that_several_settings_decide(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = load_config(write(tmp_path, SHARED | LLAMA3 | values)).to_dict()
    assert {key: config[key.split(".")[0]][key.split(".")[1]] for key in expected} == expected


def test_what_changes_the_weights_is_not_passed_over_as_speed(tmp_path: Path) -> None:
    said = read_translation(write(tmp_path, SHARED | LLAMA3 | {"quantization_bit": 4, "double_quantization": False}))
    assert said is not None
    assert "double_quantization = False: NF4 here has double quantization" in str(said)
