"""One turn of a row, as any of the usual tools writes it, -> messages as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_core.data.json_values import checked_text, is_empty, kind
from lora_core.data.tool_use import parse_call, parse_calls, tool_answer
from lora_core.errors import RowError
from lora_core.untrusted.text import quoted

Message = dict[str, Any]
"""What chat templates take: role and content; an assistant's may have reasoning_content and tool_calls, a tool's answer
name and tool_call_id."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""What a role is called, in small letters, and what templates call it."""

WEIGHTS = ("weight", "loss_weight", "train", "training", "loss")
"""Whether a turn is trained on, or how much: OpenAI's `weight`, ms-swift's `loss`, Axolotl's `train` and `training`."""

_CONTENT = ("content", "value", "text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", None})
_REASONING_PARTS = frozenset({"reasoning", "thinking", "think"})
_CALL_PARTS = frozenset({"tool_use", "tool_call", "function_call", "function"})
_MEDIA = ("image", "audio", "video", "file", "document", "input_image", "input_audio", "input_file")


@dataclass
class Turn:
    """What one turn says."""

    messages: list[Message] = field(default_factory=list)
    """Usually one. Answers of tools inside a user's turn, as Anthropic writes them, come before it."""
    weight: float = 1.0
    """Of the loss on an assistant's turn; 0 leaves it out."""
    tools: Any = None
    """Schemas that stand in the turn."""


@dataclass
class _Parts:
    """A content that is a list of parts, sorted by kind."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)


def parse_turn(turn: Any, where: str, roles: Mapping[str, str], unused: set[str]) -> Turn:
    """Read one turn.

    Args:
        where: `turn 3`, for messages.
        roles: what roles are called here, beside `ROLES`.
        unused: keys that nothing is made of are added to it, as `messages.KEY`.

    Raises:
        RowError: names what is wrong in it, and what is accepted.
    """
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} must be an object with role and content, not {kind(turn)}")
    said_role = turn.get("role", turn.get("from"))
    role_key = said_role.strip().lower() if isinstance(said_role, str) else ""
    role = roles.get(str(said_role)) or ROLES.get(role_key)
    if role is None:
        raise RowError(
            f"{where} has the role {quoted(said_role)}; known roles: {', '.join(ROLES)}; fix: data.roles={{NAME: "
            "user}} (or assistant, system, tool)"
        )
    content = _one_of(turn, _CONTENT, where)
    weight = _weight(turn, role, where)
    names = {"role", "from", "tool_calls", "function_call", "name", "tool_call_id", "tools", *_CONTENT, *_REASONING}
    unused |= {f"messages.{key}" for key, item in turn.items() if key not in {*names, *WEIGHTS} and not is_empty(item)}
    result = Turn(weight=weight, tools=turn.get("tools"))
    if role == "tool":
        result.messages = [_tool_message(turn, content, where)]
        return result
    if role_key in ("function_call", "tool_call"):  # ShareGPT: the content is the call
        result.messages = [{"role": role, "content": "", "tool_calls": parse_calls(content, where, unused)}]
        return result
    parts = _parts(content, where, unused)
    calls = parts.calls + _calls_beside(turn, role, where, unused)
    reasoning = _reasoning(turn, parts, role, where)
    if content is None and not calls and reasoning is None:
        raise RowError(f"{where}: content must be a string, not null")
    message: Message = {"role": role, "content": "".join(parts.texts)}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if not is_empty(turn.get("name")):  # some templates show who speaks
        message["name"] = checked_text(turn["name"], f"{where}: name")
    if not is_empty(turn.get("tool_call_id")):
        unused.add("messages.tool_call_id")
    is_only_answers = bool(parts.answers) and not parts.texts
    result.messages = parts.answers if is_only_answers else [*parts.answers, message]
    return result


def _one_of(turn: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value under the first of these keys that has one.

    Raises:
        RowError: two of them have different values.
    """
    given = [key for key in keys if not is_empty(turn.get(key))]
    if any(turn[key] != turn[given[0]] for key in given[1:]):
        raise RowError(f"{where} has both {given[0]} and {given[1]}, and they differ; keep one")
    for key in given or keys:
        if turn.get(key) is not None:
            return turn[key]
    return None


