"""One row of a chat file, in any accepted shape, -> `Conversation`.

Accepted rows (JSON objects; docs/data.md has an example of each):

    {"messages": [{"role": "user", "content": "..."}, ...]}              roles system, user, assistant, tool
    {"conversations": [{"from": "human", "value": "..."}, ...]}          ShareGPT; role/content too
    {"prompt": "...", "completion": "..."}                               one question, one answer, or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}              Alpaca, with history
    {"text": "..."}                                                      no chat: every token is trained

and pairs under other names, such as question and answer. Each may carry `"system": "..."`, `"tools": [...]` (or the
list as a JSON string) and `"chat_template_kwargs": {...}`. A column that is null is as good as absent. Keys that
nothing is made of are listed in `Conversation.unused_keys`, and keys that would change what is learned are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lora_core.config.schema import NOT_TEMPLATE_VARIABLES, DataConfig
from lora_core.errors import RowError
from lora_core.rows.columns import (
    PAIRS,
    SYSTEM,
    TOOLS,
    TURNS,
    first,
    holds_turns_or_pair,
    under_our_names,
)
from lora_core.rows.json_values import (
    as_number,
    checked_text,
    from_json,
    is_empty,
    is_missing,
    json_reason,
    kind,
    read_json,
)
from lora_core.rows.logged_calls import with_logged_call
from lora_core.rows.other_shapes import with_one_answer, with_turns, without_verdict
from lora_core.rows.pairs import question_and_answer
from lora_core.rows.refusals import (
    refuse_bad_label,
    refuse_media_marks,
    refuse_no_text,
    refuse_second_chat,
    refuse_text_beside,
    refuse_tools_beside,
    refuse_two_replies,
    refuse_what_is_not_sft,
    refuse_what_the_question_needs,
)
from lora_core.rows.suggestions import fix_for_no_reply, refuse_text_for_turns, unknown_names
from lora_core.rows.tool_use import parse_tools
from lora_core.rows.turn_lists import read_turns
from lora_core.rows.turns import Message, Turn, parse_turn
from lora_core.untrusted.text import quoted

__all__ = [
    "Conversation",
    "Message",
    "RowShape",
    "TrainOn",
    "parse_json_row",
    "parse_row",
    "shape_of",
    "trained_messages",
]

_ROW_WEIGHTS = ("weight", "loss_weight")
_TEMPLATE_VARIABLES = "chat_template_kwargs"


@dataclass(frozen=True)
class RowShape:
    """What a file calls its columns and roles, where that is not what everybody calls them."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """messages, prompt, completion, reasoning, text, system or tools -> the file's name for it."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's name of a role -> system, user, assistant or tool."""


def shape_of(data: DataConfig) -> RowShape:
    """What the configuration says of the rows' columns and roles."""
    return RowShape(data.columns, data.roles)


@dataclass(frozen=True)
class Conversation:
    """Messages in the shape that chat templates take, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    weights: tuple[float, ...] | None = None
    """(num_messages,) of the loss on each assistant message, 0 leaves it out; None is 1 for all."""
    num_prompt_messages: int = 0
    """Of a row that says what its prompt is and what its completion; else 0."""
    text: str | None = None
    """In place of messages: a text without turns, of which every token is trained."""
    template_variables: Mapping[str, Any] | None = None
    """Values for variables of the chat template, for this row alone; they go before data.chat_template_kwargs."""
    unused_keys: tuple[str, ...] = ()
    """Keys of the row that are in nothing of the above, sorted."""


TrainOn = Literal["all_assistant", "last_assistant", "completion", "everything"]


def trained_messages(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """Indices of the messages that are trained, by `data.train_on` and the row's own weights."""
    messages, weights = conversation.messages, conversation.weights or (1.0,) * len(conversation.messages)
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last_assistant":
        assistant = assistant[-1:]
    if train_on == "completion":
        asked = [i + 1 for i, message in enumerate(messages) if message["role"] == "user"]
        start = conversation.num_prompt_messages or (asked[-1] if asked else 0)
        assistant = [i for i in assistant if i >= start]
    return [i for i in assistant if weights[i]]


def one_for_each_reply(conversation: Conversation, train_on: TrainOn) -> list[tuple[int, Conversation]]:
    """(index of the reply, the row up to it, with this reply alone trained), for each reply that is trained."""
    replies = trained_messages(conversation, train_on) if conversation.text is None else []
    return [(index, up_to_reply(conversation, index)) for index in replies] or [(-1, conversation)]


