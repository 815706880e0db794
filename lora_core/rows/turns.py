"""One turn of a chat, as any of the usual tools writes it, -> messages as chat templates take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import MEDIA, ROLE_KEYS, ROLES, first
from lora_core.rows.json_values import checked_text, fix_for_text, is_empty, key_names, kind, says_nothing
from lora_core.rows.keyed_parts import with_types
from lora_core.rows.tool_use import parse_call, parse_calls, tool_answer
from lora_core.untrusted.text import quoted

Message = dict[str, Any]
"""What chat templates take: role and content; an assistant's may have reasoning_content and tool_calls, a tool's answer
name and tool_call_id."""

WEIGHTS = ("weight", "loss_weight", "train", "training", "loss")
"""Whether a turn is trained on, or how much: OpenAI's `weight`, ms-swift's `loss`, Axolotl's `train` and `training`."""

_MARKERS = {
    "mask",
    "loss_mask",
    "step_loss_mask",
    "train_detail",
    "training_detail",
    "train_on_turn",
    "trainable",
    "is_trainable",
    "masked",
    "is_masked",
    "ignore",
    "ignore_loss",
    "loss_weights",
}
"""Other tools' marks for what is trained of a turn: not read, so refused."""

_CONTENT = ("content", "value", "text", "message", "utterance")
_REASONING = ("reasoning_content", "reasoning", "thinking", "tool_plan")
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_REASONING_PARTS = ("reasoning", "thinking", "think")
_CALL_PARTS = ("tool_use", "tool_call", "function_call", "function")
_CALLS_IN_PARTS = ("tool_call", "function_call")
_CALL_ROLES = ("function_call", "tool_call", "tool_calls", "tool_use")
_MEDIA = ("image", "audio", "video", "file", "document", "input_image", "input_audio", "input_file")
_MEDIA_KEYS = {*MEDIA}
_OTHER_CALLS = ("function_calls", "toolCalls", "tool_call", "tool_uses")
"""What some call an assistant's calls, where others have something else."""
_SCHEMAS = ("tools", "functions")
_BESIDE = (*ROLE_KEYS, "tool_calls", "function_call", "name", "tool_call_id", *_SCHEMAS)
_KEYS = frozenset({*_BESIDE, *_CONTENT, "parts", *_REASONING, *WEIGHTS})


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
    role_key, role = _role(turn, where, roles, unused)
    for key in sorted(turn.keys() & _MARKERS):
        if not is_empty(turn.get(key)):
            raise RowError(
                f"{where} has {key}, which may leave some of it out of training; fix: weight: 0 or weight: 1"
            )
    for key in sorted(turn.keys() & _MEDIA_KEYS):
        if not is_empty(turn.get(key)):
            raise RowError(f"{where} holds {quoted(key)}; only text is trained; fix: leave such rows out")
    if turn.get("label") is not None and str(turn["label"]).strip().lower() in ("false", "0"):
        raise RowError(
            f"{where} has label={quoted(turn['label'])}, which may say that it must not be learned; fix: weight: 0, or "
            "leave the key out"
        )
    if role == "assistant" and turn.get("channel") in ("analysis", "commentary"):  # of gpt-oss
        raise RowError(
            f"{where} has the channel {turn['channel']}, so it is no reply; fix: its text as reasoning_content of the "
            "reply that follows it"
        )
    content = with_types(_one_of(turn, (*_CONTENT, "parts"), where))
    result = Turn(weight=_weight(turn, role, where), tools=_schemas(turn))
    known = _KEYS | _other_calls(turn) if role == "assistant" else _KEYS
    if role == "assistant" and is_empty(content) and not is_empty(turn.get("refusal")):
        # OpenAI: what the assistant said in place of a content.
        content, known = checked_text(turn["refusal"], f"{where}: refusal"), known | {"refusal"}
    unused |= {
        f"messages.{key}"
        for key, item in turn.items()
        if key not in known and not is_empty(item) and not (key == "type" and item == "message")
    }
    if role_key in _CALL_ROLES:  # ShareGPT: the content is the call
        parts = _Parts(calls=_calls_of_content(content, turn, where, unused))
    elif role == "tool" and not _holds(content, "tool_result"):
        parts = _Parts(answers=[_tool_message(turn, content, where, unused)])
    else:
        parts = _parts(content, where, unused)
        names = ("tool_call_id",) if role != "tool" else ("tool_call_id", "name")
        unused |= {f"messages.{key}" for key in names if not is_empty(turn.get(key))}
    calls, reasoning = _calls(turn, parts, role, where, unused), _reasoning(turn, parts, role, where)
    if parts.answers and role == "assistant":
        raise RowError(f"{where} has a tool's answer, but the role 'assistant'; fix: role tool")
    if parts.answers and not parts.texts:
        unused |= {"messages.name"} if role != "tool" and not is_empty(turn.get("name")) else set()
        result.messages = parts.answers
        return result
    if content is None and not calls and reasoning is None:
        raise RowError(f"{where}: content must be a string, not null")
    message: Message = {"role": role, "content": "".join(parts.texts)}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if not is_empty(turn.get("name")):  # some templates show who speaks
        message["name"] = checked_text(turn["name"], f"{where}: name")
    result.messages = [*parts.answers, message]
    return result


