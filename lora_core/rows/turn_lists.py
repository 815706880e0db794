"""A list of turns in whatever way it is written -> a list of objects, each with a role and a content.

    [["q", "a"], ...]                              pairs: a question and its answer
    [["user", "q"], ["assistant", "a"]]            a role and a text
    [{"user": "q"}, {"assistant": "a"}]            the role is the key
    [{"user": "q", "assistant": "a"}, ...]         rounds, also as input and output, and under other names
    {"turn_1": {...}, "turn_2": {...}}             any of these objects, numbered
    [{"type": "human", "content": "q"}, ...]       LangChain, also with `data` or `kwargs`
    [{"type": "function_call", ...}, ...]          items of OpenAI's Responses API
    {"role": [...], "content": [...]}              columns, as `datasets` writes a sequence of objects
    "[{...}]", ["{...}", ...]                      any of these as JSON text, or as Python prints it
    "\\n\\nHuman: q\\n\\nAssistant: a"              a transcript, as HH-RLHF has it

A list is read only where all of its items are of one form. Source of the items: OpenAI's reference of Responses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import ROLE_KEYS, ROLES, first
from lora_core.rows.json_values import checked_text, from_json, is_empty, kind
from lora_core.untrusted.text import quoted

ROUNDS = (
    ("input", "output"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("user", "assistant"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
"""What an object that is a whole round calls the question, and the answer."""
SPEAKERS = frozenset({"human", "user", "assistant", "gpt", "bot"})
"""Names of `ROUNDS` that say who speaks: a list of such rounds is one chat, whatever its column is called."""

_LANGCHAIN = {
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "HumanMessage": "user",
    "AIMessage": "assistant",
    "AIMessageChunk": "assistant",
    "SystemMessage": "system",
    "ToolMessage": "tool",
    "FunctionMessage": "tool",
}
# What would be a part of the question: an object that has it too is no round of these.
_ASKED_TOO = ("instruction", "question", "context")
_TEXT_OF_REASONING = ("content", "summary")


def read_turns(value: Any, key: str) -> list[Any]:
    """The turns of a column.

    Raises:
        RowError: it is no list, or holds items that are not read.
    """
    turns = from_json(value, key) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    if isinstance(turns, str):
        turns = turns_of_transcript(turns) or turns
    if isinstance(turns, Mapping):
        columns = _of_columns(turns)
        turns = columns if columns is not None else numbered_items(turns) or turns
    if not isinstance(turns, list):
        raise RowError(
            f"{key} must be a list of turns, not {kind(turns)}"
            + (f'; fix: "data.columns={{text: {key}}}" to train all of the text' if isinstance(turns, str) else "")
        )
    if len(turns) == 1 and isinstance(turns[0], list) and all(isinstance(turn, Mapping) for turn in turns[0]):
        turns = turns[0]  # a batch of one chat
    if not turns:
        raise RowError("has no turns; it needs an assistant turn to train on")
    return as_turns(turns)


def as_turns(items: list[Any]) -> list[Any]:
    """Objects with a role for items that are all of one form; the items themselves where they are of none."""
    if all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items):
        return items
    if items and all(_is_json_object(item) for item in items):
        return as_turns([from_json(item, "a turn") for item in items])
    pair = next((pair for pair in ROUNDS if items and all(_is_round(item, pair) for item in items)), None)
    if pair is not None:
        return _turns_of_rounds(items, *pair)
    found = next((turns for is_one, turns in _FORMS if items and all(map(is_one, items))), None)
    return items if found is None else found(items)


def turns_of_transcript(text: str) -> list[Any] | None:
    """The turns of a text as Anthropic's first models had it, `\\n\\nHuman: q\\n\\nAssistant: a`; None for any other.

    A last `Assistant:` without a text, as prompts end, is no turn.
    """
    before, *pieces = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)
    roles, said = pieces[::2], [each.strip() for each in pieces[1::2]]
    if (
        before
        or "Assistant" not in roles
        or roles[0] != "Human"
        or not all(said[:-1])
        or (roles[-1] == "Human" and not said[-1])
    ):
        return None
    turns = [{"role": role.lower(), "content": each} for role, each in zip(roles, said, strict=True)]
    return turns if said[-1] else turns[:-1]


def holds_turns(value: Any) -> bool:
    """Whether a column of any name is a list of turns, or of rounds or pairs that may be one chat."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, Mapping) and first(turn, ROLE_KEYS) is not None for turn in value) or (
        as_turns(value) is not value and not all(map(_is_json_object, value))
    )


def is_chat_of_rounds(value: Any) -> bool:
    """Whether it is a list of rounds that say who speaks: one chat, whatever the column is called."""
    return isinstance(value, list) and any(
        bool(value) and all(_is_round(item, pair) for item in value) for pair in ROUNDS if set(pair) <= SPEAKERS
    )


def numbered_items(value: Mapping[str, Any]) -> list[Any] | None:
    """The items of `{"turn_1": {...}, "turn_2": {...}}` in the order of their numbers; None for any other object."""
    numbers = {key: re.fullmatch(r"[A-Za-z_ -]*(\d{1,6})", key) for key in value}
    if not value or not all(numbers.values()) or not all(isinstance(item, Mapping) for item in value.values()):
        return None
    order = {key: int(number[1]) for key, number in numbers.items() if number is not None}
    return (
        [value[key] for key in sorted(order, key=lambda key: order[key])]
        if len({*order.values()}) == len(order)
        else None
    )


def _of_columns(value: Mapping[str, Any]) -> list[Any] | None:
    lists = [*value.values()]
    if not all(isinstance(items, list) for items in lists) or len({len(items) for items in lists}) != 1:
        return None
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def _is_json_object(item: Any) -> bool:
    return isinstance(item, str) and item.lstrip().startswith("{")


