"""Contracts 3 and 7: the mask is exact and nothing of a row is lost, for each kind of template that families have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.encoding.mask_reader import MaskReader
from lora_core.errors import RowError
from lora_core.rows.messages import Message, parse_row
from tests.conftest import chat, make_tokenizer

Row = dict[str, Any]

TOOLS = [
    {
        "name": "get_temp",
        "description": "Temperature of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
_TOOLS_SHOWN = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
_SPLITS = (
    "{% set r = m.reasoning_content or '' %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set r = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_LAST = (
    "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template in the smallest form that has what this kind of model does."""

    template: str
    eos: str = "<|im_end|>"
    stops: tuple[str, ...] = ()
    """What the generation config stops at, beside that."""
    specials: tuple[str, ...] = field(default=())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(self.template)
        tokenizer.add_special_tokens({"additional_special_tokens": [*self.specials, *self.stops]})
        tokenizer.eos_token = self.eos
        tokenizer.stop_tokens = self.stops
        return tokenizer


FAMILIES = {
    "think block for the last turn, hidden in earlier ones": Family(
        _LAST + _TOOLS_SHOWN + "{% for m in messages %}" + _SPLITS + "<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.q and (loop.last or r) %}<think>\n{{ r }}\n</think>\n\n"
        "{% endif %}{{ text }}" + _CALLS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "prompt ends in a think tag": Family(
        _LAST + _TOOLS_SHOWN + "{% for m in messages %}" + _SPLITS + "<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.q %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ text }}"
        + _CALLS
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "the next header ends a turn": Family(
        "{% if tools %}<|sys|>\n{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>\n{{ m.content }}"
        + _CALLS
        + "{% elif m.role == 'tool' %}<|obs|>\n{{ m.content }}{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}",
        eos="<|endoftext|>",
        stops=("<|user|>", "<|obs|>"),
        specials=("<|bot|>", "<|sys|>", "<|system|>"),
    ),
    "a tool's answer stands inside the model's turn": Family(
        "{% if tools %}<turn>tools\n{{ tools | tojson }}<end_of_turn>\n{% endif %}{% for m in messages %}"
        "{% if m.role == 'tool' %}<|answer|>{{ m.content }}<|end_answer|>"
        "{% else %}{% if m.role != 'assistant' or loop.first or messages[loop.index0 - 1].role != 'tool' %}"
        "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>call:{{ c.function.name }}{{ c.function.arguments | tojson }}</call>"
        "{% endfor %}{% if m.tool_calls and (loop.last or messages[loop.index0 + 1].role != 'tool') %}<|answer|>"
        "{% elif not m.tool_calls %}<end_of_turn>\n{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<turn>model\n{% endif %}",
        eos="<end_of_turn>",
        stops=("<|answer|>",),
        specials=("<|end_answer|>",),
    ),
    "channels": Family(
        _LAST + "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.reasoning_content and loop.index0 > ns.q %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
        "{% if m.content or not m.tool_calls %}<|start|>assistant<|channel|>"
        "{{ 'commentary' if m.tool_calls else 'final' }}<|message|>{{ m.content }}"
        "{% if not m.tool_calls %}{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|end|>{% endif %}{% endif %}"
        "{% for c in m.tool_calls or [] %}<|start|>assistant to={{ c.function.name }}<|message|>"
        "{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        eos="<|return|>",
        stops=("<|call|>",),
        specials=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
    "no header, ids of nine characters": Family(
        _LAST + "<s>{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.q %}"
        "[T]{{ tools | tojson }}[/T]{% endif %}[Q] {{ m.content }} [/Q]"
        "{% elif m.role == 'assistant' and m.tool_calls %}[CALLS] ["
        "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
        "{{ raise_exception('ids have nine characters') }}{% endif %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{{ ', ' if not loop.last }}{% endfor %}]</s>{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% elif m.role == 'tool' %}[R] {{ m.content }} {{ m.tool_call_id }}[/R]{% else %}[S] {{ m.content }}[/S]"
        "{% endif %}{% endfor %}",
        eos="</s>",
        specials=("[Q]", "[/Q]", "[CALLS]", "[T]", "[/T]", "[R]", "[/R]"),
    ),
    "arguments as text": Family(
        _TOOLS_SHOWN
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}\n{{ c.function.arguments }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "ids for names": Family(
        _TOOLS_SHOWN
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.id }}|{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "the prompt is written whether asked or not": Family(
        _TOOLS_SHOWN + "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}" + _CALLS + "<|im_end|>"
        "{% endfor %}{% if messages[-1].role != 'assistant' %}<turn>assistant\n{% endif %}"
    ),
    "contents are parts": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% for p in m.content if p.type == 'text' %} {{ p.text }}"
        "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}",
        eos="<end_of_turn>",
    ),
    "an answer names its tool": Family(
        _TOOLS_SHOWN
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.name + ': ' if m.name and m.role == 'tool' }}"
        "{{ m.content }}" + _CALLS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "keys are sorted": Family(
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}({% for k, v in "
        "t.function.parameters.properties | dictsort %}{{ k }} {% endfor %}){% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}({% for k, v in c.function.arguments | dictsort %}{{ k }}={{ v | tojson }},"
        "{% endfor %})</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def call(arguments: Any, content: str = "", **more: Any) -> Message:
    function = {"name": "get_temp", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"function": function, **more}]}


PLAIN = chat("Hi?", "First.", "More?", "Last.")
SYSTEM = {"messages": [{"role": "system", "content": "Be kind."}, *chat("Hi?", "Last.")["messages"]]}
ASKED = {
    "messages": [
        {"role": "user", "content": "Oslo?"},
        call({"city": "Oslo"}),
        {"role": "tool", "content": "4 degrees", "name": "get_temp"},
        call({"city": "Rome"}),
        {"role": "tool", "content": "20 degrees", "name": "get_temp"},
        {"role": "assistant", "content": "Go south."},
    ],
    "tools": TOOLS,
}
THOUGHT = {
    "messages": [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "First.", "reasoning_content": "Once."},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "Last.", "reasoning_content": "Again."},
    ]
}
INLINE = chat("Hi?", "<think>\nOnce.\n</think>\n\nFirst.", "More?", "<think>\nAgain.\n</think>\n\nLast.")
THOUGHT_AND_CALLED = {
    "messages": [ASKED["messages"][0], call({"city": "Oslo"}, "<think>\nAsk.\n</think>\n\n")],
    "tools": TOOLS,
}
OSLO = '<call>{"name": "get_temp", "arguments": {"city": "Oslo"}}</call>'
ROME = OSLO.replace("Oslo", "Rome")
END = "<|im_end|>"


