"""`lora-core rows` and `lora-core convert`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_core.commands.main import main
from lora_core.rows.messages import parse_json_row
from tests.conftest import chat

TOOLS = [{"name": "f", "parameters": {"type": "object"}}]
FUNCTION = {"name": "f", "arguments": {"x": None, "y": 1}}
ROWS: list[Any] = [
    {**chat("q", "a"), "id": 7},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}], "id": 8},
    {"instruction": "q", "input": "i", "output": "a", "history": [["p", "b"]], "system": "s"},
    {"text": "plain"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "function_call": FUNCTION}], "tools": TOOLS},
]
BAD = {"messages": [{"role": "boss", "content": "x"}]}


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Any:
    """A command's exit code, and what it printed."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # commands set their own

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        settings = [f"model.name_or_path={tiny_model_dir}", f"data.cache_dir={tmp_path / 'cache'}"]
        code = main([command, *arguments, *settings])
        return code, *capsys.readouterr()

    return call


# ----- rows


def test_rows_shows_the_first_three_with_loss_tokens_in_brackets(run: Any, write_rows: Any) -> None:
    path = write_rows([*ROWS[:4]])
    code, out, err = run("rows", str(path))
    assert (code, err) == (0, "")
    first, second, third = out.split(f"{path}:")[1:]
    assert first.splitlines() == [
        "1: 12 tokens, 2 loss tokens",
        "not shown to the model: id",
        "<|im_start|>user",
        "q<|im_end|>",
        "<|im_start|>assistant",
        "[[a<|im_end|>]]",
        "",
        "",
    ]
    assert ", 0 loss tokens\nnot shown to the model: id\n" in second
    assert "[[" not in second
    assert "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\np<|im_end|>" in third
    assert third.count("[[") == 2
    assert "plain" not in out


def test_rows_shows_one_line_or_as_many_as_are_asked_for(run: Any, write_rows: Any) -> None:
    path = write_rows(ROWS[:4])
    _, out, _ = run("rows", str(path), "--line", "4")
    assert "[[plain<|im_end|>]]\n\n" in out
    assert out.count(f"{path}:") == 1
    assert run("rows", str(path), "--num-rows", "4")[1].count(f"{path}:") == 4


def test_rows_are_named_as_the_file_names_them(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[:2]), encoding="utf-8")
    assert run("rows", str(path), "--line", "2")[1].startswith(f"{path}:row 2: ")


def test_rows_says_why_a_row_cannot_be_used_and_goes_on(run: Any, write_rows: Any) -> None:
    path = write_rows([BAD, chat("q", "a"), {"text": "x", "weight": 0}])
    code, out, _ = run("rows", str(path))
    assert code == 0
    assert f"{path}:1: turn 1 has the role 'boss'; known roles: " in out
    assert "[[a<|im_end|>]]" in out
    assert f"{path}:3: is a text with the weight 0" in out


def test_rows_obeys_the_configuration(run: Any, write_rows: Any) -> None:
    path = write_rows([{"turns": [{"who": 1, "role": "customer", "content": "q"}, {"role": "gpt", "content": "a"}]}])
    settings = ["data.columns={messages: turns}", "data.roles={customer: user}", "data.max_seq_length=10"]
    out = run("rows", str(path), *settings)[1]
    assert "12 tokens, 2 loss tokens; longer than data.max_seq_length=10\nnot shown to the model: messages.who\n" in out
    everything = run("rows", str(path), *settings, "data.train_on=everything")[1]
    assert "[[<|im_start|>user\nq" in everything


def test_rows_shows_no_control_characters(run: Any, write_rows: Any) -> None:
    out = run("rows", str(write_rows([chat("q\x1b[31m", "a")])))[1]
    assert "\x1b" not in out
    assert "\\x1b[31m" in out


def test_rows_are_green_on_a_terminal(run: Any, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows([chat("q", "a")])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32;1ma<|im_end|>\x1b[0m" in run("rows", str(path))[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[a<|im_end|>]]" in run("rows", str(path))[1]


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("{}\n", ["--line", "2"], "has no row at line 2; fix: leave out --line"),
        ("\n\n", [], "has no row"),
        (None, [], "no such file"),
    ],
)
def test_rows_of_a_file_without_them(
    run: Any, tmp_path: Path, content: str | None, arguments: list[str], expected: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    code, _, err = run("rows", str(path), *arguments)
    assert code == 2
    assert expected in err


# ----- convert


def test_convert_writes_rows_that_are_read_as_the_same(run: Any, write_rows: Any, tmp_path: Path) -> None:
    output = tmp_path / "new.jsonl"
    code, out, err = run("convert", str(write_rows(ROWS)), "--output", str(output))
    assert (code, err) == (0, "")
    assert out == (
        f"wrote {output}: 5 rows, 0 left out as unreadable\nleft out: arguments.x=null (1 row), id (2 rows)\n"
    )
    lines = output.read_text(encoding="utf-8").splitlines()
    for line, row in zip(lines, ROWS, strict=True):
        read, written = parse_json_row(json.dumps(row)), parse_json_row(line)
        assert (written.messages, written.tools, written.weights) == (read.messages, read.tools, read.weights)
        assert (written.text, written.num_prompt_messages) == (read.text, read.num_prompt_messages)
        assert written.unused_keys == ()
    again = tmp_path / "again.jsonl"
    run("convert", str(output), "--output", str(again))
    assert again.read_text(encoding="utf-8") == output.read_text(encoding="utf-8")


def test_convert_stops_at_bad_rows_or_leaves_them_out(run: Any, write_rows: Any, tmp_path: Path) -> None:
    path, output = write_rows([BAD, ROWS[0], BAD]), tmp_path / "new.jsonl"
    path.write_bytes(path.read_bytes() + b"\xff\n\n")
    code, _, err = run("convert", str(path), "--output", str(output))
    assert code == 2
    assert "3 of 4 rows cannot be used:" in err
    assert f"{path}:1: turn 1 has the role 'boss'" in err
    assert f"{path}:4: not UTF-8 at byte 0 of the line" in err
    assert err.endswith("Fix them, or leave them out with data.on_bad_row=skip\n")
    assert not output.exists()
    code, out, _ = run("convert", str(path), "--output", str(output), "data.on_bad_row=skip")
    assert (code, out.splitlines()[0]) == (0, f"wrote {output}: 1 row, 3 left out as unreadable")


def test_convert_writes_to_no_file_that_is_there(run: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows(ROWS)
    before = path.read_bytes()
    code, _, err = run("convert", str(path), "--output", str(path))
    assert code == 2
    assert "exists, and would be lost; fix: another name" in err
    assert path.read_bytes() == before
    code, _, err = run("convert", str(path), "--output", str(tmp_path / "no" / "new.jsonl"))
    assert code == 2
    assert f"no folder {tmp_path / 'no'}; fix: make it first" in err


def test_convert_obeys_columns_and_roles(run: Any, write_rows: Any, tmp_path: Path) -> None:
    path, output = (
        write_rows([{"turns": [{"role": "client", "content": "q"}, {"role": "ai", "content": "a"}]}]),
        tmp_path,
    )
    settings = ["data.columns={messages: turns}", "data.roles={client: user}"]
    assert run("convert", str(path), "--output", str(output / "new.jsonl"), *settings)[0] == 0
    assert json.loads((output / "new.jsonl").read_text(encoding="utf-8")) == chat("q", "a")
