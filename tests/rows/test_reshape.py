"""`lora-core convert --kind`: each refusal's command, run on the row that was refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lora_core.commands.main import main
from lora_core.errors import RowError
from lora_core.rows.messages import parse_row
from tests.rows.test_shapes import ASSISTANT, USER

Row = dict[str, Any]
CHAT = [USER, ASSISTANT]
OTHER = [USER, {**ASSISTANT, "content": "b"}]
CHOICES = [{"role": "user", "content": "q\nA. x\nB. y"}, {"role": "assistant", "content": "B. y"}]


def telegram(number: int, who: str, text: Any) -> Row:
    return {"id": number, "type": "message", "date": "2024", "from": who, "from_id": who, "text": text}


ROWS: list[tuple[Row, list[list[Row]]]] = [
    ({"conversation_a": CHAT, "conversation_b": OTHER, "winner": "model_b"}, [OTHER]),
    ({"conversation_a": CHAT, "conversation_b": OTHER, "winner": "tie"}, []),
    ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}, [OTHER]),
    (
        {
            "instruction": "q",
            "completions": [{"response": "a", "overall_score": 7}, {"response": "b", "overall_score": "7.5"}],
        },
        [OTHER],
    ),
    ({"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "", "output": "b"}]}, [CHAT, OTHER]),
    (
        {
            "paragraphs": [
                {
                    "context": "c",
                    "qas": [{"question": "q", "answers": [{"text": "a"}]}, {"question": "q", "answers": []}],
                }
            ]
        },
        [[{**USER, "content": "q\n\nc"}, ASSISTANT]],
    ),
    ({"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}, [CHAT]),
    ({"question": "q", "answers": ["b", "a"], "context": "c"}, [[{**USER, "content": "q\n\nc"}, OTHER[1]]]),
    (
        {
            "data": {"ask": "q"},
            "annotations": [
                {"result": [{"type": "choices", "value": {}}, {"type": "textarea", "value": {"text": ["a"]}}]}
            ],
        },
        [CHAT],
    ),
    ({"question": "q", "choices": ["x", "y"], "answer": 1}, [CHOICES]),
    ({"question": "q", "choices": ["x", "y"], "answer": "y"}, [CHOICES]),
    ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "B"}, [CHOICES]),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, [CHOICES]),
    (
        {"question": {"stem": "q", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}}
        | {"answerKey": "B"},
        [CHOICES],
    ),
    ({"question": "q", "A": "x", "B": "y", "answer": "B"}, [CHOICES]),
    ({"question": "q", "option_a": "x", "option_b": "y", "answer": "B"}, [CHOICES]),
    (
        {
            "messages": [
                telegram(1, "Ann", ["Hello, ", {"type": "bold", "text": "you"}]),
                telegram(2, "Ann", "q"),
                {"id": 3, "type": "service", "text": ""},
                telegram(4, "NAME", "a"),
                telegram(5, "Ann", "Bye"),
            ]
        },
        [[{**USER, "content": "Hello, you\nq"}, ASSISTANT]],
    ),
    (
        {
            "messages": [
                {"sender_name": "NAME", "timestamp_ms": 2, "content": "a"},
                {"sender_name": "Ann", "timestamp_ms": 1, "content": "q"},
            ]
        },
        [CHAT],
    ),
    (
        {
            "messages": [
                {"author": {"name": "Ann", "isBot": False}, "content": "q"},
                {"author": {"name": "NAME", "isBot": False}, "content": "a"},
            ]
        },
        [CHAT],
    ),
]


@pytest.mark.parametrize(("row", "chats"), ROWS)
def test_the_command_of_a_refusal_writes_rows(
    row: Row, chats: list[list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    pasted = re.search(r"fix: lora-core (convert .*?) \(writes ", str(caught.value))
    assert pasted is not None
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    assert main(pasted[1].split()) == 0
    written = [parse_row(json.loads(line)).messages for line in Path("NEW.jsonl").read_text("utf-8").splitlines()]
    assert written == chats * 2


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("winner", {"conversation_a": CHAT, "conversation_b": OTHER, "winner": "tie", "id": 1}, "not written: 2"),
        ("winner", {"conversation_a": CHAT, "conversation_b": OTHER, "winner": "model_a", "judge": "x"}, "judge"),
        (
            "squad",
            {"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]},
            "not written: 2, for --kind squad writes a row for each question that has an answer",
        ),
        (
            "highest-score",
            {"instruction": "q", "completions": [{"response": "a", "overall_score": 7, "custom_system_prompt": "s"}]},
            "left out: completions.custom_system_prompt (2 rows)",
        ),
        (
            "label-studio",
            {"data": {"ask": "q", "hint": "h"}, "annotations": [{"result": [], "was_cancelled": True}]},
            "not written: 2",
        ),
    ],
)
def test_what_is_beside_the_examples_or_not_written_is_counted(
    kind: str, row: Row, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    assert main(["convert", "FILE", "--output", "NEW.jsonl", "--kind", kind]) == 0
    assert said in capsys.readouterr().out


def test_a_passage_beside_a_question_with_choices_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"article": "Tom ran.", "question": "Who ran?", "options": ["Tom", "Ann"], "answer": "A", "example_id": "7"}
    Path("FILE").write_text(json.dumps(row), encoding="utf-8")
    command = ["convert", "FILE", "--output", "NEW.jsonl", "--kind", "choices"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "has article beside its prompt, and the model would not see it" in told
    fix = re.search(r'fix: "(data\.columns=\{.*?\})" to show it', told)
    assert fix is not None
    assert main([*command, fix[1]]) == 0
    assert "left out: example_id (1 row)" in capsys.readouterr().out
    (line,) = Path("NEW.jsonl").read_text("utf-8").splitlines()
    asked, replied = parse_row(json.loads(line)).messages
    assert asked["content"] == "Who ran?\nA. Tom\nB. Ann\n\nTom ran."
    assert replied["content"] == "A. Tom"


def test_what_is_not_of_the_kind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "q", "choices": ["x"], "answer": 7}, {"prompt": "q", "completion": "a"}]
    Path("FILE").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["convert", "FILE", "--output", "NEW.jsonl", "--kind", "choices"]) == 2
    said = capsys.readouterr().err
    assert "FILE:1: is not a question with choices: none of the choices is its answer 7" in said
    assert "FILE:2: is not a question with choices: it has no question" in said
    assert main(["convert", "FILE", "--output", "NEW.jsonl", "--kind", "chat-log"]) == 2
    assert "--kind chat-log and --reply-of NAME go together" in capsys.readouterr().err
    assert not Path("NEW.jsonl").exists()