def trained_text(family: Family, row: Row) -> tuple[list[str], tuple[str, ...]]:
    """Each run of loss tokens as text, and what is not shown; the mask is read back too."""
    tokenizer = family.tokenizer()
    conversation = parse_row(row)
    (encoded,) = ChatEncoder(tokenizer).encode_batch([conversation])
    if isinstance(encoded, RowError):
        raise encoded
    assert MaskReader(tokenizer).read(conversation, encoded).problem is None
    return runs_of(tokenizer, encoded), encoded.not_shown


def runs_of(tokenizer: Any, encoded: EncodedChat, is_trained: bool = True) -> list[str]:
    runs: list[list[int]] = []
    last = False
    for token, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if flag == is_trained:
            if not runs or last != is_trained:
                runs.append([])
            runs[-1].append(token)
        last = flag
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "think block for the last turn, hidden in earlier ones",
            PLAIN,
            [f"First.{END}", f"<think>\n\n</think>\n\nLast.{END}"],
        ),
        (
            "think block for the last turn, hidden in earlier ones",
            ASKED,
            [OSLO + END, ROME + END, f"<think>\n\n</think>\n\nGo south.{END}"],
        ),
        (
            "think block for the last turn, hidden in earlier ones",
            THOUGHT_AND_CALLED,
            [f"<think>\nAsk.\n</think>\n\n{OSLO}{END}"],
        ),
        ("prompt ends in a think tag", PLAIN, [f"First.{END}", f"\n</think>\n\nLast.{END}"]),
        ("the next header ends a turn", PLAIN, ["\nFirst.<|user|>", "\nLast.<|user|>"]),
        ("the next header ends a turn", ASKED, [f"\n{OSLO}<|obs|>", f"\n{ROME}<|obs|>", "\nGo south.<|user|>"]),
        ("a tool's answer stands inside the model's turn", PLAIN, ["First.<end_of_turn>", "Last.<end_of_turn>"]),
        (
            "a tool's answer stands inside the model's turn",
            ASKED,
            [
                '<call>call:get_temp{"city": "Oslo"}</call><|answer|>',
                '<call>call:get_temp{"city": "Rome"}</call><|answer|>',
                "Go south.<end_of_turn>",
            ],
        ),
        (
            "channels",
            PLAIN,
            ["<|channel|>final<|message|>First.<|end|>", "<|channel|>final<|message|>Last.<|return|>"],
        ),
        (
            "channels",
            ASKED,
            [
                ' to=get_temp<|message|>{"city": "Oslo"}<|call|>',
                ' to=get_temp<|message|>{"city": "Rome"}<|call|>',
                "<|channel|>final<|message|>Go south.<|return|>",
            ],
        ),
        ("no header, ids of nine characters", PLAIN, [" First.</s>", " Last.</s>"]),
        (
            "no header, ids of nine characters",
            ASKED,
            [
                '[CALLS] [{"name": "get_temp", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>',
                '[CALLS] [{"name": "get_temp", "arguments": {"city": "Rome"}, "id": "call00002"}]</s>',
                " Go south.</s>",
            ],
        ),
        (
            "arguments as text",
            ASKED,
            [
                f'<call>get_temp\n{{"city": "Oslo"}}</call>{END}',
                f'<call>get_temp\n{{"city": "Rome"}}</call>{END}',
                f"Go south.{END}",
            ],
        ),
        (
            "ids for names",
            ASKED,
            [
                f'<call>functions.get_temp:0|{{"city": "Oslo"}}</call>{END}',
                f'<call>functions.get_temp:1|{{"city": "Rome"}}</call>{END}',
                f"Go south.{END}",
            ],
        ),
        ("the prompt is written whether asked or not", PLAIN, [f"First.{END}", f"Last.{END}"]),
        ("the prompt is written whether asked or not", ASKED, [OSLO + END, ROME + END, f"Go south.{END}"]),
        ("contents are parts", SYSTEM, [" Last.<end_of_turn>"]),
        ("an answer names its tool", ASKED, [OSLO + END, ROME + END, f"Go south.{END}"]),
        (
            "keys are sorted",
            {**ASKED, "messages": [ASKED["messages"][0], call({"days": 2, "city": "Oslo"})]},
            [f'<call>get_temp(city="Oslo",days=2,)</call>{END}'],
        ),
    ],
)
def test_what_each_kind_of_template_trains(name: str, row: Row, expected: list[str]) -> None:
    assert trained_text(FAMILIES[name], row)[0] == expected


