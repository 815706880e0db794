"""Rows as other people's tools and tables have them, and each refusal's fix, pasted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lora_core.commands.main import main
from lora_core.data.encoded import encode_file
from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.errors import DataError, RowError
from lora_core.rows.columns import SYSTEM as SYSTEM_KEYS
from lora_core.rows.messages import Conversation, RowShape, parse_json_row, parse_row
from lora_core.sources.files import as_jsonl
from tests.conftest import make_tokenizer
from tests.rows.test_shapes import ASSISTANT, CALL, CALLING, SCHEMA, SYSTEM, USER
from tests.tiny import write_jsonl

Row = dict[str, Any]
CHAT = [USER, ASSISTANT]
TOOLS = [SCHEMA]


def refusal(row: Row) -> str:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    return str(caught.value)


def pasted(row: Row, number: int = 0) -> Conversation:
    """The row, read with one of the settings that its refusal names."""
    settings = re.findall(r'"data\.(columns|roles)=(\{.*?\})"', refusal(row))
    name, value = settings[number]
    return parse_row(row, RowShape(**{name: yaml.safe_load(value)}))


# ----- tools


@pytest.mark.parametrize("key", ["available_tools", "tool_list", "function_schemas", "toolDefinitions"])
@pytest.mark.parametrize("schemas", [TOOLS, json.dumps(TOOLS), [json.dumps(SCHEMA)], [SCHEMA["function"]]])
def test_tools_under_another_name_are_not_lost(key: str, schemas: Any) -> None:
    row = {"messages": [USER, CALLING, {"role": "tool", "content": "1"}, ASSISTANT], key: schemas}
    assert f"has schemas of tools in its {key}, and the model would not see them" in refusal(row)
    assert pasted(row).tools == TOOLS
    without = pasted(row, 1)
    assert (without.tools, without.unused_keys) == (None, (key,))


@pytest.mark.parametrize("value", ["f", ["f"], [{"name": "f", "arguments": {}}], "[f(1)]", {}, 3])
def test_what_is_no_schema_is_counted(value: Any) -> None:
    row = {"messages": CHAT, "target_tools": value}
    assert parse_row(row).unused_keys == (("target_tools",) if value else ())


def test_a_second_list_of_tools_is_counted() -> None:
    read = parse_row({"messages": CHAT, "tools": TOOLS, "available_tools": TOOLS})
    assert (read.tools, read.unused_keys) == (TOOLS, ("available_tools",))


@pytest.mark.parametrize("key", ["function_calls", "toolCalls", "tool_call", "tool_uses"])
def test_other_names_of_the_calls_of_a_turn(key: str) -> None:
    calling = {"role": "assistant", "content": None, key: json.dumps([CALL])}
    read = parse_row({"messages": [USER, calling, {"role": "environment", "content": "1"}, ASSISTANT]})
    assert read.messages[1:3] == [CALLING, {"role": "tool", "content": "1"}]
    assert read.unused_keys == ()
    assert "is not valid JSON" in refusal({"messages": [USER, {**ASSISTANT, key: "f(x=1)"}]})
    assert parse_row({"messages": [USER, {**ASSISTANT, key: True}]}).unused_keys == (f"messages.{key}",)
    assert parse_row({"messages": [{**USER, key: [CALL]}, ASSISTANT]}).unused_keys == (f"messages.{key}",)


def test_tools_of_a_system_turn_under_functions() -> None:
    told = {**SYSTEM, "functions": json.dumps([SCHEMA["function"]])}
    read = parse_row({"messages": [told, {**USER, "functions": None}, ASSISTANT]})
    assert (read.tools, read.unused_keys) == (TOOLS, ())


@pytest.mark.parametrize("nothing", ["[]", "{}", "null", "None", "nan", ""])
def test_cells_that_say_that_there_are_no_tools(nothing: str) -> None:
    row = {"messages": [USER, {**ASSISTANT, "tool_calls": nothing}], "tools": nothing}
    assert parse_row(row) == Conversation(CHAT)


def test_a_call_in_words_is_trained_as_text_where_the_user_says_so() -> None:
    row = {"conversations": [USER, {"from": "function_call", "value": "f(x=1)"}]}
    assert pasted(row).messages[1] == {"role": "assistant", "content": "f(x=1)"}


# ----- what a cell says where there is nothing


@pytest.mark.parametrize("nothing", ["nan", "NaN", "None", "null", "<NA>", "<noinput>"])
def test_a_missing_input_or_system_text_is_not_shown_but_counted(nothing: str) -> None:
    row = {"instruction": "q", "input": nothing, "output": "a", "system": nothing}
    assert parse_row(row) == Conversation(CHAT, num_prompt_messages=1, unused_keys=("input", "system"))


@pytest.mark.parametrize("asked", ["[]", "{}", "none"])
def test_a_text_that_may_be_what_is_asked_about_is_shown(asked: str) -> None:
    row = {"instruction": "Is it empty?", "input": asked, "output": "a"}
    assert parse_row(row).messages[0]["content"] == f"Is it empty?\n\n{asked}"


# ----- system texts


def test_what_the_assistant_was_told_beside_its_turns() -> None:
    assert "preamble" in SYSTEM_KEYS
    assert parse_row({"preamble": "s", "messages": CHAT}).messages == [SYSTEM, *CHAT]
    row = {"instruction": "Answer in French.", "messages": CHAT}
    assert pasted(row).messages == [{"role": "system", "content": "Answer in French."}, *CHAT]
    assert pasted(row, 1).messages == CHAT
    assert parse_row({"instruction": "q", "messages": CHAT}).unused_keys == ("instruction",)


def test_variables_that_say_nothing_and_that_the_template_has_not() -> None:
    encoder = ChatEncoder(make_tokenizer())
    empty = {"custom_instructions": "", "python_tools": [], "xml_tools": []}
    plain, read, told = encoder.encode_batch(
        [
            parse_row({"messages": CHAT}),
            parse_row({"messages": CHAT, "chat_template_kwargs": empty}),
            parse_row({"messages": CHAT, "chat_template_kwargs": {**empty, "custom_instructions": "Be nice."}}),
        ]
    )
    assert isinstance(plain, EncodedChat)
    assert read == plain
    assert "has no custom_instructions, so it would change nothing" in str(told)


# ----- pictures


@pytest.mark.parametrize("key", ["image_url", "image_path", "image_list", "audio_file", "video_urls", "img"])
def test_an_address_of_a_picture_beside_the_question(key: str) -> None:
    for row in ({"messages": CHAT, key: "a.png"}, {"question": "q", "answer": "a", key: "a.png"}):
        assert f"has {key} beside its turns, and only text is trained" in refusal(row)
        read = pasted(row)
        assert (read.messages, read.unused_keys) == (CHAT, (key,))


@pytest.mark.parametrize("asked", ["<image>\nWhat is it?", "What is it?<image>", "<video>What is it?"])
def test_the_place_of_a_picture_in_a_question(asked: str) -> None:
    assert "in place of what is asked about" in refusal({"messages": [{**USER, "content": asked}, ASSISTANT]})


def test_a_tag_within_a_text_is_text() -> None:
    about = {**USER, "content": "What does <image> mean in SVG?"}
    assert parse_row({"messages": [about, ASSISTANT]}).messages[0] == about


# ----- choices between replies, and names


@pytest.mark.parametrize("names", [("win", "lose"), ("better", "worse"), ("chosen_response", "rejected_response")])
def test_other_names_of_a_preference_pair(names: tuple[str, str]) -> None:
    better, worse = names
    row = {"prompt": "q", better: "a", worse: "b"}
    assert f"holds {better!r}: a preference pair" in refusal(row)
    assert pasted(row).messages == CHAT
    assert pasted({"conversations": [USER], better: ASSISTANT["content"], worse: "b"}).messages == CHAT
    assert parse_row({"prompt": "q", "response": "a", better: 1, worse: 0}).unused_keys == tuple(sorted(names))


def test_a_label_of_zero_beside_turns() -> None:
    for label in (0, "0"):
        row = {"messages": CHAT, "label": label}
        assert "which may say that the reply must not be learned" in refusal(row)
        assert pasted(row) == Conversation(CHAT, unused_keys=("label",))
    assert parse_row({"messages": CHAT, "label": 1}).messages == CHAT


@pytest.mark.parametrize(
    "row",
    [
        {"en": "q", "de": "a"},
        {"id": "7", "en": "q", "zh_CN": "a"},
        {"source": "q", "target": "a"},
        {"src": "q", "tgt": "a"},
        {"source_text": "q", "target_text": "a", "source_lang": "en"},
        {"context": "q", "response": "a", "safety_label": "casual"},
        {"text_input": "q", "output": "a"},
        {"question": "q", "reference_answer": "a"},
        {"problem": "q", "deepseek_solution": "a"},
        {"user_question": "q", "bot_reply": "a"},
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": 1},
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1},
        {"dialogue": "q", "summary": "a"},
    ],
)
def test_the_columns_that_a_refusal_names_read_the_row(row: Row) -> None:
    assert pasted(row).messages == CHAT


def test_a_definition_is_named_with_its_input() -> None:
    row = {"definition": "Say it.", "inputs": "q", "targets": "a"}
    assert pasted(row).messages == [{"role": "user", "content": "Say it.\n\nq"}, ASSISTANT]


def test_a_speaker_that_is_called_system_is_named_as_the_one_who_replies() -> None:
    turns = [{"speaker": "USER", "utterance": "q"}, {"speaker": "SYSTEM", "utterance": "a"}]
    assert pasted({"messages": turns}).messages == CHAT


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (4, "numbers in quotes"),
        (True, "in quotes what the model has to say"),
        ({"a": 1}, "such as json.dumps makes of"),
    ],
)
def test_a_reply_that_is_no_text(value: Any, fix: str) -> None:
    assert fix in refusal({"question": "q", "answer": value})
    assert fix in refusal({"messages": [USER, {"role": "assistant", "content": value}]})


# ----- convert --kind


def slack(who: str, text: str, at: str) -> Row:
    return {"type": "message", "user": who, "text": text, "ts": at, "client_msg_id": at}


KINDS: list[tuple[Row, list[list[Row]]]] = [
    ({"dialog": ["q", "a"], "act": [1, 2], "emotion": [0, 0]}, [CHAT]),
    ({"utterances": ["q", "a", "q"]}, [[*CHAT, USER]]),
    ({"messages": [slack("U2", "a", "2.5"), slack("U1", "q", "1.5")]}, [CHAT]),
    (
        {
            "id": "1",
            "fields": {"instruction": "q"},
            "responses": [{"values": {"reply": {"value": "a"}}, "status": "submitted"}],
        },
        [CHAT],
    ),
    (
        {
            "fields": {"chat": [USER], "source": "x"},
            "responses": {"reply": [{"value": "a"}, {"value": "b", "status": "discarded"}], "score": [{"value": 4}]},
        },
        [CHAT],
    ),
    ({"fields": {"text": "q"}, "responses": []}, []),
]


@pytest.mark.parametrize(("row", "expected"), KINDS)
def test_the_command_of_a_refusal_writes_the_examples(
    row: Row, expected: list[list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = re.search(r"lora-core (convert .*?) \(writes", refusal(row))
    assert said is not None
    Path("FILE").write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    assert main(shlex.split(said[1].replace("NAME", "U2"))) == 0
    written = [parse_json_row(line).messages for line in Path("NEW.jsonl").read_text("utf-8").splitlines()]
    assert written == expected * 2


def test_a_day_of_slack_becomes_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    day = [slack("U1", "q", "1.5"), {"type": "message", "subtype": "bot_message", "text": "x", "ts": "2"}]
    day.append(slack("U2", "a", "3.5"))
    Path("FILE").write_text(json.dumps(day), encoding="utf-8")
    said = re.search(r"fix: (python .*?), and then lora-core (convert .*?) \(writes", refusal(day[0]))
    assert said is not None
    run(said[1])
    assert main(shlex.split(said[2].replace("NAME", "U2"))) == 0
    assert parse_json_row(Path("NEW.jsonl").read_text("utf-8")).messages == CHAT


ANDROID = """12/31/23, 10:15\u202fPM - Messages and calls are end-to-end encrypted.
12/31/23, 10:15\u202fPM - Bob: q
12/31/23, 10:16\u202fPM - Ann: a
- with a line: more
12/31/23, 10:17\u202fPM - Ann: <Media omitted>
"""
IPHONE = """\u200e[31.12.23, 22:15:01] Bob: q
[31.12.23, 22:16:01] Ann: a
- with a line: more
[31.12.23, 22:17:01] Ann: \u200eimage omitted
"""


@pytest.mark.parametrize("text", [ANDROID, IPHONE])
def test_a_chat_of_whatsapp_becomes_rows(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("it's.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="an exported chat of WhatsApp") as caught:
        as_jsonl("it's.txt", "cache", key="data.train_file")
    said = re.search(r"fix: (python .*), and then lora-core (convert .*)$", str(caught.value), re.DOTALL)
    assert said is not None
    run(said[1])
    assert main(shlex.split(said[2].replace("NAME", "Ann"))) == 0
    (row,) = Path("NEW.jsonl").read_text("utf-8").splitlines()
    assert [turn["content"] for turn in parse_json_row(row).messages] == ["q", "a\n- with a line: more"]
    assert f"not written: {2 if text is ANDROID else 1}" in capsys.readouterr().out


def test_a_fix_names_the_file_that_its_row_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        Path("it's.jsonl"), [{"dialog": ["Hello?", "Hi."], "act": [2, 1]}, {"dialog": ["a", "b"], "act": [1, 1]}]
    )
    with pytest.raises(DataError) as caught:
        encode_file("it's.jsonl", tokenizer, max_seq_length=64, cache_dir="cache")
    said = re.search(r"fix: lora-core (convert .*) \(writes", str(caught.value))
    assert said is not None
    assert main(shlex.split(said[1])) == 0
    assert encode_file("NEW.jsonl", tokenizer, max_seq_length=64, cache_dir="cache").counts.kept == 2


def run(command: str) -> None:
    subprocess.run(["bash", "-c", command.replace("python", shlex.quote(sys.executable), 1)], check=True)


# ----- files


def test_objects_as_python_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "it's", "completion": 'say "hi"', "score": None}
    Path("rows.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match="objects as Python prints them") as caught:
        as_jsonl("rows.jsonl", "cache", key="data.train_file")
    said = re.search(r"fix: (python .*), and name that file", str(caught.value))
    assert said is not None
    run(said[1])
    lines = Path("rows.rows.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [row, row]


def test_the_line_of_excel_that_says_what_separates_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffsep=;\r\nprompt;completion\r\nq;a\r\n", encoding="utf-8")
    places = as_jsonl(path, tmp_path / "cache", key="data.train_file")
    assert parse_json_row(places.path.read_text("utf-8")).messages == CHAT
