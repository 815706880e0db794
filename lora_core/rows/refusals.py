"""What is refused because something else would be learned than the row says, with the fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import ANSWERS, HISTORY, MEDIA, PAIRS, ROLE_KEYS, ROLES, TURNS, first
from lora_core.rows.json_values import is_empty, is_missing, strings
from lora_core.rows.reshape import fix, refuse_several_examples
from lora_core.rows.tool_use import are_schemas
from lora_core.rows.turn_lists import as_turns, turns_of_transcript
from lora_core.untrusted.text import quoted

_ASKED = tuple(dict.fromkeys(question for question, _ in PAIRS))
# What a question may need beside it. Where nothing is made of it, the model would learn to make it up.
_ASKED_TOO = ("instruction", "instructions", "question", "query", "prompt", "problem", "input")
_PASSAGES = (
    *("context", "contexts", "passage", "passages", "document", "documents", "paragraph", "article", "story"),
    *("background", "evidence", "knowledge"),
)
_BESIDE_TURNS = ("instruction", "instructions", "context", "contexts", "documents", "passages", *HISTORY)
LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:\s*["']""")
"""How a list of turns begins where it is written as text: as JSON, or as Python prints it."""
_NAME = re.compile(r"[^\W\d]\w{,59}")
_CHOICES = ("choices", "options", "option_a", "A")
_REPLIES_TOO = (*sorted(ANSWERS), "solution", "expected_output", "expectedOutput")

_PREFERENCES = (
    *(("win", "lose"), ("winner", "loser"), ("better", "worse"), ("good", "bad"), ("accepted", "rejected")),
    *(("preferred", "rejected"), ("preferred", "dispreferred"), ("chosen_response", "rejected_response")),
    *(("response_chosen", "response_rejected"), ("positive", "negative"), ("preferred_response", "rejected_response")),
)
"""Other names of a pair: the reply that is better, and the other one."""
_MEDIA_BESIDE = tuple(f"{what}_{how}" for what in MEDIA for how in ("url", "urls", "path", "paths", "file", "files"))
_MEDIA_BESIDE += ("img", "imgs", "img_path", "image_list", "screenshot", "screenshots", "pixel_values")
_MEDIA_MARKS = ("<image>", "<video>", "<audio>")
_WEIGHTS_OF_ALL = {"weights", "loss_weights", "loss_mask", "train_mask", "mask"}
_MEDIA = {*MEDIA}
_ANSWERS = sorted(ANSWERS)


def refuse_what_is_not_sft(columns: Mapping[str, Any], named: Collection[str]) -> None:
    """Refuse columns that nothing here is made of, and without which something else would be learned.

    Args:
        named: columns that `data.columns` gives a meaning.

    Raises:
        RowError: a preference pair, a reply that must not be learned, pictures or sound.
    """
    if not named:
        refuse_several_examples(columns)
    chosen = first(columns, ("chosen", "preferred_output")) or next(
        (better for better, worse in _PREFERENCES if _is_said(columns.get(better)) and _is_said(columns.get(worse))),
        None,
    )
    if chosen is not None and chosen not in named:
        raise RowError(
            f"holds {chosen!r}: a preference pair, and one reply is trained here; fix: "
            f'"data.columns={{{_columns_of_chosen(columns, chosen)}}}" to train the chosen ones'
        )
    for key in ("label", "kto_tag"):
        if key in columns and _is_unwanted(key, columns):
            shown = "false" if columns[key] is False else quoted(columns[key])
            raise RowError(
                f"has {key}={shown}: a reply that must not be learned; fix: leave such rows out (or that column, where "
                "it says something else)"
            )
    for key in sorted(columns.keys() & _WEIGHTS_OF_ALL):
        if isinstance(columns.get(key), list) and columns[key]:
            raise RowError(
                f"has a list of {key}, which may leave some turns out of training; fix: weight: 0 or weight: 1 in each "
                "turn"
            )
    for key in sorted(columns.keys() & _MEDIA):
        if not is_empty(columns.get(key)):
            raise RowError(f"holds {quoted(key)}; only text is trained; fix: leave such rows out")


