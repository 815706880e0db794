"""Chats that well-known data sets write in a way of their own -> lists of turns, or a refusal that names the format.

    Glaive     {"system": "SYSTEM: ... {schema} ...", "chat": "USER: ...  ASSISTANT: ... <|endoftext|>"}
    MOSS       {"meta_instruction": "...", "chat": {"turn_1": {"Human": "<|Human|>: ...<eoh>", "MOSS": ...}}}
    UltraChat  {"id": "0", "data": ["question", "answer", "question", "answer"]}
    ChatGPT    {"mapping": {"id": {"message": {...}, "parent": "id"}}, "current_node": "id"}, of an export
    numbered   {"turn_1": {"user": "...", "assistant": "..."}, "turn_2": {...}}
    one name   {"rounds": [{"user": "...", "assistant": "..."}, ...]}, whatever it is called
    Self-Instruct  {"instruction": "...", "instances": [{"input": "...", "output": "..."}]}
    SQuAD      {"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [0]}}
    OASST      {"prompt": {"text": "...", "replies": [...]}}: a tree of replies, of which one path is a chat: refused

Each is read only where it is exactly that: what does not fit refuses the row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import first
from lora_core.rows.json_values import is_empty, kind, read_json, read_json_values
from lora_core.rows.reshape import KINDS, fix
from lora_core.rows.turn_lists import is_chat_of_rounds, numbered_items
from lora_core.untrusted.text import quoted

_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_TURN = re.compile(r"(?:\A\s*|\n\n)(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_END = "<|endoftext|>"
_GLAIVE_CALL = re.compile(r"""\{"name":\s*("[^"]*"),\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
_MOSS_TEXTS = {"Human": (r"<\|Human\|>:", "<eoh>"), "MOSS": (r"<\|MOSS\|>:", "<eom>")}
_MOSS_MARK = re.compile(r"<\|[A-Za-z ]{1,40}\|>:|<eo[a-z]>")


def with_turns(columns: dict[str, Any]) -> dict[str, Any]:
    """The row with its turns under `messages`, where it is one of these; any other as it is.

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
    if isinstance(columns.get("mapping"), Mapping) and "current_node" in columns:
        return _chatgpt(columns)
    if isinstance(columns.get("instances"), list) and len(columns["instances"]) == 1 and "instruction" in columns:
        rest = {key: item for key, item in columns.items() if key != "instances"}
        (instance,) = columns["instances"]
        return {**rest, **instance} if isinstance(instance, Mapping) and not rest.keys() & instance.keys() else columns
    numbered = {key: item for key, item in columns.items() if re.fullmatch(r"turn_?\d+", key)}
    in_order = numbered_items(numbered)
    if in_order is not None:
        return {**{key: item for key, item in columns.items() if key not in numbered}, "messages": in_order}
    chats = [key for key, item in columns.items() if is_chat_of_rounds(item)]
    if len(chats) == 1:
        return {"messages" if key in chats else key: item for key, item in columns.items()}
    tree = columns.get("prompt")
    if isinstance(tree, Mapping) and isinstance(tree.get("replies"), list) and "text" in tree:
        raise RowError(f"is {KINDS['tree'].what}; fix: {fix('tree')}")
    return columns


def without_verdict(columns: dict[str, Any]) -> dict[str, Any]:
    """A row of Prodigy without `answer`, which says what the annotator did with it; any other as it is.

    Raises:
        RowError: the annotator rejected or ignored it.
    """
    if "_task_hash" not in columns or columns.get("answer") not in ("accept", "reject", "ignore"):
        return columns
    if columns["answer"] != "accept":
        raise RowError(f"has answer={quoted(columns['answer'])}, of Prodigy; fix: leave such rows out")
    return {key: item for key, item in columns.items() if key != "answer"}


def with_one_answer(columns: dict[str, Any]) -> dict[str, Any]:
    """The row with `answer` for SQuAD's `answers`, which all say the same; any other as it is.

    Raises:
        RowError: they differ, or there is none.
    """
    given = columns.get("answers")
    if given is None:
        return columns
    question = first(columns, ("question", "query"))
    texts = given["text"] if isinstance(given, Mapping) and isinstance(given.get("text"), list) else given
    if question is None or "answer" in columns or not isinstance(texts, list):
        return columns
    said = [text.get("text") if isinstance(text, Mapping) and "name" not in text else text for text in texts]
    if not all(isinstance(text, str) and not text.lstrip().startswith("{") for text in said):
        return columns  # calls, as xLAM has them
    if len({str(text).strip() for text in said}) != 1:
        if not said:
            raise RowError("is a question without an answer in its answers; fix: leave such rows out")
        raise RowError(f"has {len(said)} answers, and they differ; fix: {fix('first-answer')}")
    rest = {key: item for key, item in columns.items() if key != "answers"}
    beside = {key: item for key, item in given.items() if key != "text"} if isinstance(given, Mapping) else {}
    return {**rest, **{f"answers.{key}": item for key, item in beside.items()}, "answer": said[0]}


def _chatgpt(columns: dict[str, Any]) -> dict[str, Any]:
    """An exported chat of ChatGPT is a tree; what the user saw is the path to `current_node`."""
    mapping, node = columns["mapping"], columns["current_node"]
    path: list[Any] = []
    while node is not None:
        step = mapping.get(node) if isinstance(node, str) else None
        if not isinstance(step, Mapping) or len(path) > len(mapping):
            raise RowError("is a chat of ChatGPT whose current_node leads to no beginning; fix: leave such rows out")
        path.append(step.get("message"))
        node = step.get("parent")
    turns = []
    for message in reversed(path):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content.get("parts") if isinstance(content, Mapping) else None
        if not isinstance(content, Mapping) or (isinstance(parts, list) and not any(parts)):
            continue  # the root, and system turns without a text
        is_text = content.get("content_type") == "text" and isinstance(parts, list)
        author = message.get("author")
        if not is_text or not isinstance(author, Mapping) or message.get("recipient", "all") != "all":
            raise RowError(
                f"is a chat of ChatGPT with a message of the type {quoted(content.get('content_type'))} for "
                f"{quoted(message.get('recipient', 'all'))}; plain text is read; fix: leave such rows out"
            )
        turns.append({"role": author.get("role"), "content": parts})
    rest = {key: item for key, item in columns.items() if key not in ("mapping", "current_node")}
    return {**rest, "messages": turns}


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