def _role(turn: Mapping[str, Any], where: str, roles: Mapping[str, str], unused: set[str]) -> tuple[str, str]:
    """(the role in small letters, what templates call it)."""
    given = [key for key in ROLE_KEYS if not is_empty(turn.get(key))]
    if not given:
        raise RowError(f"{where} has no role, but the keys {key_names(turn)}; fix: a role and a content in each turn")
    said = turn[given[0]]
    said = said.get("role") if isinstance(said, Mapping) else said  # ChatGPT: {"author": {"role": "user"}}
    unused |= {f"messages.{key}" for key in given[1:] if turn[key] != said}
    named = roles.get(str(said), said)
    role_key = named.strip().lower().replace("-", "_") if isinstance(named, str) else ""
    role = ROLES.get(role_key)
    if role is None:
        of_settings = f" ({quoted(named)} by data.roles)" if named != said else ""
        name = said if isinstance(said, str) and re.fullmatch(r"[^\W\d]\w{,39}", said) else "NAME"
        raise RowError(
            f"{where} has the role {quoted(said)}{of_settings}; known roles: {', '.join(ROLES)}; fix: "
            f'"data.roles={{{name}: user}}" (or assistant, system, tool)'
        )
    return role_key, role


def _plain(value: Any) -> Any:
    """The text of a list with one part of text alone, which says no more; anything else as it is."""
    (part,) = value if isinstance(value, list) and len(value) == 1 else (None,)
    return part["text"] if isinstance(part, Mapping) and part.get("type") == "text" and "text" in part else value


