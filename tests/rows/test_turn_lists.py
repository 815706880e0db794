"""Lists of turns in other forms, calls of models as logs keep them, and rows whose question would lose a part."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_core.errors import RowError
from lora_core.rows.json_values import from_json
from lora_core.rows.messages import RowShape, parse_json_row, parse_row
from tests.rows.test_other_shapes import fixed_by
from tests.rows.test_shapes import ASSISTANT, CALLING, FUNCTION, SCHEMA, SYSTEM, USER

Row = dict[str, Any]
CHAT = [USER, ASSISTANT]
TWO = [*CHAT, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
CALLED = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'}
WITH_ID = {**CALLING["tool_calls"][0], "id": "1"}
ANSWERED = {"role": "tool", "content": "1", "tool_call_id": "1"}

LISTS: list[Any] = [
    [["q", "a"], ["r", "b"]],
    [["user", "q"], ["assistant", "a"], ["user", "r"], ["assistant", "b"]],
    [{"user": "q"}, {"Assistant": "a"}, {"user": "r"}, {"assistant": "b", "system": None}],
    {"turn_2": {"user": "r", "assistant": "b"}, "turn_1": {"user": "q", "assistant": "a"}},
    {str(number): turn for number, turn in enumerate(TWO)},
    [TWO],
    [json.dumps(turn) for turn in TWO],
    str(TWO),
    [{"type": kind, "data": {"content": text}} for kind, text in zip(["human", "ai"] * 2, "qarb", strict=True)],
    [
        {"lc": 1, "type": "constructor", "id": ["langchain", "schema", f"{kind}Message"], "kwargs": {"content": text}}
        for kind, text in zip(["Human", "AI"] * 2, "qarb", strict=True)
    ],
    "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b",
    [{"role": turn["role"].upper(), "message": turn["content"]} for turn in TWO],
]


@pytest.mark.parametrize("turns", LISTS)
def test_each_form_of_a_list_is_read_as_its_turns(turns: Any) -> None:
    for row in ({"messages": turns}, {"conversation": json.dumps(turns) if not isinstance(turns, str) else turns}):
        assert parse_row(row).messages == TWO


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ([["q", "a"], ["r", "b"]], TWO),
        (["q", "a"], CHAT),
        ({"id": 1, "turn_1": {"user": "q", "assistant": "a"}, "turn_2": {"user": "r", "assistant": "b"}}, TWO),
        ({"rounds": [{"human": "q", "gpt": "a"}, {"human": "r", "gpt": "b"}]}, TWO),
        ({"prompt": "r", "response": "b", "chat_history": [["q", "a"]]}, TWO),
        ({"prompt": "r", "response": "b", "history": "[('q', 'a')]"}, TWO),
        ({"message": "r", "response": "b", "chat_history": [{"role": "CHATBOT", "message": "a"}]}, TWO[1:]),
        ({"prompt": str([USER]), "completion": json.dumps([ASSISTANT])}, CHAT),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a"}, CHAT),
        ({"prompt": "Human: q", "completion": "a"}, [{**USER, "content": "Human: q"}, ASSISTANT]),
        ({"question": "q", "answers": {"text": ["a", " a"], "answer_start": [1, 1]}}, CHAT),
        ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, CHAT),
        ({"question": "q", "context": ["c", "d"], "answer": "a"}, [{**USER, "content": "q\n\nc\n\nd"}, ASSISTANT]),
        # A reply that is to be JSON stays one.
        ({"prompt": "q", "completion": json.dumps(CHAT)}, [USER, {**ASSISTANT, "content": json.dumps(CHAT)}]),
    ],
)
def test_rows_that_are_read(row: Any, messages: list[Row]) -> None:
    assert parse_row(row).messages == messages


ITEMS: list[Row] = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
    {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
    CALLED,
    {**CALLED, "call_id": "2"},
    {"type": "function_call_output", "call_id": "1", "output": "1"},
    {"type": "reasoning", "summary": []},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
]


def test_items_of_the_responses_api_are_turns() -> None:
    calling = {**CALLING, "reasoning_content": "hm", "tool_calls": [WITH_ID, {**WITH_ID, "id": "2"}]}
    expected = [USER, calling, ANSWERED, ASSISTANT]
    conversation = parse_row({"messages": ITEMS})
    assert (conversation.messages, conversation.unused_keys) == (
        expected,
        ("messages.encrypted_content", "messages.id"),
    )
    logged = {
        "instructions": "s",
        "input": ITEMS[:5],
        "output": ITEMS[5:],
        "tools": [{"type": "function", "name": "f"}],
    }
    assert parse_row(logged).messages == [SYSTEM, *expected]
    assert parse_row({**logged, "input": "q"}).messages == [SYSTEM, *CHAT]
    assert parse_row({"request": logged, "response": {"output": ITEMS[5:], "id": "r"}}).unused_keys == (
        "messages.encrypted_content",
        "messages.id",
        "request.output",
        "response.id",
    )
    with pytest.raises(
        RowError, match="holds an item of type 'web_search_call', which is no chat; fix: leave such rows"
    ):
        parse_row({"messages": [*ITEMS, {"type": "web_search_call", "id": "w"}]})


REPLY = {"message": ASSISTANT, "index": 0, "finish_reason": "stop"}
LANGCHAIN = {"lc": 1, "type": "constructor", "id": ["AIMessage"], "kwargs": {"content": "a"}}


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"messages": [USER], "choices": [REPLY], "model": "m"}, ("model",)),
        ({"messages": [USER], "choices": [{**REPLY, "finish_reason": "length"}]}, ("choices.finish_reason",)),
        ({"request": {"messages": [USER], "model": "m"}, "response": {"choices": [REPLY]}}, ("request.model",)),
        (
            {"request": {"messages": [USER]}, "response": {"body": {"choices": [REPLY], "id": "i"}}},
            ("response.body.id",),
        ),
        (
            {
                "request": {"contents": [{"parts": [{"text": "q"}]}]},
                "response": {"candidates": [{"content": {"role": "model", "parts": [{"text": "a"}]}}]},
            },
            (),
        ),
        ({"inputs": {"messages": [USER]}, "outputs": {"generations": [[{"text": "a", "message": LANGCHAIN}]]}}, ()),
        ({"inputs": {"messages": [USER]}, "outputs": {"messages": CHAT}}, ()),
        ({"input": {"messages": [USER]}, "output": "a", "scores": [1]}, ("scores",)),
    ],
)
def test_a_logged_call_is_a_prompt_and_its_reply(row: Row, left_out: tuple[str, ...]) -> None:
    conversation = parse_row(row)
    assert (conversation.messages, conversation.num_prompt_messages) == (CHAT, 1)
    assert conversation.unused_keys == left_out


def test_a_logged_call_has_its_system_text_and_tools() -> None:
    call = {"messages": [USER], "system": "s", "tools": [SCHEMA]}
    conversation = parse_row({"request": call, "response": {"choices": [REPLY]}})
    assert (conversation.messages, conversation.tools) == ([SYSTEM, *CHAT], [SCHEMA])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[{'a': \"it's\"}\n {'a': None}]", [{"a": "it's"}, {"a": None}]),  # as NumPy prints
        ("[('q', 'a')]", [["q", "a"]]),
        ("['a' 'b']", None),
        ("{'a': 1, 'a': 2}", None),
        ("[{1: 2}]", None),
        ("[b'x']", None),
        ("[nan]", None),
        ("__import__('os')", None),
        ("[" * 500, None),
    ],
)
def test_what_python_prints(text: str, value: Any) -> None:
    if value is not None:
        assert from_json(text, "x") == value
        return
    with pytest.raises(RowError, match="x is not valid JSON"):
        from_json(text, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=3) | st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_what_python_prints_is_read_as_it_was(value: Any) -> None:
    assert from_json(repr(value), "x") == value


LOST: list[tuple[Row, str]] = [
    ({"question": "q", "answer": "a", "passage": "a long passage"}, "q\n\na long passage"),
    ({"prompt": "q", "response": "a", "context": "a long passage"}, "q\n\na long passage"),
    ({"question": "q", "answer": "a", "contexts": ["one text", "two texts"]}, "q\n\none text\n\ntwo texts"),
    ({"instruction": "q", "question": "i", "answer": "a"}, "q\n\ni"),
    ({"question": "q", "input": "i", "output": "a"}, "q\n\ni"),
]


@pytest.mark.parametrize(("row", "asked"), LOST)
def test_a_part_of_the_question_that_would_be_lost_is_refused(row: Row, asked: str) -> None:
    with pytest.raises(RowError, match=r"has \w+ beside its \w+, and the model would not see it") as caught:
        parse_row(row)
    shown, left_out = re.findall(r"data\.columns=(\{.*?\})", str(caught.value))
    assert fixed_by(row, shown).messages == [{"role": "user", "content": asked}, ASSISTANT]
    assert len(fixed_by(row, left_out).unused_keys) == 1


def test_what_is_in_the_question_already_is_counted() -> None:
    row = {"prompt": "Of a long passage: q", "response": "a", "context": "a long passage", "document": "file.pdf"}
    assert parse_row(row).unused_keys == ("context", "document")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": CHAT, "conversations": TWO},
            "has two lists of turns, messages and conversations, and they differ",
        ),
        (
            {"messages": CHAT, "prompt": "q", "completion": "b"},
            "has messages, and a prompt with a completion that is not",
        ),
        (
            {"messages": CHAT, "context": "a long passage"},
            "has context beside its turns, and the model would not see it",
        ),
        (
            {"messages": CHAT, "history": [["before", "that"]]},
            "has history beside its turns, and the model would not see it",
        ),
        (
            {"messages": CHAT, "documents": [{"text": "a b"}]},
            'beside its turns, and the model would not see it; fix: "',
        ),
        ({"text": str(CHAT)}, 'has a list of turns as its text; fix: "data.columns={messages: text}"'),
        ({"text": "q", "type": "message", "ts": "1"}, "is one message of a chat of Slack"),
        (
            {"messages": [USER, {**ASSISTANT, "label": 0}]},
            "turn 2 has label=0, which may say that it must not be learned",
        ),
        (
            {"prompt": "q", "completion": "a", "answer": "reject", "_task_hash": 1},
            "has answer='reject', of Prodigy; fix",
        ),
        ({"question": "q", "answers": {"text": []}}, "is a question without an answer in its answers; fix: leave such"),
        (
            {"messages": [USER], "choices": [REPLY, REPLY]},
            "has 2 answers in choices, and one is trained; fix: keep one",
        ),
        (
            {"inputs": {"messages": [USER]}, "outputs": {"messages": [SYSTEM]}},
            "has an answer in its outputs that beg",
        ),
        (
            {"translation": {"de": "q", "en": "a"}},
            '"data.columns={prompt: translation.de, completion: translation.en}"',
        ),
        (
            {"qa": [{"question": "q", "answer": "a"}]},
            '"data.columns={messages: qa}", if these are the rounds of one chat',
        ),
        ({"input": [USER], "ideal": "a"}, '"data.columns={prompt: input, completion: ideal}"'),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ASSISTANT], "non_preferred_output": [ASSISTANT]},
            '"data.columns={prompt: input.messages, completion: preferred_output}"',
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"}, '"data.columns={messages: chosen}"'),
    ],
)
def test_what_is_refused_and_its_fix(row: Row, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert expected in str(caught.value)
    for columns in re.findall(r"data\.columns=(\{.*?\})", str(caught.value)):
        fixed_by(row, columns)


def test_one_chat_under_two_names_is_one_chat() -> None:
    share_gpt = [{"from": "human", "value": "q", "id": "1"}, {"from": "gpt", "value": "a"}]
    row = {"messages": [SYSTEM, *CHAT], "conversations": share_gpt, "prompt": "q", "completion": "a"}
    assert parse_row(row).messages == [SYSTEM, *CHAT]
    assert parse_row({**row, "conversations": TWO}, RowShape({"messages": "messages"})).messages == [SYSTEM, *CHAT]
    accepted = {"prompt": "q", "completion": "a", "answer": "accept", "_task_hash": 1}
    assert parse_row(accepted).messages == CHAT


def test_a_chat_of_chatgpt_is_the_path_that_the_user_saw() -> None:
    def node(role: str, text: str, parent: str, **message: Any) -> Row:
        said = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}, **message}
        return {"message": said, "parent": parent}

    mapping = {
        "root": {"message": None, "parent": None},
        "s": node("system", "", "root"),
        "q": node("user", "q", "s"),
        "old": node("assistant", "x", "q"),
        "a": node("assistant", "a", "q", recipient="all"),
    }
    assert parse_row({"mapping": mapping, "current_node": "a"}).messages == CHAT
    mapping["a"] = node("assistant", "a", "q", recipient="python")
    with pytest.raises(RowError, match="is a chat of ChatGPT with a message of the type 'text' for 'python'"):
        parse_row({"mapping": mapping, "current_node": "a"})


def test_parts_and_turns_of_other_exports() -> None:
    bedrock = {"reasoningContent": {"reasoningText": {"text": "hm"}}}
    turns = [USER, {"role": "assistant", "content": [bedrock, {"text": "a"}]}]
    tools = {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {"type": "object"}}}}]}
    conversation = parse_row({"messages": turns, "toolConfig": tools})
    assert conversation.messages[1] == {**ASSISTANT, "reasoning_content": "hm"}
    assert conversation.tools == [SCHEMA]
    claude = {"sender": "assistant", "text": "a", "content": [{"type": "text", "text": "a", "citations": []}]}
    assert parse_row({"messages": [USER, claude]}).messages == CHAT
    cohere = {"role": "assistant", "tool_plan": "hm", "tool_calls": [FUNCTION]}
    assert parse_row({"messages": [USER, cohere]}).messages[1] == {**CALLING, "reasoning_content": "hm"}


def test_a_row_that_was_written_as_json_twice() -> None:
    assert parse_json_row(json.dumps(json.dumps({"messages": CHAT}))).messages == CHAT
    with pytest.raises(RowError, match="a number of thousands of digits; fix: put it in quotes"):
        parse_json_row('{"n": ' + "9" * 5000 + "}")


def said_by(role: str, text: str, parent: str | None) -> Row:
    return {
        "message": {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}},
        "parent": parent,
    }


WHOLE: list[Row] = [
    {"mapping": {"q": said_by("user", "q", None), "a": said_by("assistant", "a", "q")}, "current_node": "a"},
    {"request": {"messages": [USER]}, "response": {"choices": [REPLY]}},
    {"instructions": "s", "input": ITEMS[:5], "output": ITEMS[5:]},
    {"messages": [LANGCHAIN], "tools": [SCHEMA]},
    {"history": [["q", "a"]], "prompt": "q", "completion": [ASSISTANT]},
    {"turn_1": {"user": "q", "assistant": "a"}},
    *({"messages": turns} for turns in LISTS),
]
ODD = (None, 3, True, "", "x", "[", [], {}, [3], [None], [[]], {"a": 1}, "[{'role': 'user', 'content': 'q'}, 2]")


@st.composite
def damaged(draw: st.DrawFn) -> Row:
    """A row that is read, with another value in one place."""

    def replaced(value: Any) -> Any:
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not keys or draw(st.integers(0, 3)) == 0:
            return draw(st.sampled_from(ODD))
        key = draw(st.sampled_from(keys))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {at: replaced(item) if at == key else item for at, item in items}
        return changed if isinstance(value, dict) else [*changed.values()]

    row = draw(st.sampled_from(WHOLE))
    key = draw(st.sampled_from(list(row)))
    return {**row, key: replaced(row[key])}


@settings(max_examples=400)
@example({"prompt": "q", "completion": '[{"role": "assistant", "content": "x"}, "y"]'})
@example({"mapping": {"a": 3}, "current_node": "a"})
@example({"mapping": {"a": {"message": {"content": {"parts": 3}}}}, "current_node": "a"})
@given(damaged())
def test_a_damaged_row_is_read_or_refused_and_never_a_traceback(row: Row) -> None:
    with suppress(RowError):
        parse_row(row)