@pytest.mark.parametrize("row", [THOUGHT, INLINE], ids=["own key", "inline"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "think block for the last turn, hidden in earlier ones",
            [f"First.{END}", f"<think>\nAgain.\n</think>\n\nLast.{END}"],
        ),
        ("prompt ends in a think tag", [f"First.{END}", f"Again.\n</think>\n\nLast.{END}"]),
    ],
)
def test_hidden_reasoning_of_earlier_turns_is_counted(name: str, row: Row, expected: list[str]) -> None:
    assert trained_text(FAMILIES[name], row) == (expected, ("reasoning of earlier turns",))


def test_reasoning_in_a_channel_of_its_own_is_one_reply_with_the_answer() -> None:
    assert trained_text(FAMILIES["channels"], THOUGHT)[0][-1] == (
        "<|channel|>analysis<|message|>Again.<|end|><|start|>assistant<|channel|>final<|message|>Last.<|return|>"
    )


def test_a_call_without_a_prompt_starts_after_the_question_though_tools_have_moved() -> None:
    row = {"messages": [*ASKED["messages"][:3], *PLAIN["messages"][1:]], "tools": TOOLS}
    runs = ['[CALLS] [{"name": "get_temp", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>', " First.</s>"]
    assert trained_text(FAMILIES["no header, ids of nine characters"], row)[0] == [*runs, " Last.</s>"]


