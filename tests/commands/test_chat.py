"""`lora-core chat`, as typed, piped and scripted."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_core.commands.main import main

Outcome = tuple[int, str, str]


@pytest.fixture
def chat_with(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command's exit code, output and notes; what is typed line by line is `typed`."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # commands set their own

    def call(source: Path, *arguments: str, typed: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = main(["chat", str(source), *arguments])
        return code, *capsys.readouterr()

    return call


def test_one_prompt_gives_one_reply_and_nothing_else_on_the_output(chat_with: Any, finished_run: Path) -> None:
    code, out, notes = chat_with(finished_run, "--prompt", "green")
    assert (code, out) == (0, "go on\n")
    assert f"adapter {finished_run / 'adapter'} on " in notes
    assert ", float32 on " in notes


def test_without_a_terminal_each_line_is_a_message_and_each_reply_a_line(chat_with: Any, finished_run: Path) -> None:
    typed = "red\n\n/reset\ngreen\n/system\namber"
    code, out, notes = chat_with(finished_run, typed=typed)
    assert (code, out) == (0, "stop\ngo on\nwait\n")
    assert notes.count("what was said is forgotten") == 2


def test_a_line_that_ends_with_a_backslash_continues_on_the_next(chat_with: Any, finished_run: Path) -> None:
    two_lines = chat_with(finished_run, "--prompt", "red\ngreen")
    assert chat_with(finished_run, typed="red\\\ngreen\n")[:2] == two_lines[:2]
    assert chat_with(finished_run, typed="red\\")[:2] == (0, "stop\n")


def test_compare_shows_the_base_before_the_adapter(chat_with: Any, finished_run: Path, tiny_model_dir: Path) -> None:
    short = ("--max-new-tokens", "8", "--prompt", "red")
    _, alone, _ = chat_with(tiny_model_dir, *short, "train.bf16=false", "model.dtype=float32")
    code, out, notes = chat_with(finished_run, *short, "--compare")
    assert (code, out) == (0, f"base: {alone}adapter: stop\n")
    assert "stopped after 8 tokens; fix: --max-new-tokens 16" in notes


def test_a_checkpoint_can_be_talked_with(chat_with: Any, finished_run: Path) -> None:
    code, out, notes = chat_with(finished_run / "checkpoints/step-000020", "--prompt", "red")
    assert (code, out) == (0, "stop\n")
    assert "checkpoint " in notes


def test_commands_are_few_and_a_path_is_none(chat_with: Any, finished_run: Path) -> None:
    code, out, notes = chat_with(finished_run, "--max-new-tokens", "2", typed="/help\n/undo\n/etc/hosts\n/exit\nred\n")
    assert (code, len(out.splitlines())) == (0, 1)  # a reply to /etc/hosts alone
    assert "/undo: no such command\n/reset " in notes
    assert notes.count("/exit         end") == 2


def test_a_message_that_is_too_long_is_refused_and_the_chat_continues(chat_with: Any, finished_run: Path) -> None:
    code, out, notes = chat_with(finished_run, typed="word " * 2100 + "\nred\n")
    assert (code, out) == (0, "stop\n")
    assert "error: the messages take " in notes
    assert "fix: shorter messages (in a chat, /reset forgets the earlier ones)" in notes
    assert chat_with(finished_run, "--prompt", "word " * 2100)[0] == 2


def test_ctrl_c_stops_a_reply_and_not_the_chat(
    chat_with: Any, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_print, pieces = print, []

    def interrupt_once(*values: Any, **options: Any) -> None:
        plain_print(*values, **options)
        pieces.append(values)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("lora_core.commands.chat.print", interrupt_once, raising=False)
    monkeypatch.setattr("lora_core.commands.chat._note", lambda line: plain_print(line, file=sys.stderr))
    code, out, notes = chat_with(finished_run, typed="green\nred\n")
    assert (code, out.splitlines()[-1]) == (0, "stop")
    assert "stopped; this message is not part of the chat" in notes


def test_ctrl_c_where_nothing_is_generated_ends_the_chat(chat_with: Any, finished_run: Path, monkeypatch: Any) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(io, "StringIO", Interrupted)
    assert chat_with(finished_run)[:2] == (0, "")


def test_on_a_terminal_there_is_a_prompt(chat_with: Any, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    code, out, notes = chat_with(finished_run, typed="red\n")
    assert code == 0
    assert "stop\n" in out
    assert "/help lists the commands; Ctrl-D ends" in notes


def test_a_reply_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_core.commands.chat import _printer

    show = _printer()
    for piece in (" ", "\n a\x1b[31m", "b\tc\n"):
        show(piece)
    assert capsys.readouterr().out == "a\\x1b[31mb\tc\n"


# ----- files


def test_a_file_is_answered_with_the_expected_replies_beside(
    chat_with: Any, finished_run: Path, tmp_path: Path
) -> None:
    rows, output = finished_run.parent / "eval.jsonl", tmp_path / "replies.jsonl"
    arguments = ("--file", str(rows), "--max-new-tokens", "8", "--compare")
    code, out, _ = chat_with(finished_run, *arguments, "--output", str(output))
    assert code == 0
    assert out == f"wrote {output}: exact replies: 0 of the base model, 3 of 5 questions\n"
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["place"] for line in lines] == [f"{rows}:{number}" for number in range(1, 6)]
    assert lines[1].items() >= {"expected": "go on", "reply": "go on", "exact": True, "base_exact": False}.items()
    assert lines[1]["messages"] == [{"role": "user", "content": "green"}]
    _, shown, _ = chat_with(finished_run, *arguments)
    assert f"{rows}:2\nuser:     green\nexpected: go on\nbase:     {lines[1]['base_reply']} (" in shown
    assert "\nreply:    go on\n\n" in shown
    code, _, notes = chat_with(finished_run, *arguments, "--output", str(output))
    assert (code, "exists, and would be lost; fix: another name" in notes) == (2, True)


def test_a_row_that_is_too_long_says_so_in_its_line(chat_with: Any, finished_run: Path, write_rows: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "stop"}]}
        for text in ("word " * 2100, "red")
    ]
    path = write_rows([*rows, {"text": "asks nothing"}])
    output = path.with_name("out.jsonl")
    code, out, _ = chat_with(finished_run, "--file", str(path), "--output", str(output))
    assert (code, out) == (
        0,
        f"wrote {output}: exact replies: 1 of 2 questions; 1 row could not be asked\n",
    )
    first, second = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert first["reply"] is None
    assert first["problem"].startswith("the messages take ")
    assert (second["reply"], second["problem"]) == ("stop", None)


# ----- what is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "x", "--prompt", "y"], "the rows have their own system turns and tools; fix: leave out --prompt"),
        (["--output", "x.jsonl"], "fix: --file FILE"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be 1 or more; fix: --max-new-tokens 512"),
        (["--temperature", "-1"], "--temperature -1: must be from 0 to 10; fix: --temperature 0.7"),
        (["--tools", "nowhere.json"], "fix: a JSON list of tool schemas"),
        (["--file", "nowhere.jsonl"], "no such file"),
        (["data.chat_template=nowhere"], "fix: data.chat_template=chatml"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(
    chat_with: Any, finished_run: Path, arguments: list[str], said: str
) -> None:
    code, out, notes = chat_with(finished_run, *arguments)
    assert (code, out) == (2, "")
    assert said in notes


def test_tools_are_read_and_a_model_alone_is_not_compared(
    chat_with: Any, finished_run: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "clock", "parameters": {"type": "object"}}]', encoding="utf-8")
    assert chat_with(finished_run, "--tools", str(tools), "--prompt", "red")[:2] == (0, "stop\n")
    tools.write_text("{", encoding="utf-8")
    assert "tools is not valid JSON" in chat_with(finished_run, "--tools", str(tools))[2]
    code, _, notes = chat_with(tiny_model_dir, "--compare", "train.bf16=false", "model.dtype=float32")
    assert (code, "is a model without an adapter; fix: " in notes) == (2, True)
