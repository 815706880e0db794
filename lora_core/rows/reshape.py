"""Rows that hold several examples, or a choice between replies: refused, and written as rows by `lora-core convert`.

Which of them is meant, or how it is put into words, is not for a reader to decide unasked; `--kind NAME` asks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.errors import RowError
from lora_core.rows.columns import TURNS
from lora_core.rows.json_values import is_empty

TEXTS_IN_TURN = (*TURNS, "utterances", "turns")
"""Columns that may hold the texts of a talk without saying who says them."""
_LEFT_OUT = re.compile(
    r"\u200e?(?:<Media omitted>|<attached: .*>|(?:image|video|audio|sticker|GIF|document|Contact card) omitted"
    r"|(?:This message was deleted|You deleted this message)\.?)"
)
"""What WhatsApp writes in place of what is not in the file."""

Row = dict[str, Any]
Rows = list[Row | None]
"""None for each example that is left out, to be counted."""


@dataclass(frozen=True)
class Kind:
    """A kind of rows that is not read as it is."""

    keys: frozenset[str]
    """A row that has all of them is of this kind; none where a refusal tells it in another way."""
    what: str
    effect: str
    """What `rows` gives."""
    rows: Callable[[Row, str], Rows]
    """A row, and the name of `--reply-of` -> the rows that are read, with what is beside them in the row."""


def fix(name: str) -> str:
    """The command that writes rows of a file of this kind."""
    whose = " --reply-of NAME" if name == "chat-log" else ""
    return f"lora-core convert FILE --output NEW.jsonl --kind {name}{whose} (writes {KINDS[name].effect})"


def refuse_several_examples(columns: Mapping[str, Any]) -> None:
    """
    Raises:
        RowError: names the kind, and the command that makes rows of it.
    """
    if not columns.keys().isdisjoint(_TELLING_KEYS):
        for name, each in KINDS.items():
            if each.keys and each.keys <= columns.keys():
                raise RowError(f"is {each.what}; fix: {fix(name)}")
    is_told_by_number = "answerKey" in columns or isinstance(columns.get("answer"), int)
    if "question" in columns and is_told_by_number and _has_choices(columns):
        raise RowError(f"is {KINDS['choices'].what}; fix: {fix('choices')}")
    for key in TEXTS_IN_TURN:
        texts = columns.get(key)
        if isinstance(texts, list) and _are_texts(texts) and not texts[0].lstrip().startswith("{"):
            raise RowError(f"is {KINDS['taking-turns'].what} (its {key}); fix: {fix('taking-turns')}")
    messages = columns.get("messages")
    if isinstance(messages, list) and any(map(_is_of_a_log, messages)):
        raise RowError(f"is {KINDS['chat-log'].what}; fix: {fix('chat-log')}")


def reshaped(row: Any, name: str, reply_of: str) -> Rows:
    """The rows that a row of this kind stands for; None for each example in it that is left out.

    Raises:
        RowError: it is not of this kind.
    """
    try:
        return KINDS[name].rows(row, reply_of)
    except KeyError as error:
        raise RowError(f"is not {KINDS[name].what}: it has no {error.args[0]}") from error
    except (TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        raise RowError(f"is not {KINDS[name].what}: {error or type(error).__name__}") from error


def _rest(row: Mapping[str, Any], *used: str) -> Row:
    """What is beside it in the row, for the reader to read, count or refuse."""
    return {key: item for key, item in row.items() if key not in used}


def _below(name: str, rest: Row) -> Row:
    """The same of a part of the row: it is counted by a name of its own."""
    return {f"{name}.{key}": item for key, item in rest.items()}


def _winner(row: Row, _: str) -> Rows:
    names = {"model_a": "conversation_a", "model_b": "conversation_b"}
    if row["winner"] not in names:  # a tie
        return [None]
    return [{**_rest(row, *names.values(), "winner"), "messages": row[names[row["winner"]]]}]


def _better(row: Row, _: str) -> Rows:
    rest = _rest(row, "response_0", "response_1", "better_response_id")
    return [{**rest, "completion": row[f"response_{int(row['better_response_id'])}"]}]


def _highest_score(row: Row, _: str) -> Rows:
    best = max(row["completions"], key=lambda each: float(each["overall_score"]))
    beside = _below("completions", _rest(best, "response", "overall_score"))
    return [{**_rest(row, "completions"), **beside, "output": best["response"]}]


def _instances(row: Row, _: str) -> Rows:
    return [{**_rest(row, "instances"), **each} for each in row["instances"]]


def _squad(row: Row, _: str) -> Rows:
    return [
        {
            **_rest(row, "paragraphs"),
            **_below("paragraphs", _rest(part, "context", "qas")),
            **_below("qas", _rest(asked, "question", "answers")),
            **{"question": asked["question"], "context": part["context"], "answer": asked["answers"][0]["text"]},
        }
        if asked["answers"]
        else None
        for part in row["paragraphs"]
        for asked in part["qas"]
    ]


def _first_answer(row: Row, _: str) -> Rows:
    answers = row["answers"]
    first, *_ = answers["text"] if isinstance(answers, Mapping) else answers
    return [{**_rest(row, "answers"), "answer": first if isinstance(first, str) else first["text"]}]


def _label_studio(row: Row, _: str) -> Rows:
    asked = next(key for key, text in row["data"].items() if isinstance(text, str))
    rest = {**_rest(row, "data", "annotations"), **_below("data", _rest(row["data"], asked))}
    results = [result for each in row["annotations"] if not each.get("was_cancelled") for result in each["result"]]
    written = [result["value"]["text"] for result in results if result["type"] == "textarea"]
    texts = [text if isinstance(text, str) else "\n".join(text) for text in written]
    return [{**rest, "prompt": row["data"][asked], "completion": text} for text in texts] or [None]


def _first_replies(row: Row, _: str) -> Rows:
    message, turns = row["prompt"], []
    while message is not None:
        turns.append({"role": message["role"], "content": message["text"]})
        message = next(iter(message.get("replies") or []), None)
    return [{**_rest(row, "prompt"), "messages": turns}]


def _argilla(row: Row, _: str) -> Rows:
    """Both ways of Argilla: a list of each annotator's values, and a list of answers for each question."""
    fields, given = row["fields"], row["responses"]
    asked = next(key for key, value in fields.items() if isinstance(value, (str, list)) and value)
    rest = {**_rest(row, "fields", "responses"), **_below("fields", _rest(fields, asked))}
    if isinstance(given, Mapping):
        said = [{"status": "submitted", "value": None, **each} for name in given for each in given[name] or []]
    else:
        said = [{**each, "value": value["value"]} for each in given for value in (each["values"] or {}).values()]
    texts = [each["value"] for each in said if isinstance(each["value"], str) and each["status"] == "submitted"]
    num_others = sum(each["status"] != "submitted" for each in said)
    rows: Rows = [{**rest, "prompt": fields[asked], "completion": text} for text in texts]
    return [*rows, *[None] * num_others] or [None]