def test_an_empty_think_block_in_the_content_is_part_of_the_reply() -> None:
    family = Family("{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>{% endfor %}", eos="</s>")
    row = chat("Hi?", "<think>\n\n</think>\n\nYes.")
    asked = Family(family.template + "{% if add_generation_prompt %}<turn>assistant\n{% endif %}", eos="</s>")
    assert trained_text(asked, row)[0] == ["<think>\n\n</think>\n\nYes.</s>"]
    name = "think block for the last turn, hidden in earlier ones"
    assert trained_text(FAMILIES[name], row)[0] == [f"<think>\n\n</think>\n\nYes.{END}"]


def test_ids_that_a_template_compares_are_the_same_in_call_and_answer() -> None:
    family = Family(
        _TOOLS_SHOWN + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'tool' %}{% for c in messages[loop.index0 - 1].tool_calls if c.id == m.tool_call_id %}"
        "{{ c.function.name }}: {% endfor %}{% endif %}{{ m.content }}" + _CALLS + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    answer = {"role": "tool", "content": "4", "tool_call_id": "abc"}
    row = {"messages": [*ASKED["messages"][:1], call({"city": "Oslo"}, id="abc"), answer, {**PLAIN["messages"][1]}]}
    assert trained_text(family, {**row, "tools": TOOLS})[0] == [OSLO + END, f"First.{END}"]


def test_each_template_of_several_is_asked_for_what_it_wants() -> None:
    plain = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    plain += "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    family = Family(plain)
    tokenizer = family.tokenizer()
    tokenizer.chat_template = {"default": plain, "tool_use": FAMILIES["arguments as text"].template}
    encoder, reader = ChatEncoder(tokenizer), MaskReader(tokenizer)
    for row, expected in [
        (PLAIN, [f"First.{END}", f"Last.{END}"]),
        (ASKED, [f'<call>get_temp\n{{"city": "{c}"}}</call>{END}' for c in ("Oslo", "Rome")] + [f"Go south.{END}"]),
    ]:
        (encoded,) = encoder.encode_batch([parse_row(row)])
        assert isinstance(encoded, EncodedChat), encoded
        assert runs_of(tokenizer, encoded) == expected
        assert reader.read(parse_row(row), encoded).problem is None


def wrong_masks(mask: list[bool]) -> dict[str, list[bool]]:
    """A token too early, too late, without an end, without a turn, ..."""
    starts = [i for i, flag in enumerate(mask) if flag and not mask[i - 1]]
    ends = [i for i, flag in enumerate(mask) if flag and not (i + 1 < len(mask) and mask[i + 1])]
    wrong = {
        "earlier": [*mask[1:], False],
        "later": [False, *mask[:-1]],
        "all": [True] * len(mask),
        "none": [False] * len(mask),
    }
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        previous = ends[number - 1] + 1 if number else 0
        wrong[f"no start of {number}"] = [flag and i != start for i, flag in enumerate(mask)]
        wrong[f"no end of {number}"] = [flag and i != end for i, flag in enumerate(mask)]
        wrong[f"without {number}"] = [flag and not start <= i <= end for i, flag in enumerate(mask)]
        wrong[f"what is before {number} too"] = [flag or previous <= i < start for i, flag in enumerate(mask)]
    return {how: one for how, one in wrong.items() if one != mask}


