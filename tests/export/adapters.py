"""Adapters of each kind that PEFT has, random and large enough to be seen, on small random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedTokenizerFast

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "rsLoRA, patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both trained whole, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}
# Those after which embedding and head differ.
UNTIED = ("head trained whole", "embedding trained whole", "embedding")


def save_base(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_adapter(base: Any, folder: Path, size: float = 0.05, **settings: Any) -> Any:
    """Saved into `folder`; returns the model with it, in evaluation mode."""
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return adapted.eval()
