from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.errors import RowError
from lora_core.rows.messages import parse_json_row, parse_row

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 7},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
    ],
)
def test_every_shape_gives_the_same_messages(row: dict[str, Any]) -> None:
    assert parse_row(row).messages == [USER, ASSISTANT]
    with_system = parse_row({**row, "system": "s"}).messages
    assert with_system == [{"role": "system", "content": "s"}, USER, ASSISTANT]


def test_alpaca_input_follows_the_instruction() -> None:
    assert parse_row({"instruction": "q", "input": "i", "output": "a"}).messages[0]["content"] == "q\n\ni"


def test_function_calls_in_both_notations() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    share_gpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps(tools),
    }
    open_ai = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "1"},
            ASSISTANT,
        ],
        "tools": tools,
    }
    for row in (share_gpt, open_ai):
        conversation = parse_row(row)
        assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert conversation.messages[2] == {"role": "tool", "content": "1"}
        assert conversation.tools == tools


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not a list"),
        ('{"messages": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ("[" * 200_000, "nested too deeply"),
        ('{"texts": "x"}', "has the keys 'texts'; needs 'messages'"),
        ('{"messages": []}', "has no turns"),
        ('{"messages": "x"}', "messages must be a list"),
        ('{"messages": ["x"]}', "turn 1 must be an object"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', "turn 1 has the role 'boss'; known roles: system"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "has the role ['user']"),
        ('{"messages": [{"role": "user", "content": 3}]}', "turn 1: content must be a string, not a number"),
        ('{"messages": [{"role": "user", "content": null}]}', "not null"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"prompt": "q", "completion": "\\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "q", "completion": "a", "tools": "{"}', "tools is not valid JSON"),
        ('{"prompt": "q", "completion": "a", "tools": [1]}', "tools must be a list of objects"),
        ('{"system": "s", "messages": [{"role": "system", "content": "t"}]}', "both a system key and a system turn"),
        ('{"conversations": [{"from": "function_call", "value": "f(1)"}]}', "turn 1: tool_calls is not valid JSON"),
        ('{"conversations": [{"from": "function_call", "value": "{}"}]}', "must be an object with name"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}', "only an assistant calls tools"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}',
            "arguments of the tool call must be an object, not a list",
        ),
    ],
)
def test_bad_rows_name_what_is_wrong(line: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_json_row(line)
    assert expected in str(caught.value)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments"]), inner
        )
    ),
    max_leaves=8,
)


# Drawing rows takes as long as the machine is busy: not what is tested.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "system", "tools", "prompt", "completion"]), json_values
    )
)
def test_any_json_gives_a_conversation_or_a_row_error(row: dict[str, Any]) -> None:
    try:
        conversation = parse_json_row(json.dumps(row))
    except RowError:
        return
    assert any(message["role"] == "assistant" for message in conversation.messages)
