"""The rows that a LLaMA-Factory file names: entries of `dataset_info.json` -> files, and what names are in them.

The keys of an entry and their defaults are those of LLaMA-Factory 0.9.5, from its `data/README.md`. As there, the
folder is relative to the one that the command runs in.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_core.other_tools.translation import NotOffered, Values
from lora_core.untrusted.text import quoted

Entry = Mapping[str, Any]

_FILE = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SHAREGPT = {"messages": "conversations"}
# What is read here whatever a file calls it, by LLaMA-Factory's name for it.
_TAGS: Mapping[str, tuple[str, ...]] = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content", "text"),
    "function_tag": ("function_call", "tool_call", "tool_calls"),
}
_ROLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "user_tag": ("user", ("human", "user")),
    "assistant_tag": ("assistant", ("gpt", "assistant")),
    "observation_tag": ("tool", ("observation", "tool", "function")),
    "system_tag": ("system", ("system",)),
}
_PAIRS = ("chosen", "rejected", "kto_tag")
_MEDIA = ("images", "videos", "audios")


def rows(values: Values) -> dict[str, Any]:
    """`data.train_file` or `data.train_files`, `data.columns` and `data.roles`."""
    entries = _entries(values, "dataset", "data.train_file=PATH")
    files = [_file(values, name, entry) for name, entry in entries.items()]
    one = files[0] if len(files) == 1 and isinstance(files[0], str) else None
    return ({"data.train_files": files} if one is None else {"data.train_file": one}) | _names_of_all(entries)


def eval_rows(values: Values) -> dict[str, Any]:
    """`data.eval_file`; what columns and roles are called must hold for the training rows too."""
    entries = _entries(values, "eval_dataset", "data.eval_file=PATH")
    files = [_file({**values, "max_samples": None}, name, entry) for name, entry in entries.items()]
    if len(files) > 1 or not isinstance(files[0], str):
        raise NotOffered("one file is the eval set here: data.eval_file=PATH")
    if values.get("dataset"):
        _names_of_all(entries | _entries(values, "dataset", "data.train_file=PATH"))
    return {"data.eval_file": files[0]}


def remarks(values: Values) -> Iterable[str]:
    """What is made otherwise of the rows that the file names."""
    try:
        entries = _entries(values, "dataset", "") if values.get("dataset") else {}
    except NotOffered:  # said of `dataset`
        return
    for name, entry in entries.items():
        if (entry.get("formatting") or "alpaca") == "alpaca" and (entry.get("columns") or _ALPACA).get("query"):
            yield (
                f"dataset: {name}: where a row has an input, LLaMA-Factory puts a line break between instruction and "
                "input, and lora_core an empty line"
            )


def _entries(values: Values, key: str, fix: str) -> dict[str, Entry]:
    """The entries that the file's `dataset` or `eval_dataset` names, by their names."""
    given, folder = values[key], values["dataset_dir"]
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise NotOffered(f"{key} is a list of names; {fix}")
    if folder == "ONLINE":
        return {name: {"hf_hub_url": name} for name in names}
    info = _read(folder, fix)
    unknown = [name for name in names if not isinstance(info.get(name), dict)]
    if unknown:
        raise NotOffered(f"{folder}/{_FILE} has no entry {quoted(unknown[0])}; {fix}")
    for name, part in itertools.product(names, ("columns", "tags")):
        if not isinstance(info[name].get(part) or {}, dict):
            raise NotOffered(f"{folder}/{_FILE}: {part} of {name} is no object; {fix}")
    return {name: info[name] for name in names}


def _read(folder: Any, fix: str) -> dict[str, Any]:
    if not isinstance(folder, str) or not (Path(folder) / _FILE).is_file():
        raise NotOffered(
            f"a name in {folder}/{_FILE}, which says where the rows are and is not here; {fix}, or dataset_dir: FOLDER"
        )
    try:
        info = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise NotOffered(f"{folder}/{_FILE} cannot be read ({error}); {fix}") from error
    return info if isinstance(info, dict) else {}


