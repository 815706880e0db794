"""Where the replies are in a rendered row, by the letters of each text, and what of the row is not there."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.encoding.forms import Span, TemplateForms
from lora_core.encoding.provenance import TOOLS, MarkedRow, Text, TooManyLettersError, mark
from lora_core.errors import ChatTemplateError
from lora_core.rows.json_values import strings
from lora_core.rows.messages import Conversation

EARLIER_REASONING = "reasoning of earlier turns"
# What a row can do without; it is counted.
_CAN_BE_LEFT_OUT = ("name", "tool_call_id", "tool_calls.id")


@dataclass(frozen=True)
class Reading:
    """A row as the template writes it."""

    text: str
    spans: list[Span]
    """Of the replies, in order."""
    not_shown: tuple[str, ...] = ()
    """What the template leaves out and the row can do without."""
    masked: Sequence[tuple[int, int]] = ()
    """Characters [start, end) inside the replies that are not trained."""


def read_spans(forms: TemplateForms, conversation: Conversation, text: str) -> Reading:
    """Find the replies in the rendered text.

    Raises:
        ChatTemplateError: something of the row is not shown, or no exact mask exists; says which and why.
    """
    row = _Rendered(*_rendered_with_stand_ins(forms, conversation, text))
    missing = [one for one in row.marked.texts if any(row.shown[i] < n for i, n in one.letters.items())]
    not_shown = _what_is_not_shown(conversation, row.marked, missing, text)
    spans: list[Span] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        place = row.place(index)
        floor, first, last = (row.in_text(at) for at in (place.floor, place.first, place.last))
        limit = None if place.limit is None else row.in_text(place.limit)
        start = _with_leading_signs(text, first, message["content"][:1_000])
        text, span = forms.reply_span(conversation, text, index, floor, start, first, last, limit)
        if row.is_written_twice(index, place.first, span.end):
            raise ChatTemplateError(f"the chat template writes turn {index + 1} twice, so no exact mask exists")
        if spans and span.start < spans[-1].end:
            raise ChatTemplateError(f"the chat template writes turn {index + 1} into the reply before it")
        spans.append(span)
    return Reading(text, spans, not_shown)


def _rendered_with_stand_ins(forms: TemplateForms, conversation: Conversation, text: str) -> tuple[MarkedRow, str]:
    for with_tools in (True, False):
        try:
            marked = mark(conversation, forms.kept_words, with_tools)
            rendered = forms.render(marked.conversation)
        except (ChatTemplateError, TooManyLettersError):  # it looks at what the letters are; or they are too many
            continue
        if marked.turn_back(rendered) == text:
            return marked, rendered
    raise ChatTemplateError(
        "the chat template writes other text for other letters (an empty turn, or a word that it looks for), so no "
        "exact mask exists; fix: leave the row out, or data.chat_template=FILE.jinja that writes turns as they are"
    )


def _what_is_not_shown(
    conversation: Conversation, marked: MarkedRow, missing: Sequence[Text], text: str
) -> tuple[str, ...]:
    """What of the row may be left out and is.

    Raises:
        ChatTemplateError: something that may not be left out is not there.
    """
    messages = conversation.messages
    last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    left_out: set[str] = set()
    lost: list[str] = []
    for one in missing:
        is_reply = one.message != TOOLS and messages[one.message]["role"] == "assistant"
        if one.key == "reasoning" and one.message < last_question:
            left_out.add(EARLIER_REASONING)
        elif one.key in _CAN_BE_LEFT_OUT:
            left_out.add(f"messages.{one.key}")
        elif one.message == TOOLS and one.key != "tools.name":
            left_out.add(one.key)
        elif one.key == "tool_calls.name" and _is_named_by_id(one, marked, missing):
            continue
        else:
            where = "the tools" if one.message == TOOLS else f"turn {one.message + 1}"
            lost.append(f"{where}: {one.key}" + (" of a reply" if is_reply and one.key == "content" else ""))
    if not marked.with_tools:
        written = [*strings(conversation.tools), *_arguments(conversation)]
        if any(value not in text and json.dumps(value, ensure_ascii=False)[1:-1] not in text for value in written):
            lost.append("arguments or schemas of tools")
    if lost:
        listed = ", ".join(dict.fromkeys(lost))
        raise ChatTemplateError(
            f"the chat template does not show all of the row ({listed}), so the model would learn something else; fix: "
            "data.chat_template=qwen3, which shows tools and reasoning, or rows without it [content_not_shown]"
        )
    return tuple(sorted(left_out))


def _is_named_by_id(name: Text, marked: MarkedRow, missing: Sequence[Text]) -> bool:
    """Whether the calls of this message are shown by ids, which hold the names."""
    ids = [one for one in marked.texts if one.message == name.message and one.key == "tool_calls.id"]
    return bool(ids) and not any(one is other for one in ids for other in missing)


def _arguments(conversation: Conversation) -> list[str]:
    calls = [call for message in conversation.messages for call in message.get("tool_calls", [])]
    return [value for call in calls for value in strings(call["function"]["arguments"])]


@dataclass(frozen=True)
class _Place:
    """Of one reply, in the text with stand-ins."""

    floor: int
    """Where what others wrote before it ends."""
    first: int
    """Its first letter."""
    last: int
    """Where its last letter ends."""
    limit: int | None
    """The first letter of what others write next."""


class _Rendered:
    """A rendered row with stand-ins, searched by their letters: no other text has them."""

    def __init__(self, marked: MarkedRow, rendered: str) -> None:
        self.marked, self._rendered = marked, rendered
        self.shown = Counter(rendered)
        self._empty = marked.empty(rendered)

    def in_text(self, at: int) -> int:
        """This place in the text with the row's own letters."""
        return at - bisect_left(self._empty, at)

    def _message_at(self, at: int) -> int | None:
        text = self.marked.text_of.get(self._rendered[at])
        return None if text is None else self.marked.texts[text].message

    def place(self, index: int) -> _Place:
        """Where a reply is.

        Raises:
            ChatTemplateError: it is not there, or not in one piece.
        """
        texts = [one for one in self.marked.texts if one.message == index]
        own = [one for one in texts if one.key not in _CAN_BE_LEFT_OUT]
        if not any(self.shown[letter] for one in own for letter in one.letters):  # calls shown by their ids alone
            own = texts
        wanted = sum((one.letters for one in own), Counter[str]())
        left = {letter: min(number, self.shown[letter]) for letter, number in wanted.items() if self.shown[letter]}
        if not left:
            raise ChatTemplateError(f"the chat template does not show turn {index + 1}, so no exact mask exists")
        first = at = min(map(self._rendered.index, left))
        remaining = sum(left.values())
        while remaining:
            if self._message_at(at) not in (None, index):
                raise ChatTemplateError(
                    f"the chat template writes text of other turns into turn {index + 1}, so no exact mask exists"
                )
            letter = self._rendered[at]
            if left.get(letter, 0) > 0:
                left[letter], remaining = left[letter] - 1, remaining - 1
            at += 1
        before = (i for i in range(first - 1, -1, -1) if self._message_at(i) not in (None, index))
        after = (i for i in range(at, len(self._rendered)) if self._message_at(i) not in (None, index))
        return _Place(next(before, -1) + 1, first, at, next(after, None))

    def is_written_twice(self, index: int, first: int, end: int) -> bool:
        """Whether the reply holds a text of its own twice, up to where it ends in the text."""
        for at in self._empty:
            end += at < end
        inside = Counter(self._rendered[first:end])
        contents = [one for one in self.marked.texts if one.message == index and one.key in ("content", "reasoning")]
        return any(inside[letter] > number for one in contents for letter, number in one.letters.items())


def _with_leading_signs(text: str, first: int, content: str) -> int:
    """Where a content starts whose first letter is known: signs and kept words may stand before that."""
    for shown in (content, content.strip()):
        for length in range(min(len(shown) - 1, first), 0, -1):
            if text.startswith(shown[: length + 1], first - length):
                return first - length
    return first