def _taking_turns(row: Row, _: str) -> Rows:
    key = next((key for key in TEXTS_IN_TURN if _are_texts(row.get(key))), None)
    if key is None:
        raise ValueError("it has no list of strings")
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(row[key])]
    return [{**_rest(row, key), "messages": turns}]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def _choices(row: Row, _: str) -> Rows:
    """`A. text` in a line for each choice after the question, and the right one of these lines as the reply."""
    asked = row["question"]
    question = asked["stem"] if isinstance(asked, Mapping) else asked
    options = _labelled(row)
    answers = ("answerKey", "answer", "answer_idx", "label")
    right = next(row[key] for key in answers if not is_empty(row.get(key)))
    rest = _rest(row, "question", "choices", "options", *filter(_is_choice, row), *answers)
    for number, (label, text) in enumerate(options):
        if right in (label, text) or (type(right) is int and right == number):
            lines = [f"{name}. {said}" for name, said in options]
            return [{**rest, "prompt": "\n".join([question, *lines]), "completion": f"{label}. {text}"}]
    raise ValueError(f"none of the choices is its answer {right!r}")


def _is_choice(key: str) -> bool:
    """Of a row with a column for each."""
    return key in [*"ABCDEFGH"] or key.startswith("option_")


def _has_choices(columns: Mapping[str, Any]) -> bool:
    inside = columns["question"] if isinstance(columns["question"], Mapping) else {}
    return any(not is_empty(held.get(key)) for held in (columns, inside) for key in ("choices", "options", "option_a"))


