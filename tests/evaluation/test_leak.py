"""Replies that are exchanged between prompts, to see whether the model reads them off their own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluation.leak import _Example, _exchanged

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(st.lists(st.builds(_Example, TOKENS, TOKENS), max_size=6))
def test_an_exchanged_example_has_another_prompt_and_is_no_longer_than_the_longest(examples: list[_Example]) -> None:
    """The model takes the longest; one more token may be past its last position."""
    longest = max((len(each.prompt) + len(each.reply) for each in examples), default=0)
    exchanged = _exchanged(examples)
    assert len(exchanged) == (len(examples) if len({tuple(each.reply) for each in examples}) > 1 else 0)
    for each, pair in zip(examples, exchanged, strict=False):
        assert pair.reply == each.reply
        assert len(pair.prompt) + len(pair.reply) <= longest
        assert any(
            pair.prompt == other.prompt[len(other.prompt) - len(pair.prompt) :] and other.reply != each.reply
            for other in examples
        )
