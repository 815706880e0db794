"""The rows that an Axolotl file names under `datasets` and `test_datasets`: which files, and what names are in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_core.config.data_schema import TURN_ROLES
from lora_core.other_tools.translation import NotOffered, Values, short
from lora_core.untrusted.text import quoted

# Rows that are read here whatever Axolotl's prompt for them; of `alpaca:chat` too, which says how a prompt is worded.
_READ_TYPES = (None, "alpaca", "chat_template", "sharegpt", "completion", "input_output")
# Loaders of `datasets` by format: `path: json` with the files in `data_files`.
_FORMATS = ("json", "csv", "parquet", "arrow", "text")

# What is made of a dataset's keys here, and what its values may be for rows to be read as they are.
_TAKEN = (
    *("path", "type", "split", "revision", "data_files", "name", "ds_type", "field", "field_messages", "roles"),
    "message_property_mappings",
)
_AS_HERE: Mapping[str, tuple[Any, ...]] = {
    "role": ("role", "from"),
    "content": ("content", "value", "text"),
    "message_field_role": ("role", "from"),
    "message_field_content": ("content", "value", "text"),
    "message_field_training": ("training", "train", "weight"),
    "field_thinking": ("reasoning_content", "reasoning", "thinking"),
    "field_tools": ("tools",),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]),
    "chat_template": ("tokenizer_default",),
    "train_on_eos": ("turn",),
    "train_on_eot": ("turn",),
    "template_thinking_key": ("reasoning_content", "reasoning", "thinking"),
}


def rows(values: Values) -> dict[str, Any]:
    """`data.train_file` or `data.train_files`, and what columns and roles are called."""
    given = _datasets(values)
    types = [each.get("type") for each in given]
    kinds = {kind.split(":")[0] if isinstance(kind, str) else kind for kind in types if not isinstance(kind, dict)}
    unread = any(isinstance(kind, dict) for kind in types)
    if unread or not kinds <= set(_READ_TYPES):
        named = "a format of its own" if unread else ", ".join(sorted(map(str, kinds - set(_READ_TYPES))))
        raise NotOffered(
            f"rows of type {named} are not made here; data.train_file=PATH, with data.columns and data.roles"
        )
    files = [file for each in given for file in _train_files(each)]
    made: dict[str, Any] = {"data.train_file": files[0]} if files == [str(files[0])] else {"data.train_files": files}
    columns = {each["field_messages"] for each in given if each.get("field_messages")}
    if columns and columns != {"messages"}:
        if len(columns) > 1:
            raise NotOffered("one name for the column of messages: data.columns={messages: NAME}")
        made["data.columns"] = {"messages": columns.pop()}
    roles = {name: role for each in given for name, role in _roles(each).items()}
    if roles:
        made["data.roles"] = roles
    if kinds == {"completion"}:
        fields = {each.get("field") or "text" for each in given}
        made |= {"data.train_on": "everything"} | (
            {"data.columns": {"text": fields.pop()}} if fields != {"text"} else {}
        )
    return made


def eval_rows(values: Values) -> dict[str, Any]:
    """`data.eval_file`."""
    given = values["test_datasets"]
    if not given:
        return {}
    if len(given) > 1 or not isinstance(given[0], dict) or given[0].get("split", "train") != "train":
        raise NotOffered("one file is the eval set here: data.eval_file=PATH")
    paths = _paths(given[0])
    if len(paths) > 1:
        raise NotOffered("one file is the eval set here: data.eval_file=PATH")
    return {"data.eval_file": paths[0]}


def remarks(values: Values) -> Iterable[str]:
    """What a dataset says of its rows beside what `rows` takes: keys inside a list have no line of their own."""
    given = values.get("datasets")
    for each in given if isinstance(given, list) else []:
        if isinstance(each, dict):
            left = [f"{short(key)}={short(value)}" for key, value in _names(each) if not _is_taken(key, value)]
            if left:
                yield (
                    f"datasets: of {quoted(each.get('path'))} not taken over: {', '.join(left)}; lora-core rows shows "
                    "what becomes of a row, and data.columns, data.roles and data.train_on say what is read and trained"
                )


def _names(each: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The keys of a dataset, and those of its mapping of a turn's keys."""
    yield from each.items()
    mapping = each.get("message_property_mappings")
    yield from mapping.items() if isinstance(mapping, dict) else []


def _is_taken(key: str, value: Any) -> bool:
    if value in (None, False, [], {}, key):
        return True
    return value in _AS_HERE[key] if key in _AS_HERE else key in _TAKEN


def _datasets(values: Values) -> list[dict[str, Any]]:
    given = values["datasets"]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise NotOffered("no rows are named; data.train_file=PATH")
    return given


def _roles(each: Mapping[str, Any]) -> dict[str, str]:
    """`{user: [customer]}` -> `{customer: user}`, without the roles that are called so here too."""
    named = each.get("roles") or {}
    unknown = [role for role in named if role not in TURN_ROLES]
    if unknown:
        raise NotOffered(f"the roles here are {', '.join(TURN_ROLES)}: data.roles={{customer: user}}")
    return {name: role for role, names in named.items() for name in names if name != role}


def _paths(each: Mapping[str, Any]) -> list[str]:
    """The files of one dataset, or its name on the hub."""
    path, files = each.get("path"), each.get("data_files")
    if not isinstance(path, str) or each.get("name"):
        raise NotOffered("each of data.train_files is a path, with split and weight")
    if not files:
        return [path]
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise NotOffered("data_files is a file, or a list of files: data.train_files=[PATH, ...]")
    if path not in _FORMATS and not Path(path).is_dir():
        raise NotOffered(f"single files of {quoted(path)} cannot be named here; data.train_file=PATH of a copy")
    return [*names]


def _train_files(each: Mapping[str, Any]) -> list[str | dict[str, Any]]:
    split = each.get("split") or "train"
    revision = each.get("revision")
    if split == "train" and revision is None:
        return [*_paths(each)]
    with_path = {**({"split": split} if split != "train" else {}), **({"revision": revision} if revision else {})}
    return [{"path": path, **with_path} for path in _paths(each)]