def _labelled(row: Row) -> list[tuple[str, str]]:
    asked = row["question"]
    given = next((row[key] for key in ("choices", "options") if not is_empty(row.get(key))), None)
    if given is None and isinstance(asked, Mapping):
        given = asked["choices"]
    if given is None:  # a column for each
        given = {key[-1].upper(): text for key, text in row.items() if _is_choice(key)}
    if isinstance(given, Mapping):
        return [*zip(given["label"], given["text"], strict=True)] if "label" in given else [*given.items()]
    if isinstance(given[0], Mapping):
        return [(each["label"], each["text"]) for each in given]
    return [*zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", given, strict=False)]


def _replies_of(row: Row, name: str) -> Rows:
    """Each row is all that others said since `name` last spoke, and what `name` then said."""
    said = [(_who(message), _what(message)) for message in sorted(row["messages"], key=_when)]
    spoken = [each for each in said if each[0] and each[1]]  # and not a picture, or that somebody joined
    grouped = itertools.groupby(spoken, key=lambda each: each[0] == name)
    texts = [(is_reply, "\n".join(text for _, text in group)) for is_reply, group in grouped]
    pairs = [(before, after) for (_, before), (is_reply, after) in itertools.pairwise(texts) if is_reply]
    rows = [{**_rest(row, "messages"), "prompt": before, "completion": after} for before, after in pairs]
    return [*rows, *[None] * (len(said) - len(spoken))]


def _who(message: Mapping[str, Any]) -> Any:
    author = message.get("author")
    named = author["name"] if isinstance(author, Mapping) else message.get("from") or message.get("sender_name")
    return named or message.get("user")  # of Slack


def _what(message: Mapping[str, Any]) -> str:
    said = message.get("content") or message.get("text") or ""
    text = said if isinstance(said, str) else "".join(part if isinstance(part, str) else part["text"] for part in said)
    return "" if _LEFT_OUT.fullmatch(text.strip()) else text


def _when(message: Mapping[str, Any]) -> float:
    """Messenger writes the newest message first; others are in order."""
    return float(message.get("timestamp_ms") or message.get("ts") or 0)


def _is_of_a_log(message: Any) -> bool:
    """Whether Telegram, Discord (DiscordChatExporter), Messenger, Instagram or Slack exports such a message."""
    if not isinstance(message, Mapping):
        return False
    author = message.get("author")
    is_of_discord = isinstance(author, Mapping) and "name" in author and "role" not in author
    telling = ({"from", "from_id"}, {"sender_name", "timestamp_ms"}, {"user", "text", "ts"})
    return is_of_discord or any(keys <= message.keys() for keys in telling)


_BETTER = "and which is better is said beside them"
KINDS: dict[str, Kind] = {
    "winner": Kind(
        frozenset({"conversation_a", "conversation_b", "winner"}), f"two chats, {_BETTER}", "the winners", _winner
    ),
    "better": Kind(
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        f"two replies, {_BETTER}",
        "the better ones",
        _better,
    ),
    "highest-score": Kind(
        frozenset({"instruction", "completions"}),
        "several replies with scores, as UltraFeedback has them",
        "the ones of the highest overall_score",
        _highest_score,
    ),
    "instances": Kind(
        frozenset({"instruction", "instances"}),
        "one instruction with several instances, each an example",
        "a row for each instance",
        _instances,
    ),
    "squad": Kind(
        frozenset({"paragraphs"}),
        "an article of SQuAD with many questions",
        "a row for each question that has an answer",
        _squad,
    ),
    "first-answer": Kind(frozenset(), "a question with several answers", "the first of them", _first_answer),
    "label-studio": Kind(
        frozenset({"data", "annotations"}),
        "a task of Label Studio",
        "a row for each text that an annotator wrote, with the first text of the task as its prompt",
        _label_studio,
    ),
    "argilla": Kind(
        frozenset({"fields", "responses"}),
        "a record of Argilla",
        "a row for each text that an annotator submitted, with the first field as its prompt",
        _argilla,
    ),
    "taking-turns": Kind(
        frozenset(),
        "what two said in turn, without roles",
        "the first, the third and so on as the user's, and the others as the assistant's",
        _taking_turns,
    ),
    "tree": Kind(
        frozenset(),
        "a tree of OpenAssistant: each message has several replies, and one chat is one path",
        "the first reply of each",
        _first_replies,
    ),
    "choices": Kind(
        frozenset(),
        "a question with choices",
        "them below the question as A. B. C., and the right one as the reply",
        _choices,
    ),
    "chat-log": Kind(
        frozenset(),
        "the log of a chat between people, all of it in one row",
        "each message of NAME as the reply to what was said before it, if it has a text",
        _replies_of,
    ),
}
_TELLING_KEYS = {"winner", "better_response_id", "completions", "instances", "paragraphs", "annotations", "fields"}
"""Of each kind that is told by its keys, one that few other rows have."""
