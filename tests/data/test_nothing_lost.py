"""Contract 7: nothing of a row is lost in silence; and what is written is read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_core.commands.convert import as_row
from lora_core.errors import RowError
from lora_core.rows.json_values import strings
from lora_core.rows.messages import Conversation, parse_json_row, parse_row

# Drawing rows takes as long as the machine is busy: not what is tested.
of_rows = settings(suppress_health_check=[HealthCheck.too_slow], max_examples=400)

# Every name that means something somewhere, so that each stands where it means nothing as well.
NAMES = re.findall(
    r"\w+",
    """
messages conversations conversation prompt completion instruction output question answer query answers response
input context history system system_prompt tools functions text role from value content weight loss_weight train
training loss reasoning_content reasoning thinking tool_calls function_call name tool_call_id tool_use_id id type
index function arguments parameters args tool_call chosen rejected label kto_tag image images mask loss_mask note
parts refusal thought contents systemInstruction functionCall functionResponse toolUse toolResult toolUseId response
""",
)

texts = st.text(st.characters(codec="utf-8"), max_size=6)


@st.composite
def marked(draw: st.DrawFn) -> dict[str, Any]:
    """A row of which each text says where it stands: `~3~`; some keys are what they should be, some are not."""
    count = iter(range(10_000))

    def mark(value: Any = None) -> Any:
        text = f"~{next(count)}~"
        return draw(st.sampled_from([text] * 6 + [[text], {"note": text}, [{"type": "text", "text": text}]]))

    def with_extra(item: dict[str, Any], chance: int) -> dict[str, Any]:
        for name in draw(st.lists(st.sampled_from(NAMES), max_size=2)) if draw(st.integers(0, chance)) == 0 else []:
            item.setdefault(name, mark())
        return item

    def call() -> dict[str, Any]:
        name = draw(st.sampled_from(["arguments", "parameters", "args", "input"]))
        function = {"name": f"~{next(count)}~", name: {f"~{next(count)}~": mark()}}
        if draw(st.booleans()):
            function[name] = json.dumps(function[name])
        function = with_extra(function, 3)
        kind = draw(st.integers(0, 2))
        if kind == 0:
            return function
        return with_extra({"id": f"~{next(count)}~", "type": "function", "function": function}, 3)

    def part(role: str) -> Any:
        kinds = {"assistant": ["text", "thinking", "tool_use", "tool_call"], "user": ["text", "tool_result"]}
        kinds["assistant"] += ["toolUse", "functionCall", "thought", "refusal"]
        kinds["user"] += ["toolResult", "functionResponse"]
        kind = draw(st.sampled_from(kinds.get(role, ["text"])))
        if kind in ("tool_use", "tool_call"):
            inner = call()
            return with_extra({"type": kind, **(inner if kind == "tool_use" else {kind: inner})}, 3)
        if kind in ("toolUse", "functionCall", "toolResult", "functionResponse"):
            name = {"toolUse": "input", "functionCall": "args", "toolResult": "content"}.get(kind, "response")
            said = mark() if name in ("content", "response") else {f"~{next(count)}~": mark()}
            return with_extra(
                {kind: with_extra({"name": f"~{next(count)}~", "toolUseId": f"~{next(count)}~", name: said}, 3)}, 3
            )
        if kind == "thought":
            return with_extra({"text": f"~{next(count)}~", "thought": draw(st.booleans())}, 3)
        content = {"tool_use_id": f"~{next(count)}~", "content": mark()} if kind == "tool_result" else {kind: mark()}
        return with_extra({"type": kind, **content}, 3)

    def turn(role: str) -> dict[str, Any]:
        content = [part(role) for _ in range(draw(st.integers(1, 3)))] if draw(st.booleans()) else f"~{next(count)}~"
        item: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant" and draw(st.booleans()):
            item["tool_calls"] = [call() for _ in range(draw(st.integers(1, 2)))]
        if role == "assistant" and draw(st.booleans()):
            item["reasoning_content"] = f"~{next(count)}~"
        return with_extra(item, 3)

    turns = [
        turn(draw(st.sampled_from(["system", "user", "tool", "assistant"]))) for _ in range(draw(st.integers(0, 3)))
    ]
    last = turn("assistant")
    schema = with_extra({"name": f"~{next(count)}~", "parameters": {"properties": {f"~{next(count)}~": mark()}}}, 3)
    row: dict[str, Any] = draw(st.sampled_from([{"tools": [schema]}, {"tools": [{"function": schema}]}, {}]))
    shape = draw(st.sampled_from(["messages", "contents", "prompt", "instruction", "query", "text"]))
    if shape == "messages":
        row = {**row, "messages": [*turns, last]}
    elif shape == "contents":
        contents = [with_extra({"role": item["role"], "parts": item["content"]}, 3) for item in [*turns, last]]
        row = {**row, "systemInstruction": {"parts": mark()}, "contents": contents}
    elif shape == "prompt":
        row = {**row, "prompt": turns or f"~{next(count)}~", "completion": [last]}
    elif shape == "instruction":
        row = {**row, "instruction": mark(), "output": mark(), "input": mark(), "history": [[mark(), mark()]]}
    elif shape == "query":
        row = {**row, "query": mark(), "answers": [call()]}
    else:
        row = {**row, "text": f"~{next(count)}~"}
    return with_extra(row, 1)


def lost(row: Any, said: str, unused: set[str], key: str = "") -> Iterator[str]:
    """`key: text` of each marked text that is not in what was read, and not under a key that is counted."""
    if isinstance(row, str):
        if row.startswith(("{", "[")):
            yield from lost(json.loads(row), said, unused, key)
        elif row.startswith("~") and row not in said:
            yield f"{key}: {row}"
    elif isinstance(row, list):
        for item in row:
            yield from lost(item, said, unused, key)
    elif isinstance(row, dict):
        for name, item in row.items():
            yield from lost(name, said, unused, name)
            if name not in unused:
                yield from lost(item, said, unused, name)


TWO_CALLS = {"type": "tool_call", "tool_call": {"name": "~0~", "arguments": {}}, "function_call": "~1~"}


@of_rows
@example({"messages": [{"role": "assistant", "content": [TWO_CALLS]}]})
@example({"messages": [{"role": "assistant", "content": [{"toolUse": {"name": "~0~"}, "function": ["~1~"]}]}]})
@given(marked())
def test_every_text_of_a_row_is_read_or_counted_or_the_row_is_refused(row: dict[str, Any]) -> None:
    try:
        conversation = parse_json_row(json.dumps(row))
    except RowError:
        return
    said = " ".join(strings([conversation.messages, conversation.tools, conversation.text]))
    unused = {key.rpartition(".")[2] for key in conversation.unused_keys}
    assert list(lost(row, said, unused)) == [], conversation


names = texts.filter(bool)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
calls = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": names, "arguments": st.dictionaries(texts, json_values, max_size=3)}
        ),
    },
    optional={"id": names},
)
replies = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"reasoning_content": names, "tool_calls": st.lists(calls, min_size=1, max_size=2), "name": names},
)
others = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user"]), "content": texts}, optional={"name": names}
)
answers = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": texts}, optional={"name": names, "tool_call_id": names}
)
schemas = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": names, "parameters": st.dictionaries(texts, texts, max_size=2)}),
    }
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    if draw(st.integers(0, 9)) == 0:
        return Conversation([], text=draw(texts))
    messages = draw(st.lists(replies | others | answers, max_size=4))
    reply = draw(st.integers(0, len(messages)))
    messages.insert(reply, draw(replies))
    weights = [draw(st.sampled_from([0.0, 1.0, 0.5])) if each["role"] == "assistant" else 1.0 for each in messages]
    return Conversation(
        messages,
        draw(st.none() | st.lists(schemas, min_size=1, max_size=2)),
        tuple(weights) if set(weights) != {1.0} else None,
        draw(st.integers(0, len(messages) - 1)),
    )


@of_rows
@given(conversations())
def test_a_converted_row_is_read_back_as_the_same(conversation: Conversation) -> None:
    row = as_row(conversation)
    assert parse_json_row(json.dumps(row, ensure_ascii=False)) == conversation
    assert parse_row(as_row(parse_row(row))) == conversation


@of_rows
@given(marked())
def test_what_can_be_read_can_be_converted(row: dict[str, Any]) -> None:
    try:
        conversation = parse_row(row)
    except RowError:
        return
    assert parse_row(as_row(conversation)) == replace(conversation, unused_keys=())
