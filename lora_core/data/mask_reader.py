"""Reads a mask back from tokens, row and chat template, without knowing how `chat.py` made it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_core.data.chat import EncodedChat
from lora_core.data.messages import Conversation, Message
from lora_core.data.template import render_chat
from lora_core.errors import ChatTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MaskReading:
    """What `MaskReader` says of one row."""

    problem: str | None
    place_is_known: bool = True
    """False: the template shows earlier turns differently later on (or has none of its own for a tool call), so that
    the turns were compared by text and order, and not by position."""


class MaskReader:
    """Reads a mask back, without knowing how `chat.py` made it.

    From the row, the turns' contents; from the template, the whole text and what comes before each turn; from the
    tokenizer, the special tokens. The decoded tokens must agree with all three.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._specials = sorted(specials | set(tokenizer.all_special_tokens), key=len, reverse=True)

    def read(self, conversation: Conversation, encoded: EncodedChat) -> MaskReading:
        """Read one row that was not truncated."""
        shown = self._render(conversation.messages, conversation)
        if shown is None:
            return MaskReading("the chat template refuses it now")
        text = self._decode(encoded.input_ids)
        # Some tokenizers do not give back every space, or compose characters: then both sides go without.
        same = _plain if text == shown or self._gives_back(shown) else _loose
        if same(text) != same(shown):
            return MaskReading(f"its tokens read {_shortened(text)!r}, the template writes {_shortened(shown)!r}")
        replies = self._replies(conversation, shown)
        trained = same(self._decode([t for t, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]))
        assistants = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        pattern = "".join(
            self._turn(conversation.messages[i], reply, same) for i, reply in zip(assistants, replies, strict=True)
        )
        if re.fullmatch(pattern, trained, re.DOTALL) is None:
            contents = " | ".join(conversation.messages[i]["content"] for i in assistants)
            return MaskReading(
                f"the loss tokens read {_shortened(trained)!r}, the assistant's turns are {_shortened(contents)!r}"
            )
        starts = _starts(encoded.loss_mask)
        place_is_known = len(starts) == len(assistants)
        if place_is_known:
            for index, start in zip(assistants, starts, strict=True):
                before = self._before(conversation, index, shown)
                place_is_known &= before is not None
                here = same(self._decode(encoded.input_ids[:start]))
                if before is not None and not here.startswith(same(before)):
                    return MaskReading(
                        f"the loss tokens of turn {index + 1} begin early, after {_shortened(here, from_end=True)!r}"
                    )
        return MaskReading(None, place_is_known)

    def _turn(self, message: Message, reply: str | None, same: Callable[[str], str]) -> str:
        """A regular expression for the loss tokens of a turn: the content, with or without the white space at its ends,
        or all that the template writes after the prompt; and the special tokens that end it."""
        content = message["content"]
        forms = [content, content.strip(), content.lstrip(), content.rstrip()]
        alternatives = [] if "tool_calls" in message else [re.escape(same(form)) for form in dict.fromkeys(forms)]
        if reply is not None:
            alternatives.append(re.escape(same(reply)))
        if not alternatives:  # a tool call in a form that is not known here
            alternatives.append(".+?")
        special = "|".join(re.escape(same(token)) for token in self._specials)
        eos = re.escape(same(str(self._tokenizer.eos_token)))
        return rf" ?(?:{'|'.join(alternatives)})\s*(?:{special})(?:{eos})?"

    def _replies(self, conversation: Conversation, shown: str) -> list[str | None]:
        """For each assistant turn what the template writes after the prompt, up to the special tokens that end it; None
        where the template shows it differently in the whole row."""
        special = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        replies: list[str | None] = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._before(conversation, index, shown)
            after = self._render(conversation.messages[: index + 1], conversation)
            reply = None
            if before is not None and after is not None and shown.startswith(after) and after.startswith(before):
                ends = list(special.finditer(after, len(before)))
                reply = after[len(before) : ends[-1].start()].rstrip() if ends else None
            replies.append(reply)
        return replies

    def _before(self, conversation: Conversation, index: int, shown: str) -> str | None:
        """What the template writes before a turn: the generation prompt with it, if the whole row has it."""
        for with_prompt in (True, False):
            before = self._render(conversation.messages[:index], conversation, with_prompt)
            if before is not None and shown.startswith(before):
                return before
        return None

    def _render(self, messages: list[Message], conversation: Conversation, with_prompt: bool = False) -> str | None:
        try:
            return render_chat(self._tokenizer, messages, conversation.tools, with_prompt)
        except ChatTemplateError:  # for example for messages without a question
            return None

    def _gives_back(self, text: str) -> bool:
        """Whether this text comes out of the tokenizer as it went in."""
        return self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _starts(mask: Sequence[bool]) -> list[int]:
    """Where each run of loss tokens starts."""
    return [i for i, flag in enumerate(mask) if flag and (i == 0 or not mask[i - 1])]


def _plain(text: str) -> str:
    return text


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _shortened(text: str, from_end: bool = False, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    return f"...{text[-limit:]}" if from_end else f"{text[:limit]}..."
