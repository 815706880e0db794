"""`Conversation` -> (input_ids, loss_mask), through the model's own chat template.

The loss tokens: each assistant turn as the template shows it, and the token that ends the turn. Nothing else.

    text    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
    mask    ........................................................11111111111111..

How it is found, for any template, with or without `{% generation %}`: the row is rendered a second time
with a marker in place of each turn. What is between the markers is the template's own frame, and the real text
must be exactly frame, turn, frame, turn, ..., frame. Where it is not (some templates move a system turn, or indent a
tool's answer), markers take the place of the assistant's turns alone. Where a template treats turns too differently for
that, the turn is what follows the generation prompt; and where none of these works, the row is refused. The mask is
never guessed.

Text that looks like a control token (`<|im_end|>` typed by a user) is encoded as the characters it is.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_core.data.messages import Conversation, Message, parse_row
from lora_core.data.template import apply_template, strings, template_limits
from lora_core.errors import ChatTemplateError, RowError
from lora_core.untrusted.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are tokenized in one call: enough to be quick, and what comes back fits in memory.
_CHARACTERS_PER_CALL = 1_000_000
# Orders of roles whose frames are kept in memory; data has a few dozen.
_ROLES_REMEMBERED = 1_000


@dataclass(frozen=True)
class EncodedChat:
    """A row as the model sees it."""

    input_ids: list[int]
    """(T,) token ids."""
    loss_mask: list[bool]
    """(T,) True for the loss tokens: the model learns to produce these."""
    holds_special_text: bool = False
    """The row's own text contains what looks like a special token; it was encoded as plain characters."""
    cut_at_border: bool = False
    """A token would have reached across the start of an assistant turn; the text was cut there."""


@dataclass(frozen=True)
class _Span:
    """Characters [start, end) of the rendered text: an assistant turn with the token that ends it."""

    start: int
    end: int


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> EncodedChat:
    """Encode one row. `show_chat` prints the result with the loss tokens coloured.

    Args:
        messages: `{"role": ..., "content": ...}` turns, in any shape that a row may have.
        tools: JSON schemas of the functions that the assistant may call.

    Raises:
        RowError: a message is malformed.
        ConfigError: the template takes too much time or memory, or writes too much.
        ChatTemplateError: the template refuses the row, or its mask would not be exact.
    """
    conversation = parse_row({"messages": list(messages), "tools": tools})
    result = ChatEncoder(tokenizer).encode_batch([conversation])[0]
    if isinstance(result, RowError):
        raise result
    return result


def show_chat(tokenizer: PreTrainedTokenizerBase, encoded: EncodedChat) -> str:
    """The tokens as text for a terminal: loss tokens green, the others dim, a bar between tokens."""
    pieces = []
    for token, is_loss_token in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        # Control characters in training text must not reach the terminal.
        text = "⏎".join(map(printable, str(tokenizer.decode([token])).split("\n")))
        newline = "\n" if "⏎" in text else ""
        pieces.append(f"\x1b[{'32;1' if is_loss_token else '2'}m{text}\x1b[0m{newline}")
    return "|".join(pieces)