def _weight(turn: Mapping[str, Any], role: str, where: str) -> float:
    given = [key for key in WEIGHTS if turn.get(key) is not None]
    if not given:
        return 1.0
    values = {key: turn[key] for key in given}
    for key, value in values.items():
        if not isinstance(value, (bool, int, float)) or not 0 <= value < float("inf"):
            raise RowError(f"{where}: {key} must be a bool or a float of 0 or more, not {quoted(value)}")
    if len({float(value) for value in values.values()}) > 1:
        raise RowError(f"{where} has {' and '.join(given)}, which differ; keep one")
    weight = float(next(iter(values.values())))
    if role == "assistant":
        return weight
    if weight != 0 and given[0] in ("train", "training", "loss"):
        raise RowError(
            f"{where}: {given[0]}={quoted(turn[given[0]])} on a {role} turn, and only assistant turns are trained; "
            "fix: data.train_on=everything, or leave the key out"
        )
    return 1.0


def _tool_message(turn: Mapping[str, Any], content: Any, where: str) -> Message:
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(_part_text(part, where) for part in content)
    message: Message = {"role": "tool", "content": tool_answer(content, f"{where}: content")}
    # Some templates show which tool or call an answer belongs to.
    for key in ("name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            message[key] = checked_text(turn[key], f"{where}: {key}")
    return message


def _calls_beside(turn: Mapping[str, Any], role: str, where: str, unused: set[str]) -> list[dict[str, Any]]:
    # OpenAI's old way has one call, in function_call.
    given = [turn[key] for key in ("tool_calls", "function_call") if not is_empty(turn.get(key))]
    if given and role != "assistant":
        raise RowError(f"{where} has tool_calls, but the role {role!r}; only an assistant calls tools")
    return [call for calls in given for call in parse_calls(calls, where, unused)]


def _reasoning(turn: Mapping[str, Any], parts: _Parts, role: str, where: str) -> str | None:
    beside = _one_of(turn, _REASONING, where)
    if is_empty(beside) and not parts.reasoning:
        return None
    if role != "assistant":
        raise RowError(f"{where} has reasoning, but the role {role!r}; only an assistant reasons")
    if not is_empty(beside) and parts.reasoning:
        raise RowError(f"{where} has reasoning beside its content and in it; keep one")
    return "".join(parts.reasoning) if is_empty(beside) else checked_text(beside, f"{where}: reasoning")


def _parts(content: Any, where: str, unused: set[str]) -> _Parts:
    parts = _Parts()
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        part_kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or _is_text_part(part):
            parts.texts.append(_part_text(part, where))
        elif not isinstance(part, Mapping):
            raise RowError(f"{where}: content must be a string, not {kind(content)}")
        elif part_kind in _REASONING_PARTS:
            text = _one_of(part, (*_REASONING, *_CONTENT), where)
            parts.reasoning.append(checked_text(text, f"{where}: {part_kind} part"))
        elif part_kind in _CALL_PARTS:
            inner = part.get("tool_call", part.get("function_call", part))
            parts.calls.append(parse_call(inner, where, unused))
        elif part_kind == "tool_result":
            parts.answers.append(_tool_message({"tool_call_id": part.get("tool_use_id")}, part.get("content"), where))
        elif str(part_kind).startswith(_MEDIA):
            raise RowError(
                f"{where} holds a part of type {quoted(part_kind)}; only text is trained; fix: leave such rows out"
            )
        elif not part or isinstance(content, Mapping):
            raise RowError(f"{where}: content must be a string, not {kind(content)}")
        else:
            raise RowError(
                f"{where} holds a part of type {quoted(part_kind)}; known types: text, reasoning, thinking, tool_call, "
                "tool_use, tool_result"
            )
    return parts


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and any(part.get(k) is not None for k in _CONTENT)
    )


def _part_text(part: Any, where: str) -> str:
    text = part if isinstance(part, str) else _one_of(part, _CONTENT, where)
    return checked_text(text, f"{where}: content")
