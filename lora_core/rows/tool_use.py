"""Tool calls and tool schemas, as any of the usual tools writes them, -> as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.json_values import (
    check_plain,
    checked_text,
    from_json,
    is_empty,
    key_names,
    kind,
    read_json,
    says_nothing,
)
from lora_core.untrusted.text import quoted

_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What the arguments of a call are called: by OpenAI, by Llama, and by others."""

_CALL_TYPES = ("function", "tool_call", "tool_use", "function_call", "tool_calls")


def parse_call(value: Any, where: str, unused: set[str]) -> dict[str, Any]:
    """One call -> `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its id if it has one.

    Args:
        value: OpenAI's `{"id", "type", "function": {"name", "arguments"}}`, the function alone, or Anthropic's
            `tool_use`; arguments as an object, or as JSON text.
        unused: keys that say nothing here are added to it.

    Raises:
        RowError: it is no call.
    """
    if not isinstance(value, Mapping):
        raise RowError(f"{where}: a tool call must be an object with name and arguments, not {kind(value)}")
    function = value.get("function")
    if isinstance(function, str):  # {"function": "name", "arguments": {...}}
        inner: Mapping[str, Any] = {**value, "name": function}
        _note_other(value, "name", function, unused)
    else:
        inner = function if isinstance(function, Mapping) else value
    if is_empty(inner.get("name")):
        raise RowError(
            f"{where}: a tool call must be an object with name and arguments; it has no name, but the keys "
            f"{key_names(value)}"
        )
    name = checked_text(inner["name"], f"{where}: name of the tool call")
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": name, "arguments": _arguments(inner, name, where, unused)},
    }
    ids = [part["id"] for part in (value, inner) if not is_empty(part.get("id"))]
    if ids:
        call["id"] = checked_text(ids[0], f"{where}: tool call id")
        _note_other(inner, "id", ids[0], unused)
    outside = {"id", "type"} | ({"function"} if isinstance(function, (str, Mapping)) else set())
    outside |= {"index"} if isinstance(value.get("index"), int) else set()
    outside |= {"name", *_ARGUMENTS} if inner is not function else set()
    _note_unused(value, outside, unused)
    if inner is function:
        _note_unused(inner, {"id", "name", *_ARGUMENTS}, unused)
    if not is_empty(value.get("type")) and value["type"] not in _CALL_TYPES:
        unused.add("tool_calls.type")
    return call


def _note_other(part: Mapping[str, Any], key: str, used: str, unused: set[str]) -> None:
    if not is_empty(part.get(key)) and part[key] != used:
        unused.add(f"tool_calls.{key}")


def _note_unused(part: Mapping[str, Any], known: set[str], unused: set[str]) -> None:
    unused |= {f"tool_calls.{key}" for key, item in part.items() if key not in known and not is_empty(item)}


def parse_calls(value: Any, where: str, unused: set[str]) -> list[dict[str, Any]]:
    """A list of calls, or one call, possibly as JSON text.

    Raises:
        RowError: there is none in it, or one is malformed.
    """
    calls = from_json(value, f"{where}: tool_calls")
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls must be a list, not {kind(calls)}")
    if not calls:
        raise RowError(f"{where}: tool_calls must hold a call, not an empty list; fix: leave such rows out")
    return [parse_call(call, where, unused) for call in calls]


def _arguments(function: Mapping[str, Any], name: str, where: str, unused: set[str]) -> dict[str, Any]:
    given = [key for key in _ARGUMENTS if not is_empty(function.get(key))]
    if len(given) > 1:
        raise RowError(f"{where}: the call of {quoted(name)} has both {given[0]} and {given[1]}; keep one")
    if not given:
        return {}
    what = f"{where}: arguments of the tool call"
    raw = function[given[0]]
    arguments = from_json(raw, what)
    if not isinstance(arguments, Mapping):
        raise RowError(f"{what} must be an object, not {kind(arguments)}")
    check_plain(arguments, what)
    if isinstance(raw, str):
        return dict(arguments)
    unused |= {f"arguments.{key}=null" for key in _null_keys(arguments)}
    return dict(_without_nulls(arguments))


def _null_keys(value: Any) -> Iterator[str]:
    """`key` or `key.key` of each null. Arrow gives each object the keys of all others in the file, as null."""
    if isinstance(value, list):
        for item in value:
            yield from _null_keys(item)
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if item is None:
            yield key
        yield from (f"{key}.{inner}" for inner in _null_keys(item))


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """Schemas, possibly as JSON text -> `[{"type": "function", "function": {...}}, ...]`; None if there are none.

    A schema that stands for itself (`{"name": ..., "parameters": ...}`) is wrapped: templates look inside. Nulls go:
    Arrow fills them in wherever another schema has a key.

    Raises:
        RowError: it is no list of objects.
    """
    if says_nothing(value):
        return None
    tools = from_json(value, "tools")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping | str) for tool in tools):
        raise RowError("tools must be a list of objects, or that list as a JSON string")
    check_plain(tools, "tools")
    schemas = [_without_nulls(from_json(tool, "tools")) for tool in tools]
    return [_wrapped(schema) for listed in schemas for schema in _declarations(listed)] or None


def are_schemas(value: Any) -> bool:
    """Whether a column of any name holds tool schemas, possibly as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = read_json(value)
        except (ValueError, RecursionError):
            return False
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(tool, str | Mapping) and _is_schema(tool) for tool in listed)


def _is_schema(tool: Any) -> bool:
    if isinstance(tool, str):
        return tool.lstrip().startswith("{") and are_schemas(tool)
    inner = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
    return "name" in inner and not inner.keys().isdisjoint(("parameters", "input_schema", "inputSchema", "description"))


def _declarations(schema: Any) -> list[Any]:
    """Gemini lists several schemas under one key, and Bedrock wraps each; others stand for themselves."""
    if isinstance(schema, Mapping) and len(schema) == 1:
        (key,) = schema
        if key in ("functionDeclarations", "function_declarations") and isinstance(schema[key], list):
            return [*schema[key]]
        if key == "toolSpec" and isinstance(schema[key], Mapping):
            return [{name: _schema_inside(item) for name, item in schema[key].items()}]
    return [schema]


def _schema_inside(item: Any) -> Any:
    """Bedrock's `{"json": schema}` is the schema."""
    return item["json"] if isinstance(item, Mapping) and [*item] == ["json"] else item


def _wrapped(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        raise RowError("tools must be a list of objects, or that list as a JSON string")
    if isinstance(schema.get("function"), Mapping):
        return {"type": "function", **schema}
    if "name" not in schema:
        raise RowError(
            "a tool must be an object with a name, or with a function that has one, and this one has the keys "
            f"{key_names(schema)}; fix: leave it out, or name it"
        )
    inner = {key: item for key, item in schema.items() if not (key == "type" and item == "function")}
    for key in ("input_schema", "inputSchema"):  # Anthropic's name, and Bedrock's
        if key in inner and "parameters" not in inner:
            inner["parameters"] = inner.pop(key)
    return {"type": "function", "function": inner}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def tool_answer(value: Any, where: str) -> str:
    """What a tool answered, as text: JSON for anything that is not text.

    Raises:
        RowError: JSON has no form for it.
    """
    if isinstance(value, str):
        return checked_text(value, where)
    check_plain(value, where)
    return json.dumps(value, ensure_ascii=False)