class ChatEncoder:
    """`encode_chat` for many rows with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ChatTemplateError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
            )
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; fix: data.chat_template=chatml "
                "(or another name or file), or a model that was trained to chat (its name often ends in -Instruct)"
            )
        self.tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= set(tokenizer.all_special_tokens)
        # Longest first, so that no token hides another that it begins.
        alternatives = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
        self._special = re.compile(alternatives or r"(?!)")
        eos = re.escape(str(tokenizer.eos_token)) if tokenizer.eos_token else r"(?!)"
        self._turn_end = re.compile(rf"\s*(?:{alternatives or eos})(?:{eos})?")
        self._adds_prefix_space = tokenizer.decode([*self._ids("a"), *self._ids("a")]) != "aa"
        self._generation_prompt: str | None = None
        self._frames_by_roles: dict[tuple[str, ...], list[str] | None] = {}

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedChat | RowError]:
        """One result per row, in order; a `RowError` where it cannot be encoded.

        Raises:
            ConfigError: the template takes too much time or memory, or writes too much. No row can be trusted to it.
        """
        results: list[EncodedChat | RowError | None] = [None] * len(conversations)
        plans: list[tuple[int, str, list[_Span], dict[str, str]]] = []
        with template_limits(self.tokenizer, conversations) as next_one:
            for index, conversation in enumerate(conversations):
                next_one()
                try:
                    safe, hidden = self._hide_specials(conversation)
                    text, spans = self._render(safe)
                    plans.append((index, text, spans, hidden))
                except RowError as error:
                    results[index] = error
        whole = [plan for plan in plans if not plan[3]]
        encodings = self._encode([text for _, text, _, _ in whole])
        for (index, text, spans, _), (ids, offsets) in zip(whole, encodings, strict=True):
            mask = _mask_tokens(offsets, spans)
            results[index] = self._encode_cut(text, spans, {}, True) if mask is None else EncodedChat(ids, mask)
        for index, text, spans, hidden in plans:
            if hidden:
                results[index] = self._encode_cut(text, spans, hidden)
        return [result for result in results if result is not None]

    # ----- text

    def _render(self, conversation: Conversation) -> tuple[str, list[_Span]]:
        """The rendered text and its assistant turns."""
        text = self.apply_template(conversation.messages, conversation.tools)
        contents = self._spans_between_frames(text, conversation)
        if contents is None:
            contents = self._spans_after_prompt(text, conversation)
        if contents is None:
            raise ChatTemplateError(
                "the chat template shows an assistant turn differently once later turns follow it (some remove "
                "reasoning from earlier turns), so no exact mask exists; fix: split the row so that it ends there, or "
                "write the earlier turns as the template would show them"
            )
        return text, [_Span(self._start_of_reply(text, start), self._end_of_turn(text, end)) for start, end in contents]

    def apply_template(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        return apply_template(self.tokenizer, messages, tools, add_generation_prompt)

    def _spans_between_frames(self, text: str, conversation: Conversation) -> list[tuple[int, int]] | None:
        """Assistant turns as what is between the template's frames; None if the text is not built that way."""
        messages, tools = conversation.messages, conversation.tools
        if not tools and all(message.keys() == {"role", "content"} for message in messages):
            spans = _turns_between(text, self._frames_of_all(messages), messages)
            if spans is not None:
                return [span for span, turn in zip(spans, messages, strict=True) if turn["role"] == "assistant"]
        turns = [message for message in messages if message["role"] == "assistant"]
        return _turns_between(text, self._frames(text, messages, tools, {"assistant"}), turns)

    def _frames_of_all(self, messages: list[Message]) -> list[str] | None:
        """What the template writes around every turn: the same for all rows of the same roles, so rendered once."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames_by_roles:
            if len(self._frames_by_roles) == _ROLES_REMEMBERED:
                self._frames_by_roles.clear()
            frames = self._frames("", messages, None, set(roles))
            # Over a blank frame, a turn's own white space could be taken for the next turn's.
            is_certain = frames is not None and all(frame.strip() for frame in frames[1:-1])
            self._frames_by_roles[roles] = frames if is_certain else None
        return self._frames_by_roles[roles]

    def _frames(self, text: str, messages: list[Message], tools: Any, roles: set[str]) -> list[str] | None:
        """What the template writes around the turns of these roles; None if that cannot be determined."""
        # Doubled, not counted up: a text that holds them all would have no end.
        word = "TurnMarker"
        while word in text:
            word += word
        markers: list[str] = []
        marked: list[Message] = []
        for message in messages:
            if message["role"] in roles:
                markers.append(f"{word}{len(markers)}x")
                marked.append({"role": message["role"], "content": markers[-1]})
            else:
                marked.append(message)
        try:
            rest = self.apply_template(marked, tools)
        except ChatTemplateError:  # for example one that requires a tool's answer to follow a call
            return None
        if re.findall(rf"{word}\d+x", rest) != markers:
            return None
        return re.split(rf"{word}\d+x", rest)

    def _spans_after_prompt(self, text: str, conversation: Conversation) -> list[tuple[int, int]] | None:
        """Assistant turns as what follows the generation prompt; None if earlier turns change when later ones come."""
        spans = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self.apply_template(conversation.messages[:index], conversation.tools, add_generation_prompt=True)
            if before == self.apply_template(conversation.messages[:index], conversation.tools):
                return None  # the template has no generation prompt, so this would take the turn's header for content
            after = self.apply_template(conversation.messages[: index + 1], conversation.tools)
            if not (text.startswith(after) and after.startswith(before)):
                return None
            if message["content"].strip() not in after[len(before) :]:
                return None
            ends = list(self._special.finditer(after, len(before)))
            spans.append((len(before), ends[-1].start() if ends else len(after)))
        return spans

    def _start_of_reply(self, text: str, start: int) -> int:
        """Where the model begins to write.

        After the generation prompt; if the template puts a space between that and the content, the model has to
        write it, and tokenizers make it part of the first word.
        """
        if self._generation_prompt is None:
            question = [{"role": "user", "content": "a"}]
            with_prompt = self.apply_template(question, None, add_generation_prompt=True)
            self._generation_prompt = with_prompt.removeprefix(self.apply_template(question, None))
        before_spaces = start
        while before_spaces > 0 and text[before_spaces - 1] == " ":
            before_spaces -= 1
        prompt = self._generation_prompt.rstrip(" ")
        if text.endswith(prompt, 0, before_spaces):
            return min(start, before_spaces + len(self._generation_prompt) - len(prompt))
        return start

    def _end_of_turn(self, text: str, end: int) -> int:
        match = self._turn_end.match(text, end)
        if match is None:
            raise ChatTemplateError(
                f"the chat template ends an assistant turn with {text[end : end + 20]!r}, which is not a special "
                "token: the model would not learn to stop; fix: data.chat_template=FILE.jinja that puts "
                f"{self.tokenizer.eos_token!r} after each assistant turn"
            )
        return match.end()

    # ----- text that looks like a control token

    def _hide_specials(self, conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
        """Put a private character in place of each special token that the row itself holds.

        The template can then only add real ones, and `_encode_cut` spells the hidden ones out.
        """
        found = dict.fromkeys(
            match
            for text in strings([conversation.messages, conversation.tools])
            for match in self._special.findall(text)
        )
        if not found:
            return conversation, {}
        used = set("".join(strings([conversation.messages, conversation.tools])))
        free = (chr(code) for code in range(0x10F000, 0x10FFFE) if chr(code) not in used)
        stand_ins = {special: next(free) for special in found}

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(lambda match: stand_ins[match.group()], value)
            if isinstance(value, dict):
                return {hide(key): hide(item) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list) else value

        hidden = {stand_in: special for special, stand_in in stand_ins.items()}
        return Conversation(hide(conversation.messages), hide(conversation.tools)), hidden

    # ----- tokens

    def _ids(self, text: str, as_plain_text: bool = False) -> list[int]:
        encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_plain_text)
        return list(encoding["input_ids"])

    def _encode(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        ends = itertools.accumulate(map(len, texts))
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # tokenizer.json may hold either
        backend.no_padding()
        backend.encode_special_tokens = False
        by_call = zip(texts, (end // _CHARACTERS_PER_CALL for end in ends), strict=True)
        for _, group in itertools.groupby(by_call, key=lambda pair: pair[1]):
            texts_of_call = [text for text, _ in group]
            # The template has written every special token already; the tokenizer must add none (no second BOS). Without
            # what transformers builds around its answer, which takes a third of the time again.
            encodings = backend.encode_batch(texts_of_call, add_special_tokens=False)
            yield from ((encoding.ids, encoding.offsets) for encoding in encodings)

    def _encode_cut(
        self, text: str, spans: list[_Span], hidden: dict[str, str], cut_at_border: bool = False
    ) -> EncodedChat | RowError:
        """Encode piece by piece: cut where a turn starts, so that no token straddles it, and at hidden specials."""
        if self._adds_prefix_space:
            return ChatTemplateError(
                "a token would reach across the start of an assistant turn, or the text holds a special token; this "
                "tokenizer puts a space before every piece, so it cannot be encoded in pieces; fix: remove white space "
                "at the turn's start and special tokens from the text"
            )
        cuts = {0, len(text), *(span.start for span in spans), *(span.end for span in spans)}
        for index, character in enumerate(text):
            if character in hidden:
                cuts |= {index, index + 1}
        borders = sorted(cuts)
        turns = iter([*spans, _Span(len(text) + 1, len(text) + 1)])
        span = next(turns)
        ids: list[int] = []
        mask: list[bool] = []
        for start, end in itertools.pairwise(borders):
            piece = text[start:end]
            piece_ids = self._ids(hidden[piece], as_plain_text=True) if piece in hidden else self._ids(piece)
            while span.end <= start:
                span = next(turns)
            is_in_turn = span.start <= start
            ids += piece_ids
            mask += [is_in_turn] * len(piece_ids)
        return EncodedChat(ids, mask, bool(hidden), cut_at_border)


def _last_flags(items: Sequence[Any]) -> list[bool]:
    return [index == len(items) - 1 for index in range(len(items))]


def _turns_between(text: str, frames: list[str] | None, turns: Sequence[Message]) -> list[tuple[int, int]] | None:
    """Where each turn is in the text, if that is exactly frame, turn, frame, ..., turn, frame; None if not."""
    if frames is None or not text.startswith(frames[0]):
        return None
    position = len(frames[0])
    spans = []
    for turn, frame, is_last in zip(turns, frames[1:], _last_flags(turns), strict=True):
        end = _turn_end_before_frame(text, position, turn, frame, is_last)
        if end is None:
            return None
        spans.append((position, end))
        position = end + len(frame)
    return spans if position == len(text) else None


def _turn_end_before_frame(text: str, start: int, message: Message, frame: str, is_last: bool) -> int | None:
    """Where the turn that starts at `start` ends, with `frame` right after it; None if not certain."""
    if "tool_calls" not in message:
        content = message["content"]
        for shown in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = start + len(shown)
            if text.startswith(shown + frame, start) and (not is_last or end + len(frame) == len(text)):
                return end
        return None
    # The template writes the call in a form of its own: it is everything before the next frame.
    if is_last:
        end = len(text) - len(frame)
        return end if end >= start and text.endswith(frame) else None
    end = text.find(frame, start)
    return end if end >= 0 and text.find(frame, end + 1) < 0 else None


def _mask_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[_Span]) -> list[bool] | None:
    """Which tokens are in a span; None if a token reaches across a span's start.

    Tokens tile the text. Some tokenizers leave a token's leading space out of its offsets, so a token starts where
    the one before it ended (several tokens of one character share that character's offsets).
    """
    ends = [end for _, end in offsets]
    if ends != sorted(ends):  # no known tokenizer; then it is encoded turn by turn
        return None

    def start_of(token: int) -> int:
        return min(ends[token - 1] if token else 0, offsets[token][0])

    mask = [False] * len(offsets)
    for span in spans:
        first = bisect_right(ends, span.start)
        last = bisect_left(ends, span.end, lo=first)
        while last < len(ends) and start_of(last) < span.end:
            last += 1
        if first < last and start_of(first) < span.start:
            return None
        mask[first:last] = [True] * (last - first)
    return mask
