"""Check: the tokens before a trained reply against those that serving puts before it, with thinking on and off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from lora_core.data.counts import EncodedFile
from lora_core.encoding.forms import TemplateForms
from lora_core.encoding.prompts import RowForms
from lora_core.encoding.template import template_limits
from lora_core.errors import ChatTemplateError
from lora_core.preflight.findings import Facts, Finding
from lora_core.rows.messages import Conversation, parse_json_row, shape_of, trained_messages, up_to_reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first so many tell: a template does the same with all rows of a kind.
_ROWS, _REPLIES = 50, 100
_THINKING = "enable_thinking"
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class TrainedReply:
    """A reply of the training set, and what stands before it."""

    before: Conversation
    """The row up to the reply, as a server gets it."""
    ids: Sequence[int]
    """Tokens of the example."""
    start: int
    """Where in `ids` its loss tokens begin; 0 where reasoning, which the model writes itself, is left out of them."""

    def fits(self, prompt: Sequence[int] | None) -> bool:
        """Whether a server's prompt is what was trained: the same tokens, up to the loss tokens or into them.

        Args:
            prompt: None where the template refuses it.
        """
        return prompt is not None and len(prompt) >= self.start and list(prompt) == list(self.ids[: len(prompt)])


def check_serving_prompt(facts: Facts) -> Iterator[Finding]:
    """What stands before the trained replies, token by token, is not what every way of serving puts there.

    A model answers as it was trained where it gets the prompts that it was trained on. A server makes them with
    `apply_chat_template(..., add_generation_prompt=True)`; a template that reads `enable_thinking`, as Qwen3's does,
    makes others with thinking on and off. The first replies of the training set are compared.

    Serve with the setting that is named, such as `chat_template_kwargs={"enable_thinking": false}` in a request.
    """
    replies = [*islice(trained_replies(facts), _REPLIES)]
    if not replies:
        return
    served = {}
    if re.search(rf"\b{_THINKING}\b", _template_text(facts.tokenizer)):
        served = {is_on: served_prompts(facts.tokenizer, replies, {_THINKING: is_on}) for is_on in (True, False)}
    if not served or served[True] == served[False]:
        yield from _without_thinking(facts.tokenizer, replies)
        return
    fitting = {
        is_on: sum(reply.fits(prompt) for reply, prompt in zip(replies, served[is_on], strict=True))
        for is_on in (True, False)
    }
    if fitting[True] == fitting[False] == len(replies):
        yield _finding(
            f"the trained replies hold no reasoning: {_THINKING}=true and false both give the trained prompts, and the "
            f"model learns to leave reasoning empty with either; at serving use {_THINKING}=false",
            0,
        )
        return
    best = fitting[True] >= fitting[False]
    left = len(replies) - fitting[best]
    yield _finding(
        f"at serving use {_THINKING}={_yaml(best)}: its prompts are, token by token, those of {fitting[best]:,} of "
        f"{len(replies):,} trained replies, and of {fitting[not best]:,} with {_THINKING}={_yaml(not best)}"
        + (f"; data.split_turns=true trains the other {left:,} as they are served" if left else ""),
        left,
    )


def _without_thinking(tokenizer: PreTrainedTokenizerBase, replies: Sequence[TrainedReply]) -> Iterator[Finding]:
    """There is one way of serving."""
    prompts = served_prompts(tokenizer, replies, {})
    same = [reply.fits(prompt) for reply, prompt in zip(replies, prompts, strict=True)]
    if not all(same):
        number = same.index(False)
        said = _difference(tokenizer, replies[number], prompts[number])
        yield _finding(
            f"{same.count(False):,} of {len(replies):,} trained prompts are not the tokens that the chat template "
            f"gives at serving (add_generation_prompt=True): {said}",
            same.count(False),
        )


def trained_replies(facts: Facts) -> Iterator[TrainedReply]:
    """Those of the first whole rows of the training set."""
    data, config = facts.train_data, facts.config.data
    if config.train_on == "everything":
        return
    rows = data.rows
    # Text of special tokens is text in training; a server's tokenizer makes tokens of it.
    is_other = (rows.holds_special_text | rows.cut_at_border)[data.indices]
    length = rows.length[data.indices]
    for number, (row, line) in enumerate(_first_rows(data)):
        conversation = up_to_reply(parse_json_row(line, shape_of(config)), row["reply"])
        if conversation.text is not None or is_other[number] or length[number] > len(row["input_ids"]):
            continue
        trained = trained_messages(conversation, config.train_on)
        starts = [0] * len(trained) if config.mask_reasoning else _starts_of_runs(row["loss_mask"])
        if len(starts) != len(trained):  # replies that follow each other
            continue
        for index, start in zip(trained, starts, strict=True):
            before = replace(conversation, messages=conversation.messages[:index])
            yield TrainedReply(before, row["input_ids"], start)


def served_prompts(
    tokenizer: PreTrainedTokenizerBase, replies: Sequence[TrainedReply], variables: Mapping[str, Any]
) -> list[list[int] | None]:
    """The tokens that a server puts before each reply; None where the template refuses what is before it.

    Args:
        variables: of the template, in place of the row's own.
    """
    rows = [
        replace(reply.before, template_variables={**(reply.before.template_variables or {}), **variables})
        for reply in replies
    ]
    prompts: list[list[int] | None] = []
    with template_limits(tokenizer, rows) as next_one:
        forms = RowForms(TemplateForms(tokenizer))
        for row in rows:
            next_one()
            try:
                text = forms.of(row).render(row, add_generation_prompt=True)
            except ChatTemplateError:
                prompts.append(None)
                continue
            prompts.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return prompts


def _first_rows(data: EncodedFile) -> Iterator[tuple[dict[str, Any], str]]:
    """Encoded rows with their lines in the file."""
    rows: list[dict[str, Any]] = [*islice(iter(data.dataset), _ROWS)]
    of_line = {number: [*group] for number, group in groupby(rows, key=lambda row: int(row["line"]))}
    with data.places.path.open("rb") as file:
        for number, raw in enumerate(islice(file, max(of_line, default=0)), start=1):
            for row in of_line.get(number, []):
                yield row, raw.decode("utf-8-sig")


def _starts_of_runs(mask: Sequence[bool]) -> list[int]:
    """Where loss tokens begin that follow each other."""
    return [place for place, flag in enumerate(mask) if flag and (place == 0 or not mask[place - 1])]


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    templates = tokenizer.chat_template
    return " ".join(templates.values()) if isinstance(templates, dict) else str(templates)


def _difference(tokenizer: PreTrainedTokenizerBase, reply: TrainedReply, prompt: Sequence[int] | None) -> str:
    """The ends of both, for a message."""
    if prompt is None:
        return "it refuses what is before the reply"
    trained, served = (tokenizer.decode(list(ids))[-_SHOWN_CHARACTERS:] for ids in (reply.ids[: reply.start], prompt))
    return f"trained {trained!r}, served {served!r}"


def _yaml(value: bool) -> str:
    return "true" if value else "false"


def _finding(message: str, number: int) -> Finding:
    return Finding("serving_prompt", "note", message, number, 0, None)