def up_to_reply(conversation: Conversation, index: int) -> Conversation:
    """The row up to this reply, which alone is trained; the row itself for -1."""
    if index < 0:
        return conversation
    weight = conversation.weights[index] if conversation.weights else 1.0
    messages = conversation.messages[: index + 1]
    return replace(conversation, messages=messages, weights=(*[0.0] * index, weight), num_prompt_messages=0)


def parse_json_row(line: str, shape: RowShape | None = None) -> Conversation:
    """`parse_row` of one JSONL line.

    Raises:
        RowError: not strict JSON (NaN and duplicate keys are refused too), or not an accepted row.
    """
    return parse_row(_row_of(line), shape)


def _row_of(line: str) -> Any:
    try:
        row = read_json(line)
        # A row that was written as JSON twice.
        return read_json(row) if isinstance(row, str) and row.startswith("{") else row
    except RecursionError as error:
        raise RowError("JSON nested too deeply to read") from error
    except ValueError as error:
        raise RowError(f"not valid JSON: {json_reason(error)}") from error


def parse_file(
    path: Path, shape: RowShape | None = None, reshape: Callable[[Any], list[Any]] | None = None
) -> Iterator[tuple[int, Conversation | RowError]]:
    """(1-based line, its row or what is wrong with it) for each line of a JSONL that is not blank.

    Args:
        reshape: makes the rows that are read of the row of each line.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                text = raw.decode("utf-8-sig")
                for row in [_row_of(text)] if reshape is None else reshape(_row_of(text)):
                    yield line, parse_row(row, shape)
            except RowError as error:
                yield line, error
            except UnicodeDecodeError as error:
                yield line, RowError(f"not UTF-8 at byte {error.start} of the line; fix: save the file as UTF-8")


def parse_row(row: Any, shape: RowShape | None = None) -> Conversation:
    """Turn an accepted row into a `Conversation`.

    Raises:
        RowError: names the key or the turn that is wrong, and what is accepted.
    """
    if isinstance(row, list) and row:  # its turns alone, or a question and its answer
        is_pair = len(row) == 2 and all(isinstance(text, str) and not text.lstrip().startswith("{") for text in row)
        row = dict(zip(("prompt", "completion"), row, strict=True)) if is_pair else {"messages": row}
    if not isinstance(row, Mapping):
        raise RowError(f"must be a JSON object, not {kind(row)}")
    shape = shape or RowShape()
    columns = with_logged_call(with_one_answer(without_verdict(under_our_names(row, shape.columns))))
    if not holds_turns_or_pair(columns):
        columns = with_turns(columns)
    refuse_what_is_not_sft(columns, set(shape.columns.values()))
    # A column of a name that data.columns gives to another one.
    unused = {key for key in shape.columns if key not in shape.columns.values() and not is_empty(row.get(key))}
    used, prompt, completion = _turns(columns, "reasoning" in shape.columns)
    if "completion" not in shape.columns:
        refuse_two_replies(columns, used, shape.columns)
    weight = _row_weight(columns, used)
    if used & {"text"}:
        refuse_no_text(columns, shape.columns)
        refuse_text_beside(columns, shape.columns)
        if weight != 1:
            raise RowError(f"is a text with the weight {weight:g}, and all of a text is trained; fix: leave it out")
        text = checked_text(columns["text"], "text")
        return Conversation([], text=text, unused_keys=_sorted(columns.keys() - used, columns, unused))
    numbered = [*prompt, *completion]
    turns = [parse_turn(turn, f"turn {i}", shape.roles, unused) for i, turn in enumerate(numbered, start=1)]
    system = first(columns, SYSTEM)
    if system is not None and not is_missing(columns[system]):
        used.add(system)
        (told,) = parse_turn({"role": "system", "content": columns[system]}, system, {}, unused).messages
        if _is_new_system(told, turns, system):
            turns.insert(0, Turn([told]))
            prompt = [None, *prompt] if prompt else prompt
    messages = [message for turn in turns for message in turn.messages]
    refuse_media_marks(messages)
    if columns.keys() - used:
        refuse_bad_label(columns, used, shape.columns)
        refuse_second_chat(columns, used, shape.columns, messages)
        refuse_what_the_question_needs(columns, used, shape.columns, [message["content"] for message in messages])
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(f"has no assistant turn; it needs one to train on{fix_for_no_reply(columns, numbered)}")
    weights = tuple(
        turn.weight * weight if message["role"] == "assistant" else 1.0 for turn in turns for message in turn.messages
    )
    tools_key = first(columns, TOOLS if "tools" not in shape.columns else ("tools",))
    used |= {tools_key} if tools_key is not None else set()
    tools = _tools(columns, tools_key, turns)
    if tools is None and columns.keys() - used:
        refuse_tools_beside(columns, used, shape.columns)
    variables = _template_variables(columns.get(_TEMPLATE_VARIABLES))
    used |= {_TEMPLATE_VARIABLES} if variables else set()
    return Conversation(
        messages,
        tools,
        None if all(weight == 1 for weight in weights) else weights,
        sum(len(turn.messages) for turn in turns[: len(prompt)]),
        template_variables=variables,
        unused_keys=_sorted(columns.keys() - used, columns, unused),
    )


def _is_new_system(told: Message, turns: Sequence[Turn], key: str) -> bool:
    """Whether the rows' turns do not begin with this system turn already."""
    first = turns[0].messages[0] if turns and turns[0].messages else None
    if first is None or first["role"] != "system":
        return True
    if first["content"] != told["content"]:
        raise RowError(f"has both a {key} key and a system turn, and they differ; keep one")
    return False


