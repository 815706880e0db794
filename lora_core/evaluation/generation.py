"""A model's reply to messages: the prompt as the template writes it, and generation that ends where training ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.encoding.prompts import render_prompt, tokens_to_stop_at
from lora_core.model.attention import causal_lm_of
from lora_core.model.loss import CausalLMLoss
from lora_core.rows.messages import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    """Without special tokens, and without white space around it."""
    num_tokens: int
    """The token that ends it is one of them."""
    is_whole: bool
    """It ended by itself; False where the limit of new tokens ended it."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, asked: Conversation) -> Tensor:
    """Messages and the generation prompt -> token ids of shape (1, T).

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
        ChatTemplateError: it refuses the messages.
    """
    text = render_prompt(tokenizer, asked)
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def generate_reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
    in_step: bool = False,
) -> Reply:
    """Continue a prompt up to a token that a trained reply ends with. Leaves the model's mode as it was.

    Args:
        model: with `generate`, such as transformers' own or a `CausalLMLoss`.
        prompt: (1, T), as `encode_prompt` makes it.
        temperature: 0 is greedy: always the most likely token. Above it, tokens are drawn; top_k and the like are those
            of the model's generation config.
        on_text: called with each piece of the reply as soon as it is there; the pieces are the reply, with the white
            space around it.
        in_step: all ranks answer, and none stops before the others: each token needs weights of all.
    """
    was_training = model.training
    model.eval()
    prompt = prompt.to(next(model.parameters()).device)
    stops = stop_ids(model, tokenizer)
    how = {"do_sample": True, "temperature": temperature}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    try:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            synced_gpus=in_step,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
            **(how if temperature > 0 else greedy),
        )
    finally:  # a reply can be interrupted
        model.train(was_training)
    new = output[0, prompt.shape[1] :].tolist()
    text = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return Reply(text, len(new), bool(new) and new[-1] in stops)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that generation stops at, sorted: the model's own, and those that trained replies end with, which are the
    tokenizer's EOS, those of the base model's generation config, and the ones that the template puts after replies.

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
    """
    inner = model.model if isinstance(model, CausalLMLoss) else model
    own = causal_lm_of(inner).generation_config.eos_token_id
    ids = {own} if isinstance(own, int) else set(own or ())
    for token in tokens_to_stop_at(tokenizer):
        number = tokenizer.convert_tokens_to_ids(token)
        # What the vocabulary lacks has the id of the unknown token, which is some tokenizers' EOS.
        if isinstance(number, int) and (number != tokenizer.unk_token_id or token == tokenizer.unk_token):
            ids.add(number)
    return sorted(ids)


def longest_context(model: Any) -> int | None:
    """Tokens that the model takes, prompt and reply together; None if its config does not say."""
    config = causal_lm_of(model).config.get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> TextStreamer:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        """transformers' streamer, which knows when a piece is whole, with another place to write to."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
