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
from lora_core.errors import DataError
from lora_core.evaluation.generation import Reply, encode_prompt, generate_reply
from lora_core.rows.messages import Conversation, Message, parse_json_row, shape_of
from lora_core.runtime.ranks import gather_from_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


def sample_reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any,
    max_new_tokens: int,
    in_step: bool = False,
) -> str:
    """The text of `greedy_reply`."""
    return greedy_reply(model, tokenizer, messages, tools, max_new_tokens, in_step).text


def greedy_reply(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any,
    max_new_tokens: int,
    in_step: bool = False,
) -> Reply:
    """The model's greedy reply to messages that end with a user's turn.

    Args:
        model: with `generate`, such as transformers' own or a `CausalLMLoss`.
        in_step: all ranks answer, and none stops before the others: each token needs weights of all.
    """
    prompt = encode_prompt(tokenizer, Conversation(list(messages), tools))
    return generate_reply(model, tokenizer, prompt, max_new_tokens, in_step=in_step)


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
    by_line = lines_by_number(data.places.path, set(wanted))
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


def lines_by_number(path: Path, wanted: set[int]) -> dict[int, str]:
    """The lines with these 1-based numbers.

    Raises:
        DataError: there are fewer lines, so the file is another one by now.
    """
    found: dict[int, str] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number in wanted:
                found[number] = raw.decode("utf-8-sig")
                if len(found) == len(wanted):
                    break
    if len(found) < len(wanted):
        raise DataError(f"{path}: changed since its rows were encoded; fix: start again")
    return found


def describe_reply(prompt: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """For metrics.jsonl: what was asked, and what was answered."""
    return {"prompt": prompt["messages"][-1]["content"], "reply": reply.text, "ended": reply.is_whole}


def reply_to_all(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, Any]],
    max_new_tokens: int,
) -> list[Reply]:
    """Every rank answers its share; all get all answers, in order. Under FSDP all ranks answer all, together."""
    if not prompts:
        return []
    sharded = accelerator.is_fsdp2
    unwrapped = accelerator.unwrap_model(model)
    mine = range(len(prompts)) if sharded else range(accelerator.process_index, len(prompts), accelerator.num_processes)
    # Generation takes a token at a time and grows a cache: train.torch_compile would compile for that anew.
    with accelerator.autocast(), accelerator.unwrap_model(model).autocast(), torch.compiler.set_stance("force_eager"):
        replies = [
            (i, greedy_reply(unwrapped, tokenizer, asked["messages"], asked["tools"], max_new_tokens, sharded))
            for i, asked in ((i, prompts[i]) for i in mine)
        ]
    if not sharded:
        replies = [each for of_rank in gather_from_ranks(replies) for each in of_rank]
    return [reply for _, reply in sorted(replies, key=lambda numbered: numbered[0])]
