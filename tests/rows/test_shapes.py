"""Every shape and every name that a row may have, and the words of each refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_core.config.schema import DataConfig
from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.errors import RowError
from lora_core.rows.columns import PAIRS, ROLES, TURNS
from lora_core.rows.columns import SYSTEM as SYSTEM_KEYS
from lora_core.rows.messages import Conversation, RowShape, parse_row, shape_of
from lora_core.rows.turns import WEIGHTS
from tests.conftest import make_tokenizer

Row = dict[str, Any]

USER: Row = {"role": "user", "content": "q"}
ASSISTANT: Row = {"role": "assistant", "content": "a"}
SYSTEM: Row = {"role": "system", "content": "s"}
FUNCTION: Row = {"name": "f", "arguments": {"x": 1}}
CALL: Row = {"type": "function", "function": FUNCTION}
CALLING: Row = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SCHEMA: Row = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def messages_of(*turns: Any, **columns: Any) -> list[Row]:
    return parse_row({"messages": list(turns), **columns}).messages


def assistant(**keys: Any) -> Row:
    """What a turn of these keys becomes, between a question and a plain reply."""
    return messages_of(USER, {"role": "assistant", **keys}, ASSISTANT)[1]


# ----- rows


@pytest.mark.parametrize("key", TURNS)
def test_names_of_a_list_of_turns(key: str) -> None:
    assert parse_row({key: [USER, ASSISTANT]}) == Conversation([USER, ASSISTANT])
    in_csv = json.dumps([USER, ASSISTANT])
    assert parse_row({key: in_csv}).messages == [USER, ASSISTANT]


@pytest.mark.parametrize(("question", "answer"), [pair for pair in PAIRS if pair[1] != "answers"])
def test_names_of_a_question_and_its_answer(question: str, answer: str) -> None:
    expected = Conversation([USER, ASSISTANT], num_prompt_messages=1)
    assert parse_row({question: "q", answer: "a"}) == expected
    assert parse_row({question: [USER], answer: [ASSISTANT]}) == expected
    assert parse_row({question: USER, answer: {"from": "gpt", "value": "a"}}) == expected
    assert parse_row({"messages": [], question: "q", answer: "a"}) == expected


def test_a_query_with_calls_as_its_answers() -> None:
    row = {"query": "q", "answers": json.dumps([FUNCTION]), "tools": json.dumps([SCHEMA["function"]])}
    assert parse_row(row) == Conversation([USER, CALLING], [SCHEMA], num_prompt_messages=1)


@pytest.mark.parametrize("question", ["instruction", "question", "query", "prompt"])
def test_what_belongs_to_a_question_follows_it(question: str) -> None:
    answer = "output" if question in ("instruction", "prompt") else "response"
    (asked, _) = parse_row({question: "q", "input": "i", answer: "a"}).messages
    assert asked["content"] == "q\n\ni"
    assert parse_row({question: "", "input": "i", answer: "a"}).messages[0]["content"] == "i"
    assert parse_row({question: "q", "input": "", answer: "a"}).messages[0]["content"] == "q"
    with pytest.raises(RowError, match=f"has input beside its {question}, and the model would not see it; fix: write"):
        parse_row({question: [USER], "input": "i", answer: "a"})


@pytest.mark.parametrize("question", ["instruction", "question", "query"])
def test_a_context_follows_its_question_but_not_a_prompt(question: str) -> None:
    assert parse_row({question: "q", "context": "c", "response": "a"}).messages[0]["content"] == "q\n\nc"
    of_prompt = parse_row({"prompt": "q", "context": "c", "response": "a"})
    assert (of_prompt.messages[0], of_prompt.unused_keys) == (USER, ("context",))


@pytest.mark.parametrize("history", [[["q", "a"]], [USER, ASSISTANT]])
def test_history_comes_first(history: Any) -> None:
    row = {"instruction": "r", "output": "b", "history": history, "system": "s"}
    expected = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    assert parse_row(row) == Conversation(expected, num_prompt_messages=4)
    assert parse_row({**row, "history": []}).messages == [SYSTEM, *expected[3:]]


@pytest.mark.parametrize("key", SYSTEM_KEYS)
@pytest.mark.parametrize("text", ["s", [{"type": "text", "text": "s"}]])
def test_a_system_text_beside_the_turns(key: str, text: Any) -> None:
    assert messages_of(USER, ASSISTANT, **{key: text}) == [SYSTEM, USER, ASSISTANT]
    assert messages_of(SYSTEM, USER, ASSISTANT, **{key: text}) == [SYSTEM, USER, ASSISTANT]  # said twice
    assert messages_of(USER, ASSISTANT, **{key: ""}) == [USER, ASSISTANT]


def test_a_second_system_text_is_counted() -> None:
    assert parse_row({"messages": [USER, ASSISTANT], "system": "s", "system_prompt": "t"}).unused_keys == (
        "system_prompt",
    )


def test_a_text_is_trained_whole_with_an_end() -> None:
    tokenizer = make_tokenizer()
    row = parse_row({"text": "one two", "messages": None, "source": "web"})
    assert (row.text, row.messages, row.unused_keys) == ("one two", [], ("source",))
    encoded = encode(row)
    assert tokenizer.decode(encoded.input_ids) == "one two<|im_end|>"
    assert all(encoded.loss_mask)
    special = encode(parse_row({"text": "one<|im_end|>"}))  # typed, so it ends nothing
    assert special.holds_special_text
    assert special.input_ids.index(tokenizer.eos_token_id) == len(special.input_ids) - 1
    assert tokenizer.decode(special.input_ids) == "one<|im_end|><|im_end|>"
    assert parse_row({"text": "one two", "messages": []}).text == "one two"


def test_columns_of_null_are_as_good_as_absent() -> None:
    nulls = dict.fromkeys(("prompt", "completion", "text", "system", "tools", "chosen", "weight", "images", "id"))
    assert parse_row({"messages": [USER, ASSISTANT], **nulls}) == Conversation([USER, ASSISTANT])
    keys = ("from", "value", "tool_calls", "function_call", "name", "tool_call_id", "reasoning_content", "weight")
    turns = [{**dict.fromkeys(keys), **USER}, {**dict.fromkeys(keys), **ASSISTANT}]
    assert parse_row({"messages": turns}) == Conversation([USER, ASSISTANT])
    share_gpt = [{"role": None, "content": None, "from": "human", "value": "q"}, ASSISTANT]
    assert parse_row({"messages": share_gpt}) == Conversation([USER, ASSISTANT])


# ----- data.columns and data.roles


def test_a_column_of_reasoning_is_that_of_the_answer_where_it_is_named() -> None:
    row = {"question": "q", "answer": "a", "thoughts": "hm"}
    shape = RowShape({"prompt": "question", "completion": "answer", "reasoning": "thoughts"})
    conversation = parse_row(row, shape)
    assert conversation.messages == [USER, {**ASSISTANT, "reasoning_content": "hm"}]
    assert conversation.unused_keys == ()
    # Some rows have none; and a column of that name that nobody named is counted.
    assert parse_row({"question": "q", "answer": "a"}, shape).messages == [USER, ASSISTANT]
    assert parse_row({"question": "q", "answer": "a", "reasoning": "hm"}).unused_keys == ("reasoning",)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"messages": "turns"}, {"turns": [USER, ASSISTANT]}),
        ({"prompt": "ask", "completion": "say"}, {"ask": "q", "say": "a"}),
        ({"prompt": "ask", "completion": "chosen"}, {"ask": "q", "chosen": "a", "rejected": ""}),
        ({"messages": "messages"}, {"messages": [USER, ASSISTANT]}),
    ],
)
def test_columns_of_other_names(columns: Row, row: Row) -> None:
    conversation = parse_row({**row, "persona": "s"}, RowShape({**columns, "system": "persona"}))
    assert (conversation.messages, conversation.unused_keys) == ([SYSTEM, USER, ASSISTANT], ())
    # Parquet and Arrow give a row without its null columns.
    assert parse_row(row, RowShape({**columns, "system": "persona"})).messages == [USER, ASSISTANT]


def test_a_text_and_tools_of_other_names() -> None:
    assert parse_row({"body": "x"}, RowShape({"text": "body"})).text == "x"
    row = {"messages": [USER, ASSISTANT], "apis": [SCHEMA]}
    assert parse_row(row, RowShape({"tools": "apis"})).tools == [SCHEMA]


def test_a_column_that_gives_its_name_away_is_counted() -> None:
    row = {"messages": [{"role": "user", "content": "other"}], "turns": [USER, ASSISTANT]}
    assert parse_row(row, RowShape({"messages": "turns"})).unused_keys == ("messages",)


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(RowError, match=r"has no 'turn', which data\.columns names; it has the keys 'turns'"):
        parse_row({"turns": [USER, ASSISTANT]}, RowShape({"messages": "turn"}))


@pytest.mark.parametrize(("said", "role"), [("Customer", "user"), ("agent", "assistant"), ("lab", "Observation")])
def test_roles_of_other_names(said: str, role: str) -> None:
    shape = RowShape(roles={said: role})
    messages = parse_row({"messages": [USER, {"role": said, "content": "x"}, ASSISTANT]}, shape).messages
    assert messages[1] == {"role": ROLES[role.lower()], "content": "x"}


def test_a_role_of_another_name_may_be_a_call() -> None:
    row = {"messages": [USER, {"from": "act", "value": json.dumps(FUNCTION)}]}
    assert parse_row(row, RowShape(roles={"act": "function_call"})).messages == [USER, CALLING]
    with pytest.raises(RowError, match=r"turn 2 has the role 'act' \('caller' by data\.roles\); known roles: system"):
        parse_row(row, RowShape(roles={"act": "caller"}))


# ----- turns


@pytest.mark.parametrize("said", ROLES)
@pytest.mark.parametrize("spelled", [str, str.upper, lambda name: f" {name.replace('_', '-')} "])
def test_names_of_roles(said: str, spelled: Any) -> None:
    role = ROLES[said]
    is_call = said in ("function_call", "tool_call", "tool_calls", "tool_use")
    turn = {"from": spelled(said), "value": json.dumps(FUNCTION) if is_call else "x"}
    expected = CALLING if is_call else {"role": role, "content": "x"}
    assert messages_of(USER, turn, ASSISTANT)[1] == expected


@pytest.mark.parametrize("key", ["content", "value", "text"])
def test_names_of_the_content(key: str) -> None:
    assert assistant(**{key: "x"}) == {"role": "assistant", "content": "x"}
    assert assistant(**{"content": "", key: "x"})["content"] == "x"
    assert assistant(**{"content": "x", key: "x"})["content"] == "x"


@pytest.mark.parametrize("content", ["", [], [""], [{"type": "text", "text": ""}]])
def test_an_empty_content_is_a_content(content: Any) -> None:
    assert assistant(content=content) == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "content",
    [
        {"type": "text", "text": "ab"},
        ["a", "b"],
        [{"type": "text", "text": "a"}, {"text": "b"}],
        [{"type": "input_text", "text": "a"}, {"type": "output_text", "content": "b", "image_url": None}],
        [{"type": "text", "value": "a"}, {"type": None, "text": "b"}],
    ],
)
def test_parts_of_text_are_joined(content: Any) -> None:
    assert assistant(content=content) == {"role": "assistant", "content": "ab"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_names_of_reasoning(key: str) -> None:
    expected = {"role": "assistant", "content": "x", "reasoning_content": "r"}
    assert assistant(content="x", **{key: "r"}) == expected
    assert assistant(content="x", **{key: ""}) == {"role": "assistant", "content": "x"}
    for kind in ("thinking", "reasoning", "think"):
        parts = [{"type": kind, key: "r"}, {"type": "text", "text": "x"}]
        assert assistant(content=parts) == expected
        assert assistant(content=parts, **{key: "r"}) == expected


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}'])
def test_names_of_arguments(name: str, given: Any) -> None:
    function = {"name": "f", name: given}
    for call in (
        function,
        {"type": "function", "function": function},
        {"function": "f", name: given},
        {"index": 0, "id": None, "function": {**function, "id": ""}},
    ):
        assert assistant(tool_calls=[call]) == CALLING
    assert assistant(tool_calls=json.dumps([function])) == CALLING
    assert assistant(content=None, function_call=function) == CALLING
    assert assistant(content=[{"type": "tool_use", **function}]) == CALLING


@pytest.mark.parametrize("empty", ["", None, {}, "{}"])
def test_a_call_without_arguments(empty: Any) -> None:
    calls = assistant(tool_calls=[{"name": "f", "arguments": empty}, {"name": "f"}])["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": {}}] * 2


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "function_call", "function"])
@pytest.mark.parametrize("inside", [None, "tool_call", "function_call"])
def test_calls_in_the_content(kind: str, inside: str | None) -> None:
    part = {"type": kind, **(FUNCTION if inside is None else {inside: FUNCTION})}
    content = [{"type": "text", "text": "x"}, part]
    assert assistant(content=content) == {**CALLING, "content": "x"}
    assert assistant(content=content, tool_calls=[FUNCTION]) == {**CALLING, "content": "x"}  # the same call, said twice


def test_ids_join_a_call_and_its_answer() -> None:
    for call in ({"id": "c1", **CALL}, {"type": "function", "function": {"id": "c1", **FUNCTION}}):
        assert assistant(tool_calls=[call])["tool_calls"] == [{**CALL, "id": "c1"}]
    answer = {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c1"}
    assert messages_of(USER, CALLING, answer, ASSISTANT)[2] == answer


@pytest.mark.parametrize("role", ["user", "tool"])
def test_answers_of_tools_inside_a_turn(role: str) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "1"}], "is_error": True}
    answer = {"role": "tool", "content": "1", "tool_call_id": "c1"}
    row = parse_row({"messages": [USER, CALLING, {"role": role, "content": [result]}, ASSISTANT]})
    assert row.messages == [USER, CALLING, answer, ASSISTANT]
    assert row.unused_keys == ("content.is_error",)
    with_text = {"role": role, "content": [result, {"type": "text", "text": "q"}]}
    if role == "user":
        assert messages_of(USER, CALLING, with_text, ASSISTANT) == [USER, CALLING, answer, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1", "1"),
        (None, ""),
        ({"b": [1, "é"]}, '{"b": [1, "é"]}'),
        (3, "3"),
        ([{"type": "text", "text": "a"}, "b"], '[{"type": "text", "text": "a"}, "b"]'),
        ([{"type": "file", "name": "a.txt"}], '[{"type": "file", "name": "a.txt"}]'),
        ([{"type": "text", "text": "a"}, {"text": "b"}], "ab"),
    ],
)
def test_what_a_tool_answers_becomes_text(content: Any, expected: str) -> None:
    assert messages_of(USER, CALLING, {"role": "tool", "content": content}, ASSISTANT)[2]["content"] == expected


# ----- tools


@pytest.mark.parametrize(
    "tool",
    [
        SCHEMA,
        SCHEMA["function"],
        {"type": "function", **SCHEMA["function"]},
        {"function": SCHEMA["function"]},
        {"name": "f", "input_schema": {"type": "object"}},
        {"name": "f", "parameters": {"type": "object", "properties": None}, "strict": None},
        json.dumps(SCHEMA),
    ],
)
def test_schemas_are_wrapped(tool: Any) -> None:
    for key in ("tools", "functions"):
        for given in ([tool], tool, json.dumps([tool])):
            assert parse_row({"messages": [USER, ASSISTANT], key: given}).tools == [SCHEMA]
    in_turn = {**SYSTEM, "tools": [tool]}
    assert parse_row({"messages": [in_turn, USER, ASSISTANT]}).tools == [SCHEMA]
    assert parse_row({"messages": [in_turn, USER, ASSISTANT], "tools": [tool]}).tools == [SCHEMA]


@pytest.mark.parametrize("empty", [None, "", "[]", []])
def test_no_tools(empty: Any) -> None:
    assert parse_row({"messages": [USER, ASSISTANT], "tools": empty}).tools is None


def test_nulls_that_arrow_adds_to_arguments_are_left_out_and_counted() -> None:
    call = {"name": "f", "arguments": {"x": 1, "y": None, "z": [{"a": None, "b": 1}]}}
    row = parse_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "z": [{"b": 1}]}
    assert row.unused_keys == ("arguments.y=null", "arguments.z.a=null")
    as_text = {**call, "arguments": json.dumps(call["arguments"])}  # not Arrow's: meant
    assert assistant(tool_calls=[as_text])["tool_calls"][0]["function"]["arguments"] == call["arguments"]


# ----- weights


def encode(row: Conversation, **settings: Any) -> EncodedChat:
    (encoded,) = ChatEncoder(make_tokenizer(), **settings).encode_batch([row])
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


def trained(row: Row, **settings: Any) -> str:
    encoded = encode(parse_row(row), **settings)
    pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    return str(make_tokenizer().decode([token for token, is_loss in pairs if is_loss])).replace("<|im_end|>", "|")


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_turn_of_weight_0_is_not_trained(key: str) -> None:
    for value in (0, False, 0.0):
        turns = [USER, {"role": "assistant", "content": "one", key: value}, USER, ASSISTANT]
        assert trained({"messages": turns}) == "a|"
    for value in (1, True, None):
        turns = [{**USER, key: None}, {"role": "assistant", "content": "one", key: value}, USER, ASSISTANT]
        assert trained({"messages": turns}) == "one|a|"
    turns = [{**USER, key: 0}, {**ASSISTANT, key: 0}]
    assert trained({"messages": turns}) == ""


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_the_weight_of_a_row_is_that_of_its_turns(key: str) -> None:
    turns = [USER, ASSISTANT, USER, {**ASSISTANT, "weight": 0}]
    assert parse_row({"messages": turns, key: 1}).weights == (1, 1, 1, 0)
    assert parse_row({"messages": turns, key: 0.5}).weights == (1, 0.5, 1, 0)
    assert trained({"messages": turns, key: 0}) == ""
    assert trained({"messages": turns, key: 0.5}) == "a|"


TRAIN_ON = {
    "all_assistant": ("one|two|", "two|"),
    "last_assistant": ("two|", "two|"),
    "completion": ("two|", "two|"),
}


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_train_on(train_on: Any) -> None:
    first = {"role": "assistant", "content": "one"}
    last = {"role": "assistant", "content": "two"}
    every, weighted = TRAIN_ON[train_on]
    assert trained({"messages": [SYSTEM, USER, first, USER, last]}, train_on=train_on) == every
    assert trained({"messages": [USER, {**first, "weight": 0}, USER, last]}, train_on=train_on) == weighted
    split = {"prompt": [USER], "completion": [first, USER, last], "system": "s"}
    in_completion = "two|" if train_on == "last_assistant" else "one|two|"
    assert trained(split, train_on=train_on) == in_completion


def test_train_on_everything_is_all_that_the_template_writes() -> None:
    encoded = encode(parse_row({"messages": [USER, ASSISTANT]}), train_on="everything")
    assert all(encoded.loss_mask)


# ----- refusals


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"a": 1}, "has the keys 'a'; needs 'messages', 'conversations', 'text', or a pair such as"),
        ({"a": 1}, 'fix: "data.columns={messages: NAME}" (or {prompt: NAME, completion: NAME}, or {text: NAME})'),
        ({}, "has the keys (none)"),
        ({f"k{i}": i for i in range(12)}, "'k9' and 2 more; needs"),
        ({"messages": "Hi"}, 'messages must be a list of turns, not a string; fix: "data.columns={text: messages}" to'),
        ({"messages": "[{"}, "messages is not valid JSON"),
        ({"messages": {"a": 1}}, "messages must be a list of turns, not an object"),
        ({"conversation": []}, "has no turns; it needs an assistant turn to train on"),
        (
            {"messages": [{"q": "q", "output": "a"}]},
            "turn 1 has no role, but the keys 'q', 'output'; fix: a role",
        ),
        ({"messages": [USER]}, "has no assistant turn; it needs one to train on"),
        ({"messages": [USER], "response": "a"}, 'fix: "data.columns={prompt: messages, completion: response}"'),
        ({"role": "prompter", "text": "q"}, "is one message (role 'prompter'), and a row is a whole chat; fix: put"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a string or a list of messages, not a number"),
        ({"prompt": "q", "completion": []}, "completion must be a string or a list of messages, not a list"),
        ({"question": "q", "context": [1], "answer": "a"}, "context must be a string, not a list"),
        ({"prompt": "q", "completion": "a", "history": "x"}, "history must be a list of rounds, not a string"),
        ({"prompt": "q", "completion": "a", "history": [["q"]]}, "history: round 1 must be [question, answer]"),
        ({"text": ["x"]}, "text must be a string, not a list"),
        ({"text": "x", "weight": 0}, "is a text with the weight 0, and all of a text is trained; fix: leave it out"),
        ({"prompt": "q", "completion": "a", "weight": "x"}, "weight must be a float of 0 or more, not 'x'"),
        ({"prompt": "q", "completion": "a", "weight": -1}, "weight must be a float of 0 or more, not -1"),
        ({"prompt": "q", "completion": "a", "weight": 0, "loss_weight": 1}, "has weight and loss_weight, which differ"),
        ({"prompt": "q", "completion": "a", "label": False}, "has label=false: a reply that must not be learned; fix"),
        ({"messages": [USER, ASSISTANT], "kto_tag": False}, "has kto_tag=false"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "has label='False': a reply that must not be learned"),
        ({"prompt": "q", "completion": "a", "label": 0}, "has label=0: a reply that must not be learned; fix: leave"),
        ({"question": "q", "answer": 4}, "not a number; fix: numbers in quotes"),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "holds 'images'; only text is trained; fix: leave such"),
        ({"messages": [SYSTEM, ASSISTANT], "system": "t"}, "has both a system key and a system turn, and they differ"),
        ({"messages": [USER, ASSISTANT], "system": 3}, "system: content must be a string, not a number"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "a tool must be an object with a name, or with a function"),
        ({"messages": [USER, ASSISTANT], "tools": ["[]"]}, "tools must be a list of objects, or that list as a JSON"),
        (
            {"messages": [{**USER, "tools": [{"name": "g"}]}, ASSISTANT], "tools": [SCHEMA]},
            "has several lists of tools, and they differ; a chat template takes one",
        ),
    ],
)
def test_rows_that_are_refused(row: Row, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert expected in str(caught.value)


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("x", "turn 2 must be an object with role and content, not a string"),
        ({"role": "boss", "content": "x"}, "turn 2 has the role 'boss'; known roles: system, developer, user"),
        ({"role": "boss", "content": "x"}, 'fix: "data.roles={boss: user}" (or assistant, system, tool)'),
        ({"role": "the boss", "content": "x"}, 'fix: "data.roles={NAME: user}" (or assistant, system, tool)'),
        ({"role": "user"}, "turn 2: content must be a string, not null"),
        ({"role": "user", "content": 1}, "turn 2: content must be a string, not a number"),
        ({"role": "user", "content": [1]}, "turn 2: content must be a string, not a list"),
        ({"role": "user", "content": [{}]}, "turn 2: content must be a string, not a list"),
        ({"role": "user", "content": {"parts": ["x"]}}, "turn 2: content must be a string, not an object"),
        (
            {"role": "user", "content": "x", "value": "y"},
            "turn 2 has both content and value, and they differ; keep one",
        ),
        ({"role": "user", "content": [IMAGE]}, "turn 2 holds a part of type 'image_url'; only text is trained; fix:"),
        ({"role": "tool", "content": [IMAGE]}, "turn 2 holds a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "x"}]}, "turn 2 holds a part of type 'x'; known types: text, reasoning"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "turn 2 holds a part of type ['text']"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "turn 2 holds a part without a text, but with the keys 'type'",
        ),
        ({"role": "user", "content": "x", "reasoning": "r"}, "turn 2 has reasoning, but the role 'user'; only an"),
        ({"role": "tool", "content": "x", "reasoning": "r"}, "turn 2 has reasoning, but the role 'tool'; only an"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "r"}]}, "turn 2 has reasoning, but the role"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "turn 2 has tool_calls, but the role 'user'; only an"),
        ({"role": "user", "content": [{"type": "tool_use", **FUNCTION}]}, "turn 2 has tool_calls, but the role 'user'"),
        (
            {"role": "assistant", "content": [{"type": "tool_result", "content": "x"}]},
            "turn 2 has a tool's answer, but",
        ),
        ({**ASSISTANT, "reasoning": "r", "thinking": "s"}, "turn 2 has both reasoning and thinking, and they differ"),
        (
            {"role": "assistant", "reasoning": "r", "content": [{"type": "thinking", "thinking": "s"}]},
            "turn 2 has reasoning beside its content and in it; keep one",
        ),
        (
            {**CALLING, "function_call": {"name": "g"}},
            "turn 2 has tool calls in two places (tool_calls and function_call)",
        ),
        ({**ASSISTANT, "tool_calls": 3}, "turn 2: tool_calls must be a list, not a number"),
        (
            {**ASSISTANT, "tool_calls": [3]},
            "turn 2: a tool call must be an object with name and arguments, not a number",
        ),
        (
            {**ASSISTANT, "tool_calls": [{"id": "1"}]},
            "turn 2: a tool call must be an object with name and arguments; it",
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": "[]"},
            "turn 2: tool_calls must hold a call, not an empty list",
        ),
        ({**ASSISTANT, "tool_calls": "f(1)"}, "turn 2: tool_calls is not valid JSON"),
        (
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"x": 1}, "input": {"x": 2}}]},
            "turn 2: the call of 'f' has both arguments and input; keep one",
        ),
        (
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "x"}]},
            "arguments of the tool call is not valid JSON",
        ),
        ({**ASSISTANT, "weight": "0"}, "turn 2: weight must be a bool or a float of 0 or more, not '0'"),
        ({**ASSISTANT, "weight": 0, "train": True}, "turn 2 has weight and train, which differ; keep one"),
        ({**USER, "train": True}, "turn 2: train=True on a user turn, and only assistant turns are trained; fix:"),
        ({**ASSISTANT, "loss_mask": [0, 1]}, "turn 2 has loss_mask, which may leave some of it out of training; fix:"),
        ({**ASSISTANT, "train_detail": [{"train": False}]}, "turn 2 has train_detail, which may leave some of it out"),
    ],
)
def test_turns_that_are_refused(turn: Any, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        messages_of(USER, turn, ASSISTANT)
    assert expected in str(caught.value)


HUMAN = {"from": "human", "value": "q"}
PREFERENCES: list[tuple[Row, Row]] = [
    ({"prompt": "q", "chosen": "a"}, {"completion": "chosen"}),
    ({"prompt": [USER], "chosen": [ASSISTANT]}, {"completion": "chosen"}),
    ({"prompt": "q", "chosen": [USER, ASSISTANT], "messages": [USER, ASSISTANT]}, {"messages": "chosen"}),
    ({"chosen": [HUMAN, ASSISTANT]}, {"messages": "chosen"}),
    (
        {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "a"}},
        {"prompt": "conversations", "completion": "chosen"},
    ),
    ({"question": "q", "chosen": "a"}, {"prompt": "question", "completion": "chosen"}),
    ({"instruction": "q", "input": "", "chosen": "a"}, {"prompt": "instruction", "completion": "chosen"}),
]


@pytest.mark.parametrize(("row", "columns"), PREFERENCES)
def test_a_preference_pair_is_refused_with_a_fix_that_trains_the_chosen_reply(row: Row, columns: Row) -> None:
    row = {**row, "rejected": "b"}
    with pytest.raises(RowError) as caught:
        parse_row(row)
    said = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    assert f'fix: "data.columns={{{said}}}" to train the chosen ones' in str(caught.value)
    fixed = parse_row(row, shape_of(DataConfig(columns=columns)))
    assert fixed.messages == [USER, ASSISTANT]
    assert "rejected" in fixed.unused_keys


def test_a_preference_between_texts() -> None:
    row = {"chosen": "Human: q Assistant: a", "rejected": "b"}
    with pytest.raises(RowError, match=r"data\.columns=\{text: chosen\}"):
        parse_row(row)
    assert parse_row(row, RowShape({"text": "chosen"})).text == row["chosen"]


def test_a_rejected_reply_beside_the_turns_is_counted() -> None:
    assert parse_row({"messages": [USER, ASSISTANT], "rejected": "b"}).unused_keys == ("rejected",)


# ----- what is left out


@pytest.mark.parametrize(
    ("turn", "key"),
    [
        ({**ASSISTANT, "refusal": "x"}, "messages.refusal"),
        ({**ASSISTANT, "from": "alice"}, "messages.from"),
        ({**USER, "tool_call_id": "x"}, "messages.tool_call_id"),
        ({"role": "user", "name": "x", "content": [{"type": "tool_result", "content": "1"}]}, "messages.name"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "citations": ["x"]}]}, "content.citations"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "s"}]},
            "content.signature",
        ),
        ({**ASSISTANT, "tool_calls": [{**CALL, "name": "x"}]}, "tool_calls.name"),
        ({**ASSISTANT, "tool_calls": [{"function": "f", "name": "x"}]}, "tool_calls.name"),
        ({**ASSISTANT, "tool_calls": [{**CALL, "type": "x"}]}, "tool_calls.type"),
        ({**ASSISTANT, "tool_calls": [{**CALL, "index": "x"}]}, "tool_calls.index"),
        ({**ASSISTANT, "tool_calls": [{"id": "1", "function": {**FUNCTION, "id": "2"}}]}, "tool_calls.id"),
        ({**ASSISTANT, "tool_calls": [{**FUNCTION, "note": "x"}]}, "tool_calls.note"),
        ({"from": "function_call", "value": '{"name": "f", "note": "x"}'}, "tool_calls.note"),
    ],
)
def test_what_nothing_is_made_of_is_listed(turn: Row, key: str) -> None:
    assert parse_row({"messages": [USER, turn, ASSISTANT]}).unused_keys == (key,)
