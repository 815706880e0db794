"""Signs of rows that are not what they should be."""

from __future__ import annotations

import pytest

from lora_core.data.row_text import signs, sketch, start_of_reply
from lora_core.rows.messages import parse_row
from tests.conftest import chat


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("hello", "Dear {{name}},"), {"has_placeholder"}),
        (("hello", "Dear [INSERT NAME],"), {"has_placeholder"}),
        (("hello", "ask <YOUR MANAGER>"), {"has_placeholder"}),
        (("fill in {{name}}", "Dear Ann,"), set()),  # asked, and not replied
        (("hello", "a [link] and {braces} and <b>"), set()),
        (("What is the name of it?", "What is the name of it? Ely."), {"repeats_prompt"}),
        (("Is it Ely?", "Is it Ely? Yes."), set()),  # a short question is repeated by good replies too
        (("hello", "hi", "and then?"), {"ends_unanswered"}),
        (("hello", " "), {"has_empty_reply"}),
        (("Wie heisst die Stadt?", "Город называется Эли."), {"changes_script"}),
        (("Как называется город?", "Город называется Эли."), set()),
        (("名前は何ですか、教えてください", "カタカナとひらがな"), set()),  # three scripts of one language
        (("write 東京 in letters please", "Tokyo, Tokyo"), set()),  # mostly Latin
    ],
)
def test_signs(turns: tuple[str, ...], expected: set[str]) -> None:
    found = signs(parse_row(chat(*turns)))
    assert {name for name, value in found.items() if value is True} == expected


def test_rows_that_differ_in_a_word_share_most_of_their_sketch() -> None:
    text = "the river floods the lower fields every spring and the cows are moved to the hill until it falls again"
    one = sketch(parse_row(chat("tell me about it", text)))
    other = sketch(parse_row(chat("tell me about it", text.replace("again", "once more"))))
    assert len({*one} & {*other}) >= 6
    assert 0 not in one
    with_system = {"messages": [{"role": "system", "content": f"{text} {text} {text}"}, *chat("a", "b")["messages"]]}
    assert sketch(parse_row(with_system)) == [0] * 8  # what all rows may have in common does not count


def test_the_start_of_a_reply_is_its_first_four_words() -> None:
    assert start_of_reply(parse_row(chat("a", "Sure! Here IS the slip"))) == "sure here is the"
    assert start_of_reply(parse_row(chat("a", "Sure, here"))) == ""
    assert signs(None)["reply_start"] == 0