def _is_said(value: Any) -> bool:
    return isinstance(value, (str, list)) and bool(value)


def _is_unwanted(key: str, columns: Mapping[str, Any]) -> bool:
    """Whether a label of KTO says so: false, as CSV writes it too; 0 where nothing else is labelled so."""
    label = columns.get(key)
    label = label.strip().lower() if isinstance(label, str) else label
    if label is False or label in ("false", "undesirable"):
        return True
    return label in (0, "0") and (key == "kto_tag" or "completion" in columns)


def _columns_of_chosen(columns: Mapping[str, Any], key: str) -> str:
    """What `data.columns` must say to train the reply under `chosen`."""
    chosen = columns[key]
    if isinstance(chosen, list) and role_of(chosen[0]) not in ("assistant", "gpt", "bot", "model"):
        return f"messages: {key}"  # the question is in it
    turns = first(columns, TURNS)
    if turns is None and isinstance(columns.get("input"), Mapping) and "messages" in columns["input"]:
        turns = "input.messages"  # of OpenAI
    if turns is not None:
        return f"prompt: {turns}, completion: {key}"
    question = next((question for question, _ in PAIRS if question in columns), None)
    if question is None and isinstance(chosen, str) and turns_of_transcript(chosen):
        return f"messages: {key}"  # HH-RLHF
    if question in (None, "prompt"):
        return f"text: {key}" if question is None else f"completion: {key}"
    return f"prompt: {question}, completion: {key}"


def role_of(turn: Any) -> Any:
    """What a turn calls its role; None if it has none."""
    key = first(turn, ROLE_KEYS) if isinstance(turn, Mapping) else None
    return None if key is None else turn[key]


def refuse_two_replies(columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str]) -> None:
    """Refuse a question with two replies that differ: which of them must be learned is not said.

    Args:
        used: the columns that the row was read from.
        names: of `data.columns`.

    Raises:
        RowError: names both.
    """
    question, answer = (next((key for key in keys if key in used), None) for keys in (_ASKED, _ANSWERS))
    if question is None or answer is None or not isinstance(columns[answer], str):
        return
    for other in _REPLIES_TOO:
        said = columns.get(other)
        if other not in used and isinstance(said, str) and said.strip() not in ("", columns[answer].strip()):
            asked = names.get(question, question)
            fixes = [f'"data.columns={{prompt: {asked}, completion: {reply}}}"' for reply in (answer, other)]
            raise RowError(f"has two replies, {answer} and {other}, and they differ; fix: {fixes[0]}, or {fixes[1]}")


