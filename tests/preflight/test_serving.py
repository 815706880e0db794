"""Prompts in training against prompts at serving, by ids, with thinking on and off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.configuration import load_config
from lora_core.data.encoded import load_data
from lora_core.encoding.named_templates import set_template
from lora_core.preflight.findings import Facts
from lora_core.preflight.serving import check_serving_prompt, served_prompts, trained_replies
from tests.conftest import make_tokenizer

OFF = "data.chat_template_kwargs={enable_thinking: false}"
# A template whose generation prompt opens reasoning that rows do not have, as those of some reasoning models do.
DIFFERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def turns(*contents: str, reasoning: str | None = None) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    if reasoning is not None:
        messages[-1]["reasoning_content"] = reasoning
    return {"messages": messages}


@pytest.fixture
def look(tmp_path: Path, write_rows: Any) -> Any:
    def make(rows: list[dict[str, Any]], *overrides: str) -> Facts:
        given = [
            f"data.train_file={write_rows(rows)}",
            "data.eval_file=null",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.chat_template=qwen3",
            *overrides,
        ]
        config = load_config("demo", given)
        tokenizer: PreTrainedTokenizerFast = make_tokenizer()
        set_template(tokenizer, config.data)
        train_data, eval_data = load_data(config, tokenizer)
        seen = SimpleNamespace(config=config, tokenizer=tokenizer, train_data=train_data, eval_data=eval_data)
        return cast(Facts, seen)

    return make


PLAIN = [turns(f"question {i}", f"answer {i}") for i in range(4)]
THOUGHT = [turns(f"question {i}", f"answer {i}", reasoning=f"it is {i}") for i in range(3)]
LONGER = [turns("question", "answer", "and then?", "that") for _ in range(2)]


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        (PLAIN, [], "the trained replies hold no reasoning: enable_thinking=true and false both"),
        (
            PLAIN,
            [OFF],
            "at serving use enable_thinking=false: its prompts are, token by token, those of 4 of 4 trained",
        ),
        (THOUGHT, [], "at serving use enable_thinking=true: its prompts are, token by token, those of 3 of 3 trained"),
        (
            [*PLAIN, *THOUGHT],
            [],
            "enable_thinking=true: its prompts are, token by token, those of 7 of 7 trained replies, and of 4 with",
        ),
        (THOUGHT, ["data.mask_reasoning=true"], "at serving use enable_thinking=true"),
        # Of a row of several turns only the last has the tags.
        (LONGER, [], "at serving use enable_thinking=true: its prompts are, token by token, those of 4 of 4"),
        (LONGER, [OFF], "data.split_turns=true trains the other 2 as they are served"),
        (
            LONGER,
            [OFF, "data.split_turns=true"],
            "at serving use enable_thinking=false: its prompts are, token by token",
        ),
        (PLAIN, ["data.chat_template=chatml"], None),
        ([{"text": "no turns at all"}], [], None),
        (PLAIN, ["data.train_on=everything"], None),
    ],
)
def test_the_setting_at_serving_that_gives_the_trained_prompts_is_named(
    look: Any, rows: list[dict[str, Any]], overrides: list[str], said: str | None
) -> None:
    found = list(check_serving_prompt(look(rows, *overrides)))
    assert [finding.id for finding in found] == ([] if said is None else ["serving_prompt"])
    assert said is None or said in found[0].message


def test_a_rows_own_setting_is_what_it_was_trained_with(look: Any) -> None:
    rows = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in PLAIN]
    (found,) = check_serving_prompt(look(rows))
    assert "at serving use enable_thinking=false" in found.message


def test_prompts_are_those_of_apply_chat_template(look: Any) -> None:
    facts = look([*PLAIN, *LONGER])
    replies = [*trained_replies(facts)]
    assert len(replies) == 8
    for variables in ({"enable_thinking": True}, {"enable_thinking": False}):
        for reply, prompt in zip(replies, served_prompts(facts.tokenizer, replies, variables), strict=True):
            expected: Any = facts.tokenizer.apply_chat_template(
                reply.before.messages, add_generation_prompt=True, return_dict=False, **variables
            )
            assert prompt == expected


def test_a_template_without_thinking_that_differs_at_serving_is_told(look: Any, tmp_path: Path) -> None:
    (tmp_path / "differs.jinja").write_text(DIFFERS, encoding="utf-8")
    (found,) = check_serving_prompt(look(PLAIN, f"data.chat_template={tmp_path / 'differs.jinja'}"))
    assert found.message.startswith("4 of 4 trained prompts are not the tokens that the chat template gives at serving")
