"""Rows of Gemini and Bedrock, refusals, and other shapes that say the same in another way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_core.errors import RowError
from lora_core.rows.messages import Conversation, parse_json_row, parse_row
from tests.rows.test_shapes import ASSISTANT, CALLING, FUNCTION, SCHEMA, USER, assistant, messages_of

Row = dict[str, Any]
ANSWER: Row = {"role": "tool", "content": '{"t": 9}', "name": "f"}
BEDROCK_ANSWER: Row = {"role": "tool", "content": '{"t": 9}', "tool_call_id": "1"}


def gemini(*turns: Row, **columns: Any) -> Row:
    return {"contents": [{"role": "user", "parts": [{"text": "q"}]}, *turns], **columns}


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
def test_a_row_of_gemini(key: str) -> None:
    row = gemini(
        {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"t": 9}}}]},
        {"role": "model", "parts": [{"text": "a"}]},
        tools=[{"functionDeclarations": [SCHEMA["function"]]}],
        **{key: {"role": "system", "parts": [{"text": "s"}]}},
    )
    system = {"role": "system", "content": "s"}
    assert parse_row(row) == Conversation([system, USER, CALLING, ANSWER, ASSISTANT], [SCHEMA])


def test_thoughts_of_gemini_are_reasoning() -> None:
    reply = parse_row(gemini({"role": "model", "parts": [{"text": "r", "thought": True}, {"text": "a"}]})).messages[1]
    assert reply == {"role": "assistant", "content": "a", "reasoning_content": "r"}
    assert messages_of(USER, {"role": "model", "parts": [{"text": "a", "thought": False}]})[1] == ASSISTANT


def test_parts_of_bedrock() -> None:
    call = {"toolUse": {"toolUseId": "1", "name": "f", "input": {"x": 1}}}
    answer = {"toolResult": {"toolUseId": "1", "content": [{"json": {"t": 9}}]}}
    row = {
        "messages": [
            {"role": "user", "content": [{"text": "q"}]},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [answer]},
            {"role": "assistant", "content": [{"text": "a"}]},
        ],
        "tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}],
    }
    calling = {**CALLING, "tool_calls": [{"type": "function", "function": FUNCTION, "id": "1"}]}
    assert parse_row(row) == Conversation([USER, calling, BEDROCK_ANSWER, ASSISTANT], [SCHEMA])


def test_a_key_that_would_be_lost_is_refused_and_what_is_beside_a_part_is_counted() -> None:
    twice = {"functionCall": {"name": "f"}, "name": "g"}
    with pytest.raises(RowError, match="turn 2 holds a part without a text, but with the keys 'functionCall', 'name'"):
        messages_of(USER, {"role": "model", "parts": [twice]})
    beside = {"functionCall": FUNCTION, "thoughtSignature": "x"}
    assert parse_row({"messages": [USER, {"role": "model", "parts": [beside]}]}).unused_keys == (
        "tool_calls.thoughtSignature",
    )


def test_a_column_of_that_name_in_another_row_is_a_column() -> None:
    for contents in ("text", [], [{"text": "x"}], [3]):
        row = {"prompt": "q", "completion": "a", "contents": contents}
        assert parse_row(row).messages == [USER, ASSISTANT]
    both = gemini(system="s", systemInstruction={"parts": [{"text": "t"}]})
    with pytest.raises(RowError, match="has the keys 'contents', 'system', 'systemInstruction'"):
        parse_row(both)


def test_a_refusal_is_what_the_assistant_said() -> None:
    refused = {"role": "assistant", "content": "No."}
    assert assistant(content=None, refusal="No.") == refused
    assert assistant(content="", refusal="No.") == refused
    assert assistant(content=[{"type": "refusal", "refusal": "No."}]) == refused
    beside = parse_row({"messages": [USER, {**ASSISTANT, "refusal": "No."}]})
    assert (beside.messages[1], beside.unused_keys) == (ASSISTANT, ("messages.refusal",))
    one_of_two = [{"role": "assistant", "content": "", "refusal": "No."}, USER, {**ASSISTANT, "refusal": "No."}]
    assert parse_row({"messages": [USER, *one_of_two]}).unused_keys == ("messages.refusal",)
    with pytest.raises(RowError, match="refusal must be a string, not a number"):
        assistant(content=None, refusal=3)


def test_turns_alone_and_turns_by_columns() -> None:
    expected = Conversation([USER, ASSISTANT])
    by_columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
    assert parse_row([USER, ASSISTANT]) == expected
    assert parse_row({"messages": by_columns}) == expected
    assert parse_row({"messages": json.dumps(by_columns)}) == expected
    with pytest.raises(RowError, match="messages must be a list of turns, not an object"):
        parse_row({"messages": {"role": ["user"], "content": ["q", "a"]}})


def test_a_weight_of_a_table_is_a_text() -> None:
    pair = {"prompt": "q", "completion": "a"}
    assert parse_row({**pair, "weight": "0.5"}).weights == parse_row({**pair, "weight": 0.5}).weights == (1.0, 0.5)
    for bad in ("x", "-1", "nan", "inf"):
        with pytest.raises(RowError, match="weight must be a float of 0 or more"):
            parse_row({**pair, "weight": bad})


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_labels_that_say_yes_or_something_else(key: str) -> None:
    for label in (True, 1, "True", "desirable", "sports"):
        assert parse_row({"prompt": "q", "completion": "a", key: label}).unused_keys == (key,)
    for label in (False, 0, "0", "False", "undesirable"):
        with pytest.raises(RowError, match=f"has {key}=.*: a reply that must not be learned"):
            parse_row({"prompt": "q", "completion": "a", key: label})
    assert parse_row({"text": "a film", "label": 0}).text == "a film"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{'prompt': 'q'}", "(at character 2); this is how Python prints a value; fix: write it with json.dumps"),
        ('{"prompt": None}', "Expecting value (at character 12); this is how Python prints"),
        ('{"a": 1}{"b": 2}', "Extra data (at character 9); fix: one object a line, and no commas between"),
        ('{"a": 1},', "fix: one object a line, and no commas between"),
        ('{"a": "x\ty"}', r"Invalid control character (at character 9); fix: \n or \t in its place"),
        ('{"a": NaN}', "NaN is not JSON; fix: null in its place"),
        ("", "Expecting value (at character 1)"),
    ],
)
def test_a_line_that_is_no_json_says_where_and_what_to_do(line: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_json_row(line)
    assert expected in str(caught.value)