@pytest.mark.parametrize("row", [PLAIN, ASKED], ids=["plain", "tools"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reader_objects_to_every_other_mask(name: str, row: Row) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    conversation = parse_row(row)
    (encoded,) = ChatEncoder(tokenizer).encode_batch([conversation])
    if row == ASKED and name == "contents are parts":  # it shows no tools
        assert isinstance(encoded, RowError)
        return
    assert isinstance(encoded, EncodedChat)
    reader = MaskReader(tokenizer)
    assert reader.read(conversation, encoded).problem is None
    for how, mask in wrong_masks(encoded.loss_mask).items():
        assert reader.read(conversation, EncodedChat(encoded.input_ids, mask)).problem is not None, how


_HEADER = "<turn>{{ m.role }}\n"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("{{ m.content }} / {{ m.content }}<|im_end|>", PLAIN, "writes turn 2 twice"),
        ("{{ m.content | upper }}<|im_end|>", PLAIN, "does not show all of the row|other text for other letters"),
        ("{{ m.content }}<|im_end|>", ASKED, r"does not show all of the row.*\[content_not_shown\]"),
        ("{{ m.content }}" + _CALLS + "<|im_end|>", ASKED, r"the tools: tools\.name.*\[content_not_shown\]"),
        ("{{ m.content }}<|im_end|>", THOUGHT, r"turn 4: reasoning.*\[content_not_shown\]"),
        ("{{ m.content }}", PLAIN, "would not learn to stop"),  # the next header is no token that generation stops at
    ],
)
def test_rows_without_an_exact_mask_are_refused_with_the_reason(template: str, row: Row, reason: str) -> None:
    family = Family(
        f"{{% for m in messages %}}{_HEADER}{template}{{% endfor %}}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    with pytest.raises(RowError, match=reason):
        trained_text(family, row)


# ---------------------------------------------------------------------------------------------------------------
# Contract 7, over all of them

_WORDS = [
    "ok",
    "7",
    "?!",
    "user",
    "assistant",
    "</think>",
    "<call>",
    '"q"\n',
    " a b ",
    "你好",
    "é",
    "<|im_end|>",
    "x\\y",
]
_texts = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=4).map("".join)
_values = st.one_of(_texts, st.integers(0, 99), st.booleans(), st.lists(_texts, max_size=2))
_arguments = st.dictionaries(st.sampled_from(["city", "days", "is_on"]), _values, max_size=3)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A conversation in which every text holds a word that no other text has."""
    number = iter(range(1, 1_000))

    def text() -> str:
        return f"w{next(number)}w{draw(_texts)}"

    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": text()})
    with_tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": text()})
        if with_tools and draw(st.booleans()):
            messages += [
                call(draw(_arguments), draw(st.sampled_from(["", text()]))),
                {"role": "tool", "content": text()},
            ]
        reply: Message = {"role": "assistant", "content": text()}
        if draw(st.booleans()):
            reply["reasoning_content"] = text()
        messages.append(reply)
    return {"messages": messages, **({"tools": TOOLS} if with_tools else {})}


def shown_as(text: str, whole: str) -> bool:
    """Each piece of it that a template may put elsewhere: what stands before `</think>` is reasoning."""
    pieces = [text, text.strip()], *([piece.strip()] for piece in text.split("</think>"))
    whole_or_pieces = pieces[:1] if "</think>" not in text else pieces[1:]
    return all(
        any(form in whole for one in forms for form in (one, json.dumps(one, ensure_ascii=False)[1:-1]))
        for forms in whole_or_pieces
    )


def strings_in(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in strings_in(item)]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_a_row_is_lost_and_nothing_of_another_is_trained(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    encoder, reader = ChatEncoder(tokenizer), MaskReader(tokenizer)
    num_encoded = 0

    @settings(max_examples=40)
    @given(rows())
    def check(row: Row) -> None:
        nonlocal num_encoded
        conversation = parse_row(row)
        (encoded,) = encoder.encode_batch([conversation])
        if isinstance(encoded, RowError):
            return
        num_encoded += 1
        assert reader.read(conversation, encoded).problem is None
        whole = tokenizer.decode(encoded.input_ids, skip_special_tokens=False)
        trained = "|".join(runs_of(tokenizer, encoded))
        for message in conversation.messages:
            is_reply = message["role"] == "assistant"
            assert shown_as(message["content"], trained if is_reply else whole)
            if not is_reply:
                assert f"w{message['content'].split('w')[1]}w" not in trained
            if "reasoning_content" in message and not encoded.not_shown:
                assert shown_as(message["reasoning_content"], trained)
            for one in message.get("tool_calls", []):
                assert one["function"]["name"] in trained
                assert all(shown_as(text, trained) for text in strings_in(one["function"]["arguments"]))
        assert not row.get("tools") or "get_temp" in whole

    check()
    assert num_encoded > 0