def _is_round(item: Any, pair: tuple[str, str]) -> bool:
    if not isinstance(item, Mapping) or not all(key in item for key in pair):
        return False
    return first(item, (*ROLE_KEYS, *(key for key in _ASKED_TOO if key not in pair))) is None


def _turns_of_rounds(items: list[Any], question: str, answer: str) -> list[Any]:
    """Two turns for each round, and before them its system text where it is a new one."""
    turns: list[Any] = []
    told = None
    for item in items:
        rest = {key: value for key, value in item.items() if key not in (question, answer, "system")}
        if not is_empty(item.get("system")) and item["system"] != told:
            told = item["system"]
            turns.append({"role": "system", "content": told})
        turns.append({"role": "user", "content": item[question]})
        turns.append({**rest, "role": "assistant", "content": item[answer]})
    return turns


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)


def _turns_of_pairs(items: list[Any]) -> list[Any]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for item in items for role, text in zip(roles, item, strict=True)]


def _is_role_and_text(item: Any) -> bool:
    return _is_pair(item) and item[0].strip().lower() in ROLES


def _is_keyed_by_role(item: Any) -> bool:
    said = [key for key, text in item.items() if not is_empty(text)] if isinstance(item, Mapping) else []
    return len(said) == 1 and said[0].strip().lower() in ROLES


def _turns_of_keys(items: list[Any]) -> list[Any]:
    return [{"role": role, "content": item[role]} for item in items for role in item if not is_empty(item[role])]


def _langchain_role(item: Any) -> str | None:
    if not isinstance(item, Mapping) or first(item, ROLE_KEYS) is not None:
        return None
    name = item.get("type")
    if name == "constructor" and isinstance(item.get("id"), list) and item["id"]:
        name = item["id"][-1]
    holder = first(item, ("kwargs", "data")) or ("content" if "content" in item else None)
    return _LANGCHAIN.get(name) if isinstance(name, str) and holder is not None else None


def _turns_of_langchain(items: list[Any]) -> list[Any]:
    turns = []
    for item in items:
        holder = first(item, ("kwargs", "data"))
        message = item if holder is None else item[holder]
        if not isinstance(message, Mapping):
            raise RowError(f"a message of LangChain has {kind(message)} as its {holder}; fix: an object with content")
        rest = {key: value for key, value in message.items() if key != "type"}
        beside = rest.get("additional_kwargs")
        if isinstance(beside, Mapping):  # where older versions have the calls, and newer ones have them too
            rest = {key: value for key, value in rest.items() if key != "additional_kwargs"}
            rest |= {key: value for key, value in beside.items() if is_empty(rest.get(key))}
        turns.append({**rest, "role": _langchain_role(item)})
    return turns


def _is_item(item: Any) -> bool:
    """Whether the Responses API may have it in its input or output."""
    name = item.get("type") if isinstance(item, Mapping) else None
    if not isinstance(name, str):
        return isinstance(item, Mapping) and "role" in item
    return name in ("message", "reasoning") or re.fullmatch(r"\w+_(call|output|list_tools|request)", name) is not None


def _turns_of_items(items: list[Any]) -> list[Any]:
    """Reasoning, text and calls of one answer are one turn, as chat templates have them."""
    turns: list[dict[str, Any]] = []
    for item in items:
        name = item.get("type", "message")
        rest = {key: value for key, value in item.items() if key != "type"}
        before = turns[-1] if turns and turns[-1].get("role") == "assistant" else {}
        is_begun = bool(before) and not before.keys() & {"content", "tool_calls"}  # by its reasoning
        if name == "message":
            said, goes_on = rest, is_begun and rest.get("role") == "assistant"
        elif name == "reasoning":
            said, goes_on = {**_of_reasoning(rest, before if is_begun else {}), "role": "assistant"}, is_begun
        elif name == "function_call":
            call = {
                "id": rest.pop("call_id", None),
                "name": rest.pop("name", None),
                "arguments": rest.pop("arguments", None),
            }
            said = {**rest, "role": "assistant", "tool_calls": [*before.get("tool_calls", []), call]}
            goes_on = bool(before)
        elif name == "function_call_output":
            names = {"call_id": "tool_call_id", "output": "content"}
            said, goes_on = {**{names.get(key, key): value for key, value in rest.items()}, "role": "tool"}, False
        else:
            raise RowError(f"holds an item of type {quoted(name)}, which is no chat; fix: leave such rows out")
        if goes_on:
            before |= said
        else:
            turns.append(said)
    return turns


def _of_reasoning(item: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The text of it, after that of the item before; often there is none, as all of it is encrypted."""
    used = first(item, _TEXT_OF_REASONING)
    parts = item[used] if used is not None else []
    given = parts if isinstance(parts, list) else [parts]
    said = [part.get("text") if isinstance(part, Mapping) else part for part in given]
    texts = [checked_text(part, "an item of type 'reasoning'") for part in said]
    reasoning = "\n\n".join([*filter(None, [before.get("reasoning")]), *texts])
    return {**{key: value for key, value in item.items() if key != used}, "reasoning": reasoning}


_FORMS: tuple[tuple[Callable[[Any], bool], Callable[[list[Any]], list[Any]]], ...] = (
    (_is_role_and_text, lambda items: [{"role": role, "content": text} for role, text in items]),
    (_is_pair, _turns_of_pairs),
    (_is_keyed_by_role, _turns_of_keys),
    (lambda item: _langchain_role(item) is not None, _turns_of_langchain),
    (_is_item, _turns_of_items),
)
"""What each item is, and the turns of a list of such."""
