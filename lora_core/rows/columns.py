"""What rows call their columns, and the columns that change what must be learned."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.json_values import is_empty, key_names
from lora_core.rows.keyed_parts import with_our_names
from lora_core.untrusted.text import quoted

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
"""Where the role of a turn stands: under the first of these that says something."""

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("query", "answers"),
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)
ANSWERS = frozenset(answer for _, answer in PAIRS)
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
TOOLS = ("tools", "functions")
_OPTIONAL = (*SYSTEM, *TOOLS, "history", "input", "reasoning")
"""Columns that some rows lack: Parquet and Arrow give a row without its null columns."""

# Other names, of which a refusal makes a fix: they say too little of a row to be read unasked.
_QUESTIONS = (*dict.fromkeys(question for question, _ in PAIRS), "inputs", "problem", "user", "human", "source_text")
_QUESTIONS += ("article", "document", "dialogue", "request", "user_input", "task", "text")
_REPLIES = (*dict.fromkeys(answer for _, answer in PAIRS if answer != "answers"), "targets", "target", "assistant")
_REPLIES += (
    "gpt",
    "bot",
    "solution",
    "generated_solution",
    "summary",
    "highlights",
    "canonical_solution",
    "code",
    "reply",
)
_BESIDE = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "reasoning": ("reasoning", "complex_cot", "cot", "chain_of_thought", "thinking", "thoughts", "rationale"),
}
_NAME = re.compile(r"[^\W\d][\w.]{,59}")
"""What stands in a list of `data.columns` as it is."""

_WEIGHTS_OF_ALL = ("weights", "loss_weights", "loss_mask", "train_mask", "mask")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def first(columns: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that holds something."""
    return next((key for key in keys if not is_empty(columns.get(key))), None)


def refuse_what_is_not_sft(columns: Mapping[str, Any], named: Collection[str]) -> None:
    """Refuse columns that nothing here is made of, and without which something else would be learned.

    Args:
        named: columns that `data.columns` gives a meaning.

    Raises:
        RowError: a preference pair, a reply that must not be learned, pictures or sound.
    """
    if not is_empty(columns.get("chosen")) and "chosen" not in named:
        raise RowError(
            "holds 'chosen': a preference pair, and one reply is trained here; fix: "
            f'"data.columns={{{_columns_of_chosen(columns)}}}" to train the chosen ones'
        )
    for key in ("label", "kto_tag"):
        if _is_unwanted(key, columns):
            shown = "false" if columns[key] is False else quoted(columns[key])
            raise RowError(
                f"has {key}={shown}: a reply that must not be learned; fix: leave such rows out (or that column, where "
                "it says something else)"
            )
    for key in _WEIGHTS_OF_ALL:
        if isinstance(columns.get(key), list) and columns[key]:
            raise RowError(
                f"has a list of {key}, which may leave some turns out of training; fix: weight: 0 or weight: 1 in each "
                "turn"
            )
    for key in MEDIA:
        if not is_empty(columns.get(key)):
            raise RowError(f"holds {quoted(key)}; only text is trained; fix: leave such rows out")


def _is_unwanted(key: str, columns: Mapping[str, Any]) -> bool:
    """Whether a label of KTO says so: false, as CSV writes it too; 0 where nothing else is labelled so."""
    label = columns.get(key)
    label = label.strip().lower() if isinstance(label, str) else label
    if label is False or label in ("false", "undesirable"):
        return True
    return label in (0, "0") and (key == "kto_tag" or "completion" in columns)


def _columns_of_chosen(columns: Mapping[str, Any]) -> str:
    """What `data.columns` must say to train the reply under `chosen`."""
    chosen = columns["chosen"]
    if isinstance(chosen, list) and _role_of(chosen[0]) not in ("assistant", "gpt"):
        return "messages: chosen"  # the question is in it
    turns = first(columns, TURNS)
    if turns is not None:
        return f"prompt: {turns}, completion: chosen"
    question = next((question for question, _ in PAIRS if question in columns), None)
    if question in (None, "prompt"):
        return "text: chosen" if question is None else "completion: chosen"
    return f"prompt: {question}, completion: chosen"


def _role_of(turn: Any) -> Any:
    key = first(turn, ROLE_KEYS) if isinstance(turn, Mapping) else None
    return None if key is None else turn[key]


