"""One row of a chat file, in any accepted shape, -> `Conversation`.

Accepted rows (JSON objects; keys that are not named here are ignored):

    {"messages": [{"role": "user", "content": "..."}, ...]}              roles system, user, assistant, tool
    {"conversations": [{"from": "human", "value": "..."}, ...]}          ShareGPT; role/content too
    {"prompt": "...", "completion": "..."}                               one question, one answer
    {"instruction": "...", "input": "...", "output": "..."}              Alpaca

Each may carry `"system": "..."` and `"tools": [...]` (or the list as a JSON string). Tool use is written either as
OpenAI does (`tool_calls` on an assistant message, role `tool` for the answer) or as ShareGPT does (`function_call`
and `observation` turns).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.errors import RowError
from lora_core.untrusted.text import quoted

Message = dict[str, Any]
"""What chat templates take: role, content, and for an assistant possibly tool_calls."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}

# Tools and arguments may be nested this deep. Schemas need ten levels; templates and Arrow walk them by recursion.
_MAX_DEPTH = 50


@dataclass(frozen=True)
class Conversation:
    """Messages in the shape that chat templates take, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def parse_json_row(line: str) -> Conversation:
    """`parse_row` of one JSONL line.

    Raises:
        RowError: not strict JSON (NaN and duplicate keys are refused too), or not an accepted row.
    """
    try:
        row = _read_json(line)
    except RecursionError as error:
        raise RowError("JSON nested too deeply to read") from error
    except ValueError as error:
        raise RowError(f"not valid JSON: {error}") from error
    return parse_row(row)


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number, object_pairs_hook=_unique_keys)


def parse_row(row: Any) -> Conversation:
    """Turn an accepted row into a `Conversation`.

    Raises:
        RowError: names the key or the turn that is wrong, and what is accepted.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"must be a JSON object, not {_kind(row)}")
    turns = _turns(row)
    if not turns:
        raise RowError("has no turns; it needs an assistant turn to train on")
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    system = row.get("system")
    if system is not None and system != "":
        if messages[0]["role"] == "system":
            raise RowError("has both a system key and a system turn; keep one")
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("has no assistant turn; it needs one to train on")
    return Conversation(messages, _tools(row.get("tools")))


def _turns(row: Mapping[str, Any]) -> Sequence[Any]:
    for key in ("messages", "conversations"):
        if key in row:
            turns = row[key]
            if not isinstance(turns, list):
                raise RowError(f"{key} must be a list of turns, not {_kind(turns)}")
            return turns
    if "prompt" in row and "completion" in row:
        return [_turn("user", row["prompt"]), _turn("assistant", row["completion"])]
    if "instruction" in row and "output" in row:
        extra = row.get("input") or ""
        question = (
            f"{_text(row['instruction'], 'instruction')}\n\n{_text(extra, 'input')}" if extra else row["instruction"]
        )
        return [_turn("user", question), _turn("assistant", row["output"])]
    raise RowError(
        f"has the keys {_names(row)}; needs 'messages', 'conversations', "
        "'prompt' and 'completion', or 'instruction' and 'output'"
    )


def _names(row: Mapping[str, Any]) -> str:
    more = f" and {len(row) - 10:,} more" if len(row) > 10 else ""
    return (", ".join(quoted(key) for key in list(row)[:10]) or "(none)") + more


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _message(turn: Any, number: int) -> Message:
    where = f"turn {number}"
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} must be an object with role and content, not {_kind(turn)}")
    said_role = turn.get("role", turn.get("from"))
    if not isinstance(said_role, str) or said_role not in _ROLES:
        raise RowError(f"{where} has the role {quoted(said_role)}; known roles: {', '.join(_ROLES)}")
    role = _ROLES[said_role]
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls")
    if said_role == "function_call":
        return {"role": role, "content": "", "tool_calls": _share_gpt_calls(content, where)}
    if calls:
        if role != "assistant":
            raise RowError(f"{where} has tool_calls, but the role {said_role!r}; only an assistant calls tools")
        text = "" if content is None else _text(content, f"{where}: content")
        return {"role": role, "content": text, "tool_calls": _open_ai_calls(calls, where)}
    message = {"role": role, "content": _text(content, f"{where}: content")}
    # Some templates show which tool or call an answer belongs to.
    message.update({key: _text(turn[key], f"{where}: {key}") for key in ("name", "tool_call_id") if turn.get(key)})
    return message


def _text(value: Any, what: str) -> str:
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        parts = [part.get("text") for part in value]
        wrong = [part for part in parts if not isinstance(part, str)]
        value = wrong[0] if wrong else "".join(parts)
    if not isinstance(value, str):
        raise RowError(f"{what} must be a string, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{what} holds half of a surrogate pair at character {error.start}: not valid Unicode"
        ) from error
    return value


def _share_gpt_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """`{"name": ..., "arguments": {...}}`, or a list of them, usually as a JSON string."""
    calls = _from_json(value, f"{where}: function_call")
    if calls == []:
        raise RowError(f"{where}: function_call must hold a call, not an empty list")
    return [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]


def _open_ai_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls must be a list, not {_kind(value)}")
    calls = []
    for item in value:
        call = _call(item.get("function", item) if isinstance(item, Mapping) else item, where)
        if item.get("id"):
            call["id"] = _text(item["id"], f"{where}: tool call id")
        calls.append(call)
    return calls


def _call(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or "name" not in value:
        raise RowError(f"{where}: a tool call must be an object with name and arguments, not {_kind(value)}")
    arguments = _from_json(value.get("arguments", {}), f"{where}: arguments of the tool call")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}: arguments of the tool call must be an object, not {_kind(arguments)}")
    name = _text(value["name"], f"{where}: name of the tool call")
    _check_plain(arguments, f"{where}: arguments of the tool call")
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if value is None or value == "" or value == []:
        return None
    tools = _from_json(value, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of objects, or that list as a JSON string")
    _check_plain(tools, "tools")
    return tools or None


def _from_json(value: Any, what: str) -> Any:
    """The value; read from JSON first if it is a string."""
    if not isinstance(value, str):
        return value
    try:
        return _read_json(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {error}") from error


def _check_plain(value: Any, what: str, depth: int = 1) -> None:
    """Refuse what templates, tokenizers and JSON cannot take, at any depth of a nested value."""
    if depth > _MAX_DEPTH:
        raise RowError(f"{what}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        _text(value, what)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _text(key, f"{what}: a key")
            _check_plain(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, what, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{what}: {value} is not a number in JSON")
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise RowError(f"{what} must hold JSON values only, not {_kind(value)}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{quoted(text)} is too large for a float")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {quoted(twice)} in one object")
    return row


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a bool",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
