"""`Conversation` -> (input_ids, loss_mask), through the model's own chat template.

The loss tokens: each assistant turn as the template shows it, and the token that ends the turn. Nothing else.

    text    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
    mask    ........................................................11111111111111..

How it is found, for any template, with or without `{% generation %}`: each letter of the row is given a stand-in that
says which text of which turn it belongs to, and the row is rendered a second time (`provenance`). A reply starts right
after the generation prompt that stands before its first letter, so that what the template writes there by itself, such
as a think block, is learned as the model will have to write it; it ends with the first token after its last letter that
generation stops at. A row without tools, whose text is exactly what the template writes around turns of these roles
with the turns between, needs no second rendering. The mask is never guessed, and a row of which something is not shown
is refused.

Text that looks like a control token (`<|im_end|>` typed by a user) is encoded as the characters it is.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_core.encoding.forms import Span, TemplateForms, special_tokens
from lora_core.encoding.prompts import RowForms
from lora_core.encoding.provenance import hide_specials
from lora_core.encoding.reasoning import reasoning_spans
from lora_core.encoding.spans import Reading, read_spans
from lora_core.encoding.template import template_limits
from lora_core.errors import ChatTemplateError, RowError
from lora_core.rows.messages import Conversation, Message, TrainOn, parse_row, trained_messages
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
    not_shown: tuple[str, ...] = ()
    """What the template leaves out and the row can do without: `reasoning of earlier turns`, `name`, ..."""
    loss_weights: tuple[float, ...] = ()
    """(T,) of each token; empty is 1 for all loss tokens."""


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


def text_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[bool]
) -> Iterator[tuple[str, bool]]:
    """(text, whether of loss tokens) for each run of tokens of one kind.

    Decoded in one piece: a character of several tokens has no text of its own in any of them.
    """
    for is_loss, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1])):
        yield str(tokenizer.decode([token for token, _ in group])), is_loss


class ChatEncoder:
    """`encode_chat` for many rows with one tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all_assistant", mask_reasoning: bool = False
    ) -> None:
        """
        Args:
            train_on: all_assistant turns; the last_assistant turn; the completion: what follows the prompt in rows that
                say so, else what follows the last user turn; or everything that the template writes.
            mask_reasoning: leave the reasoning of replies out, in whatever way rows hold it.
        """
        if not tokenizer.is_fast:
            raise ChatTemplateError(
                f"{type(tokenizer).__name__} gives no character offsets, of which the loss mask is made: only "
                "fast tokenizers do; fix: another model.name_or_path"
            )
        self.tokenizer = tokenizer
        self.train_on, self.mask_reasoning = train_on, mask_reasoning
        self._special = special_tokens(tokenizer)
        self.forms = TemplateForms(tokenizer)
        self._row_forms = RowForms(self.forms)
        self._adds_prefix_space = tokenizer.decode([*self._ids("a"), *self._ids("a")]) != "aa"
        self._frames_by_roles: dict[tuple[TemplateForms, tuple[str, ...]], list[str] | None] = {}

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[EncodedChat | RowError]:
        """One result per row, in order; a `RowError` where it cannot be encoded.

        Raises:
            ConfigError: the template takes too much time or memory, or writes too much. No row can be trusted to it.
        """
        results: list[EncodedChat | RowError | None] = [None] * len(conversations)
        plans: list[tuple[int, Reading, dict[str, str]]] = []
        with template_limits(self.tokenizer, conversations) as next_one:
            for index, conversation in enumerate(conversations):
                next_one()
                try:
                    if conversation.text is not None:
                        results[index] = self._encode_text(conversation.text)
                        continue
                    safe, hidden = hide_specials(conversation, self._special)
                    plans.append((index, self._read(safe), hidden))
                except RowError as error:
                    results[index] = error
        whole = [plan for plan in plans if not plan[2]]
        encodings = self._encode([reading.text for _, reading, _ in whole])
        for (index, reading, _), (ids, offsets) in zip(whole, encodings, strict=True):
            mask = _mask_tokens(offsets, reading.spans)
            if mask is None:
                results[index] = self._encode_cut(reading, {}, True)
                continue
            mask = _without_masked(mask, offsets, reading.masked)
            weights = _token_weights(offsets, reading.spans, mask)
            results[index] = EncodedChat(ids, mask, False, False, reading.not_shown, weights)
        for index, reading, hidden in plans:
            if hidden:
                results[index] = self._encode_cut(reading, hidden)
        return [result for result in results if result is not None]

    # ----- text

    def _read(self, conversation: Conversation) -> Reading:
        """The rendered text and what of it is trained."""
        if not self.tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; fix: data.chat_template=chatml "
                "(or another name or file), or a model that was trained to chat (its name often ends in -Instruct)"
            )
        forms = self._row_forms.of(conversation)
        text = forms.render(conversation)
        reading = self._spans_between_frames(forms, text, conversation) or read_spans(forms, conversation, text)
        if self.mask_reasoning:
            reading = replace(reading, masked=reasoning_spans(conversation, reading))
        weights = conversation.weights or (1.0,) * len(conversation.messages)
        replies = [replace(span, weight=weights[span.message]) for span in reading.spans]
        if self.train_on == "everything":
            return replace(reading, spans=_with_all_between(replies, len(reading.text)))
        trained = trained_messages(conversation, self.train_on)
        return replace(reading, spans=[span for span in replies if span.message in trained])

    def _spans_between_frames(self, forms: TemplateForms, text: str, conversation: Conversation) -> Reading | None:
        """Turns as what is between the template's frames; None if the text is not built that way."""
        messages = conversation.messages
        if conversation.tools or any(message.keys() != {"role", "content"} for message in messages):
            return None
        spans = _turns_between(text, self._frames_of_all(forms, messages), messages)
        if spans is None:
            return None
        floor, replies = 0, []
        for index, ((start, end), message) in enumerate(zip(spans, messages, strict=True)):
            if message["role"] == "assistant":
                limit = spans[index + 1][0] if index + 1 < len(spans) else None
                letter = start + forms.leading_signs(text[start:end])
                text, span = forms.reply_span(conversation, text, index, floor, start, letter, end, limit)
                replies.append(span)
            floor = end
        return Reading(text, replies)

    def _frames_of_all(self, forms: TemplateForms, messages: list[Message]) -> list[str] | None:
        """What the template writes around every turn: the same for all rows of the same roles, so rendered once."""
        roles = forms, tuple(message["role"] for message in messages)
        if roles not in self._frames_by_roles:
            if len(self._frames_by_roles) == _ROLES_REMEMBERED:
                self._frames_by_roles.clear()
            frames = _frames(forms, messages)
            # Over a blank frame, a turn's own white space could be taken for the next turn's.
            is_certain = frames is not None and all(frame.strip() for frame in frames[1:-1])
            self._frames_by_roles[roles] = frames if is_certain else None
        return self._frames_by_roles[roles]

    def _encode_text(self, text: str) -> EncodedChat:
        """A text without turns: all of it is trained, and the token that ends it."""
        ids = list(self.tokenizer(text, split_special_tokens=True)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if isinstance(eos, int) and ids[-1:] != [eos]:
            ids.append(eos)
        return EncodedChat(ids, [True] * len(ids), self._special.search(text) is not None)

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
        self, reading: Reading, hidden: dict[str, str], cut_at_border: bool = False
    ) -> EncodedChat | RowError:
        """Encode piece by piece: cut where a turn starts, so that no token straddles it, and at hidden specials."""
        if self._adds_prefix_space:
            return ChatTemplateError(
                "a token would reach across the start of an assistant turn, or the text holds a special token; this "
                "tokenizer puts a space before every piece, so it cannot be encoded in pieces; fix: remove white space "
                "at the turn's start and special tokens from the text"
            )
        text, spans = reading.text, reading.spans
        cuts = {0, len(text), *(span.start for span in spans), *(span.end for span in spans)}
        cuts |= {at for masked in reading.masked for at in masked}
        for index, character in enumerate(text):
            if character in hidden:
                cuts |= {index, index + 1}
        borders = sorted(cuts)
        turns = iter([*spans, Span(len(text) + 1, len(text) + 1)])
        span = next(turns)
        ids: list[int] = []
        mask: list[bool] = []
        weights: list[float] = []
        for start, end in itertools.pairwise(borders):
            piece = text[start:end]
            piece_ids = self._ids(hidden[piece], as_plain_text=True) if piece in hidden else self._ids(piece)
            while span.end <= start:
                span = next(turns)
            is_trained = span.start <= start and not any(first <= start < last for first, last in reading.masked)
            ids += piece_ids
            mask += [is_trained] * len(piece_ids)
            weights += [span.weight if is_trained else 0.0] * len(piece_ids)
        is_plain = all(span.weight == 1 for span in spans)
        return EncodedChat(
            ids, mask, bool(hidden), cut_at_border, reading.not_shown, () if is_plain else tuple(weights)
        )


