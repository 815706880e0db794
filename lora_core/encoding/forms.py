"""What a chat template wants to be given, and what it writes around a reply: found by asking it, once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_core.encoding.template import apply_template
from lora_core.errors import ChatTemplateError
from lora_core.rows.messages import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: Message = {"role": "user", "content": "Qq"}
_TOOLS = [{"type": "function", "function": {"name": "Ff", "description": "", "parameters": {"type": "object"}}}]
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# What templates without a generation prompt write before replies; they have a few ways.
_STARTS_REMEMBERED = 1_000
# Of what was said before a reply, compared to find it again.
_CONTEXT_CHARACTERS = 20


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Any special token of the tokenizer, the longest first, so that none hides another that it begins."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any_of(special | set(tokenizer.all_special_tokens))


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text: a reply with the token that ends it."""

    start: int
    end: int
    message: int = 0
    """Index of the reply among the row's messages."""
    weight: float = 1.0
    """Of the loss of its tokens."""


class TemplateForms:
    """Answers about one tokenizer's template. Use it inside `template_limits`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            variables: values for variables of the template.
        """
        self.tokenizer, self.special = tokenizer, special_tokens(tokenizer)
        self._variables = variables
        eos = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
        self.stop_tokens: list[str] = [*dict.fromkeys([*eos, *getattr(tokenizer, "stop_tokens", ())])]
        """At which generation stops: the tokenizer's end, and those of the model's generation config if it was read."""
        self._starts: dict[tuple[str, str], int] = {}

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The row, in the forms that the template wants.

        Raises:
            ChatTemplateError: it refuses the row in each of them.
        """
        forms = [self._adapted(conversation, self._wants_text_arguments)]
        if any("tool_calls" in message for message in conversation.messages):
            forms += [_with_call_ids(forms[0]), self._adapted(conversation, not self._wants_text_arguments)]
        refusals = []
        for messages in forms:
            try:
                return apply_template(
                    self.tokenizer, messages, conversation.tools, add_generation_prompt, self._variables
                )
            except ChatTemplateError as error:
                refusals.append(error)
        raise refusals[0]

    @cached_property
    def generation_prompt(self) -> str:
        """What generation starts after, the end of a question's turn left out; empty if the template adds nothing."""
        prompted, plain = self._ask([QUESTION], True), self._ask([QUESTION], False)
        # Some templates end a row with EOS where the prompt would be.
        same = next((i for i, (a, b) in enumerate(zip(prompted, plain, strict=False)) if a != b), len(plain))
        inside = next((m.start() for m in self.special.finditer(prompted) if m.start() < same < m.end()), same)
        return prompted[inside:]

    @cached_property
    def prompt_beginnings(self) -> list[str]:
        """The generation prompt without the spaces at its end, then as much of it as stands before replies that the
        template shows in another form: up to a line or a special token, the longest first."""
        prompt = self.generation_prompt.rstrip(" ")
        ends = {match.end() for match in self.special.finditer(prompt)}
        lines = {at + 1 for at, character in enumerate(prompt) if character == "\n" and any(end <= at for end in ends)}
        return [prompt[:end] for end in sorted({*ends, *lines, len(prompt)} - {0}, reverse=True)]

    @cached_property
    def ends(self) -> re.Pattern[str]:
        """Any of `end_tokens`."""
        return any_of(self.end_tokens)

    @cached_property
    def end_tokens(self) -> list[str]:
        """The special tokens that follow replies, the last one and an earlier one; none if none follows the last."""
        turns = [QUESTION, {"role": "assistant", "content": "Yy"}, QUESTION, {"role": "assistant", "content": "Zz"}]
        text = self._ask(turns)
        last = self.special.search(text, text.rfind("Zz") + 2)
        earlier = self.special.search(text, text.find("Yy") + 2)
        found = [match.group() for match in (last, earlier) if match is not None and last is not None]
        return [*dict.fromkeys(found)]

    def reply_span(
        self,
        conversation: Conversation,
        text: str,
        index: int,
        floor: int,
        first: int,
        letter: int,
        last: int,
        limit: int | None,
    ) -> tuple[str, Span]:
        """One reply, from what generation starts after to what it stops at.

        Args:
            index: of the reply among the messages.
            floor: where what others wrote before it ends.
            first: where its own text starts; letter: its first letter, after what the template may write as well, such
                as `<think>`.
            last: where its own text ends.
            limit: where what others wrote next starts; None at the end of the row.

        Returns:
            (the rendered text, with the end of the turn added if the template leaves it to the next one; the span)

        Raises:
            ChatTemplateError: nothing ends it.
        """
        start = self._start(conversation, text, index, floor, first, letter)
        region = slice(last, len(text) if limit is None else limit)
        stop = self._stop.search(text, region.start, region.stop) or self.ends.search(text, region.start, region.stop)
        if stop is not None:
            return text, Span(start, stop.end(), index)
        is_last = limit is None and index == len(conversation.messages) - 1
        header = self._next_header("tool_calls" in conversation.messages[index]) if is_last else ""
        if header:
            return text + header, Span(start, len(text) + len(header), index)
        raise ChatTemplateError(
            f"the chat template ends an assistant turn with {text[last : last + 20]!r}, which is not a special "
            "token: the model would not learn to stop; fix: data.chat_template=FILE.jinja that puts "
            f"{self.tokenizer.eos_token!r} after each assistant turn"
        )

    def _start(self, conversation: Conversation, text: str, index: int, floor: int, first: int, letter: int) -> int:
        """Where the model begins to write: right after the generation prompt, or after as much of it as is there.

        If the template puts a space between that and the content, the model has to write it, and tokenizers make it
        part of the first word.
        """
        gap = text[floor:letter]
        for number, prompt in enumerate(self.prompt_beginnings):
            place = gap.rfind(prompt)
            if place >= 0:
                start = floor + place + len(prompt)
                spaces = len(self.generation_prompt) - len(prompt) if number == 0 else 0
                while spaces and start < letter and text[start] == " ":
                    start, spaces = start + 1, spaces - 1
                return start
        # No prompt of its own stands there: some templates write none, and some let a tool's answer stand inside the
        # model's turn. Between two texts they write the same each time, so it is asked once.
        before = conversation.messages[index - 1]["role"] if index else ""
        key = (before, text[floor:first])
        if key not in self._starts:
            if len(self._starts) == _STARTS_REMEMBERED:
                self._starts.clear()
            self._starts[key] = self._start_after_what_was_said(conversation, text, index, floor, letter) - floor
        return floor + self._starts[key]

    def _start_after_what_was_said(
        self, conversation: Conversation, text: str, index: int, floor: int, letter: int
    ) -> int:
        """Where the row without this reply and what follows it, as generation gets it, ends in the text.

        Raises:
            ChatTemplateError: it is written in another way there.
        """
        said = self.render(replace(conversation, messages=conversation.messages[:index]), add_generation_prompt=True)
        if text.startswith(said) and floor <= len(said) <= letter:
            return len(said)
        # Earlier turns may be written in another way by now: then what follows the last letter must be the same.
        content = conversation.messages[index - 1]["content"] if index else ""
        letters = max((at + 1 for at, character in enumerate(content) if character.isalnum()), default=1)
        context = max(floor - min(letters, _CONTEXT_CHARACTERS), 0)
        ends = [end for end in range(floor, letter + 1) if floor and said.endswith(text[context:end])]
        if len(ends) != 1:
            raise ChatTemplateError(
                f"the chat template has no generation prompt before turn {index + 1}, so where the reply starts is not "
                "known; fix: data.chat_template=FILE.jinja with add_generation_prompt"
            )
        return ends[0]

    @cached_property
    def _stop(self) -> re.Pattern[str]:
        return any_of(self.stop_tokens)

    @cached_property
    def kept_words(self) -> re.Pattern[str]:
        """What the template may look for in contents, such as `</think>`."""
        from jinja2 import Environment, TemplateSyntaxError

        templates = self.tokenizer.chat_template
        sources = templates.values() if isinstance(templates, dict) else [templates]
        try:
            tokens = [token for source in sources for token in Environment().lex(str(source))]
        except TemplateSyntaxError:  # rendering says so
            return re.compile(r"(?!)")
        literals = {value[1:-1].strip() for _, kind, value in tokens if kind == "string"}
        words = [w for w in literals if len(w) <= 40 and re.search(r"[^\W_]", w) and re.search(r"[^\w\s]", w)]
        return any_of(words)

    def leading_signs(self, content: str) -> int:
        """How many characters stand before a content's first letter: signs, spaces, and words that templates write."""
        at = 0
        while at < len(content):
            kept = self.kept_words.match(content, at)
            if kept is None and content[at].isalnum():
                break
            at = kept.end() if kept is not None else at + 1
        return at

    def _next_header(self, after_a_call: bool) -> str:
        """What generation stops at where the next turn would start; empty if the template ends turns by itself.

        Some templates have no end of a turn of their own, and the next one's header is what generation stops at.
        """
        reply: Message = {"role": "assistant", "content": "" if after_a_call else "Zz"}
        if after_a_call:
            function = {"name": "Ff", "arguments": {"Kk": "Zz"}}
            reply["tool_calls"] = [{"type": "function", "function": function}]
        text = self._ask([QUESTION, reply, {"role": "tool" if after_a_call else "user", "content": "Ww"}])
        found = self._stop.search(text, text.rfind("Zz") + 2, max(text.rfind("Ww"), 0))
        return found.group() if found else ""

    @cached_property
    def _reasoning_key(self) -> str:
        """What a message's reasoning is called in this template."""
        for key in _REASONING_KEYS:
            if "Zz" in self._ask([QUESTION, {"role": "assistant", "content": "Aa", key: "Zz"}]):
                return key
        return _REASONING_KEYS[0]

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether a content must be a list of parts, as some templates of vision models want it."""
        parts = {"role": "user", "content": [{"type": "text", "text": "Qq"}]}
        return "Qq" not in self._ask([QUESTION]) and "Qq" in self._ask([parts])

    @cached_property
    def _wants_text_arguments(self) -> bool:
        """Whether a call's arguments must be JSON text: of an object, some templates write Python's own form."""
        function = {"name": "Ff", "arguments": {"Kk": "Zz"}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        return "'Kk'" in self._ask([QUESTION, call])

    @cached_property
    def _shows_ids_for_names(self) -> bool:
        """Whether a call is shown by its id alone, which then holds the name, as Kimi's templates do."""
        call = {"id": "functions.Ff:0", "type": "function", "function": {"name": "Ff", "arguments": {}}}
        ask = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
        without_id = [ask[0], {**ask[1], "tool_calls": [{k: v for k, v in call.items() if k != "id"}]}]
        return "functions.Ff:0" in self._ask(ask) and "Ff" not in self._ask(without_id)

    def _ask(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """What the template says to it; nothing if it refuses."""
        # Of several templates, the one for tools is taken for rows that have some.
        with_tools = isinstance(self.tokenizer.chat_template, dict) and any("tool_calls" in m for m in messages)
        try:
            tools = _TOOLS if with_tools else None
            return apply_template(self.tokenizer, messages, tools, add_generation_prompt, self._variables)
        except ChatTemplateError:  # one that wants ids of calls, or a system turn
            return ""

    def _adapted(self, conversation: Conversation, as_text: bool) -> list[Message]:
        messages = []
        for message in conversation.messages:
            adapted = dict(message)
            if "reasoning_content" in message:
                adapted[self._reasoning_key] = adapted.pop("reasoning_content")
            if as_text and "tool_calls" in message:
                adapted["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
            if self._wants_parts:
                adapted["content"] = [{"type": "text", "text": message["content"]}]
            messages.append(adapted)
        return _with_names_as_ids(messages) if self._shows_ids_for_names else messages


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches each of these words, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _with_names_as_ids(messages: Sequence[Message]) -> list[Message]:
    """Calls whose id does not hold the function's name get one that does: `functions.NAME:NUMBER`."""
    number, result = 0, []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", []):
            name = call["function"]["name"]
            calls.append(call if name in call.get("id", "") else {**call, "id": f"functions.{name}:{number}"})
            number += 1
        result.append({**message, "tool_calls": calls} if calls else message)
    return result


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Calls without an id get one of nine characters, as Mistral's templates want, and so do their answers."""
    number, result = 0, []
    waiting: list[tuple[str | None, str]] = []  # the ids of calls without an answer yet, as said and as made
    for message in messages:
        changed = dict(message)
        if "tool_calls" in message:
            waiting, calls = [], []
            for call in message["tool_calls"]:
                number += 1
                made = f"call{number:05d}"
                calls.append({**call, "id": call["id"] if len(call.get("id", "")) == 9 else made})
                waiting.append((call.get("id"), calls[-1]["id"]))
            changed["tool_calls"] = calls
        elif message["role"] == "tool" and waiting:
            said = message.get("tool_call_id")
            place = next((i for i, (old, _) in enumerate(waiting) if said is not None and old == said), 0)
            changed["tool_call_id"] = waiting.pop(place)[1]
        result.append(changed)
    return result