def refuse_no_text(columns: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse what stands under `text` and is a list of turns, or one message of a chat.

    Raises:
        RowError: says which.
    """
    if "text" in names:
        return
    if LIST_OF_MESSAGES.match(str(columns["text"])):
        raise RowError(
            'has a list of turns as its text; fix: "data.columns={messages: text}", or "data.columns={text: text}" to '
            "train it as it stands"
        )
    if columns.get("type") == "message" and "ts" in columns:
        raise RowError(
            'is one message of a chat of Slack, and a row is a whole chat; fix: python -c "import json, sys; '
            "print(json.dumps({'messages': json.load(sys.stdin.buffer)}))\" < FILE > CHAT.jsonl, and then "
            f"{fix('chat-log').replace('FILE', 'CHAT.jsonl')}"
        )


def refuse_text_beside(columns: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse a text, of which all is trained, beside a question or a reply that would be left out.

    Args:
        names: of `data.columns`; where they say what the text is, nothing is refused.

    Raises:
        RowError: names both.
    """
    questions = [question for question, _ in PAIRS if question != "input"]
    for other in (*questions, *_ANSWERS, "target", "summary"):
        if "text" not in names and isinstance(columns.get(other), str) and columns[other].strip():
            asked, replied = (other, "text") if other in questions else ("text", other)
            raise RowError(
                f"has a text and {other} beside it, which would be left out; fix: "
                f'"data.columns={{prompt: {asked}, completion: {replied}}}", or "data.columns={{text: text}}" to train '
                "the text alone"
            )


def refuse_what_the_question_needs(
    columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str], said: Sequence[str]
) -> None:
    """Refuse a part of a question that the model would not see: a passage, choices, a second question.

    Args:
        used: the columns that the row was read from.
        names: of `data.columns`; where they say what the question is, nothing is refused.
        said: the texts of the turns. What stands in one of them is seen.

    Raises:
        RowError: names the column, and how it is shown or left out.
    """
    if {"prompt", "messages", "text"} & names.keys():
        return None
    _refuse_media_beside(columns, used)
    question, answer = (next((key for key in keys if key in used), None) for keys in (_ASKED, _ANSWERS))
    keys = _BESIDE_TURNS if question is None or answer is None else (*_ASKED_TOO, *_PASSAGES)
    beside = [key for key in keys if key in columns and key not in used]
    key = next((key for key in beside if _is_lost(columns[key], key, said)), None)
    if key is None or question is None or answer is None:
        if key is not None:
            turns = first(columns, TURNS)
            shown = (
                ""
                if not isinstance(columns[key], str)
                else f'"data.columns={{messages: {turns}, system: {key}}}" to show it first, or '
            )
            raise RowError(
                f"has {key} beside its turns, and the model would not see it; fix: {shown}"
                f'"data.columns={{messages: {turns}}}" to leave it out'
            )
        return _refuse_choices(columns, used, question, answer, said)
    pair = f"prompt: {question}, completion: {answer}"
    if not isinstance(columns[question], str) or not all(isinstance(text, str) for text in _listed(columns[key])):
        fix = f"write it into {question} as text"
    elif key in _ASKED_TOO and key != "input":
        fix = f'"data.columns={{prompt: {key}, input: {question}, completion: {answer}}}" to show both'
    else:
        fix = f'"data.columns={{{pair}, input: {key}}}" to show it after the question'
    raise RowError(
        f"has {key} beside its {question}, and the model would not see it; fix: {fix}, or "
        f'"data.columns={{{pair}}}" to leave it out'
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_lost(value: Any, key: str, said: Sequence[str]) -> bool:
    texts = [text.strip() for text in strings(list(value.values()) if isinstance(value, Mapping) else value)]
    texts = [text for text in texts if not is_missing(text)]
    if key in _PASSAGES:  # one word is a name, of a file say
        texts = [text for text in texts if re.search(r"\s", text)]
    return any(text and not any(text in each for each in said) for text in texts)


def _refuse_choices(
    columns: Mapping[str, Any], used: Collection[str], question: str | None, answer: str | None, said: Sequence[str]
) -> None:
    key = first(columns, _CHOICES)
    if question not in ("question", "query", "prompt", "input") or answer is None or key is None:
        return
    if key == "A" and "B" not in columns:
        return
    if key not in used and _is_lost(columns[key], key, said):
        raise RowError(
            f"has {key} beside its {question}, and the model would not see what there is to choose from; fix: "
            f'{fix("choices")}, or "data.columns={{prompt: {question}, completion: {answer}}}" to leave them out'
        )


def refuse_second_chat(
    columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str], messages: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse two lists of turns, or turns and a pair, that are not the same chat.

    Args:
        messages: that were read.

    Raises:
        RowError: names both.
    """
    turns = next((key for key in TURNS if key in used), None)
    if turns is None or {"prompt", "messages"} & names.keys():
        return
    for other in TURNS:
        value = columns.get(other)
        if other != turns and isinstance(value, list) and value and _said_in(as_turns(value)) != _said_in(messages):
            raise RowError(
                f"has two lists of turns, {turns} and {other}, and they differ; fix: "
                f'"data.columns={{messages: {turns}}}", or "data.columns={{messages: {other}}}"'
            )
    for question, answer in PAIRS:
        reply = columns.get(answer)
        is_pair = isinstance(columns.get(question), str) and isinstance(reply, str)
        if is_pair and not any(str(reply).strip() in message["content"] for message in messages):
            raise RowError(
                f"has {turns}, and a {question} with a {answer} that is not in them; fix: "
                f'"data.columns={{messages: {turns}}}", or '
                f'"data.columns={{prompt: {question}, completion: {answer}}}"'
            )


def _said_in(turns: Sequence[Any]) -> list[str]:
    """All that turns say but for their system texts, which may stand in a column of their own."""
    spoken = [turn for turn in turns if isinstance(turn, Mapping) and our_role(turn) != "system"]
    said = (turn[key] for turn in spoken if (key := first(turn, ("content", "value", "text"))) is not None)
    return [" ".join(strings(each)).strip() for each in said]


def our_role(turn: Any) -> str | None:
    """What templates call it."""
    return ROLES.get(str(role_of(turn)).strip().lower())


def _refuse_media_beside(columns: Mapping[str, Any], used: Collection[str]) -> None:
    """Refuse an address of a picture, which the question may be about."""
    key = first(columns, _MEDIA_BESIDE) if not columns.keys().isdisjoint(_MEDIA_BESIDE) else None
    if key is not None:
        raise RowError(
            f"has {key} beside its turns, and only text is trained; fix: leave such rows out, or "
            f'"data.columns={{{_columns_of(used)}}}" where the text does without it'
        )


def _columns_of(used: Collection[str]) -> str:
    """What `data.columns` says to read the same columns, and nothing is refused that stands beside them."""
    turns = next((key for key in TURNS if key in used), None)
    pair = next(((q, a) for q, a in PAIRS if q in used and a in used), None)
    return f"messages: {turns}" if pair is None else f"prompt: {pair[0]}, completion: {pair[1]}"


def refuse_bad_label(columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str]) -> None:
    """Refuse a chat with a label of 0, as tables have KTO's false.

    Raises:
        RowError: it may be a reply that must not be learned.
    """
    if columns.get("label") in (0, "0") and columns["label"] is not False and not {"prompt", "messages"} & names.keys():
        raise RowError(
            f"has label={quoted(columns['label'])}, which may say that the reply must not be learned; fix: leave such "
            f'rows out, or "data.columns={{{_columns_of(used)}}}" where it says something else'
        )


def refuse_media_marks(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a question about a picture that is not there: `<image>` where LLaVA and others put it.

    Raises:
        RowError: names the turn.
    """
    for number, message in enumerate(messages, start=1):
        said = message["content"]
        if message["role"] == "user" and (said.startswith(_MEDIA_MARKS) or said.endswith(_MEDIA_MARKS)):
            mark = next(mark for mark in _MEDIA_MARKS if said.startswith(mark) or said.endswith(mark))
            raise RowError(
                f"turn {number} has {mark} in place of what is asked about, and only text is trained; fix: leave such "
                "rows out"
            )


def refuse_tools_beside(columns: Mapping[str, Any], used: Collection[str], names: Mapping[str, str]) -> None:
    """Refuse schemas of tools under a name that is not read: the model would learn calls of tools that it never saw.

    Raises:
        RowError: names the column.
    """
    if {"prompt", "messages", "tools"} & names.keys():
        return
    for key in columns.keys() - used:
        if re.search("tool|function", key, re.IGNORECASE) and _NAME.fullmatch(key) and are_schemas(columns[key]):
            without = f"data.columns={{{_columns_of(used)}}}"
            raise RowError(
                f"has schemas of tools in its {key}, and the model would not see them; fix: "
                f'"data.columns={{tools: {key}}}" to show them, or "{without}" to leave them out'
            )
