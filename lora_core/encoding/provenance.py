"""Who wrote each character of a rendered row: the row's letters, each replaced by a stand-in of its own.

Every text of a row (a content, a reasoning, the name and the arguments of a call, each text of a tool's schema) gets
private characters of Unicode in place of its letters and digits, other ones than every other text gets. What the chat
template makes of that row, turned back, must be what it makes of the row itself. Then each stand-in says whose letter
stands there, and one that is missing says what the template does not show.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lora_core.rows.json_values import strings
from lora_core.rows.messages import Conversation, Message

TOOLS = -1
"""In place of a message's index: the schemas of tools."""

_STAND_IN = re.compile("[\U000f0000-\U0010efff]")
_FIRST, _LAST = 0xF0000, 0x10EFFF
REASONING_TAGS = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
"""What models write in angle brackets around reasoning inside a content; Mistral's write [THINK]."""
_REASONING = re.compile(
    rf"(?P<open>\s*(?:<(?P<tag>{REASONING_TAGS})>|(?P<square>\[)THINK\]))(?P<inner>.*?)"
    r"(?P<close>(?(square)\[/THINK\]|</(?P=tag)>))",
    re.S,
)
# What templates look up in a schema, and compare; their own words and not the row's.
_SCHEMA_WORDS = frozenset(
    {"type", "function", "name", "description", "parameters", "properties", "required", "items", "enum", "default"}
    | {"anyOf", "allOf", "oneOf", "format", "title", "return", "returns", "strict", "additionalProperties", "$ref"}
    | {"minimum", "maximum", "pattern", "const", "nullable", "$defs", "definitions", "examples", "response"}
)

# Texts that templates compare with each other.
_SHARED = {
    "tools.properties": "property",
    "tools.required": "property",
    "tool_calls.id": "id",
    "tool_call_id": "id",
}


@dataclass(frozen=True)
class Text:
    """One text of a row."""

    message: int
    """Index of its message, or `TOOLS`."""
    key: str
    """Where it stands: content, reasoning, name, tool_calls.name, tool_calls.arguments, tools.description, ..."""
    letters: Counter[str]
    """Its stand-ins."""


@dataclass
class MarkedRow:
    """A row with stand-ins in place of its letters."""

    conversation: Conversation
    texts: list[Text]
    with_tools: bool
    """Whether schemas and the arguments of calls are marked too."""
    text_of: dict[str, int] = field(repr=False)
    """Stand-in -> index of its text."""
    _real: dict[int, str] = field(repr=False)

    def turn_back(self, rendered: str) -> str:
        """The rendered text with the row's own letters."""
        return rendered.translate(self._real)

    def empty(self, rendered: str) -> list[int]:
        """Where the stand-ins of empty texts are; they are turned back to nothing."""
        nothing = {chr(code) for code, real in self._real.items() if not real}
        return [at for at, letter in enumerate(rendered) if letter in nothing] if nothing else []


class TooManyLettersError(ValueError):
    """Unicode has not enough private characters for this row."""


def mark(conversation: Conversation, keep: re.Pattern[str], with_tools: bool = True) -> MarkedRow:
    """Replace the letters of a row.

    Args:
        keep: what stays as it is: words that the template looks for in contents, such as `</think>`.
        with_tools: mark schemas and the arguments of calls too.

    Raises:
        TooManyLettersError: more than 126,000 letters would be needed, counted once in each text.
    """
    return _Marker(keep, with_tools).mark(conversation)