def _one_of(turn: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value under the first of these keys that has one.

    Raises:
        RowError: two of them have different values.
    """
    given = [key for key in keys if not is_empty(turn.get(key))]
    if any(_plain(turn[key]) != _plain(turn[given[0]]) for key in given[1:]):
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
            "fix: leave the key out (data.train_on=everything trains all text)"
        )
    return 1.0


def _tool_message(turn: Mapping[str, Any], content: Any, where: str, unused: set[str]) -> Message:
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(_part_text(part, where, unused) for part in content)
    for part in content if isinstance(content, list) else []:
        # A tool may answer with an object of type "file"; a part with a source or a URL is none.
        if isinstance(part, Mapping) and ("source" in part or str(part.get("type")) in part):
            _refuse_media(part, where)
    answer = "" if content is None else tool_answer(content, f"{where}: content")
    message: Message = {"role": "tool", "content": answer}
    # Some templates show which tool or call an answer belongs to.
    for key in ("name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            message[key] = checked_text(turn[key], f"{where}: {key}")
    return message


def _other_calls(turn: Mapping[str, Any]) -> frozenset[str]:
    if turn.keys().isdisjoint(_OTHER_CALLS):
        return frozenset()
    of_calls = [key for key in _OTHER_CALLS if isinstance(turn.get(key), (str, list, Mapping))]
    return frozenset(key for key in of_calls if not says_nothing(turn[key]))


def _schemas(turn: Mapping[str, Any]) -> Any:
    return next((turn[key] for key in _SCHEMAS if not says_nothing(turn.get(key))), None)


def _calls_of_content(content: Any, turn: Mapping[str, Any], where: str, unused: set[str]) -> list[dict[str, Any]]:
    """The calls of a turn whose role says that it is one."""
    if isinstance(content, str) and not content.lstrip().startswith(("[", "{")):
        role = next(turn[key] for key in ROLE_KEYS if not is_empty(turn.get(key)))
        raise RowError(
            f"{where}: tool_calls is not valid JSON, but a text with the role {quoted(role)}; fix: "
            f'"data.roles={{{role}: assistant}}" to train it as text'
        )
    return parse_calls(content, where, unused)


def _calls(turn: Mapping[str, Any], parts: _Parts, role: str, where: str, unused: set[str]) -> list[dict[str, Any]]:
    """The calls in the content, or beside it; OpenAI's old way has one, in function_call."""
    # Where there is a reply too, "[]" and the like say that there is no call.
    said_nothing = says_nothing if any(map(str.strip, parts.texts)) else is_empty
    given = [key for key in ("tool_calls", "function_call") if not said_nothing(turn.get(key))]
    given += sorted(_other_calls(turn)) if role == "assistant" else []
    if role != "assistant" and (given or parts.calls):
        raise RowError(f"{where} has tool_calls, but the role {role!r}; only an assistant calls tools")
    beside = [parse_calls(turn[key], where, unused) for key in given]
    several = [calls for calls in (parts.calls, *beside) if calls]
    functions = [[call["function"] for call in calls] for calls in several]
    if any(each != functions[0] for each in functions[1:]):
        raise RowError(f"{where} has tool calls in two places ({' and '.join(['content', *given][-2:])}); keep one")
    if any("id" in call and call not in several[0] for calls in several for call in calls):
        unused.add("tool_calls.id")
    return several[0] if several else []


def _reasoning(turn: Mapping[str, Any], parts: _Parts, role: str, where: str) -> str | None:
    beside = _one_of(turn, _REASONING, where)
    inside = "".join(parts.reasoning)
    if role != "assistant" and (inside or not is_empty(beside)):
        raise RowError(f"{where} has reasoning, but the role {role!r}; only an assistant reasons")
    if is_empty(beside):
        return inside or None
    if inside and inside != beside:
        raise RowError(f"{where} has reasoning beside its content and in it; keep one")
    return checked_text(beside, f"{where}: reasoning")


def _parts(content: Any, where: str, unused: set[str]) -> _Parts:
    parts = _Parts()
    for part in content if isinstance(content, list) else [] if content is None else [content]:
        part_kind = part.get("type") if isinstance(part, Mapping) else None
        _refuse_media(part, where)
        if isinstance(part, str) or _is_text_part(part):
            parts.texts.append(_part_text(part, where, unused))
        elif not isinstance(part, Mapping):
            raise RowError(f"{where}: content must be a string, not {kind(content)}{fix_for_text(content)}")
        elif part_kind in _REASONING_PARTS:
            text = _one_of(part, (*_REASONING, *_CONTENT), where)
            parts.reasoning.append(checked_text(text, f"{where}: {part_kind} part"))
            _note_unused(part, (*_REASONING, *_CONTENT), unused)
        elif part_kind in _CALL_PARTS:
            key = first(part, _CALLS_IN_PARTS)
            parts.calls.append(parse_call(part if key is None else part[key], where, unused))
            _note_unused(part, tuple(part) if key is None else (key,), unused)
        elif part_kind == "tool_result":
            said = {"tool_call_id": part.get("tool_use_id"), "name": part.get("name")}
            parts.answers.append(_tool_message(said, part.get("content"), where, unused))
            _note_unused(part, ("tool_use_id", "name", "content"), unused)
        else:
            raise _unknown_part(part, part_kind, content, where)
    return parts


def _note_unused(part: Any, known: tuple[str, ...], unused: set[str]) -> None:
    unused |= {f"content.{key}" for key, item in part.items() if key not in ("type", *known) and not is_empty(item)}


def _refuse_media(part: Any, where: str) -> None:
    part_kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and part_kind is None and "text" not in part:  # {"image": "a.png"}
        part_kind = first(part, MEDIA)
    if isinstance(part_kind, str) and part_kind.startswith(_MEDIA):
        raise RowError(
            f"{where} holds a part of type {quoted(part_kind)}; only text is trained; fix: leave such rows out"
        )


def _unknown_part(part: Mapping[str, Any], part_kind: Any, content: Any, where: str) -> RowError:
    if not part or isinstance(content, Mapping):
        return RowError(f"{where}: content must be a string, not {kind(content)}{fix_for_text(content)}")
    if part_kind in _TEXT_PARTS:
        return RowError(f"{where} holds a part without a text, but with the keys {key_names(part)}")
    return RowError(
        f"{where} holds a part of type {quoted(part_kind)}; known types: text, reasoning, thinking, tool_call, "
        "tool_use, tool_result"
    )


def _holds(content: Any, part_kind: str) -> bool:
    """Whether a content is a list of parts of this kind."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, Mapping) and part.get("type") == part_kind for part in content)
    )


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and any(part.get(k) is not None for k in _CONTENT)
    )


def _part_text(part: Any, where: str, unused: set[str]) -> str:
    text = part if isinstance(part, str) else _one_of(part, _CONTENT, where)
    if text is not part:
        _note_unused(part, _CONTENT, unused)
    return checked_text(text, f"{where}: content")
