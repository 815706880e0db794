"""Sample replies: what the model answers before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.encoding.forms import render_prompt
from lora_core.errors import DataError
from lora_core.rows.messages import Conversation, Message, parse_json_row, shape_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def sample_reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any,
    max_new_tokens: int,
) -> str:
    """The model's greedy reply to messages that end with a user's turn."""
    was_training = model.training
    model.eval()
    text = render_prompt(tokenizer, Conversation(list(messages), tools))
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        pad_token_id=pad_token_id,
    )
    model.train(was_training)
    reply = str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return reply.strip()


def sample_prompts(config: RunConfig, train_data: EncodedFile, eval_data: EncodedFile | None) -> list[dict[str, Any]]:
    """The first examples of the eval set that ask something, up to their first assistant turn; without an eval set,
    of the training rows.

    Returns:
        Of each: messages, tools, expected (the example's own assistant turn), from ("eval" or "train"), line.
    """
    if config.train.num_sample_replies == 0:
        return []
    source, data = ("train", train_data) if eval_data is None else ("eval", eval_data)
    wanted = [*dict.fromkeys(int(line) for line in data.dataset[: 4 * config.train.num_sample_replies]["line"])]
    by_line = _lines(data.places.path, set(wanted))
    prompts: list[dict[str, Any]] = []
    for line in wanted:
        conversation = parse_json_row(by_line[line], shape_of(config.data))
        if conversation.text is not None:  # it asks nothing
            continue
        first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
        messages, expected = conversation.messages[:first], _expected(conversation.messages[first])
        if messages and messages[-1]["role"] == "user" and len(prompts) < config.train.num_sample_replies:
            whence = {"expected": expected, "from": source, "line": data.places.mark(line)}
            prompts.append({"messages": messages, "tools": conversation.tools, **whence})
    return prompts


def _expected(message: Message) -> str:
    """What the example says in place of the reply: its text, and its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(filter(None, [message["content"], *calls]))


def _lines(path: Path, wanted: set[int]) -> dict[int, str]:
    """The lines with these 1-based numbers."""
    found: dict[int, str] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number in wanted:
                found[number] = raw.decode("utf-8-sig")
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        raise DataError(f"{path}: changed while the run was starting; fix: start the run again")
    return found


def reply_to_all(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    max_new_tokens: int,
) -> list[str]:
    """Every rank answers its share; all get all answers, in order."""
    from accelerate.utils import gather_object

    if not prompts:
        return []
    adapted = accelerator.unwrap_model(model).model
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    # Generation takes a token at a time and grows a cache: train.torch_compile would compile for that anew.
    with accelerator.autocast(), accelerator.unwrap_model(model).autocast(), torch.compiler.set_stance("force_eager"):
        replies = [
            (i, sample_reply(adapted, tokenizer, prompts[i]["messages"], prompts[i]["tools"], max_new_tokens))
            for i in mine
        ]
    return [reply for _, reply in sorted(gather_object(replies))]
