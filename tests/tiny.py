"""Small real things to train with: a byte-level BPE tokenizer trained here, a random Qwen2, rows of a few words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str = CHATML, pad_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Pad is EOS unless asked otherwise, as in SmolLM2: the case that unlearns EOS when done wrong."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rows = (ROOT / "benchmarks/diagnosis_train.jsonl").read_text(encoding="utf-8").splitlines()
    backend.train_from_iterator(rows, trainer)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<turn>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad_token)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(vocab_size: int, seed: int = 0, num_layers: int = 2) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=64,  # NF4 packs blocks of 64
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def save_tiny_model(folder: Path, tokenizer: PreTrainedTokenizerFast, num_layers: int = 2) -> None:
    """As a folder that `model.name_or_path` can name."""
    make_model(len(tokenizer), num_layers=num_layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat(*contents: str) -> dict[str, Any]:
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run_settings(folder: Path, model_dir: Path, rows: Path, eval_rows: Path | None = None) -> list[str]:
    """Overrides that every run on a few rows needs: what it reads, and where it writes, in `folder`."""
    return [
        f"model.name_or_path={model_dir}",
        f"data.train_file={rows}",
        f"data.eval_file={eval_rows or rows}",
        f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
    ]
