"""Calls of a model as APIs answer them and as logs keep them -> `prompt` and `completion`, as lists of messages.

    {"messages": [...], "choices": [{"message": {...}}]}                    a stored completion of OpenAI
    {"input": [...] or "q", "instructions": "s", "output": [{"type": ...}]} a response of OpenAI's Responses API
    {"request": {"messages": [...]}, "response": {"choices": [...]}}        a line of a log, as of Vertex or a proxy
    {"inputs": {"messages": [...]}, "outputs": {...}}                       a run of LangSmith
    {"input": {"messages": [...]}, "output": {...}}                         a trace of Langfuse

What stands beside the messages in the call is passed on under `request.KEY`, so that it is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import ROLE_KEYS, ROLES, SYSTEM, TOOLS, first
from lora_core.rows.json_values import is_empty
from lora_core.rows.keyed_parts import with_our_names
from lora_core.untrusted.text import quoted

_CALLS = (("request", "response"), ("inputs", "outputs"), ("input", "output"), ("body", "response"))
"""Where a log has what was asked, and what was answered."""
_HOLDERS = {"choices", *(key for pair in _CALLS for key in pair)}
_ASKED = ("messages", "input")
_ANSWERED = ("choices", "candidates", "generations", "message", "content", "output", "messages", "body", "response")
"""Inside an answer: under which keys its message is, from the outside to the inside."""
_END_REASONS = ("finish_reason", "finishReason", "stop_reason")
_ENDED_WELL = ("stop", "tool_calls", "function_call", "STOP", "end_turn", "tool_use", "stop_sequence", "eos")


def with_logged_call(columns: dict[str, Any]) -> dict[str, Any]:
    """The row with `prompt` and `completion`, where it is one of these; any other as it is.

    Raises:
        RowError: it has several answers, or one that begins with messages of its own.
    """
    if all(isinstance(columns[key], str) for key in columns.keys() & _HOLDERS):
        return columns
    beside: dict[str, Any] = {}
    if isinstance(columns.get("choices"), list) and isinstance(columns.get("messages"), list):
        answer = _messages_of({"choices": columns["choices"]}, "", beside)
        return columns if answer is None else _as_pair(columns, ("messages", "choices"), answer, beside)
    if _are_items(columns.get("output")) and not is_empty(columns.get("input")):
        return _as_pair(columns, ("input", "output"), columns["output"], beside)
    for asked, answered in _CALLS:
        call = columns.get(asked)
        call = with_our_names(dict(call)) if isinstance(call, Mapping) else {}
        inside = first(call, _ASKED)
        answer = _messages_of(columns.get(answered), answered, beside) if inside is not None else None
        if inside is not None and answer is not None:
            lifted = {key: call[key] for key in (*SYSTEM, *TOOLS, "instructions") if not is_empty(call.get(key))}
            twice = next((key for key in lifted if not is_empty(columns.get(key))), None)
            if twice is not None:
                raise RowError(f"has {twice} in its {asked} and beside it; keep one")
            others = {f"{asked}.{key}": item for key, item in call.items() if key not in (inside, *lifted)}
            rest = {key: item for key, item in columns.items() if key != answered}
            return _as_pair(rest | lifted | others | {asked: call[inside]}, (asked, answered), answer, beside)
    return columns


def _as_pair(
    columns: Mapping[str, Any], used: tuple[str, str], answer: list[Any], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Args:
        used: the column with the messages that were asked, and that of the answer.
        beside: what the answer says beside its messages, which is counted.
    """
    asked = columns[used[0]]
    rest = {key: item for key, item in columns.items() if key not in used}
    if isinstance(rest.get("instructions"), str) and first(rest, SYSTEM) is None:
        rest["system"] = rest.pop("instructions")
    if isinstance(asked, list) and answer[: len(asked)] == asked:  # the whole chat, as LangGraph answers
        answer = answer[len(asked) :]
    roles = [item.get(key) for item in answer[:1] if (key := first(item, ROLE_KEYS)) is not None]
    if roles and ROLES.get(str(roles[0]).lower()) != "assistant":
        raise RowError(
            f"has an answer in its {used[1]} that begins with a turn of {quoted(roles[0])}; fix: the reply alone there"
        )
    return {**rest, **beside, "prompt": asked, "completion": answer}


def _are_items(value: Any) -> bool:
    """Whether it is the output of the Responses API."""
    return (
        isinstance(value, list)
        and all(isinstance(item, Mapping) and isinstance(item.get("type"), str) for item in value)
        and any(item["type"] in ("message", "function_call") for item in value)
    )


def _messages_of(answer: Any, where: str, beside: dict[str, Any]) -> list[Any] | None:
    """The messages of an answer; None where it has none that is read.

    Args:
        where: the keys that lead to it.
        beside: what stands beside them is added to it.

    Raises:
        RowError: it has several answers.
    """
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(answer, list):
        are_messages = all(isinstance(item, Mapping) and first(item, ROLE_KEYS) is not None for item in answer)
        if _are_items(answer) or (answer and are_messages):
            return [*answer]
        if len(answer) > 1:
            raise RowError(f"has {len(answer)} answers in {where or 'it'}, and one is trained; fix: keep one")
        return _messages_of(answer[0], where, beside) if answer else None
    if not isinstance(answer, Mapping):
        return None
    if first(answer, ROLE_KEYS) is not None or answer.get("type") in ("ai", "constructor"):
        return [answer]
    inside = first(answer, _ANSWERED)
    if inside is None:
        return None
    path = f"{where}.{inside}".lstrip(".")
    for key, item in answer.items():
        is_noise = key == "index" or (key in _END_REASONS and item in _ENDED_WELL)
        if key != inside and not is_noise and not (key == "text" and isinstance(answer[inside], Mapping)):
            beside[f"{where}.{key}".lstrip(".")] = item
    return _messages_of(answer[inside], path, beside)
