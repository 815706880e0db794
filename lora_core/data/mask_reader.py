"""Reads a mask back from the tokens and the row, without knowing how `chat.py` found it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lora_core.data.chat import EncodedChat
from lora_core.data.forms import TemplateForms
from lora_core.data.messages import Conversation, Message, TrainOn, trained_messages
from lora_core.data.template import template_limits
from lora_core.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A shorter text of another turn may stand in a reply by chance.
_CERTAIN_CHARACTERS = 12
_INLINE_REASONING = re.compile(r"(.*</(?:think|thinking|thought|reasoning|seed:think)>|.*\[/THINK\])(.*)", re.DOTALL)


@dataclass(frozen=True)
class MaskReading:
    """What `MaskReader` says of one row."""

    problem: str | None
    place_is_known: bool = True
    """False: replies follow each other without anything between, so that they were compared by text and order."""


class MaskReader:
    """Reads a mask back by the row: what its loss tokens say, turn by turn, and what they do not say.

    Each run of loss tokens must hold every text of its turn (content, reasoning, the names and arguments of calls) and
    none of another's, start right after the generation prompt, and end with the first token that generation stops at.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all_assistant") -> None:
        self._tokenizer, self._train_on = tokenizer, train_on
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._specials = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._forms = TemplateForms(tokenizer)

    def read(self, conversation: Conversation, encoded: EncodedChat) -> MaskReading:
        """Read one row that was not truncated."""
        ids, mask, messages = encoded.input_ids, encoded.loss_mask, conversation.messages
        text = self._decode(ids)
        if conversation.text is not None:
            whole = all(mask[1:]) and _loose(conversation.text) in _loose(text)
            return MaskReading(None if whole else f"its tokens read {_shortened(text)!r}, and not all are trained")
        try:
            with template_limits(self._tokenizer, [conversation]) as next_one:
                next_one()
                shown = self._forms.render(conversation)
                self._forms.prompt_beginnings  # noqa: B018  # asks the template, inside its limits
        except ChatTemplateError:
            return MaskReading("the chat template refuses it now")
        # Some tokenizers do not give back every space, or compose characters: then both sides go without.
        same = _plain if text.startswith(shown) or self._gives_back(shown) else _loose
        added = same(text).removeprefix(same(shown))
        if added and added not in map(same, self._forms.stop_tokens):
            return MaskReading(f"its tokens read {_shortened(text)!r}, the template writes {_shortened(shown)!r}")
        if self._train_on == "everything":
            return MaskReading(None if all(mask[1:]) else "not all of its tokens are trained")
        trained = trained_messages(conversation, self._train_on)
        runs = [same(self._decode(ids[start:end])) for start, end in _runs(mask)]
        if len(runs) != len(trained):
            problem = self._problem(conversation, trained, "".join(runs), same)
            return MaskReading(problem, place_is_known=False)
        for index, run, (start, _) in zip(trained, runs, _runs(mask), strict=True):
            problem = self._problem(conversation, [index], run, same)
            before = same(self._decode(ids[:start]))
            if problem is None and not self._starts_well(before, run, messages[index], messages[:index][-1:], same):
                problem = (
                    f"the loss tokens of turn {index + 1} begin early, after {_shortened(before, from_end=True)!r}"
                )
            if problem is not None:
                return MaskReading(problem)
        return MaskReading(None)

    def _problem(
        self, conversation: Conversation, trained: Sequence[int], run: str, same: Callable[[str], str]
    ) -> str | None:
        """What is wrong with loss tokens that should be the replies of these turns."""
        messages = conversation.messages
        contents = " | ".join(messages[index]["content"] for index in trained)
        problem = f"the loss tokens read {_shortened(run)!r}, the assistant's turns are {_shortened(contents)!r}"
        last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        own = [_texts(messages[index], is_earlier=index < last_question) for index in trained]
        loose = _loose(run)
        if not trained and run:
            return problem
        if any(not any(_loose(form) in loose for form in forms) for texts in own for forms in texts):
            return problem
        said = "".join(_loose(form) for texts in own for forms in texts for form in forms)
        others = (
            form for i, m in enumerate(messages) if i not in trained for forms in _texts(m, True) for form in forms
        )
        if any(len(_loose(o)) >= _CERTAIN_CHARACTERS and _loose(o) in loose and _loose(o) not in said for o in others):
            return problem
        return None if not trained or self._ends_well(run, messages[trained[-1]], same) else problem

    def _ends_well(self, run: str, message: Message, same: Callable[[str], str]) -> bool:
        """Whether it ends with a token that ends turns, the first one after the turn's own text."""
        tail = run[
            max((run.rfind(same(forms[-1])) + len(same(forms[-1])) for forms in _texts(message, True)), default=0) :
        ]
        stops = [same(token) for token in self._forms.stop_tokens]
        first_stop = min((tail.find(stop) + len(stop) for stop in stops if stop in tail), default=None)
        if first_stop is not None:
            return first_stop == len(tail)
        return run.endswith(tuple(same(token) for token in self._specials))

    def _starts_well(
        self, before: str, run: str, message: Message, earlier: Sequence[Message], same: Callable[[str], str]
    ) -> bool:
        """Whether it starts right after the generation prompt, or as much of that as the row has."""
        starts = [run.find(same(forms[-1])) for forms in _texts(message, False)]
        own = run[: min((start for start in starts if start >= 0), default=0)]
        said = [same(forms[-1]) for m in earlier for forms in _texts(m, is_earlier=False)]
        floor = max((before.rfind(text) + len(text) for text in said if text in before), default=0)
        gap = before[floor:] + own
        for prompt in map(same, self._forms.prompt_beginnings):
            place = gap.rfind(prompt)
            if place >= 0:
                end = place + len(prompt)
                return end <= len(before) - floor and not gap[end : len(before) - floor].strip(" ")
        return same(message["content"]).strip().startswith(own.strip())

    def _gives_back(self, text: str) -> bool:
        """Whether this text comes out of the tokenizer as it went in."""
        return self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _texts(message: Message, is_earlier: bool) -> list[list[str]]:
    """The texts of a turn that a reply must hold, each in the forms that it may have there, its plain one last."""
    content = message["content"]
    reasoning = [[message["reasoning_content"].strip()]] if message.get("reasoning_content") else []
    inline = _INLINE_REASONING.fullmatch(content) if message["role"] == "assistant" else None
    if inline is not None:
        reasoning.append([re.sub(r"</?[\w:]+>|\[/?THINK\]", "", inline[1]).strip()])
        content = inline[2]
    texts = ([] if is_earlier else reasoning) + ([[content, content.strip()]] if content.strip() else [])
    for call in message.get("tool_calls", []):
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            texts.append([json.dumps(value, ensure_ascii=False)[1:-1], value])
    return texts


def _leaves(value: Any) -> Iterator[str]:
    """The strings in a call's arguments, and the names that they have."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _runs(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of each run of loss tokens."""
    runs, at = [], 0
    for flag, group in groupby(mask):
        length = len(list(group))
        if flag:
            runs.append((at, at + length))
        at += length
    return runs


def _plain(text: str) -> str:
    return text


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _shortened(text: str, from_end: bool = False, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    return f"...{text[-limit:]}" if from_end else f"{text[:limit]}..."
