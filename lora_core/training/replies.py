"""Sample replies: what the model answers before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.encoding.forms import render_prompt
from lora_core.errors import DataError
from lora_core.rows.messages import Conversation, Message, parse_json_row, shape_of
from lora_core.runtime.ranks import gather_from_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    ended: bool
    """It came to its end, and was not cut off after so many tokens."""


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


@torch.no_grad()
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
    was_training = model.training
    model.eval()
    text = render_prompt(tokenizer, Conversation(list(messages), tools))
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(next(model.parameters()).device)
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
        synced_gpus=in_step,
    )
    model.train(was_training)
    tokens = output[0, prompt["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    ended = bool(tokens) and tokens[-1] in ([stops] if isinstance(stops, int) else stops or [])
    return Reply(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(), ended)


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


def describe_reply(prompt: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """For metrics.jsonl: what was asked, and what was answered."""
    return {"prompt": prompt["messages"][-1]["content"], "reply": reply.text, "ended": reply.ended}


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
