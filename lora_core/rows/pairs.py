"""A question and its answer in columns of their own -> turns.

{"instruction": "q", "input": "...", "output": "a"}     what belongs to the question follows it
{"prompt": "q", "response": "a", "history": [...]}      earlier rounds go before it
{"prompt": [{"role": ...}], "completion": [...]}        lists of messages, also as JSON text in a cell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import HISTORY, ROLES, first
from lora_core.rows.json_values import checked_text, fix_for_text, from_json, is_missing, kind
from lora_core.rows.refusals import LIST_OF_MESSAGES
from lora_core.rows.turn_lists import as_turns, turns_of_transcript

_INPUT = {
    "instruction": ("input", "context"),
    "question": ("context", "input"),
    "query": ("context", "input"),
    "prompt": ("input",),
}
"""What belongs to a question, and follows it."""


def question_and_answer(
    columns: Mapping[str, Any], question: str, answer: str
) -> tuple[set[str], Sequence[Any], Sequence[Any]]:
    used = {question, answer}
    asked = columns[question]
    extra = first(columns, _INPUT.get(question, ()))
    if extra is not None and isinstance(asked, str) and not is_missing(columns[extra]):
        asked = "\n\n".join(text for text in (asked, _extra_text(columns[extra], extra)) if text)
        used.add(extra)
    history = first(columns, HISTORY)
    rounds = _history(columns[history], history) if history is not None else []
    used |= {history} if history is not None else set()
    prompt = [*rounds, *_as_turns("user", asked, question)]
    if answer == "answers":  # xLAM: a list of calls
        return used, prompt, [{"role": "assistant", "tool_calls": columns[answer]}]
    return used, prompt, _as_turns("assistant", columns[answer], answer)


def _extra_text(value: Any, column: str) -> str:
    """What belongs to the question; of a list, such as passages that were found, all texts."""
    texts = value if isinstance(value, list) and all(isinstance(text, str) for text in value) else [value]
    return "\n\n".join(checked_text(text, column) for text in texts)


def _as_turns(role: str, said: Any, column: str) -> Sequence[Any]:
    """A text as one turn; a list of messages, or one message, as it is."""
    if isinstance(said, str) and LIST_OF_MESSAGES.match(said):  # in a cell of a CSV file
        listed = from_json(said, column)
        asks = any(isinstance(turn, Mapping) and ROLES.get(str(turn.get("role"))) == "user" for turn in listed)
        is_one = role == "user" or not asks
        said = listed if is_one else said
    if role == "user" and isinstance(said, str) and said.endswith(("Assistant:", "Assistant: ")):
        said = turns_of_transcript(said) or said
    if isinstance(said, Mapping) and ("role" in said or "from" in said):
        return [said]
    turns = as_turns(said) if isinstance(said, list) and said else []
    if turns and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns):
        return turns
    if not isinstance(said, str):
        raise RowError(f"{column} must be a string or a list of messages, not {kind(said)}{fix_for_text(said)}")
    return [{"role": role, "content": said}]


def _history(value: Any, column: str) -> list[Any]:
    """Earlier rounds: `[[question, answer], ...]`, messages, or either as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = from_json(value, column)
    if not isinstance(value, list):
        raise RowError(f"{column} must be a list of rounds, not {kind(value)}")
    turns = as_turns(value)
    for number, item in enumerate(turns, start=1):
        if not isinstance(item, Mapping):
            raise RowError(f"{column}: round {number} must be [question, answer], not {kind(item)}")
    return turns