def _turns(columns: Mapping[str, Any], takes_reasoning: bool) -> tuple[set[str], Sequence[Any], Sequence[Any]]:
    """(the columns used, the prompt's turns, the others)."""
    key = first(columns, TURNS) or next((key for key in TURNS if key in columns), None)
    pair = next(((q, a) for q, a in PAIRS if q in columns and a in columns), None)
    if key is not None and not (is_empty(columns[key]) and (pair or "text" in columns)):
        if isinstance(columns[key], str):
            refuse_text_for_turns(columns, key)
        return {key}, [], read_turns(columns[key], key)
    if pair is not None:
        used, prompt, completion = question_and_answer(columns, *pair)
        reasoning = columns.get("reasoning") if takes_reasoning else None
        if is_empty(reasoning) or len(completion) != 1:
            return used, prompt, completion
        return used | {"reasoning"}, prompt, [{**completion[0], "reasoning_content": reasoning}]
    if isinstance(columns.get("role"), str):
        raise RowError(
            f"is one message (role {quoted(columns['role'])}), and a row is a whole chat; fix: put the messages of a "
            'chat into one row, as {"messages": [...]}'
        )
    if "text" in columns:
        return {"text"}, [], []
    raise unknown_names(columns)


def _tools(columns: Mapping[str, Any], key: str | None, turns: Sequence[Turn]) -> list[dict[str, Any]] | None:
    given = [parse_tools(columns[key])] if key is not None else []
    given += [parse_tools(turn.tools) for turn in turns]
    tools = [schemas for schemas in given if schemas]
    if any(schemas != tools[0] for schemas in tools[1:]):
        raise RowError("has several lists of tools, and they differ; a chat template takes one")
    return tools[0] if tools else None


def _template_variables(value: Any) -> dict[str, Any] | None:
    """Values for the template's variables; a cell of a CSV file holds them as JSON."""
    if is_empty(value):
        return None
    given = from_json(value, _TEMPLATE_VARIABLES) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise RowError(f"{_TEMPLATE_VARIABLES} must be an object, such as {{'enable_thinking': false}}")
    bad = [name for name in given if name in NOT_TEMPLATE_VARIABLES or not (name.isascii() and name.isidentifier())]
    if bad:
        raise RowError(f"{_TEMPLATE_VARIABLES} cannot set {quoted(bad[0])}: it is no variable of a chat template")
    return {name: item for name, item in given.items() if item is not None} or None  # Arrow fills in nulls


def _row_weight(columns: Mapping[str, Any], used: set[str]) -> float:
    weights = [1.0]
    for key in (key for key in _ROW_WEIGHTS if key in columns):
        weight = as_number(columns[key])  # cells of a CSV file are text
        if not isinstance(weight, (bool, int, float)) or not 0 <= weight < float("inf"):
            raise RowError(f"{key} must be a float of 0 or more, not {quoted(weight)}")
        weights.append(float(weight))
        used.add(key)
    if len(set(weights[1:])) > 1:
        raise RowError(f"has {' and '.join(_ROW_WEIGHTS)}, which differ; keep one")
    return weights[-1]


def _sorted(left: set[str], columns: Mapping[str, Any], unused: set[str]) -> tuple[str, ...]:
    return tuple(sorted(unused | {key for key in left if not is_empty(columns[key])}))
