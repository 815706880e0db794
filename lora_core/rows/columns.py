"""What rows call their turns and pairs, and the columns that change what must be learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.json_values import is_empty
from lora_core.untrusted.text import quoted

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
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
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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
    for key in _MEDIA:
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
    return turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
