"""`lora-core chat`: talk with an adapter, a checkpoint or a model; once, in turns, or over a file of rows."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.commands.command_line import Command, add_overrides, heavy_imports, new_file, quiet_libraries
from lora_core.errors import ConfigError, LoraCoreError, RowError, counted
from lora_core.rows.tool_use import parse_tools
from lora_core.runtime.launcher import refuse_several
from lora_core.untrusted.text import showable

if TYPE_CHECKING:
    from lora_core.evaluation.generation import Reply
    from lora_core.inference.chat import Asking, Chat
    from lora_core.inference.opened import LoadedModel
    from lora_core.inference.questions import Answered

_HELP = """/reset        forget what was said
/system TEXT  another system text; forgets what was said (without a text: none)
/help         this list
/exit         end, as Ctrl-D does
A line that ends with a backslash continues on the next one."""


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN", help="a run, adapter, checkpoint or model folder, or a model's hub id: outputs/demo"
    )
    add_overrides(parser, "model.quantization=none")
    parser.add_argument("--system", metavar="TEXT", help="the system turn that a chat begins with")
    parser.add_argument("--tools", metavar="FILE.json", help="a list of tool schemas that the model is shown")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once, and end")
    parser.add_argument("--file", metavar="FILE", help="answer the rows of a file, as data.train_file takes them")
    parser.add_argument("--output", metavar="FILE.jsonl", help="with --file: write the replies to this new file")
    parser.add_argument("--compare", action="store_true", help="the base model's reply before the adapter's")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of a reply; default: 512")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy: the likeliest token"
    )


def _run(arguments: Namespace) -> None:
    refuse_several("chat")
    _check(arguments)
    output = new_file("--output", arguments.output)
    tools = None if arguments.tools is None else _read_tools(Path(arguments.tools).expanduser())
    _note("loading ...")
    with heavy_imports():
        quiet_libraries()
        import torch

        from lora_core.inference.chat import Asking, Chat, base_alone, check_template
        from lora_core.inference.opened import load_opened, open_model

    opened = open_model(arguments.source, arguments.overrides)
    loaded = load_opened(opened)
    check_template(loaded)
    if arguments.compare:
        base_alone(loaded)  # refuses a model without an adapter
    torch.manual_seed(loaded.config.train.seed)
    _note(f"{opened}, {_precision(loaded)} on {loaded.accelerator.device}")
    asking = Asking(arguments.max_new_tokens, arguments.temperature)
    if arguments.file is not None:
        _answer_file(loaded, arguments.file, asking, arguments.compare, output)
        return
    names = {"base": replace(asking, without_adapter=True)} if arguments.compare else {}
    chats = {name: Chat(loaded, how, arguments.system, tools) for name, how in {**names, "adapter": asking}.items()}
    if arguments.prompt is not None:
        _ask(chats, arguments.prompt, asking)
        return
    _talk(chats, asking)


def _check(arguments: Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: says what, and the fix.
    """
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens}: must be 1 or more; fix: --max-new-tokens 512")
    if not 0 <= arguments.temperature <= 10:
        raise ConfigError(f"--temperature {arguments.temperature:g}: must be from 0 to 10; fix: --temperature 0.7")
    if arguments.file is not None:
        given = [name for name in ("prompt", "system", "tools") if getattr(arguments, name) is not None]
        if given:
            raise ConfigError(f"--file: the rows have their own system turns and tools; fix: leave out --{given[0]}")
    elif arguments.output is not None:
        raise ConfigError("--output: what is written are replies to rows; fix: --file FILE")


def _read_tools(path: Path) -> list[dict[str, Any]] | None:
    try:
        return parse_tools(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RowError) as error:
        reason = str(error).partition("; fix:")[0]  # of a row
        raise ConfigError(f"--tools {path}: {reason}; fix: a JSON list of tool schemas") from error


def _precision(loaded: LoadedModel) -> str:
    quantization = loaded.config.model.quantization
    return str(loaded.model.dtype).removeprefix("torch.") if quantization == "none" else quantization


# ----- in turns


def _talk(chats: dict[str, Chat], asking: Asking) -> None:
    """Until the input ends, `/exit`, or Ctrl-C where no reply is being generated."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows; then lines cannot be edited
            import readline  # noqa: F401
        _note("/help lists the commands; Ctrl-D ends")
    with suppress(KeyboardInterrupt):
        for message in _messages():
            if not re.match(r"/[a-z]+(\s|$)", message):
                try:
                    _ask(chats, message, asking)
                except KeyboardInterrupt:
                    print(flush=True)
                    _note("stopped; this message is not part of the chat")
                except LoraCoreError as error:
                    _note(f"error: {error}")
            elif _obey(message, chats) == "exit":
                break


def _messages() -> Iterator[str]:
    """What is typed, or read line by line where the input is no terminal; blank lines left out."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            break
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            if message := "\n".join(lines).strip():
                yield message
            lines = []
    if message := "\n".join(lines).strip():
        yield message
    if sys.stdin.isatty():
        print()


