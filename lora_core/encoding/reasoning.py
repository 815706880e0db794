"""Where the reasoning of replies stands in a rendered row, for `data.mask_reasoning`: it is shown, and not trained."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_core.encoding.provenance import REASONING_TAGS
from lora_core.encoding.spans import EARLIER_REASONING, Reading
from lora_core.errors import ChatTemplateError
from lora_core.rows.messages import Conversation, Message

_TAG = re.compile(rf"</?{REASONING_TAGS}>|\[/?THINK\]")
_CLOSING_TAG = re.compile(rf"</{REASONING_TAGS}>|\[/THINK\]")


def reasoning_spans(conversation: Conversation, reading: Reading) -> list[tuple[int, int]]:
    """Characters [start, end) of each text of reasoning inside the replies, without the words that open and close it.

    Raises:
        ChatTemplateError: a reply's reasoning is written in another form than the row has it.
    """
    found = []
    for span in reading.spans:
        at = span.start
        for text in reasoning_of(conversation.messages[span.message]):
            start = reading.text.find(text, at, span.end)
            if start < 0:
                if EARLIER_REASONING in reading.not_shown:
                    continue
                raise ChatTemplateError(
                    f"data.mask_reasoning=true: the chat template writes the reasoning of turn {span.message + 1} in "
                    "another form, so it cannot be left out of training; fix: data.mask_reasoning=false"
                )
            at = start + len(text)
            found.append((start, at))
    return found


def reasoning_of(message: Message) -> Iterator[str]:
    """The texts of a message's reasoning: of its own key, and in its content up to the last closing tag."""
    if message.get("reasoning_content", "").strip():
        yield message["reasoning_content"].strip()
    end = max((match.start() for match in _CLOSING_TAG.finditer(message["content"])), default=0)
    yield from (piece.strip() for piece in _TAG.split(message["content"][:end]) if piece.strip())
