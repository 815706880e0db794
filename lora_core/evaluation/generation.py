"""A model's reply to messages: the prompt as the template writes it, and generation that ends where training ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.encoding.prompts import render_prompt, tokens_to_stop_at
from lora_core.errors import TrainingError
from lora_core.model.attention import causal_lm_of
from lora_core.model.decoder import own_positions, padding_masked
from lora_core.model.loss import CausalLMLoss
from lora_core.rows.messages import Conversation
from lora_core.runtime.faults import is_of_the_machine

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

    Raises:
        TrainingError: the model's own code does not generate.
    """
    streamer = None if on_text is None else _streamer(tokenizer, on_text)
    (new,) = _generate(model, tokenizer, [prompt], max_new_tokens, temperature, synced_gpus=in_step, streamer=streamer)
    return new


def generate_replies(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[Reply]:
    """As `generate_reply`, all at once: each is what it is alone, up to rounding.

    Args:
        model: one whose attention `takes_padding`, if there are several prompts.
        prompts: each (1, T), of any lengths.

    Raises:
        TrainingError: as `generate_reply`.
    """
    with padding_masked(_inner(model)) if len(prompts) > 1 else nullcontext():
        return _generate(model, tokenizer, prompts, max_new_tokens, temperature)


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    temperature: float,
    **how: Any,
) -> list[Reply]:
    was_training = model.training
    model.eval()
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids, attention_mask = _padded_on_the_left(prompts, 0 if pad is None else pad)
    device = next(model.parameters()).device
    positions = own_positions(_inner(model), input_ids) if len(prompts) == 1 else None
    how |= {} if positions is None else {"position_ids": positions.to(device)}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    drawn = {"do_sample": True, "temperature": temperature}
    try:
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=pad,
            **(drawn if temperature > 0 else greedy),
            **how,
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # Some families' caches do not suit all that their configs allow.
        if isinstance(error, RuntimeError) and is_of_the_machine(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise TrainingError(
            f"{type(causal_lm_of(_inner(model))).__name__} does not generate with this version of transformers "
            f"({type(error).__name__}: {reason}); fix: train.num_sample_replies=0, and no replies"
        ) from error
    finally:  # a reply can be interrupted
        model.train(was_training)
    return [_reply(tokenizer, new, stops) for new in output[:, input_ids.shape[1] :].tolist()]


def _padded_on_the_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """(1, T) each -> ids (B, longest T) and their mask, in which 1 is a token of a prompt."""
    longest = max(prompt.shape[1] for prompt in prompts)
    room = [longest - prompt.shape[1] for prompt in prompts]
    ids = [nn.functional.pad(prompt, (n, 0), value=pad) for prompt, n in zip(prompts, room, strict=True)]
    mask = [nn.functional.pad(torch.ones_like(prompt), (n, 0)) for prompt, n in zip(prompts, room, strict=True)]
    return torch.cat(ids), torch.cat(mask)


def _reply(tokenizer: PreTrainedTokenizerBase, new: list[int], stops: list[int]) -> Reply:
    """Tokens after a prompt, up to the first that ends a reply; what follows waited for the other replies."""
    end = next((place for place, token in enumerate(new, start=1) if token in stops), None)
    text = str(tokenizer.decode(new[:end], skip_special_tokens=True)).strip()
    return Reply(text, len(new[:end]), end is not None)


def _inner(model: Any) -> Any:
    return model.model if isinstance(model, CausalLMLoss) else model


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that generation stops at, sorted: the model's own, and those that trained replies end with, which are the
    tokenizer's EOS, those of the base model's generation config, and the ones that the template puts after replies.

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
    """
    own = causal_lm_of(_inner(model)).generation_config.eos_token_id
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