def _file(values: Values, name: str, entry: Entry) -> str | dict[str, Any]:
    """One of `data.train_files`."""
    if entry.get("hf_hub_url"):
        path = str(entry["hf_hub_url"])
    elif entry.get("file_name"):
        path = str(Path(values["dataset_dir"]) / str(entry["file_name"]))
    else:
        raise NotOffered(f"{name} is no file and no dataset of the Hugging Face hub; data.train_file=PATH")
    for key in ("subset", "folder", "num_samples"):
        if entry.get(key):
            raise NotOffered(
                f"{key} of {name} has no counterpart here; data.train_file=PATH of the rows that are meant"
            )
    split, limit = entry.get("split") or "train", values["max_samples"]
    details = {**({} if split == "train" else {"split": split}), **({"max_rows": int(limit)} if limit else {})}
    return {"path": path, **details} if details else path


def _names_of_all(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """`data.columns` and `data.roles`, where they are not what everybody calls them."""
    named = {name: _names(name, entry) for name, entry in entries.items()}
    first = next(iter(named))
    for name, (columns, _) in named.items():
        if columns != named[first][0]:
            raise NotOffered(
                f"{first} and {name} call their columns otherwise, and data.columns holds for all files; "
                "lora-core convert writes either as messages"
            )
    roles = {tag: role for _, of_entry in named.values() for tag, role in of_entry.items()}
    columns = named[first][0]
    return ({"data.columns": columns} if columns else {}) | ({"data.roles": roles} if roles else {})


def _names(name: str, entry: Entry) -> tuple[dict[str, str], dict[str, str]]:
    """(columns, roles) of one file."""
    kind, columns = entry.get("formatting") or "alpaca", entry.get("columns")
    default = _ALPACA if kind == "alpaca" else _SHAREGPT
    columns = {key: column for key, column in (default if columns is None else columns).items() if column}
    if entry.get("ranking") or any(key in columns for key in _PAIRS):
        raise NotOffered(f"{name} holds preference pairs, and replies are trained here; data.train_file=PATH")
    if any(key in columns for key in _MEDIA):
        raise NotOffered(f"{name} holds images, videos or audio, and text alone is trained here; data.train_file=PATH")
    if kind not in ("alpaca", "sharegpt", "openai"):
        raise NotOffered(f"{name} is formatted as {quoted(kind)}; data.train_file=PATH, with data.columns")
    beside = {key: columns[key] for key in ("system", "tools") if columns.get(key, key) != key}
    if kind == "alpaca":
        return _of_pair(name, columns) | beside, {}
    messages = columns.get("messages")
    if messages is None:
        raise NotOffered(f"{name} names no column of messages; data.columns={{messages: NAME}}")
    usual = messages in ("messages", "conversations", "conversation")
    return ({} if usual else {"messages": messages}) | beside, _roles(name, entry.get("tags") or {})


def _of_pair(name: str, columns: Mapping[str, str]) -> dict[str, str]:
    prompt, response = columns.get("prompt"), columns.get("response")
    if prompt is None or response is None:
        raise NotOffered(f"{name} names no prompt or no response; data.columns={{prompt: NAME, completion: NAME}}")
    for key, ours in (("query", "input"), ("history", "history")):
        if columns.get(key, ours) != ours:
            raise NotOffered(f"{key} of {name} is the column {ours} here; rename {quoted(columns[key])} in the file")
    return {} if (prompt, response) == ("instruction", "output") else {"prompt": prompt, "completion": response}


def _roles(name: str, tags: Mapping[str, str]) -> dict[str, str]:
    """`{"user_tag": "customer"}` -> `{"customer": "user"}`, without the names that are read anyway."""
    for tag, usual in _TAGS.items():
        if tags.get(tag, usual[0]) not in usual:
            raise NotOffered(f"{tag} of {name} is one of {', '.join(usual)} here; lora-core convert reads no other")
    return {tags[tag]: role for tag, (role, usual) in _ROLES.items() if tags.get(tag, usual[0]) not in usual}
