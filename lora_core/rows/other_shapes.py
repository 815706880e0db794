"""Chats that well-known data sets write in a way of their own -> lists of turns, or a refusal that names the format.

    Glaive     {"system": "SYSTEM: ... {schema} ...", "chat": "USER: ...  ASSISTANT: ... <|endoftext|>"}
    MOSS       {"meta_instruction": "...", "chat": {"turn_1": {"Human": "<|Human|>: ...<eoh>", "MOSS": ...}}}
    UltraChat  {"id": "0", "data": ["question", "answer", "question", "answer"]}
    OASST      {"prompt": {"text": "...", "replies": [...]}}: a tree of replies, of which one path is a chat: refused
    rounds     [{"system": "...", "input": "...", "output": "..."}, ...]: a question and its answer in one object

Each is read only where it is exactly that: what does not fit refuses the row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import ROLE_KEYS, first
from lora_core.rows.json_values import is_empty, kind, read_json, read_json_values
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
)
"""What an object that is a whole round calls the question, and the answer."""

_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_TURN = re.compile(r"(?:\A\s*|\n\n)(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_END = "<|endoftext|>"
_GLAIVE_CALL = re.compile(r"""\{"name":\s*("[^"]*"),\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
_MOSS_TEXTS = {"Human": (r"<\|Human\|>:", "<eoh>"), "MOSS": (r"<\|MOSS\|>:", "<eom>")}
_MOSS_MARK = re.compile(r"<\|[A-Za-z ]{1,40}\|>:|<eo[a-z]>")
_FIRST_REPLIES = (
    "python -c \"import json, sys; path = lambda m: [{'role': m['role'], 'content': m['text']}] + "
    "(path(m['replies'][0]) if m.get('replies') else []); [print(json.dumps({'messages': "
    "path(json.loads(row)['prompt'])})) for row in open(sys.argv[1], encoding='utf-8')]\" FILE > NEW.jsonl"
)


def with_turns(columns: dict[str, Any]) -> dict[str, Any]:
    """The row with its turns under `messages`, where it is one of Glaive, MOSS or UltraChat; any other as it is.

    Raises:
        RowError: it is one of these, and not all of it can be read; or a tree of OASST.
    """
    chat, data = columns.get("chat"), columns.get("data")
    if isinstance(chat, str) and re.match(r"\s*(USER|ASSISTANT):", chat):
        return _glaive(columns, chat)
    if isinstance(chat, Mapping) and chat and all(_is_moss_turn(key, turn) for key, turn in chat.items()):
        return _moss(columns, chat)
    if columns.keys() <= {"id", "data"} and isinstance(data, list) and len(data) > 1 and _are_texts(data):
        roles = ("user", "assistant")
        turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(data)]
        return {"messages": turns, **{key: item for key, item in columns.items() if key == "id"}}
    tree = columns.get("prompt")
    if isinstance(tree, Mapping) and isinstance(tree.get("replies"), list) and "text" in tree:
        raise RowError(
            "is a tree of OpenAssistant: each message has several replies, and one chat is one path; fix, for the "
            f"first reply of each: {_FIRST_REPLIES}"
        )
    return columns


def turns_of_rounds(items: list[Any]) -> list[Any]:
    """Two turns for each object that is a question and its answer, and before them its system text; else the items."""
    pair = next((pair for pair in ROUNDS if items and all(_is_round(item, pair) for item in items)), None)
    if pair is None:
        return items
    question, answer = pair
    turns: list[Any] = []
    told = None
    for item in items:
        rest = {key: value for key, value in item.items() if key not in (*pair, "system")}
        if not is_empty(item.get("system")) and item["system"] != told:
            told = item["system"]
            turns.append({"role": "system", "content": told})
        turns.append({"role": "user", "content": item[question]})
        turns.append({**rest, "role": "assistant", "content": item[answer]})
    return turns


def _is_round(item: Any, pair: tuple[str, str]) -> bool:
    return isinstance(item, Mapping) and all(key in item for key in pair) and first(item, ROLE_KEYS) is None


def _are_texts(items: list[Any]) -> bool:
    return all(isinstance(item, str) for item in items)