def under_our_names(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row without its null columns.

    Args:
        names: of `data.columns`: ours -> the file's, which may be that of a key inside a column (`body.messages`).

    Raises:
        RowError: a column that is named is not there.
    """
    missing = [theirs for ours, theirs in names.items() if ours not in _OPTIONAL and not _is_there(row, theirs)]
    if missing:
        raise RowError(f"has no {quoted(missing[0])}, which data.columns names; it has the keys {key_names(row)}")
    rest = {key: item for key, item in row.items() if key not in names}
    for theirs in names.values():
        rest = _without(rest, theirs)
    columns = {**rest, **{ours: _value_at(row, theirs) for ours, theirs in names.items()}}
    return with_our_names({str(key): item for key, item in columns.items() if item is not None})


def _inside(row: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any], str] | None:
    """(column, what it holds, key inside) of `body.messages`; None where that is a column itself, or is none."""
    column, dot, rest = name.partition(".")
    inner = row.get(column)
    return (column, inner, rest) if dot and name not in row and isinstance(inner, Mapping) else None


def _is_there(row: Mapping[str, Any], name: str) -> bool:
    inside = _inside(row, name)
    return name in row if inside is None else _is_there(inside[1], inside[2])


def _value_at(row: Mapping[str, Any], name: str) -> Any:
    inside = _inside(row, name)
    return row.get(name) if inside is None else _value_at(inside[1], inside[2])


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    """What is left of a row beside a column, or beside a key inside one."""
    inside = _inside(row, name)
    if inside is None:
        return {key: item for key, item in row.items() if key != name}
    column, inner, rest = inside
    return {**row, column: _without(dict(inner), rest)}


def holds_turns_or_pair(columns: Mapping[str, Any]) -> bool:
    """Whether the chat stands under names that everybody uses."""
    return first(columns, TURNS) is not None or any(q in columns and a in columns for q, a in PAIRS)


def refuse_two_replies(columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str]) -> None:
    """Refuse a question with two replies that differ: which of them must be learned is not said.

    Args:
        used: the columns that the row was read from.
        names: of `data.columns`.

    Raises:
        RowError: names both.
    """
    question, answer = (next((key for key in keys if key in used), None) for keys in (_QUESTIONS, sorted(ANSWERS)))
    if question is None or answer is None or not isinstance(columns[answer], str):
        return
    for other in (*sorted(ANSWERS), "solution"):
        said = columns.get(other)
        if other not in used and isinstance(said, str) and said.strip() not in ("", columns[answer].strip()):
            asked = names.get(question, question)
            fixes = [f'"data.columns={{prompt: {asked}, completion: {reply}}}"' for reply in (answer, other)]
            raise RowError(f"has two replies, {answer} and {other}, and they differ; fix: {fixes[0]}, or {fixes[1]}")


def refuse_text_beside(columns: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse a text, of which all is trained, beside a question or a reply that would be left out.

    Args:
        names: of `data.columns`; where they say what the text is, nothing is refused.

    Raises:
        RowError: names both.
    """
    questions = [question for question, _ in PAIRS if question != "input"]
    for other in (*questions, *sorted(ANSWERS), "target", "summary"):
        if "text" not in names and isinstance(columns.get(other), str) and columns[other].strip():
            asked, replied = (other, "text") if other in questions else ("text", other)
            raise RowError(
                f"has a text and {other} beside it, which would be left out; fix: "
                f'"data.columns={{prompt: {asked}, completion: {replied}}}", or "data.columns={{text: text}}" to train '
                "the text alone"
            )


def unknown_names(columns: Mapping[str, Any]) -> RowError:
    """The refusal of a row without a column of ours, with the names that it may have for them."""
    there = {name: value for name, value in _with_inner(columns) if _NAME.fullmatch(name) and not is_empty(value)}
    turns = next((name for name, value in there.items() if _is_turns(value)), None)
    texts = {name.lower().rpartition(".")[2]: name for name, value in there.items() if isinstance(value, str)}
    asked, replied = (next((texts[key] for key in keys if key in texts), None) for keys in (_QUESTIONS, _REPLIES))
    if turns is not None:
        fix = f'"data.columns={{messages: {turns}}}"'
    elif asked is not None and replied is not None:
        named = {"prompt": asked, "completion": replied}
        for ours, keys in _BESIDE.items():
            theirs = next((texts[key] for key in keys if key in texts and texts[key] not in named.values()), None)
            named |= {ours: theirs} if theirs is not None and (ours == "input" or theirs not in SYSTEM) else {}
        fix = f'"data.columns={{{", ".join(f"{ours}: {theirs}" for ours, theirs in named.items())}}}"'
    else:
        fix = '"data.columns={messages: NAME}" (or {prompt: NAME, completion: NAME}, or {text: NAME})'
    return RowError(
        f"has the keys {key_names(columns)}; needs 'messages', 'conversations', 'text', or a pair such as 'prompt' and "
        f"'completion', 'instruction' and 'output', 'question' and 'answer'; fix: {fix}"
    )


def _with_inner(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name as `data.columns` takes it, value) of each column, and of each key inside one."""
    yield from columns.items()
    for key, item in columns.items():
        if isinstance(item, Mapping):
            yield from ((f"{key}.{inner}", value) for inner, value in item.items())


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(_role_of(turn) is not None for turn in value)
