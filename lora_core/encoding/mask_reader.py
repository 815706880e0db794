"""Reads a mask back from the tokens and the row, without knowing how `chat.py` found it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lora_core.encoding.chat import EncodedChat
from lora_core.encoding.forms import TemplateForms, any_of, special_tokens
from lora_core.encoding.prompts import RowForms
from lora_core.encoding.provenance import hide_specials
from lora_core.encoding.template import template_limits
from lora_core.errors import ChatTemplateError
from lora_core.rows.messages import Conversation, Message, TrainOn, trained_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A shorter text of another turn may stand in a reply by chance.
_CERTAIN_CHARACTERS = 12
# Of what stands before a reply, where earlier turns are written in another way by then.
_COMPARED_CHARACTERS = 20
_INLINE_REASONING = re.compile(r"(.*</(?:think|thinking|thought|reasoning|seed:think)>|.*\[/THINK\])(.*)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|thinking|thought|reasoning|seed:think)>|\[/?THINK\]")


@dataclass(frozen=True)
class MaskReading:
    """What `MaskReader` says of one row."""

    problem: str | None


@dataclass(frozen=True)
class _Run:
    """Loss tokens that follow each other, as text."""

    before: str
    text: str
    after: str


class MaskReader:
    """Reads a mask back by the row: what its loss tokens say, turn by turn, and what they do not say.

    Each run of loss tokens must hold every text of its turn (content, reasoning, the names and arguments of calls) and
    none of another's, start right after the generation prompt, and end with the first token that generation stops at.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn = "all_assistant", mask_reasoning: bool = False
    ) -> None:
        self._tokenizer, self._train_on, self._mask_reasoning = tokenizer, train_on, mask_reasoning
        self._special = special_tokens(tokenizer)
        special = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special_ids = {*special, *tokenizer.all_special_ids}
        self._forms = TemplateForms(tokenizer)
        """Of the row that is read."""
        self._row_forms = RowForms(self._forms)

    def read(self, conversation: Conversation, encoded: EncodedChat) -> MaskReading:
        """Read one row that was not truncated."""
        ids, mask = encoded.input_ids, encoded.loss_mask
        text = self._decode(ids)
        if conversation.text is not None:
            whole = all(mask[1:]) and _loose(conversation.text) in _loose(text)
            return MaskReading(None if whole else f"its tokens read {_shortened(text)!r}, and not all are trained")
        # Text that looks like a special token is read as a character of its own, so that it ends nothing.
        safe, hidden = hide_specials(conversation, self._special)
        stand_ins = {special: stand_in for stand_in, special in hidden.items()}
        text = self._decode(ids, stand_ins)
        trained = trained_messages(safe, self._train_on)
        if self._train_on == "everything":  # what is left out must be the replies of weight 0
            weights = safe.weights or (1.0,) * len(safe.messages)
            trained = [
                i for i, message in enumerate(safe.messages) if message["role"] == "assistant" and not weights[i]
            ]
            mask = [False, *(not flag for flag in mask[1:])]
        try:
            with template_limits(self._tokenizer, [safe]) as next_one:
                next_one()
                self._forms = self._row_forms.of(safe)
                shown, prompts = self._shown(safe, trained)
        except ChatTemplateError:
            return MaskReading("the chat template refuses it now")
        # Some tokenizers do not give back every space, or compose characters: then both sides go without.
        same = _plain if text.startswith(shown) or self._gives_back(shown, hidden) else _loose
        added = same(text).removeprefix(same(shown))
        if added and added not in map(same, self._forms.stop_tokens):
            return MaskReading(f"its tokens read {_shortened(text)!r}, the template writes {_shortened(shown)!r}")
        if self._mask_reasoning:
            reasoning = [piece for index in trained for piece in _reasoning(safe.messages[index])]
            mask, problem = self._with_reasoning(reasoning, ids, [*mask], stand_ins)
            if problem is not None:
                return MaskReading(problem)
        runs = [
            _Run(*(same(self._decode(part, stand_ins)) for part in (ids[:start], ids[start:end], ids[end:])))
            for start, end in _runs(mask)
        ]
        # Earlier turns may be written in another way by then; so that the row does not begin with it.
        is_beginning = [bool(prompt) and shown.startswith(prompt) for prompt in prompts]
        given = [*zip(map(same, prompts), is_beginning, strict=True)]
        return MaskReading(self._problem(safe.messages, trained, runs, given, same))

    def _with_reasoning(
        self, reasoning: Sequence[str], ids: Sequence[int], mask: Sequence[bool], stand_ins: Mapping[str, str]
    ) -> tuple[list[bool], str | None]:
        """The mask as it would be if reasoning were trained; what is wrong with what it leaves out."""
        filled, waiting = list(mask), [_loose(piece) for piece in reasoning]
        for start, end in _runs([not flag for flag in mask]):
            for piece in waiting:
                length = self._length_of_end(piece, ids[start:end], stand_ins)
                if length:
                    filled[end - length : end] = [True] * length
                    waiting.remove(piece)
                    break
        shown = _loose(self._decode(ids, stand_ins))
        left = next((piece for piece in waiting if piece in shown), None)
        return filled, None if left is None else f"the reasoning {_shortened(left)!r} is not left out, or more is"

    def _length_of_end(self, piece: str, ids: Sequence[int], stand_ins: Mapping[str, str]) -> int:
        """How many of the last tokens say the piece, and beside it nothing but signs; 0 if they do not."""
        low, high = 0, len(ids)
        while low < high:  # the fewest that hold it
            middle = (low + high) // 2
            holds = piece in _loose(self._decode(ids[len(ids) - middle :], stand_ins))
            low, high = (low, middle) if holds else (middle + 1, high)
        said = _loose(self._decode(ids[len(ids) - low :], stand_ins))
        return low if piece in said and not any(map(str.isalnum, said.replace(piece, "", 1))) else 0

    def _shown(self, conversation: Conversation, trained: Sequence[int]) -> tuple[str, list[str]]:
        """What the template writes, and what generation gets before each of these turns; empty if it refuses that.

        Raises:
            ChatTemplateError: it refuses the row.
        """
        shown = self._forms.render(conversation)
        self._forms.prompt_beginnings, self._forms.ends  # noqa: B018  # ask the template, inside its limits
        prompts = []
        for index in trained:
            try:
                before = replace(conversation, messages=conversation.messages[:index])
                prompt = self._forms.render(before, add_generation_prompt=True)
            except ChatTemplateError:  # for example nothing before the first turn
                prompt = ""
            prompts.append(prompt)
        return shown, prompts

    def _problem(
        self,
        messages: Sequence[Message],
        trained: Sequence[int],
        runs: list[_Run],
        given: Sequence[tuple[str, bool]],
        same: Callable[[str], str],
    ) -> str | None:
        """What is wrong with the loss tokens."""
        said = " | ".join(messages[index]["content"] for index in trained)
        read = "".join(run.text for run in runs)
        problem = f"the loss tokens read {_shortened(read)!r}, the assistant's turns are {_shortened(said)!r}"
        for number, index in enumerate(trained):
            if not runs:
                return problem
            run = runs.pop(0)
            if len(runs) < len(trained) - number - 1:  # replies can follow each other without anything between
                end = self._end(run, messages[index], same) or len(run.text)
                if end < len(run.text):
                    runs.insert(0, _Run(run.before + run.text[:end], run.text[end:], run.after))
                    run = _Run(run.before, run.text[:end], run.text[end:] + run.after)
            if not self._says_its_turn(messages, index, run.text):
                return (
                    f"the loss tokens read {_shortened(run.text)!r}, turn {index + 1} is "
                    f"{_shortened(messages[index]['content'])!r}"
                )
            if self._end(run, messages[index], same) != len(run.text):
                return f"the loss tokens of turn {index + 1} end with {_shortened(run.text, from_end=True)!r}"
            if not self._starts_well(run, messages, index, *given[number], same):
                before = _shortened(run.before, from_end=True)
                return f"the loss tokens of turn {index + 1} begin in the wrong place, after {before!r}"
        return problem if runs else None

    def _says_its_turn(self, messages: Sequence[Message], index: int, run: str) -> bool:
        """Whether each text of the turn is in its loss tokens, and no text of another."""
        last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        own, loose = _texts(messages[index], is_earlier=index < last_question), _loose(run)
        if any(not any(_loose(form) in loose for form in forms) for forms in own):
            return False
        said = "".join(_loose(form) for forms in _texts(messages[index], is_earlier=False) for form in forms)
        said += _loose(messages[index]["content"])
        others = (_loose(form) for i, m in enumerate(messages) if i != index for f in _texts(m, True) for form in f)
        return not any(
            o in loose and o not in said and len(self._special.sub("", o)) >= _CERTAIN_CHARACTERS for o in others
        )

    def _end(self, run: _Run, message: Message, same: Callable[[str], str]) -> int | None:
        """Where the reply should end: with the first token after the turn's own text that ends turns."""
        after_own = 0
        # Content follows reasoning, which may be the same; of a call's parts each template has its own order.
        for forms in _own_words(message, is_earlier=False):
            found = [(run.text.find(one, after_own), one) for one in map(same, forms)]
            if all(at < 0 for at, _ in found):
                found = [(run.text.find(one), one) for one in map(same, forms)]
            after_own = max([after_own, *(at + len(one) for at, one in found if at >= 0)])
        ends: dict[str, int] = {}  # a part that is there twice is found twice
        for one in (same(form) for forms in _call_texts(message) for form in dict.fromkeys(forms)):
            at = run.text.find(one, ends.get(one, 0))
            ends[one] = at + len(one) if at >= 0 else ends.get(one, 0)
        after_own = max(after_own, *ends.values(), 0)
        whole = run.text + run.after
        stops = any_of(map(same, self._forms.stop_tokens))
        stop = stops.search(run.text, after_own)
        if stop is None:
            # What follows replies, unless generation goes on to a token right behind it that it does stop at.
            stop = self._forms.ends.search(run.text, after_own)
            more = re.compile(rf"(?:{self._special.pattern}|\s)*").match(whole, stop.end()) if stop else None
            if more is not None and stops.search(more.group()):
                return None
        return stop.end() if stop is not None else None

    def _starts_well(
        self,
        run: _Run,
        messages: Sequence[Message],
        index: int,
        prompt: str,
        is_beginning: bool,
        same: Callable[[str], str],
    ) -> bool:
        """Whether it starts right after what generation gets, or after as much of the generation prompt as is there."""
        if is_beginning and run.before == prompt:
            return True
        if is_beginning and prompt.endswith(same(self._forms.generation_prompt)):
            return False
        starts = [run.text.find(same(forms[-1])) for forms in _texts(messages[index], False)]
        own = run.text[: min((start for start in starts if start >= 0), default=0)]
        gap = run.before + own
        places = [(gap.rfind(beginning), len(beginning)) for beginning in map(same, self._forms.prompt_beginnings)]
        place, length = max(places, default=(-1, 0))  # the nearest, and as much of it as is there
        if place >= 0:
            end = place + length
            return end <= len(run.before) and not gap[end : len(run.before)].strip(" ")
        if prompt:
            said = same(messages[index - 1]["content"]).strip() if index else ""
            place = run.before.rfind(said) if said else -1
            length = len(run.before) - place if place >= 0 else _COMPARED_CHARACTERS
            return bool(run.before) and prompt.endswith(run.before[-length:])
        return same(messages[index]["content"]).strip().startswith(own.strip())

    def _gives_back(self, shown: str, hidden: Mapping[str, str]) -> bool:
        """Whether this text comes out of the tokenizer as it went in."""
        text = "".join(hidden.get(character, character) for character in shown)
        return self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def _decode(self, ids: Sequence[int], stand_ins: Mapping[str, str] | None = None) -> str:
        """The tokens as text, with these stand-ins for what looks like a special token and is none."""
        if stand_ins:
            pieces = [
                (is_one, self._decode([*group])) for is_one, group in groupby(ids, self._special_ids.__contains__)
            ]
            looks_so = any_of(stand_ins)
            return "".join(
                piece if is_one else looks_so.sub(lambda match: stand_ins[match.group()], piece)
                for is_one, piece in pieces
            )
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _texts(message: Message, is_earlier: bool) -> list[list[str]]:
    """The texts of a turn that a reply must hold, each in the forms that it may have there, its plain one last."""
    return _own_words(message, is_earlier) + _call_texts(message)


def _own_words(message: Message, is_earlier: bool) -> list[list[str]]:
    """Reasoning, unless a later question lets templates leave it out, and content."""
    content = message["content"]
    inline = _INLINE_REASONING.fullmatch(content) if message["role"] == "assistant" else None
    content = content if inline is None else inline[2]
    reasoning = [] if is_earlier else [[piece] for piece in _reasoning(message)]
    return reasoning + ([[content, content.strip()]] if content.strip() else [])


def _reasoning(message: Message) -> list[str]:
    """The texts of a turn's reasoning: beside its content, and inside it."""
    pieces = [message.get("reasoning_content", "").strip()]
    inline = _INLINE_REASONING.fullmatch(message["content"]) if message["role"] == "assistant" else None
    pieces += [piece.strip() for piece in _TAG.split(inline[1])] if inline is not None else []
    return [piece for piece in pieces if piece]


def _call_texts(message: Message) -> list[list[str]]:
    texts = []
    for call in message.get("tool_calls", []):
        function = call["function"]
        for value in (function["name"], *_leaves(function["arguments"])):
            in_quotes = value.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'")
            texts.append([json.dumps(value, ensure_ascii=False)[1:-1], in_quotes, value])
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
