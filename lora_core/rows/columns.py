"""What rows call their columns, and the columns that change what must be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.json_values import is_empty, key_names
from lora_core.rows.keyed_parts import with_our_names
from lora_core.untrusted.text import quoted

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
"""Where the role of a turn stands: under the first of these that says something."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool_use": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "environment": "tool",
    "tool_output": "tool",
    "tool_outputs": "tool",
    "tool_results": "tool",
    "function_result": "tool",
    "function_output": "tool",
    "function_call_output": "tool",
}
"""What a role is called, in small letters, and what templates call it."""

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("query", "answers"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
    ("message", "response"),
)
ANSWERS = frozenset(answer for _, answer in PAIRS)
HISTORY = ("history", "chat_history")
"""Earlier rounds, before the question of a pair."""
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "preamble")
TOOLS = ("tools", "functions")
_OPTIONAL = (*SYSTEM, *TOOLS, "history", "input", "reasoning")
"""Columns that some rows lack: Parquet and Arrow give a row without its null columns."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def first(columns: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that holds something."""
    return next((key for key in keys if not is_empty(columns.get(key))), None)


def under_our_names(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row without its null columns.

    Args:
        names: of `data.columns`: ours -> the file's, which may be that of a key inside a column (`body.messages`).

    Raises:
        RowError: a column that is named is not there.
    """
    missing = [theirs for ours, theirs in names.items() if ours not in _OPTIONAL and not _is_there(row, theirs)]
    if missing:
        raise RowError(f"has no {quoted(missing[0])}, which data.columns names; it has the keys {key_names(row)}")
    rest = {key: item for key, item in row.items() if key not in names}
    for theirs in names.values():
        rest = _without(rest, theirs)
    columns = {**rest, **{ours: _value_at(row, theirs) for ours, theirs in names.items()}}
    return with_our_names({str(key): item for key, item in columns.items() if item is not None})


def _inside(row: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any], str] | None:
    """(column, what it holds, key inside) of `body.messages`; None where that is a column itself, or is none."""
    column, dot, rest = name.partition(".")
    inner = row.get(column)
    return (column, inner, rest) if dot and name not in row and isinstance(inner, Mapping) else None


def _is_there(row: Mapping[str, Any], name: str) -> bool:
    inside = _inside(row, name)
    return name in row if inside is None else _is_there(inside[1], inside[2])


def _value_at(row: Mapping[str, Any], name: str) -> Any:
    inside = _inside(row, name)
    return row.get(name) if inside is None else _value_at(inside[1], inside[2])


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    """What is left of a row beside a column, or beside a key inside one."""
    inside = _inside(row, name)
    if inside is None:
        return {key: item for key, item in row.items() if key != name}
    column, inner, rest = inside
    return {**row, column: _without(dict(inner), rest)}


def holds_turns_or_pair(columns: Mapping[str, Any]) -> bool:
    """Whether the chat stands under names that everybody uses."""
    return first(columns, TURNS) is not None or any(q in columns and a in columns for q, a in PAIRS)
