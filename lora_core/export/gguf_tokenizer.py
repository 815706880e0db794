"""A byte-level BPE tokenizer in a GGUF file: tokens, merges, how text is split first, and where generation ends."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before merging -> what llama.cpp calls it (tokenizer.ggml.pre). It knows no others by pattern.
_SPLITS = {rf"{_CONTRACTIONS}|\p{{N}}{_REST}": "qwen2", rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe"}


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: list[int]) -> None:
    """Add a tokenizer to a `gguf.GGUFWriter`.

    Args:
        vocab_size: rows of the embedding; those without a token are called unused.
        stop_ids: after which generation ends; the tokenizer's EOS if there are none.

    Raises:
        ConfigError: it is no byte-level BPE, or splits text in a way that llama.cpp has no name for.
    """
    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, name = backend["model"]["type"], tokenizer.name_or_path
    if kind != "BPE" or backend["model"].get("byte_fallback"):
        raise ConfigError(
            f"{name}: its tokenizer is no byte-level BPE; fix: install llama.cpp and set LLAMA_CPP to its folder"
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = added.content
        types[index] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend["pre_tokenizer"], name))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = backend["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    eos = stop_ids[0] if stop_ids else tokenizer.eos_token_id
    if tokenizer.eos_token_id in stop_ids:
        eos = tokenizer.eos_token_id
    special: tuple[tuple[int | None, Any], ...] = (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (eos, writer.add_eos_token_id),
        (next((each for each in stop_ids if each != eos), None), writer.add_eot_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    )
    for special_id, add in special:
        if special_id is not None:
            add(special_id)
    begins = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(written: dict[str, Any] | None, name: str) -> str:
    """What llama.cpp calls the way in which text is split before merging.

    Args:
        written: as in tokenizer.json.

    Raises:
        ConfigError: it has no name for it, so that the model would see other tokens than it was trained on.
    """
    steps = (written or {}).get("pretokenizers") or [written or {}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        found = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if found is not None:
            return found
    raise ConfigError(
        f"{name}: llama.cpp has no name here for how its tokenizer splits text ({', '.join(map(str, kinds))}); fix: "
        "install llama.cpp and set LLAMA_CPP to its folder"
    )