def _glaive(columns: dict[str, Any], chat: str) -> dict[str, Any]:
    pieces = _GLAIVE_TURN.split(chat)
    roles, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    for role, text in zip(roles[:-1], texts[:-1], strict=True):
        if role == "ASSISTANT" and _GLAIVE_END in chat and not text.endswith(_GLAIVE_END):
            raise RowError(
                f"has a reply in its chat without {_GLAIVE_END}, so what follows may be a part of it; fix: leave such "
                "rows out"
            )
    turns = [_glaive_turn(role, text) for role, text in zip(roles, texts, strict=True)]
    rest = {key: item for key, item in columns.items() if key != "chat"}
    told = columns.get("system")
    if not isinstance(told, str):
        return {**rest, "messages": turns}
    if "tools" in columns:
        raise RowError("has tools beside a chat with them in its system text, as Glaive writes it; fix: leave one out")
    system, tools = _glaive_system(told)
    return {**rest, "messages": turns, "system": system, "tools": tools}


def _glaive_turn(role: str, text: str) -> dict[str, Any]:
    said = text.removesuffix(_GLAIVE_END).strip()
    if _GLAIVE_END in said:
        raise RowError(f"has a turn of {role} in its chat that goes on after {_GLAIVE_END}; fix: leave such rows out")
    before, mark, call = said.partition("<functioncall>")
    if role != "ASSISTANT" or not mark:
        return {"role": _GLAIVE_ROLES[role], "content": said}
    return {"role": "assistant", "content": before.strip(), "tool_calls": [_glaive_call(call.strip())]}


def _glaive_call(text: str) -> dict[str, Any]:
    """`{"name": "f", "arguments": '{"x": 1}'}`: JSON, but for the quotes around the arguments."""
    found = _GLAIVE_CALL.fullmatch(text)
    try:
        call = {"name": read_json(found[1]), "arguments": read_json(found[2])} if found else read_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"has a <functioncall> that is no JSON: {quoted(text)}; fix: leave such rows out") from error
    if not isinstance(call, dict):
        raise RowError(f"has a <functioncall> that is {kind(call)}, not an object; fix: leave such rows out")
    return call


def _glaive_system(text: str) -> tuple[str, list[Any]]:
    """(the text before the schemas, the schemas); all of it is text where something else follows it."""
    said = text.strip().removeprefix("SYSTEM:").strip()
    start = re.search(r"^\{", said, re.MULTILINE)
    if start is None:
        return said, []
    try:
        return said[: start.start()].strip(), read_json_values(said[start.start() :])
    except (ValueError, RecursionError):
        return said, []


def _is_moss_turn(key: str, turn: Any) -> bool:
    return re.fullmatch(r"turn_\d+", key) is not None and isinstance(turn, Mapping) and {"Human", "MOSS"} <= turn.keys()


def _moss(columns: dict[str, Any], chat: Mapping[str, Any]) -> dict[str, Any]:
    turns: list[Any] = []
    for key in sorted(chat, key=lambda name: int(name.removeprefix("turn_"))):
        others = {name: text for name, text in chat[key].items() if name not in _MOSS_TEXTS and not is_empty(text)}
        used = [name for name, text in others.items() if _MOSS_MARK.sub("", str(text)).strip() not in ("", "None")]
        if used:
            raise RowError(f"is a chat of MOSS with {quoted(used[0])} in {key}, which is not read; fix: leave such out")
        turns.append({"role": "user", "content": _moss_text(chat[key]["Human"], "Human")})
        turns.append({"role": "assistant", "content": _moss_text(chat[key]["MOSS"], "MOSS")})
    rest = {key: item for key, item in columns.items() if key not in ("chat", "meta_instruction")}
    if not is_empty(columns.get("meta_instruction")):
        if not is_empty(columns.get("system")):
            raise RowError("has both meta_instruction and system; keep one")
        rest["system"] = columns["meta_instruction"]
    return {**rest, "messages": turns}


def _moss_text(text: Any, name: str) -> Any:
    """Without the marks around it."""
    before, end = _MOSS_TEXTS[name]
    if not isinstance(text, str):
        return text
    said = re.sub(rf"\A\s*{before}", "", text)
    return said.strip().removesuffix(end).strip() if said != text else text
