"""Chats that data sets write in a way of their own, and names that a refusal makes a fix of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.commands.main import main
from lora_core.config.schema import DataConfig
from lora_core.errors import RowError
from lora_core.rows.messages import Conversation, parse_row, shape_of
from lora_core.rows.turn_lists import ROUNDS
from tests.rows.test_shapes import ASSISTANT, CALLING, SCHEMA, SYSTEM, USER

Row = dict[str, Any]

# Texts without what frames a turn in one of the formats; white space around a turn belongs to the frame.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|\r"), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and not re.search("USER|ASSISTANT|FUNCTION", text)
)
ROUNDS_OF_TEXT = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def messages_of(rounds: list[tuple[str, str]]) -> list[Row]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for both in rounds for role, text in zip(roles, both, strict=True)]


@given(ROUNDS_OF_TEXT)
def test_each_format_gives_back_the_rounds_that_were_written(rounds: list[tuple[str, str]]) -> None:
    glaive = "".join(f"USER: {asked}\n\n\nASSISTANT: {said} <|endoftext|>\n\n\n" for asked, said in rounds)
    moss = {
        f"turn_{number}": {
            "Human": f"<|Human|>: {asked}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": f"<|MOSS|>: {said}<eom>\n",
        }
        for number, (asked, said) in reversed([*enumerate(rounds, start=1)])
    }
    rows: list[Row] = [
        {"chat": glaive},
        {"chat": moss},
        {"id": "0", "data": [text for both in rounds for text in both]},
    ]
    rows += [{"conversation": [dict(zip(pair, both, strict=True)) for both in rounds]} for pair in ROUNDS]
    for row in rows:
        conversation = parse_row(row)
        assert conversation.messages == messages_of(rounds)
        assert conversation.unused_keys == (("id",) if "id" in row else ())


def test_a_row_of_glaive_has_its_schemas_and_calls() -> None:
    schemas = json.dumps(SCHEMA["function"], indent=4)
    row = {
        "system": f"SYSTEM: s\n{schemas}\n\n{schemas.replace('f', 'g')}\n",
        "chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"x": 1}\'} <|endoftext|>\n\n\n'
        "FUNCTION RESPONSE: 1\n\n\nASSISTANT: a <|endoftext|>",
    }
    conversation = parse_row(row)
    assert conversation.messages == [SYSTEM, USER, CALLING, {"role": "tool", "content": "1"}, ASSISTANT]
    assert conversation.tools is not None
    assert conversation.tools[0] == SCHEMA
    assert len(conversation.tools) == 2
    # What is no list of schemas stays text.
    plain = parse_row({**row, "system": "SYSTEM: s\n{not JSON}"})
    assert (plain.messages[0]["content"], plain.tools) == ("s\n{not JSON}", None)


def test_an_apostrophe_in_the_arguments_of_glaive() -> None:
    call = '<functioncall> {"name": "f", "arguments": \'{"x": "don\'t"}\'}'
    message = parse_row({"chat": f"USER: q\n\n\nASSISTANT: {call} <|endoftext|>"}).messages[1]
    assert message["tool_calls"][0]["function"]["arguments"] == {"x": "don't"}


def test_rounds_have_system_texts_and_keep_what_is_beside() -> None:
    rounds = [{"system": "s", "input": "q", "output": "a"}, {"system": "s", "input": "q", "output": "a", "weight": 0}]
    conversation = parse_row({"conversation": rounds})
    assert conversation.messages == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert conversation.weights == (1, 1, 1, 1, 0)
    assert parse_row({"conversation": [{**rounds[0], "note": "n"}]}).unused_keys == ("messages.note",)
    history = {"prompt": "q", "response": "a", "history": [{"human": "q", "assistant": "a"}]}
    assert parse_row(history).messages == [USER, ASSISTANT, USER, ASSISTANT]


@pytest.mark.parametrize("key", ["speaker", "author", "sender"])
def test_other_keys_of_the_role(key: str) -> None:
    assert parse_row({"messages": [{key: "User", "text": "q"}, {key: "bot", "text": "a"}]}).messages == [
        USER,
        ASSISTANT,
    ]
    beside = parse_row({"messages": [USER, {**ASSISTANT, key: "Ann"}]})
    assert (beside.messages, beside.unused_keys) == ([USER, ASSISTANT], (f"messages.{key}",))


def test_what_everybody_uses_goes_first() -> None:
    others = {"chat": "USER: x\n\n\nASSISTANT: y", "data": ["x", "y"]}
    assert parse_row({"messages": [USER, ASSISTANT], **others}).messages == [USER, ASSISTANT]
    assert parse_row({"prompt": "q", "completion": "a", **others}).unused_keys == ("chat", "data")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chat": "USER: q\n\n\nASSISTANT: a\n\n\nUSER: q\n\n\nASSISTANT: b <|endoftext|>"}, "without <|endoftext|>"),
        ({"chat": "USER: q\n\n\nASSISTANT: a <|endoftext|> b"}, "goes on after <|endoftext|>"),
        ({"chat": "USER: q\n\n\nASSISTANT: <functioncall> f(1)"}, "has a <functioncall> that is no JSON: 'f(1)'; fix:"),
        ({"chat": "USER: q\n\n\nASSISTANT: <functioncall> [1]"}, "has a <functioncall> that is a list"),
        ({"chat": "USER: q\n\n\nASSISTANT: a", "system": "s", "tools": [SCHEMA]}, "has tools beside a chat"),
        (
            {"chat": {"turn_1": {"Human": "q", "Commands": "<|Commands|>: Search(x)<eoc>", "MOSS": "a"}}},
            "is a chat of MOSS with 'Commands' in turn_1, which is not read",
        ),
        ({"chat": {"turn_1": {"Human": "q", "MOSS": None}}}, "turn 2: content must be a string, not null"),
        (
            {"messages": [USER, {**ASSISTANT, "channel": "analysis"}]},
            "turn 2 has the channel analysis, so it is no reply",
        ),
    ],
)
def test_what_does_not_fit_is_refused(row: Row, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert expected in str(caught.value)


def test_a_tree_of_replies_is_refused_with_a_command_that_takes_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = {"text": "a", "role": "assistant", "replies": []}
    row = {"prompt": {"text": "q", "role": "prompter", "replies": [leaf, {**leaf, "text": "b"}]}}
    with pytest.raises(RowError, match="is a tree of OpenAssistant") as caught:
        parse_row(row)
    (tmp_path / "FILE").write_text(json.dumps(row) + "\n", encoding="utf-8")
    pasted = re.search(r"fix: lora-core (.*) \(writes the first reply of each\)", str(caught.value))
    assert pasted is not None
    monkeypatch.chdir(tmp_path)
    assert main(pasted[1].split()) == 0
    assert parse_row(json.loads((tmp_path / "NEW.jsonl").read_text(encoding="utf-8"))).messages == [USER, ASSISTANT]


# (row, what the fix says, what is left out then)
FIXES: list[tuple[Row, str, tuple[str, ...]]] = [
    ({"Question": "q", "Response": "a", "n": 1}, "{prompt: Question, completion: Response}", ("n",)),
    ({"inputs": "q", "targets": "a"}, "{prompt: inputs, completion: targets}", ()),
    ({"problem": "q", "solution": "a", "answer": None}, "{prompt: problem, completion: solution}", ()),
    ({"human": "q", "assistant": "a"}, "{prompt: human, completion: assistant}", ()),
    ({"frage": {"input": "q", "target": "a"}}, "{prompt: frage.input, completion: frage.target}", ()),
    ({"chat": [USER, ASSISTANT]}, "{messages: chat}", ()),
    ({"body": {"messages": [USER, ASSISTANT], "model": "m"}}, "{messages: body.messages}", ("body",)),
    ({"Anfrage": [{"speaker": "user", "text": "q"}, ASSISTANT]}, "{messages: Anfrage}", ()),
]


@pytest.mark.parametrize(("row", "columns", "left_out"), FIXES)
def test_a_refusal_names_the_columns_that_there_are(row: Row, columns: str, left_out: tuple[str, ...]) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert f'fix: "data.columns={columns}"' in str(caught.value)
    fixed = fixed_by(row, columns)
    assert (fixed.messages, fixed.unused_keys) == ([USER, ASSISTANT], left_out)


def fixed_by(row: Row, columns: str) -> Conversation:
    named = dict(pair.split(": ") for pair in columns.strip("{}").split(", "))
    return parse_row(row, shape_of(DataConfig(columns=named)))


def test_a_refusal_names_what_stands_beside_a_pair() -> None:
    row = {"Instruction": "q", "Input": "i", "Complex_CoT": "r", "Output": "a"}
    columns = "{prompt: Instruction, completion: Output, input: Input, reasoning: Complex_CoT}"
    with pytest.raises(RowError, match=re.escape(f'fix: "data.columns={columns}"')):
        parse_row(row)
    assert fixed_by(row, columns).messages == [
        {"role": "user", "content": "q\n\ni"},
        {**ASSISTANT, "reasoning_content": "r"},
    ]


@pytest.mark.parametrize(
    ("answer", "other"), [("answer", "solution"), ("answer", "response"), ("completion", "output")]
)
def test_two_replies_are_refused_unless_one_is_named(answer: str, other: str) -> None:
    question = "prompt" if answer == "completion" else "question"
    row = {question: "q", answer: "a", other: "b"}
    with pytest.raises(RowError, match=f"has two replies, {answer} and {other}, and they differ") as caught:
        parse_row(row)
    first, second = re.findall(r"data\.columns=(\{.*?\})", str(caught.value))
    assert fixed_by(row, first).messages[1]["content"] == "a"
    assert fixed_by(row, second).messages[1]["content"] == "b"
    assert parse_row({**row, other: " a "}).messages == [USER, ASSISTANT]
    assert parse_row({"messages": [USER, ASSISTANT], answer: "b", other: "c"}).messages == [USER, ASSISTANT]


def test_a_role_in_other_letters_is_named_in_the_fix() -> None:
    with pytest.raises(RowError, match=re.escape('fix: "data.roles={用户: user}"')):
        parse_row({"messages": [{"role": "用户", "content": "q"}, ASSISTANT]})


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"text": "q", "summary": "a"}, [USER, ASSISTANT]),
        ({"text": "q", "completion": "a"}, [USER, ASSISTANT]),
        ({"question": "q", "text": "a", "id": 1}, [USER, ASSISTANT]),
    ],
)
def test_a_text_beside_a_question_or_a_reply_is_refused_unless_one_is_named(row: Row, turns: list[Row]) -> None:
    with pytest.raises(RowError, match=r"has a text and \w+ beside it, which would be left out") as caught:
        parse_row(row)
    as_pair, as_text = re.findall(r"data\.columns=(\{.*?\})", str(caught.value))
    assert fixed_by(row, as_pair).messages == turns
    assert fixed_by(row, as_text).text == row["text"]
    assert parse_row({"text": "x", "title": "t", "label": 1, "summary": " "}).text == "x"