def _obey(line: str, chats: dict[str, Chat]) -> str:
    """Do what a line that begins with a slash asks for; returns the command's name."""
    name, _, rest = line[1:].partition(" ")
    if name == "help":
        _note(_HELP)
    elif name in ("reset", "system"):
        for chat in chats.values():
            chat.reset(chat.system if name == "reset" else rest.strip() or None)
        _note("what was said is forgotten")
    elif name != "exit":
        _note(f"/{name}: no such command\n{_HELP}")
    return name


def _ask(chats: dict[str, Chat], text: str, asking: Asking) -> None:
    """Print the replies as they are generated; with several, the name of each in front of it."""
    said_before = {name: chat.history for name, chat in chats.items()}
    try:
        for name, chat in chats.items():
            if len(chats) > 1:
                print(f"{name}: ", end="", flush=True)
            reply = chat.ask(text, _printer())
            print(flush=True)
            if not reply.is_whole:
                _note(_why_it_stopped(reply, asking))
    except (KeyboardInterrupt, LoraCoreError):  # all of them have it, or none
        for name, chat in chats.items():
            chat.history = said_before[name]
        raise


def _printer() -> Callable[[str], None]:
    """Prints pieces of a reply, without the white space that it begins with."""
    started = False

    def show(piece: str) -> None:
        nonlocal started
        text = piece if started else piece.lstrip()
        started = started or bool(text)
        # A model may write what steers a terminal; a tab does not.
        print("\t".join(map(showable, text.split("\t"))), end="", flush=True)

    return show


def _why_it_stopped(reply: Reply, asking: Asking) -> str:
    after = f"stopped after {counted(reply.num_tokens, 'token')}"
    if reply.num_tokens < asking.max_new_tokens:
        return f"{after}: the model's context is full; fix: /reset, or a shorter message"
    return f"{after}; fix: --max-new-tokens {2 * asking.max_new_tokens}"


# ----- a file


def _answer_file(loaded: LoadedModel, file: str, asking: Asking, compare: bool, output: Path | None) -> None:
    """Reply to each row's last trained turn; print them, or write a line for each to `output`."""
    from lora_core.inference.questions import answers, questions_of_file

    questions, num_left_out = questions_of_file(file, loaded.config.data, loaded.tokenizer)
    num_exact = num_base_exact = 0
    written = None if output is None else output.open("x", encoding="utf-8")
    try:
        base_asking = replace(asking, without_adapter=True)
        of_base = answers(loaded, questions, base_asking) if compare else repeat(None, len(questions))
        for answered, base in zip(answers(loaded, questions, asking), of_base, strict=True):
            num_exact += answered.is_exact
            num_base_exact += base is not None and base.is_exact
            if written is None:
                print(_described(answered, base), end="\n\n", flush=True)
            else:
                written.write(json.dumps(_as_row(answered, base), ensure_ascii=False) + "\n")
                written.flush()
    finally:
        if written is not None:
            written.close()
    before = f"{num_base_exact:,} of the base model, " if compare else ""
    said = f"exact replies: {before}{num_exact:,} of {counted(len(questions), 'question')}"
    said += f"; {counted(num_left_out, 'row')} could not be asked" if num_left_out else ""
    print(showable(said if output is None else f"wrote {output}: {said}"))


def _described(answered: Answered, base: Answered | None) -> str:
    question = answered.question
    last = question.asked.messages[-1]
    lines = [question.place, f"{last['role'] + ':':<10}{last['content']}"]
    lines += [f"expected: {question.expected}"]
    for name, each in (("base", base), ("reply", answered)):
        if each is not None:
            lines.append(f"{name + ':':<10}{each.reply or ''}{f' ({each.problem})' if each.problem else ''}")
    return showable("\n".join(lines))


def _as_row(answered: Answered, base: Answered | None) -> dict[str, Any]:
    question = answered.question
    row: dict[str, Any] = {"place": question.place, "messages": question.asked.messages, "expected": question.expected}
    row |= {"reply": answered.reply, "exact": answered.is_exact, "problem": answered.problem}
    return row | ({} if base is None else {"base_reply": base.reply, "base_exact": base.is_exact})


def _note(line: str) -> None:
    """On standard error: the output holds replies and nothing else."""
    print(showable(line), file=sys.stderr, flush=True)


COMMAND = Command(
    "talk with a run's adapter, a checkpoint or a model: lora-core chat RUN [--compare] [--prompt TEXT]",
    _add_arguments,
    _run,
)
