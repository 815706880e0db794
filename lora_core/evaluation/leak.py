"""Does the prompt hold the reply? Looked for before the first step, in a few examples, by text and by loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from lora_core.data.counts import EncodedFile
from lora_core.data.packing import Batching, collate, collate_packed, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 8
_SHORTEST = 16
"""Characters: a shorter reply, such as a label, stands in its prompt by good right."""


@dataclass(frozen=True)
class LeakSeen:
    """Examples whose last reply stands, word for word, in what comes before it."""

    num_examples: int
    """That were looked at: with a reply that is long enough."""
    num_verbatim: int
    loss: float
    """Mean over the tokens of their last replies."""
    exchanged_loss: float
    """The same, each reply after the prompt of another example."""


@dataclass(frozen=True)
class _Example:
    prompt: list[int]
    reply: list[int]

    def is_verbatim(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        said = _text(tokenizer, self.reply)
        return said in _text(tokenizer, self.prompt)


def look_for_leak(
    accelerator: Accelerator,
    model: nn.Module,
    data: EncodedFile,
    tokenizer: PreTrainedTokenizerBase,
    batching: Batching,
) -> LeakSeen | None:
    """Compare the loss of replies after their own prompts with that after other examples' prompts.

    The model is asked only where the replies stand in their prompts, so that other runs pay nothing. None where they do
    not, or where there are no two examples with different replies to exchange. Every rank looks at the same examples.
    """
    chosen = np.unique(np.linspace(0, len(data.lengths) - 1, _EXAMPLES).astype(int))
    rows = [data.dataset[int(index)] for index in chosen]
    split = [_last_reply(row["input_ids"], row["loss_mask"]) for row in rows]
    examples = [each for each in split if len(_text(tokenizer, each.reply)) >= _SHORTEST]
    verbatim = [each for each in examples if each.is_verbatim(tokenizer)]
    exchanged = _exchanged(verbatim)
    if 2 * len(verbatim) < len(examples) or not exchanged:
        return None
    losses = [_mean_loss(accelerator, model, pairs, batching) for pairs in (verbatim, exchanged)]
    return LeakSeen(len(examples), len(verbatim), *losses)


def _last_reply(ids: Sequence[int], mask: Sequence[bool]) -> _Example:
    """The last run of loss tokens, and all that comes before it."""
    end = max(index for index, is_loss in enumerate(mask) if is_loss) + 1
    start = end
    while start > 0 and mask[start - 1]:
        start -= 1
    return _Example([*ids[:start]], [*ids[start:end]])


def _exchanged(examples: Sequence[_Example]) -> list[_Example]:
    """Each reply after the prompt of the next example with another reply; empty where all replies are the same.

    Of a long prompt the end, so that none is longer than the longest example, which the model takes.
    """
    pairs = []
    longest = max((len(each.prompt) + len(each.reply) for each in examples), default=0)
    for index, example in enumerate(examples):
        others = [*examples[index + 1 :], *examples[:index]]
        other = next((each for each in others if each.reply != example.reply), None)
        if other is not None:
            room = longest - len(example.reply)
            pairs.append(_Example(other.prompt[max(0, len(other.prompt) - room) :], example.reply))
    return pairs


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@torch.no_grad()
def _mean_loss(accelerator: Accelerator, model: nn.Module, examples: Sequence[_Example], batching: Batching) -> float:
    """Cross-entropy per token of the replies, an example at a time. Leaves the model's mode as it was."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for example in examples:
        row: dict[str, Any] = {
            "input_ids": example.prompt + example.reply,
            "loss_mask": [False] * len(example.prompt) + [True] * len(example.reply),
            "loss_weights": [],
        }
        batch = collate([row], batching.pad_token_id) if batching.max_tokens is None else collate_packed([row])
        total += float(model(**to_device(batch, accelerator.device)).loss_sum)
        tokens += len(example.reply)
    model.train(was_training)
    return total / tokens
