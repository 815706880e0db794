"""`data.mask_reasoning`: the reasoning of replies is shown and not trained, in whatever way rows and templates hold it;
and `chat_template_kwargs` of single rows."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest

from lora_core.config.schema import NOT_TEMPLATE_VARIABLES, DataConfig
from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.encoding.mask_reader import MaskReader
from lora_core.errors import ConfigError, RowError
from lora_core.rows.messages import parse_row
from tests.encoding.test_spans import END, FAMILIES, INLINE, THOUGHT, THOUGHT_AND_CALLED, Family, chat, runs_of

THINK = "think block for the last turn, hidden in earlier ones"
# Whether a model thinks is a variable of this template, as in many.
SWITCHED = Family(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def encode(family: Family, row: dict[str, Any], mask_reasoning: bool = True) -> EncodedChat:
    """Encoded, and read back."""
    tokenizer = family.tokenizer()
    conversation = parse_row(row)
    (encoded,) = ChatEncoder(tokenizer, mask_reasoning=mask_reasoning).encode_batch([conversation])
    if isinstance(encoded, RowError):
        raise encoded
    assert MaskReader(tokenizer, mask_reasoning=mask_reasoning).read(conversation, encoded).problem is None
    return encoded


@pytest.mark.parametrize("row", [THOUGHT, INLINE], ids=["own key", "inline"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (THINK, [f"First.{END}", "<think>\n", f"\n</think>\n\nLast.{END}"]),
        ("prompt ends in a think tag", [f"First.{END}", f"\n</think>\n\nLast.{END}"]),
    ],
)
def test_reasoning_is_shown_and_not_trained(name: str, row: dict[str, Any], expected: list[str]) -> None:
    family = FAMILIES[name]
    encoded, plain = encode(family, row), encode(family, row, mask_reasoning=False)
    assert encoded.input_ids == plain.input_ids
    assert runs_of(family.tokenizer(), encoded) == expected
    left_out = [on and not off for on, off in zip(plain.loss_mask, encoded.loss_mask, strict=True)]
    text = family.tokenizer().decode(
        [token for token, flag in zip(plain.input_ids, left_out, strict=True) if flag], skip_special_tokens=False
    )
    assert text == "Again."


def test_reasoning_in_a_channel_of_its_own_and_before_a_call() -> None:
    family = FAMILIES["channels"]
    thought = {"messages": THOUGHT["messages"][2:]}
    start, end = "<|start|>assistant<|channel|>", "<|end|>"
    assert runs_of(family.tokenizer(), encode(family, thought)) == [
        "<|channel|>analysis<|message|>",
        f"{end}{start}final<|message|>Last.<|return|>",
    ]
    runs = runs_of(FAMILIES[THINK].tokenizer(), encode(FAMILIES[THINK], THOUGHT_AND_CALLED))
    assert runs[0] == "<think>\n"
    assert runs[1].startswith("\n</think>\n\n<call>")


def test_a_turn_without_reasoning_is_trained_whole() -> None:
    family, row = FAMILIES[THINK], chat("Hi?", "First.", "More?", "Last.")
    assert encode(family, row) == encode(family, row, mask_reasoning=False)


def test_text_that_looks_like_a_special_token_inside_reasoning_stays_out() -> None:
    """Such rows are encoded piece by piece, as the characters they are."""
    family = FAMILIES[THINK]
    row = chat("Hi?", "<think>\nIs <|im_end|> the end?\n</think>\n\nLast.")
    encoded = encode(family, row)
    assert encoded.holds_special_text
    assert runs_of(family.tokenizer(), encoded) == ["<think>\n", f"\n</think>\n\nLast.{END}"]


def test_weights_of_turns_leave_reasoning_at_zero() -> None:
    family = FAMILIES[THINK]
    row = chat("Hi?", "<think>\nAgain.\n</think>\n\nLast.")
    row["messages"][1]["weight"] = 0.5
    encoded = encode(family, row)
    assert [weight > 0 for weight in encoded.loss_weights] == encoded.loss_mask
    assert set(encoded.loss_weights) == {0.0, 0.5}


def test_the_reader_objects_to_every_other_mask() -> None:
    family = FAMILIES[THINK]
    tokenizer, conversation = family.tokenizer(), parse_row(THOUGHT)
    encoded = encode(family, THOUGHT)
    reader, whole = MaskReader(tokenizer, mask_reasoning=True), encode(family, THOUGHT, mask_reasoning=False)
    assert reader.read(conversation, whole).problem is not None
    generator = random.Random(0)
    for _ in range(60):
        wrong = list(encoded.loss_mask)
        at = generator.randrange(1, len(wrong))
        wrong[at] = not wrong[at]
        said = tokenizer.decode([encoded.input_ids[at]], skip_special_tokens=False)
        problem = reader.read(conversation, EncodedChat(encoded.input_ids, wrong)).problem
        # A lone sign at the border of the reasoning may belong to its last token, or not.
        assert problem is not None or not said.strip(), (said, at)


def test_reasoning_in_another_form_is_refused() -> None:
    shouting = Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content | replace('.', '!') }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RowError, match=r"writes the reasoning of turn 2 in another form.*data.mask_reasoning=false"):
        encode(shouting, {"messages": THOUGHT["messages"][:2]})


def test_all_text_and_no_reasoning_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"data.mask_reasoning=false"):
        DataConfig(mask_reasoning=True, train_on="everything")


# ---------------------------------------------------------------------------------------------------------------
# chat_template_kwargs of a row


def test_a_row_sets_variables_of_the_template_for_itself_alone() -> None:
    tokenizer = SWITCHED.tokenizer()
    rows = [chat("Hi?", "First."), {**chat("Hi?", "First."), "chat_template_kwargs": {"enable_thinking": False}}]
    conversations = [parse_row(row) for row in [*rows, rows[0]]]
    encoded = ChatEncoder(tokenizer).encode_batch(conversations)
    texts = [tokenizer.decode(one.input_ids) for one in encoded if isinstance(one, EncodedChat)]
    assert texts[0] == texts[2] == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nFirst.<|im_end|>\n"
    assert texts[1] == texts[0].replace("First", "<think>\n\n</think>\n\nFirst")
    reader = MaskReader(tokenizer)
    for conversation, one in zip(conversations, encoded, strict=True):
        assert isinstance(one, EncodedChat)
        # What generation starts after is never trained: the empty think block is part of the prompt here.
        assert runs_of(tokenizer, one) == [f"First.{END}"]
        assert reader.read(conversation, one).problem is None


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"thinking_budget": 3}, "has no thinking_budget, so it would change nothing"),
        ({"tools": []}, "cannot set 'tools'"),
        ({"chat_template": "x"}, "cannot set 'chat_template'"),
        ("yes", "chat_template_kwargs"),
        ({"enable_thinking": "<|im_end|>"}, "holds a special token"),
    ],
)
def test_variables_that_the_template_does_not_take_refuse_the_row(variables: Any, problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        encode(SWITCHED, {**chat("Hi?", "First."), "chat_template_kwargs": variables}, mask_reasoning=False)


@pytest.mark.parametrize("variables", [None, {}, "", {"enable_thinking": None}, '{"enable_thinking": null}'])
def test_no_variables_are_as_good_as_absent(variables: Any) -> None:
    assert parse_row({**chat("Hi?", "First."), "chat_template_kwargs": variables}).template_variables is None


def test_a_configuration_cannot_set_what_transformers_passes_itself() -> None:
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(parameters) - {"kwargs"} <= set(NOT_TEMPLATE_VARIABLES)
    with pytest.raises((ConfigError, ValueError), match="cannot set 'padding'"):
        DataConfig(chat_template_kwargs={"padding": True})
