"""The question of a row, and the reply that it expects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.config.schema import DataConfig
from lora_core.errors import DataError
from lora_core.inference.questions import questions_of_file
from tests.conftest import CHATML, chat, make_tokenizer

TOOLS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def data(tmp_path: Path, **keys: Any) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), **keys)


def test_the_last_trained_reply_is_asked_for_with_all_before_it(
    tmp_path: Path, write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = chat("q1", "a1", "q2", " a2 ", "q3", "a3")
    row["messages"][5]["weight"] = 0
    path = write_rows([{**row, "system": "s"}, chat("q", "a")])
    (first, second), left_out = questions_of_file(str(path), data(tmp_path), tokenizer)
    assert [turn["content"] for turn in first.asked.messages] == ["s", "q1", "a1", "q2"]
    assert (first.expected, first.place, left_out) == ("a2", f"{path}:1", 0)
    assert (second.expected, second.place) == ("a", f"{path}:2")


def test_with_split_turns_each_reply_is_asked_for(
    tmp_path: Path, write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows([chat("q1", "a1", "q2", "a2")])
    questions, _ = questions_of_file(str(path), data(tmp_path, split_turns=True), tokenizer)
    assert [(len(each.asked.messages), each.expected) for each in questions] == [(1, "a1"), (3, "a2")]
    everything, _ = questions_of_file(str(path), data(tmp_path, train_on="everything"), tokenizer)
    assert [(len(each.asked.messages), each.expected) for each in everything] == [(3, "a2")]


def test_a_call_is_expected_as_the_template_writes_it(tmp_path: Path, write_rows: Any) -> None:
    call = {"name": "clock", "arguments": {"zone": "CET"}}
    turns = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"name": "clock", "parameters": {"type": "object"}}]
    path = write_rows([{"messages": turns, "tools": tools}])
    (question,), _ = questions_of_file(str(path), data(tmp_path), make_tokenizer(TOOLS_TEMPLATE))
    assert question.expected == '<call>clock {"zone": "CET"}</call>'
    assert question.asked.tools is not None


def test_values_for_the_templates_variables_go_with_the_question(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([{**chat("q", "a"), "chat_template_kwargs": {"enable_thinking": False}}])
    (question,), _ = questions_of_file(
        str(path), data(tmp_path), make_tokenizer(CHATML + "{{ enable_thinking or '' }}")
    )
    assert question.asked.template_variables == {"enable_thinking": False}


def test_any_file_is_read_and_rows_that_ask_nothing_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.json"
    said = {"messages": [{"role": "assistant", "content": "unasked"}]}
    path.write_text(json.dumps([{"text": "plain"}, chat("q", "a"), said]), encoding="utf-8")
    questions, left_out = questions_of_file(str(path), data(tmp_path), tokenizer)
    assert ([each.place for each in questions], left_out) == ([f"{path}:row 2"], 2)


def test_rows_that_cannot_be_read_are_listed_or_counted(
    tmp_path: Path, write_rows: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows([{"messages": []}, chat("q", "a")])
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used:\n.*rows.jsonl:1: has no turns"):
        questions_of_file(str(path), data(tmp_path), tokenizer)
    questions, left_out = questions_of_file(str(path), data(tmp_path, on_bad_row="skip"), tokenizer)
    assert (len(questions), left_out) == (1, 1)
    with pytest.raises(DataError, match="none of 1 row asks anything; fix: "):
        questions_of_file(str(write_rows([{"text": "x"}], "texts.jsonl")), data(tmp_path), tokenizer)