class _Marker:
    def __init__(self, keep: re.Pattern[str], with_tools: bool) -> None:
        self._keep, self._with_tools = keep, with_tools
        self._next = _FIRST
        self._texts: list[Text] = []
        self._real: dict[int, str] = {}
        self._text_of: dict[str, int] = {}
        self._shared: dict[tuple[str, str], str] = {}
        """(kind, text) -> marked: names of properties, which stand among the required ones too, and ids of calls, which
        their answers repeat."""
        self._taken: set[str] = set()

    def mark(self, conversation: Conversation) -> MarkedRow:
        everything = "".join(strings([conversation.messages, conversation.tools]))
        self._taken = set(_STAND_IN.findall(everything))  # private characters of the row's own
        messages = [self._message(index, message) for index, message in enumerate(conversation.messages)]
        tools = conversation.tools
        if tools is not None and self._with_tools:
            for name in sorted(set(_property_names(tools)), key=_as_templates_sort):
                self._text(name, TOOLS, "tools.properties")
            tools = [self._schema(tool, "tools") for tool in tools]
        return MarkedRow(Conversation(messages, tools), self._texts, self._with_tools, self._text_of, self._real)

    def _message(self, index: int, message: Message) -> Message:
        marked = dict(message)
        content = message["content"]
        reasoning = _REASONING.match(content) if message["role"] == "assistant" else None
        says_nothing = not content.strip() and not message.get("tool_calls") and not message.get("reasoning_content")
        if reasoning:
            marked["content"] = self._content_with_reasoning(content, reasoning, index)
        elif content.strip() or says_nothing:
            marked["content"] = self._text(content, index, "content")
        for key, name in (("reasoning_content", "reasoning"), ("name", "name"), ("tool_call_id", "tool_call_id")):
            if message.get(key):
                marked[key] = self._text(message[key], index, name)
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, index) for call in message["tool_calls"]]
        return marked

    def _content_with_reasoning(self, content: str, reasoning: re.Match[str], index: int) -> str:
        """Both marked, but not what is blank of them: templates ask whether there is anything."""
        inner, rest = reasoning["inner"], content[reasoning.end() :]
        if inner.strip():
            inner = self._text(inner, index, "reasoning")
        if rest.strip():
            rest = self._text(rest, index, "content")
        return f"{reasoning['open']}{inner}{reasoning['close']}{rest}"

    def _call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self._with_tools:
            arguments = self._nested(arguments, index, "tool_calls.arguments")
        name = self._text(function["name"], index, "tool_calls.name")
        marked = {**call, "function": {"name": name, "arguments": arguments}}
        return {**marked, "id": self._text(call["id"], index, "tool_calls.id")} if "id" in call else marked

    def _nested(self, value: Any, index: int, key: str) -> Any:
        if isinstance(value, str):
            return self._text(value, index, key) if value else value
        if isinstance(value, dict):
            # In order, for templates that sort; then in their own.
            names = {name: self._text(name, index, key) for name in sorted(value, key=_as_templates_sort)}
            return {names[name]: self._nested(item, index, key) for name, item in value.items()}
        return [self._nested(item, index, key) for item in value] if isinstance(value, list) else value

    def _schema(self, value: Any, path: str, names_are_ours: bool = False) -> Any:
        """A schema's names and descriptions; what templates look up stays."""
        if isinstance(value, dict):
            marked = {}
            for key, item in value.items():
                is_word = key in _SCHEMA_WORDS and not names_are_ours
                if is_word and key in ("type", "format", "$ref"):
                    marked[key] = item
                elif is_word:
                    marked[key] = self._schema(item, f"tools.{key}", key in ("properties", "$defs", "definitions"))
                else:
                    name = self._text(key, TOOLS, "tools.properties") if names_are_ours else key
                    marked[name] = self._schema(item, path if names_are_ours else f"tools.{key}")
            return marked
        if isinstance(value, list):
            # Templates ask whether a property is among the required: the same letters as its name has.
            return [self._schema(item, path) for item in value]
        return self._text(value, TOOLS, path) if isinstance(value, str) and value else value

    def _text(self, text: str, message: int, key: str) -> str:
        """The text in stand-ins; an empty one gets a letter that is turned back to nothing."""
        shared = (_SHARED.get(key, ""), text)
        if shared in self._shared:
            return self._shared[shared]
        kept = [match.span() for match in self._keep.finditer(text)]
        pieces = _outside(text, kept)
        counted = {letter: number for letter, number in Counter("".join(pieces)).items() if letter.isalnum()}
        if not counted:  # signs, or nothing but kept words: every character counts
            kept, pieces = [], [text]
            counted = {sign: number for sign, number in Counter(text).items() if not sign.isspace()}
        # In order, for templates that sort.
        stand_ins = {character: self._allocate(character) for character in sorted(counted or {""})}
        table = {ord(character): letter for character, letter in stand_ins.items() if character}
        words = [*(text[start:end] for start, end in kept), ""]
        marked = "".join(piece.translate(table) + word for piece, word in zip(pieces, words, strict=True))
        marked = marked if counted else stand_ins[""]
        self._text_of.update(dict.fromkeys(stand_ins.values(), len(self._texts)))
        letters = Counter({stand_ins[character]: number for character, number in counted.items()})
        self._texts.append(Text(message, key, letters or Counter([marked])))
        if key in _SHARED:
            self._shared[shared] = marked
        return marked

    def _allocate(self, character: str) -> str:
        while chr(self._next) in self._taken:
            self._next += 1
        if self._next > _LAST:
            raise TooManyLettersError
        letter = chr(self._next)
        self._next += 1
        self._real[ord(letter)] = character
        return letter


def _as_templates_sort(name: str) -> tuple[str, str]:
    return name.lower(), name


def _property_names(schema: Any) -> Iterator[str]:
    """Names of properties in schemas, at any depth."""
    if isinstance(schema, dict):
        properties = schema.get("properties")
        yield from properties if isinstance(properties, dict) else ()
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _property_names(item)


def _outside(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """What is before, between and after these spans."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def hide_specials(conversation: Conversation, special_tokens: re.Pattern[str]) -> tuple[Conversation, dict[str, str]]:
    """Put a private character in place of each special token that the row itself holds.

    The template can then only add real ones, and whoever encodes the text spells the hidden ones out.

    Returns:
        (the row; what each private character stands for)
    """
    found = dict.fromkeys(
        match for text in strings([conversation.messages, conversation.tools]) for match in special_tokens.findall(text)
    )
    if not found:
        return conversation, {}
    used = set("".join(strings([conversation.messages, conversation.tools])))
    free = (chr(code) for code in range(0x10F000, 0x10FFFE) if chr(code) not in used)
    stand_ins = {special: next(free) for special in found}

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return special_tokens.sub(lambda match: stand_ins[match.group()], value)
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, list) else value

    hidden = {stand_in: special for special, stand_in in stand_ins.items()}
    return replace(conversation, messages=hide(conversation.messages), tools=hide(conversation.tools)), hidden
