"""`lora-core convert`: rows of any accepted file and shape, as messages in JSONL."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import Any

from lora_core.commands.command_line import Command, add_config_arguments, load_config_of, new_file
from lora_core.errors import ConfigError, DataError, RowError, counted, problem_list
from lora_core.rows.messages import Conversation, Message, parse_file, shape_of
from lora_core.rows.reshape import KINDS, reshaped
from lora_core.sources.files import as_jsonl
from lora_core.untrusted.text import showable


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="rows, as data.train_file takes them")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="a new file; one that exists is refused")
    parser.add_argument("--kind", choices=sorted(KINDS), help="make examples of rows that hold several, or choices")
    parser.add_argument("--reply-of", metavar="NAME", help="with --kind chat-log: whose messages are the replies")
    add_config_arguments(parser, default="base")


def _run(arguments: Namespace) -> None:
    output = new_file("--output", arguments.output)
    assert output is not None  # argparse requires it
    train_file = f"data.train_file={json.dumps(arguments.file, ensure_ascii=False)}"
    data = load_config_of(arguments, train_file).data
    kind, reply_of = arguments.kind, arguments.reply_of
    if (kind == "chat-log") != (reply_of is not None):
        raise ConfigError("--kind chat-log and --reply-of NAME go together; fix: give both, or neither")
    num_not_written = 0

    def reshape(row: Any) -> list[Any]:
        nonlocal num_not_written
        made = reshaped(row, kind, reply_of or "")
        num_not_written += made.count(None)
        return [each for each in made if each is not None]

    places = as_jsonl(data.train_file, data.cache_dir, key="FILE", streaming=data.streaming)
    rows, problems = [], []
    left_out: dict[str, int] = {}
    for line, parsed in parse_file(places.path, shape_of(data), None if kind is None else reshape):
        if isinstance(parsed, RowError):
            problems.append(f"{places.place(line)}: {places.with_file(str(parsed), line)}")
            continue
        for key in parsed.unused_keys:
            left_out[key] = left_out.get(key, 0) + 1
        rows.append(_json(as_row(parsed)))
    if problems and data.on_bad_row == "error":
        title = f"{arguments.file}: {len(problems):,} of {counted(len(problems) + len(rows), 'row')} cannot be used:"
        raise DataError(problem_list(title, problems) + "\nFix them, or leave them out with data.on_bad_row=skip")
    with output.open("x", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in rows)
    print(showable(f"wrote {output}: {counted(len(rows), 'row')}, {len(problems):,} left out as unreadable"))
    if num_not_written:
        print(f"not written: {num_not_written:,}, for --kind {kind} writes {KINDS[kind].effect}")
    if left_out:
        listed = ", ".join(f"{key} ({counted(number, 'row')})" for key, number in sorted(left_out.items()))
        print(showable(f"left out: {listed}"))


def as_row(conversation: Conversation) -> dict[str, Any]:
    """What was read, as a row that `parse_row` reads back as the same."""
    if conversation.text is not None:
        return {"text": conversation.text}
    weights = conversation.weights or (1.0,) * len(conversation.messages)
    messages = [
        _as_turn(message) | ({"weight": weight} if message["role"] == "assistant" and weight != 1 else {})
        for message, weight in zip(conversation.messages, weights, strict=True)
    ]
    split = conversation.num_prompt_messages
    row: dict[str, Any] = (
        {"prompt": messages[:split], "completion": messages[split:]} if split else {"messages": messages}
    )
    row |= {"tools": conversation.tools} if conversation.tools else {}
    return row | ({"chat_template_kwargs": conversation.template_variables} if conversation.template_variables else {})


def _as_turn(message: Message) -> Message:
    """Arguments as JSON text, as OpenAI writes them: to objects Arrow adds nulls, and those are not read back."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


COMMAND = Command("rows of any accepted file as messages in JSONL", _add_arguments, _run)
