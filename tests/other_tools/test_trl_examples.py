"""TRL's own examples, as keys and values: each migrates, or says why it does not.

What the commands and files in TRL's repository and documentation set, written down here by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_core.configuration import load_config
from tests.other_tools.examples import is_refused, migrates, write

CAPYBARA = {
    "model_name_or_path": "Qwen/Qwen2-0.5B",
    "dataset_name": "trl-lib/Capybara",
    "num_train_epochs": 1,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "output_dir": "Qwen2-0.5B-SFT",
    "push_to_hub": True,
}
LORA = CAPYBARA | {"learning_rate": 2.0e-4, "use_peft": True, "lora_r": 32, "lora_alpha": 16}
NO_REGRET = {
    "model_name_or_path": "Qwen/Qwen2.5-3B-Instruct",
    "dataset_name": "open-thoughts/OpenThoughts-114k",
    "learning_rate": 2.0e-5,
    "num_train_epochs": 1,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 16,
    "use_peft": True,
    "lora_r": 256,
    "lora_alpha": 16,
    "lora_target_modules": "all-linear",
    "output_dir": "Qwen2.5-3B-OpenThoughts-LoRA",
    "report_to": "trackio",
    "push_to_hub": True,
}
GPT_OSS = {
    "dtype": "bfloat16",
    "model_name_or_path": "openai/gpt-oss-20b",
    "packing": True,
    "packing_strategy": "wrapped",
    "run_name": "20b-lora-eager",
    "attn_implementation": "eager",
    "dataset_num_proc": 12,
    "dataset_name": "HuggingFaceH4/Multilingual-Thinking",
    "gradient_checkpointing": True,
    "max_length": 4096,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "output_dir": "gpt-oss-20b-multilingual-reasoner",
    "report_to": "trackio",
    "seed": 42,
    "use_peft": True,
}
SFT_ONLY = "that is full fine-tuning"
OTHER_TRAINER = "preference or reinforcement training"

# name -> (the file, keys of ours that come of it)
MIGRATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft.py, LoRA": (LORA, {"lora.rank": 32, "lora.alpha": 16, "train.learning_rate": 2e-4, "train.eval_steps": 100}),
    "sft.py, QLoRA": (
        LORA | {"load_in_4bit": True},
        {"model.quantization": "nf4", "train.gradient_checkpointing": True},
    ),
    "LoRA without regret": (
        NO_REGRET,
        {"lora.rank": 256, "lora.target_modules": "all-linear", "train.report_to": ["trackio"]},
    ),
    "sft_gpt_oss.py with an adapter": (
        GPT_OSS,
        {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    "a mixture of datasets": (
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B",
            "use_peft": True,
            "datasets": [{"path": "stanfordnlp/imdb"}, {"path": "roneneldan/TinyStories", "split": "validation"}],
        },
        {"train.learning_rate": 2e-5},
    ),
    "loss on replies alone": (LORA | {"assistant_only_loss": True}, {"data.train_on": "all_assistant"}),
    "loss on the completion": (LORA | {"completion_only_loss": True}, {"data.train_on": "completion"}),
    "streaming": (
        LORA | {"dataset_streaming": True, "max_steps": 200},
        {"data.streaming": True, "train.max_steps": 200},
    ),
    "rsLoRA with modules": (
        LORA | {"use_rslora": True, "lora_target_modules": ["q_proj", "k_proj"], "lora_modules_to_save": ["lm_head"]},
        {"lora.use_rslora": True, "lora.target_modules": ["q_proj", "k_proj"], "lora.modules_to_save": ["lm_head"]},
    ),
    "NEFTune": (LORA | {"neftune_noise_alpha": 5}, {"train.neftune_noise_alpha": 5}),
    "ranks by pattern": (
        LORA | {"rank_pattern": {"q_proj": 8, "model.layers.0.v_proj": 4}, "alpha_pattern": {"q_proj": 32}},
        {"lora.rank_pattern": {"q_proj": 8, "model.layers.0.v_proj": 4}, "lora.alpha_pattern": {"q_proj": 32}},
    ),
    "thinking off": (
        LORA | {"chat_template_kwargs": {"enable_thinking": False}},
        {"data.chat_template_kwargs": {"enable_thinking": False}},
    ),
}
# name -> (the file, why it is refused)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "example_config.yaml": (
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B",
            "dataset_name": "stanfordnlp/imdb",
            "report_to": "none",
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
        },
        SFT_ONLY,
    ),
    "sft.py, full": (CAPYBARA | {"learning_rate": 2e-5}, SFT_ONLY),
    "dpo.py, LoRA": (LORA | {"beta": 0.1, "dataset_name": "trl-lib/ultrafeedback_binarized"}, OTHER_TRAINER),
    "grpo": (LORA | {"num_generations": 8, "max_prompt_length": 512}, OTHER_TRAINER),
    "ppo": (LORA | {"reward_model_path": "some/reward"}, OTHER_TRAINER),
}


@pytest.mark.parametrize("name", MIGRATED)
def test_an_example_migrates_and_every_key_is_known(tmp_path: Path, name: str) -> None:
    values, expected = MIGRATED[name]
    migrates(write(tmp_path, values), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_an_example_that_is_no_training_of_an_adapter_says_so(tmp_path: Path, name: str) -> None:
    values, reason = REFUSED[name]
    is_refused(write(tmp_path, values), reason)


def test_patterns_and_template_variables_of_axolotl_and_scripts_are_taken(tmp_path: Path) -> None:
    theirs = {
        "base_model": "Qwen/Qwen2.5-3B",
        "adapter": "lora",
        "datasets": [{"path": "chats.jsonl", "type": "chat_template"}],
        "lora_rank_pattern": {"q_proj": 8},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    config = load_config(write(tmp_path, theirs))
    assert (config.lora.rank_pattern, config.data.chat_template_kwargs) == ({"q_proj": 8}, {"enable_thinking": False})
    script = tmp_path / "train.py"
    script.write_text(
        "from peft import LoraConfig\nfrom trl import SFTConfig, SFTTrainer\n"
        "adapter = LoraConfig(r=16, lora_alpha=32, rank_pattern={'q_proj': 8}, alpha_pattern={'q_proj': 16})\n"
        "SFTTrainer('Qwen/Qwen2.5-0.5B', args=SFTConfig(learning_rate=2e-4), peft_config=adapter)\n"
    )
    lora = load_config(script).lora
    assert (lora.rank_pattern, lora.alpha_pattern) == ({"q_proj": 8}, {"q_proj": 16})
