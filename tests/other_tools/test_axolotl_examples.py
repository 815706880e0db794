"""Axolotl's own examples, as keys and values: each migrates, or says why it does not.

What the files in its repository's `examples/` set at 0.19, written down here by hand; the names are those of the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_core.config.layers import Setting
from lora_core.configuration import load_config, read_translation
from lora_core.other_tools.axolotl import AXOLOTL
from lora_core.other_tools.translation import translate
from tests.other_tools.examples import all_known, is_refused, migrates, write

SEVEN = ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]
# What nearly all of them share.
SHARED = {
    "learning_rate": 0.0002,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "saves_per_epoch": 1,
    "weight_decay": 0.0,
    "attn_implementation": "flash_attention_2",
    "output_dir": "./outputs/out",
    "sample_packing": True,
}
QLORA = SHARED | {
    "load_in_8bit": False,
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
}
LORA = QLORA | {"load_in_4bit": False, "adapter": "lora"}
INT8 = LORA | {"load_in_8bit": True}
CLASSES = {"model_type": "AutoModelForCausalLM", "tokenizer_type": "AutoTokenizer"}
SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
FINETOME = {"path": "mlabonne/FineTome-100k", "type": "chat_template", "split": "train[:20%]"} | SHAREGPT
ORCA = {"path": "cgato/SlimOrcaDedupCleaned", "type": "chat_template"} | SHAREGPT
FSDP = {
    "fsdp": ["full_shard", "auto_wrap"],
    "fsdp_config": {"fsdp_offload_params": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}


def alpaca(path: str, kind: str = "alpaca") -> dict[str, Any]:
    return {"datasets": [{"path": path, "type": kind}]}


def batch(micro: int, accumulation: int, epochs: int, length: int) -> dict[str, Any]:
    return {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_epochs": epochs,
        "sequence_len": length,
    }


def as_batch(micro: int, accumulation: int, epochs: int, length: int) -> dict[str, Any]:
    return {
        "train.per_device_train_batch_size": micro,
        "train.gradient_accumulation_steps": accumulation,
        "train.num_train_epochs": epochs,
        "data.max_seq_length": length,
    }


# What all of SHARED becomes, with Axolotl's own defaults.
AS_SHARED: dict[str, Any] = {
    "train.learning_rate": 2e-4,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_ratio": 0.1,
    "train.bf16": "auto",
    "train.gradient_checkpointing": True,
    "train.logging_steps": 1,
    "train.save_steps": None,
    "data.truncation": "drop",
    "data.train_on": "all_assistant",
    "train.report_to": [],
}
AS_QLORA = AS_SHARED | {
    "model.quantization": "nf4",
    "lora.rank": 32,
    "lora.alpha": 16,
    "lora.dropout": 0.05,
    "lora.target_modules": "all-linear",
}
AS_FINETOME = {
    "data.train_files": [
        {
            "path": "mlabonne/FineTome-100k",
            "weight": 1.0,
            "split": "train[:20%]",
            "revision": None,
            "max_rows": None,
        }
    ],
    "data.columns": {"messages": "conversations"},
}

# name -> (the file, keys of ours that come of it)
MIGRATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-3/lora-1b": (
        SHARED
        | alpaca("teknium/GPT4-LLM-Cleaned")
        | batch(2, 2, 1, 2048)
        | {
            "base_model": "NousResearch/Llama-3.2-1B",
            "val_set_size": 0.1,
            "adapter": "lora",
            "eval_sample_packing": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "lora_target_modules": SEVEN,
            "optimizer": "adamw_8bit",
            "loss_watchdog_threshold": 5.0,
            "loss_watchdog_patience": 3,
            "evals_per_epoch": 4,
            "special_tokens": {"pad_token": "<|end_of_text|>"},
        },
        AS_SHARED
        | as_batch(2, 2, 1, 2048)
        | {
            "model.name_or_path": "NousResearch/Llama-3.2-1B",
            "model.quantization": "none",
            "model.attn_implementation": "flash_attention_2",
            "data.train_file": "teknium/GPT4-LLM-Cleaned",
            "data.eval_fraction": 0.1,
            "lora.rank": 16,
            "lora.target_modules": SEVEN,
            "train.optim": "adamw_8bit",
        },
    ),
    "llama-3/qlora": (
        QLORA
        | CLASSES
        | alpaca("aaditya/alpaca_subset_1")
        | batch(2, 4, 4, 4096)
        | {"base_model": "NousResearch/Meta-Llama-3-8B", "val_set_size": 0, "optimizer": "paged_adamw_32bit"},
        AS_QLORA | as_batch(2, 4, 4, 4096) | {"train.optim": "paged_adamw_32bit", "data.eval_fraction": 0.0},
    ),
    "llama-3/lora-1b-deduplicate-sft": (
        INT8
        | batch(2, 4, 4, 4096)
        | {
            "base_model": "meta-llama/Llama-3.2-1B",
            "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"} for _ in range(2)],
            "dataset_exact_deduplication": True,
            "lora_modules_to_save": ["embed_tokens", "lm_head"],
            "optimizer": "adamw_bnb_8bit",
        },
        AS_QLORA
        | {
            "model.quantization": "int8",
            "data.train_files": ["mhenrichsen/alpaca_2k_test"] * 2,
            "lora.modules_to_save": ["embed_tokens", "lm_head"],
            "train.optim": "adamw_bnb_8bit",
        },
    ),
    "llama-3/qlora-fsdp-70b": (
        QLORA
        | FSDP
        | alpaca("tatsu-lab/alpaca")
        | batch(1, 4, 4, 512)
        | {
            "base_model": "casperhansen/llama-3-70b-fp16",
            "val_set_size": 0.05,
            "lora_r": 8,
            "optimizer": "adamw_torch_fused",
            "learning_rate": 1e-05,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        AS_QLORA | as_batch(1, 4, 4, 512) | {"lora.rank": 8, "train.learning_rate": 1e-5, "data.eval_fraction": 0.05},
    ),
    "qwen3/32b-qlora": (
        SHARED
        | batch(1, 2, 1, 2048)
        | {
            "base_model": "Qwen/Qwen3-32B",
            "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"],
            "strict": False,
            "chat_template": "qwen3",
            "datasets": [FINETOME],
            "load_in_4bit": True,
            "adapter": "qlora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"],
            "lora_mlp_kernel": True,
            "optimizer": "adamw_torch_4bit",
            "gradient_checkpointing": "offload",
        },
        AS_SHARED
        | AS_FINETOME
        | {"model.quantization": "nf4", "data.chat_template": "qwen3", "lora.rank": 16, "lora.dropout": 0.0},
    ),
    "archived/qwen/qwen2-moe-qlora": (
        QLORA
        | alpaca("mhenrichsen/alpaca_2k_test")
        | batch(1, 4, 4, 1024)
        | {"base_model": "Qwen/Qwen1.5-MoE-A2.7B", "trust_remote_code": True, "optimizer": "paged_adamw_8bit"},
        AS_QLORA | {"train.optim": "paged_adamw_8bit"},
    ),
    "qwen3.5/35b-a3b-moe-qlora": (
        SHARED
        | batch(4, 2, 1, 2048)
        | {
            "base_model": "Qwen/Qwen3.5-35B-A3B-Base",
            "use_kernels": True,
            "use_scattermoe": True,
            "liger_rope": True,
            "liger_rms_norm_gated": True,
            "torch_compile": False,
            "chat_template": "qwen3_5",
            "datasets": [FINETOME],
            "load_in_4bit": True,
            "quantize_moe_experts": True,
            "adapter": "qlora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "activation_offloading": True,
            "optimizer": "adamw_torch_8bit",
        },
        AS_SHARED | AS_FINETOME | as_batch(4, 2, 1, 2048) | {"lora.rank": 16, "data.chat_template": None},
    ),
    "mistral/lora": (
        INT8
        | alpaca("mhenrichsen/alpaca_2k_test")
        | batch(2, 4, 1, 8192)
        | {
            "base_model": "mistralai/Mistral-7B-v0.1",
            "model_type": "MistralForCausalLM",
            "dataset_prepared_path": "last_run_prepared",
            "val_set_size": 0.1,
            "lora_target_modules": SEVEN,
            "optimizer": "adamw_bnb_8bit",
        },
        AS_QLORA | {"model.quantization": "int8", "data.max_seq_length": 8192},
    ),
    "mistral/mixtral/mixtral": (
        QLORA
        | CLASSES
        | alpaca("tatsu-lab/alpaca")
        | batch(1, 2, 1, 4096)
        | {
            "base_model": "mistralai/Mixtral-8x7B-v0.1",
            "model_config": {"output_router_logits": True},
            "deepspeed": "deepspeed_configs/zero2.json",
            "optimizer": "adamw_bnb_8bit",
        },
        AS_QLORA | as_batch(1, 2, 1, 4096),
    ),
    "gemma2/qlora": (
        QLORA
        | CLASSES
        | batch(1, 4, 4, 2048)
        | {
            "base_model": "google/gemma-2-9b",
            "chat_template": "gemma",
            "eot_tokens": ["<end_of_turn>"],
            "datasets": [ORCA | {"drop_system_message": True}],
            "optimizer": "adamw_bnb_8bit",
        },
        AS_QLORA
        | {
            "data.chat_template": "gemma",
            "data.train_file": "cgato/SlimOrcaDedupCleaned",
            "data.columns": {"messages": "conversations"},
        },
    ),
    "gemma3/gemma-3-4b-vision-qlora": (
        QLORA
        | batch(2, 4, 1, 2048)
        | {
            "base_model": "google/gemma-3-4b-it",
            "processor_type": "AutoProcessor",
            "skip_prepare_dataset": True,
            "remove_unused_columns": False,
            "chat_template": "gemma3",
            "datasets": [
                {"path": "HuggingFaceH4/llava-instruct-mix-vsft", "type": "chat_template", "split": "train[:1%]"}
            ],
            "lora_target_linear": False,
            "lora_target_modules": r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
            "val_set_size": 0.01,
        },
        AS_QLORA
        | {
            "lora.target_modules": r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
            "data.eval_fraction": 0.01,
        },
    ),
    "phi/lora-3.5": (
        {key: value for key, value in INT8.items() if key != "attn_implementation"}
        | batch(4, 4, 2, 4096)
        | {
            "base_model": "microsoft/Phi-3.5-mini-instruct",
            "chat_template": "phi_3",
            "datasets": [{"path": "fozziethebeat/alpaca_messages_2k_test", "type": "chat_template"}],
            "val_set_size": 0.05,
            "bfloat16": True,
            "bf16": True,
            "saves_per_epoch": 4,
        },
        AS_QLORA
        | as_batch(4, 4, 2, 4096)
        | {
            "model.quantization": "int8",
            "data.chat_template": "phi3",
            "train.bf16": True,
            "model.attn_implementation": "sdpa",
        },
    ),
    "phi/phi-qlora": (
        QLORA
        | alpaca("garage-bAInd/Open-Platypus")
        | batch(2, 1, 4, 2048)
        | {
            "base_model": "microsoft/phi-1_5",
            "lora_r": 64,
            "lora_alpha": 32,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-05,
            "max_grad_norm": 1.0,
            "learning_rate": 3e-06,
            "weight_decay": 0.1,
            "resize_token_embeddings_to_32x": True,
        },
        AS_QLORA
        | {
            "lora.rank": 64,
            "lora.alpha": 32,
            "train.learning_rate": 3e-6,
            "train.adam_beta2": 0.95,
            "train.adam_epsilon": 1e-5,
            "train.weight_decay": 0.1,
        },
    ),
    "deepseek-v2/qlora-fsdp-2_5": (
        QLORA
        | FSDP
        | batch(8, 1, 1, 4096)
        | {
            "base_model": "axolotl-quants/DeepSeek-V2.5-bnb-nf4-bf16",
            "chat_template": "deepseek_v2",
            "datasets": [FINETOME],
            "lora_r": 256,
            "lora_alpha": 256,
            "peft_use_rslora": True,
            "learning_rate": "2e-5",
            "evals_per_epoch": 2,
        },
        AS_QLORA
        | AS_FINETOME
        | {"lora.rank": 256, "lora.alpha": 256, "lora.use_rslora": True, "train.learning_rate": 2e-5},
    ),
    "deepseek-v4/v4-flash-nvfp4-lora": (
        SHARED
        | alpaca("tatsu-lab/alpaca")
        | batch(1, 1, 1, 4096)
        | {
            "base_model": "nvidia/DeepSeek-V4-Flash-NVFP4",
            "attn_implementation": "eager",
            "use_dsv4_kernels": True,
            "dsv4_fp4_grouped_mode": "nvfp4",
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "learning_rate": 0.0001,
        },
        # transformers' constant schedule passes over a warmup
        AS_SHARED
        | {
            "train.learning_rate": 1e-4,
            "train.lr_scheduler_type": "constant",
            "train.warmup_steps": 0,
            "train.warmup_ratio": None,
            "lora.target_modules": "auto",
            "model.attn_implementation": "eager",
        },
    ),
    "falcon-h1/falcon-h1-1b-qlora": (
        QLORA
        | CLASSES
        | batch(1, 4, 4, 2048)
        | {
            "base_model": "tiiuae/Falcon-H1-1.5B-Base",
            "chat_template": "falcon_h1",
            "datasets": [ORCA],
            "lora_target_linear": False,
            "lora_target_modules": ["q_proj", "in_proj", "down_proj"],
            "sample_packing": False,
        },
        AS_QLORA | {"lora.target_modules": ["q_proj", "in_proj", "down_proj"]},
    ),
    "jamba/qlora_fsdp_large": (
        QLORA
        | FSDP
        | batch(1, 4, 2, 2048)
        | {
            "base_model": "ai21labs/AI21-Jamba-1.5-Large",
            "use_tensorboard": True,
            "chat_template": "jamba",
            "datasets": [ORCA | {"drop_system_message": True}],
            "learning_rate": 1e-05,
        },
        AS_QLORA | {"train.report_to": ["tensorboard"], "train.learning_rate": 1e-5},
    ),
    "swanlab/lora-swanlab-profiling": (
        LORA
        | alpaca("teknium/GPT4-LLM-Cleaned")
        | batch(2, 2, 1, 2048)
        | {
            "base_model": "NousResearch/Llama-3.2-1B",
            "plugins": ["axolotl.integrations.swanlab.SwanLabPlugin"],
            "use_swanlab": True,
            "swanlab_project": "lora-profiling",
            "swanlab_experiment_name": "llama-3.2-1b-profiling-demo",
            "swanlab_mode": "cloud",
        },
        AS_SHARED | {"train.report_to": ["swanlab"], "train.tracker_project": "lora-profiling"},
    ),
    "archived/falcon/config-7b-lora": (
        INT8
        | alpaca("teknium/GPT4-LLM-Cleaned", "alpaca:chat")
        | {
            "base_model": "tiiuae/falcon-7b",
            "gptq": False,
            "batch_size": 2,
            "micro_batch_size": 1,
            "num_epochs": 4,
            "sequence_len": 2048,
            "attn_implementation": "xformers",
            "learning_rate": 3e-05,
        },
        AS_QLORA
        | as_batch(1, 2, 4, 2048)
        | {
            "model.quantization": "int8",
            "model.attn_implementation": "sdpa",
            "data.train_file": "teknium/GPT4-LLM-Cleaned",
            "train.learning_rate": 3e-5,
        },
    ),
    "llama-2/relora": (
        QLORA
        | alpaca("teknium/GPT4-LLM-Cleaned")
        | {
            "base_model": "NousResearch/Llama-2-7b-hf",
            "relora": True,
            "relora_prune_ratio": 0.9,
            "jagged_restart_steps": 150,
            "jagged_restart_warmup_steps": 10,
        },
        AS_QLORA | {"train.num_train_epochs": 1, "data.max_seq_length": 512},
    ),
}
FULL = SHARED | CLASSES | alpaca("tatsu-lab/alpaca") | batch(2, 4, 1, 4096)
# name -> (the file, why it is refused)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama-3/fft-8b-liger-fsdp": (
        FULL | FSDP | {"base_model": "NousResearch/Meta-Llama-3.1-8B", "liger_rope": True},
        "adapter: None; adapters",
    ),
    "streaming/sft": (
        FULL
        | {
            "base_model": "HuggingFaceTB/SmolLM2-135M",
            "streaming": True,
            "streaming_multipack_buffer_size": 10000,
            "max_steps": 1000,
            "save_strategy": "steps",
            "save_steps": 100,
        },
        "adapter: None; adapters",
    ),
    "mistral/dpo/mistral-dpo-qlora": (
        QLORA
        | {
            "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
            "rl": "dpo",
            "datasets": [{"path": "olivermolenschot/alpaca_messages_dpo_test", "type": "chat_template.default"}],
        },
        "rl: dpo; fine-tuning on chats",
    ),
    "llama-3/qlora-1b-kto": (
        QLORA
        | alpaca("argilla/ultrafeedback-binarized-preferences-cleaned-kto", "llama3.ultra")
        | {
            "base_model": "meta-llama/Llama-3.2-1B",
            "rl": "kto",
            "rl_beta": 0.5,
            "kto_desirable_weight": 0.2,
        },
        "rl: kto",
    ),
    "qwen2/reward-model": (
        FULL | {"base_model": "Qwen/Qwen2.5-0.5B", "reward_model": True, "num_labels": 1},
        "reward_model: fine-tuning on chats",
    ),
    "llama-2/gptq-lora": (
        LORA
        | alpaca("mhenrichsen/alpaca_2k_test")
        | {"base_model": "TheBloke/Llama-2-7B-GPTQ", "gptq": True, "gptq_disable_exllama": True},
        "gptq: true",
    ),
    "gpt-oss/gpt-oss-20b-sft-lora-singlegpu": (
        LORA
        | {
            "base_model": "openai/gpt-oss-20b",
            "model_quantization_config": "Mxfp4Config",
            "model_quantization_config_kwargs": {"dequantize": True},
            "datasets": [
                {
                    "path": "HuggingFaceH4/Multilingual-Thinking",
                    "type": "chat_template",
                    "field_thinking": "thinking",
                    "template_thinking_key": "thinking",
                }
            ],
        },
        "model_quantization_config",
    ),
    "llama-3/diffusion/pretrain-1b": (
        FULL
        | {
            "base_model": "meta-llama/Llama-3.2-1B",
            "pretraining_dataset": [{"path": "wikitext"}],
            "diffusion": {"noise_schedule": "cosine", "min_mask_ratio": 0.15},
        },
        "pretraining_dataset: text without chats",
    ),
}


@pytest.mark.parametrize("name", MIGRATED)
def test_an_example_migrates_and_every_key_is_known(tmp_path: Path, name: str) -> None:
    values, expected = MIGRATED[name]
    assert migrates(write(tmp_path, values), expected).tool == "Axolotl 0.19"


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_that_is_no_training_of_an_adapter_says_so(tmp_path: Path, name: str) -> None:
    values, reason = REFUSED[name]
    path = write(tmp_path, values)
    all_known(path)
    is_refused(path, reason)


def test_a_key_that_the_example_misspells_is_unknown(tmp_path: Path) -> None:
    """`context_parapllel_size` in falcon-h1/falcon-h1-1b-qlora-cp, `adam_eps` in llama-2/gptq-lora."""
    values = MIGRATED["llama-3/qlora"][0] | {"context_parapllel_size": 2, "adam_eps": 1e-5}
    translation = read_translation(write(tmp_path, values))
    assert translation is not None
    assert [reading.key for reading in translation.of("unknown")] == ["context_parapllel_size", "adam_eps"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"cosine_min_lr_ratio": 0.1},
            {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ({"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}, {"train.lr_scheduler_type": "linear"}),
        (
            {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8},
            {"train.lr_scheduler_type": "cosine", "train.lr_scheduler_kwargs": {}},
        ),
        ({"warmup_steps": 0.1, "warmup_ratio": None}, {"train.warmup_ratio": 0.1}),
        ({"wandb_project": "slips"}, {"train.report_to": ["wandb"], "train.tracker_project": "slips"}),
        ({"wandb_project": None, "use_mlflow": True}, {"train.report_to": ["mlflow"]}),
        (
            {"gradient_checkpointing": None, "fsdp_config": {"activation_checkpointing": True}},
            {"train.gradient_checkpointing": True},
        ),
        (
            {"datasets": [{"path": "a.jsonl", "type": "chat_template", "roles": {"user": ["customer", "user"]}}]},
            {"data.roles": {"customer": "user"}},
        ),
        (
            {"datasets": [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "alpaca"}]},
            {"data.train_files": ["a.jsonl", "b.jsonl"]},
        ),
        ({"peft_trainable_token_indices": [4, 5]}, {"lora.trainable_token_indices": [4, 5]}),
    ],
)
def test_what_lora_core_has_by_another_name(tmp_path: Path, values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = load_config(write(tmp_path, MIGRATED["llama-3/qlora"][0] | values)).to_dict()
    assert {key: config[key.split(".")[0]][key.split(".")[1]] for key in expected} == expected


def test_a_file_of_a_dataset_on_the_hub_is_not_taken_for_one_here(tmp_path: Path) -> None:
    rows = {"path": "timdettmers/openassistant-guanaco", "data_files": ["best.jsonl"], "type": "completion"}
    translation = read_translation(write(tmp_path, MIGRATED["llama-3/qlora"][0] | {"datasets": [rows]}))
    assert translation is not None
    assert "single files of 'timdettmers/openassistant-guanaco' cannot be named here" in str(translation)


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (ORCA | {"drop_system_message": True}, "drop_system_message=true"),
        ({"path": "a.jsonl", "message_property_mappings": {"role": "speaker", "content": "value"}}, "role=speaker"),
        ({"path": "a.jsonl", "roles_to_train": ["user"]}, "roles_to_train="),
        ({"path": "a.jsonl", "shards": 10}, "shards=10"),
        (FINETOME | {"roles_to_train": ["assistant"], "train_on_eos": "turn", "field_thinking": "thinking"}, None),
    ],
)
def test_keys_inside_a_dataset_are_accounted_for(dataset: dict[str, Any], said: str | None) -> None:
    remarks = translate("f", AXOLOTL, {"datasets": Setting([dataset], "f:1")}).remarks
    inside = [remark for remark in remarks if remark.startswith("datasets: of ")]
    assert len(inside) == (said is not None)
    assert said is None or said in inside[0]


@pytest.mark.parametrize("datasets", [None, "a.jsonl", ["a.jsonl"], [{"path": 3}], [{"path": "a", "type": ["x"]}], {}])
def test_datasets_of_any_shape_are_read_without_a_traceback(datasets: Any) -> None:
    said = translate("f", AXOLOTL, {"datasets": Setting(datasets, "f:1")})
    assert [reading.outcome for reading in said.readings] == ["not offered"]
