"""Rows and parts of Gemini and Bedrock, which say by a key what a part is, -> parts that say it by a type.

    {"functionCall": {"name", "args"}}             {"toolUse": {"toolUseId", "name", "input"}}          -> tool_use
    {"functionResponse": {"name", "response"}}     {"toolResult": {"toolUseId", "content"}}             -> tool_result
    {"text": "...", "thought": true}               {"reasoningContent": {"reasoningText": {"text"}}}    -> thinking
    {"type": "refusal", "refusal": "..."}          OpenAI's: what the assistant said                    -> text

Gemini's rows, `{"systemInstruction": {"parts": [...]}, "contents": [{"role": "user", "parts": [...]}, ...]}`, become
`system` and `messages`. Source: the REST references of the Gemini API (Content, Part) and of Bedrock (ContentBlock).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROW = {"contents": "messages", "systemInstruction": "system", "system_instruction": "system"}
_CALLS = ("functionCall", "function_call", "toolUse")
_ANSWERS = ("functionResponse", "function_response", "toolResult")
_CALL = {"toolUseId": "id"}
_ANSWER = {"toolUseId": "tool_use_id", "id": "tool_use_id", "response": "content"}


def with_our_names(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of Gemini under our names; any other row as it is."""
    config = columns.get("toolConfig")
    if isinstance(config, Mapping) and "tools" in config and "tools" not in columns:  # of Bedrock
        rest = {f"toolConfig.{key}": item for key, item in config.items() if key != "tools"}
        columns = (
            {key: item for key, item in columns.items() if key != "toolConfig"} | {"tools": config["tools"]} | rest
        )
    turns = columns.get("contents")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) and "parts" in turn for turn in turns):
        return columns
    renamed = _renamed(columns, _ROW)
    if renamed is None:
        return columns
    renamed["messages"] = [turn if "role" in turn else {"role": "user", **turn} for turn in turns]
    system = renamed.get("system")
    return renamed | {"system": system["parts"]} if isinstance(system, Mapping) and "parts" in system else renamed


def with_types(content: Any) -> Any:
    """The content of a turn, each part of which says by its type what it is."""
    if isinstance(content, Mapping) and content.keys() == {"content_type", "parts"}:  # ChatGPT
        content = content["parts"] if content["content_type"] == "text" else content
    return [_with_type(part) for part in content] if isinstance(content, list) else content


def _with_type(part: Any) -> Any:
    """The part itself where it is none of these, or where a key would be lost."""
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "refusal":
        return {**(_renamed(part, {"refusal": "text"}) or part), "type": "refusal" if "text" in part else "text"}
    if "type" in part:
        return part
    if isinstance(part.get("thought"), bool) and "text" in part:
        rest = {key: item for key, item in part.items() if key != "thought"}
        return {**rest, "type": "thinking"} if part["thought"] else rest
    if part.keys() == {"reasoningContent"} and isinstance(part["reasoningContent"], Mapping):
        inside = part["reasoningContent"].get("reasoningText")
        return {**inside, "type": "reasoning"} if isinstance(inside, Mapping) else part
    for key in (*_CALLS, *_ANSWERS):
        if isinstance(part.get(key), Mapping):
            inner = _renamed(part[key], _CALL if key in _CALLS else _ANSWER)
            rest = {name: item for name, item in part.items() if name != key}
            if inner is not None and "type" not in inner and not inner.keys() & rest.keys():
                return {**rest, **_unwrapped(inner), "type": "tool_use" if key in _CALLS else "tool_result"}
    return part


def _unwrapped(inner: dict[str, Any]) -> dict[str, Any]:
    """Bedrock's answer `[{"json": value}]` is the value."""
    content = inner.get("content")
    (only,) = content if isinstance(content, list) and len(content) == 1 else (None,)
    return {**inner, "content": only["json"]} if isinstance(only, Mapping) and [*only] == ["json"] else inner


def _renamed(item: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any] | None:
    """None where two keys would have one name."""
    keys = [names.get(key, key) for key in item]
    return dict(zip(keys, item.values(), strict=True)) if len(set(keys)) == len(keys) else None
