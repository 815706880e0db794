"""The refusal of a row without columns of ours, with the `data.columns` that would read it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import ANSWERS, PAIRS, SYSTEM, TURNS, first
from lora_core.rows.json_values import is_empty, key_names
from lora_core.rows.refusals import our_role, role_of
from lora_core.rows.turn_lists import holds_turns, turns_of_transcript

# Other names, of which a refusal makes a fix: they say too little of a row to be read unasked.
_QUESTIONS = (*dict.fromkeys(question for question, _ in PAIRS), "inputs", "problem", "user", "human", "source_text")
_QUESTIONS += ("article", "document", "dialogue", "request", "user_input", "input_text", "user_message", "task", "text")
_QUESTIONS += ("text_input", "utterance", "context", "src", "source")  # last: in most rows it is where they are from
_REPLIES = (*dict.fromkeys(answer for _, answer in PAIRS if answer != "answers"), "targets", "target", "assistant")
_REPLIES += ("gpt", "bot", "solution", "generated_solution", "summary", "highlights", "canonical_solution", "code")
_REPLIES += (
    "reply",
    "output_text",
    "expected_output",
    "expectedoutput",
    "ideal",
    "assistant_message",
    "preferred_output",
    "reference_answer",
    "target_text",
    "tgt",
)
_ENDS = [
    re.compile(rf"(?:^|_)(?:{names})$")
    for names in ("question|prompt|query|problem", "answer|response|solution|output|reply")
]
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[_-][A-Za-z]{2,4})?")
_SEVERAL = re.compile(r"(.*(?:response|answer|output|completion|reply|generation|ref)_?)([abAB12])")
_DEFINITIONS = ("definition", "task_definition")
_BESIDE = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "reasoning": ("reasoning", "complex_cot", "cot", "chain_of_thought", "thinking", "thoughts", "rationale"),
}
_NAME = re.compile(r"[^\W\d][\w.]{,59}")
"""What stands in a list of `data.columns` as it is."""


def unknown_names(columns: Mapping[str, Any]) -> RowError:
    """The refusal of a row without a column of ours, with the names that it may have for them."""
    there = {name: value for name, value in _with_inner(columns) if _NAME.fullmatch(name) and not is_empty(value)}
    turns = next((name for name, value in there.items() if holds_turns(value)), None)
    texts = {name.lower().rpartition(".")[2]: name for name, value in there.items() if isinstance(value, str)}
    asked, replied = (_name_of(texts, keys, end) for keys, end in zip((_QUESTIONS, _REPLIES), _ENDS, strict=True))
    several = [name for name in texts.values() if _SEVERAL.fullmatch(name)]
    languages = [name for name in texts.values() if _LANGUAGE.fullmatch(name) and name not in ("id", "url")]
    if turns is not None:
        is_asked_only = replied is not None and all(our_role(turn) == "user" for turn in there[turns])
        fix = f'"data.columns={{messages: {turns}}}"'
        if is_asked_only:
            fix = f'"data.columns={{prompt: {turns}, completion: {replied}}}"'
        elif not all(map(role_of, there[turns])):  # rounds, of names that examples have too
            fix += ", if these are the rounds of one chat"
    elif isinstance(columns.get("translation"), Mapping) and len(columns["translation"]) > 1:
        one, other = [f"translation.{language}" for language in columns["translation"]][:2]
        fix = f'"data.columns={{prompt: {one}, completion: {other}}}", or the other way round'
    elif asked is not None and replied is not None:
        task = next((texts[key] for key in _DEFINITIONS if key in texts), None)
        named = {"prompt": asked, "completion": replied}
        if task is not None:
            named = {"prompt": task, "input": asked, "completion": replied}
        for ours, keys in _BESIDE.items():
            theirs = next((texts[key] for key in keys if key in texts and texts[key] not in named.values()), None)
            named |= {ours: theirs} if theirs is not None and (ours == "input" or theirs not in SYSTEM) else {}
        fix = f'"data.columns={{{", ".join(f"{ours}: {theirs}" for ours, theirs in named.items())}}}"'
    elif asked is not None and len(several) == 2:
        fix = " or ".join(f'"data.columns={{prompt: {asked}, completion: {name}}}"' for name in several)
    elif len(languages) == 2 and replied is None:
        one, other = languages
        fix = f'"data.columns={{prompt: {one}, completion: {other}}}", or the other way round'
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


def _name_of(texts: Mapping[str, str], keys: tuple[str, ...], end: re.Pattern[str]) -> str | None:
    """The first of these names that is there, or the only one that ends so."""
    known = next((texts[key] for key in keys if key in texts), None)
    others = [name for key, name in texts.items() if end.search(key)]
    return known if known is not None else others[0] if len(others) == 1 else None


def refuse_text_for_turns(columns: Mapping[str, Any], key: str) -> None:
    """Refuse a dialogue that is a text, where something is asked of it that stands beside it: a summary.

    Raises:
        RowError: names both.
    """
    if columns[key].lstrip().startswith(("[", "{")) or turns_of_transcript(columns[key]) is not None:
        return
    replied = next((name for name in _REPLIES if isinstance(columns.get(name), str) and columns[name].strip()), None)
    if replied is not None:
        raise RowError(
            f"has a text as its {key}, not a list of turns, and a {replied} beside it; fix: "
            f'"data.columns={{prompt: {key}, completion: {replied}}}"'
        )


def fix_for_no_reply(columns: Mapping[str, Any], turns: Sequence[Any]) -> str:
    """The fix where the reply stands beside the turns, or is of a role that is called system."""
    key, answer = first(columns, TURNS), first(columns, sorted(ANSWERS))
    if key is not None and answer is not None:
        return f'; fix: "data.columns={{prompt: {key}, completion: {answer}}}"'
    replies = [str(role_of(turn)) for turn in turns[1:] if our_role(turn) == "system"]
    return f'; fix: "data.roles={{{replies[0]}: assistant}}"' if replies and _NAME.fullmatch(replies[0]) else ""