def _frames(forms: TemplateForms, messages: list[Message]) -> list[str] | None:
    """What the template writes around turns of these roles; None if that cannot be determined."""
    markers = [f"TurnMarker{number}x" for number in range(len(messages))]
    marked = [{"role": turn["role"], "content": marker} for turn, marker in zip(messages, markers, strict=True)]
    try:
        rest = forms.render(Conversation(marked))
    except ChatTemplateError:  # for example one that requires a tool's answer to follow a call
        return None
    if re.findall(r"TurnMarker\d+x", rest) != markers:
        return None
    return re.split(r"TurnMarker\d+x", rest)


def _with_all_between(replies: Sequence[Span], length: int) -> list[Span]:
    """All of a text but the replies of weight 0."""
    spans, at = [], 0
    for reply in replies:
        spans += [Span(at, reply.start)] if reply.weight != 1 and at < reply.start else []
        spans += [reply] if reply.weight not in (0, 1) else []
        at = reply.end if reply.weight != 1 else at
    return [*spans, Span(at, length)] if at < length else spans


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
    content = message["content"]
    for shown in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = start + len(shown)
        if text.startswith(shown + frame, start) and (not is_last or end + len(frame) == len(text)):
            return end
    return None


def _token_weights(
    offsets: Sequence[tuple[int, int]], spans: Sequence[Span], mask: Sequence[bool]
) -> tuple[float, ...]:
    """(T,) the weight of each token's loss, 0 where it has none; empty if all are 1."""
    if all(span.weight == 1 for span in spans):
        return ()
    weights = [0.0] * len(offsets)
    for span in spans:
        for token, is_in_span in enumerate(_mask_tokens(offsets, [span]) or ()):
            weights[token] = span.weight if is_in_span else weights[token]
    return tuple(weight if is_loss else 0.0 for weight, is_loss in zip(weights, mask, strict=True))


def _without_masked(
    mask: list[bool], offsets: Sequence[tuple[int, int]], masked: Sequence[tuple[int, int]]
) -> list[bool]:
    """The mask without each token that holds a character of these spans."""
    ends = [end for _, end in offsets]
    for start, end in masked:
        token = bisect_right(ends, start)
        while token < len(ends) and min(ends[token - 1] if token else 0, offsets[token][0]) < end:
            mask[token] = False
            token += 1
    return mask


def _mask_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[bool] | None:
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
