"""Every code block of README.md and docs/ works: commands parse, configurations load, Python runs, rows are read.

Nothing is trained but a tiny model, which stands in for the models that pages name.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from lora_core.commands.main import build_parser
from lora_core.configuration import load_config
from lora_core.errors import RowError
from lora_core.rows.columns import PAIRS, ROLES, TURNS
from lora_core.rows.messages import Conversation, parse_json_row, parse_row
from lora_core.rows.turns import WEIGHTS
from tests.conftest import ROOT, chat
from tests.docs.pages import PAGES, Block, code_blocks, sections
from tests.tiny import write_jsonl

BLOCKS = code_blocks()
# Lines that are not run, each with the reason.
NOT_RUN = {
    "python3 -m venv .venv && . .venv/bin/activate": "makes an environment; the Makefile does the same",
}
# Between backticks, names of programs and not commands to copy.
NAMES = (
    "lora-core prescribe",
    "lora-core chat",
    "accelerate launch",
    "accelerate launch --cpu",
    "accelerate config",
    "accelerate launch --cpu --num_processes 2",
)
# Models that pages name and that are not here; the tiny model stands in for them, and for the configurations' own.
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B")
CONFIGURATIONS = ("qwen0.5b", "qwen7b")
# Output that a page quotes -> a part of the module that prints it.
OUTPUT = {
    "the model would learn next to nothing": "lora_core/preflight/schedule.py",
    "dropped without loss tokens": "lora_core/data/counts.py",
}


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def command_lines(text: str) -> list[str]:
    """Lines of a shell block, continued ones joined, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


LINES = [(block.place, line) for block in blocks("bash") for line in command_lines(block.text)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has one: YAML files of the pages, rows, launch/ and configs/ of the checkout."""
    for block in blocks("yaml"):
        (tmp_path / yaml_name(block)).write_text(block.text, encoding="utf-8")
    write_jsonl(tmp_path / "chats.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(40)])
    for name in ("launch", "configs", "benchmarks", "docs", "examples", "tests", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def yaml_name(block: Block) -> str:
    """A YAML block says in its first line what its file is called."""
    match = re.match(r"# ([\w.]+\.yaml)\n", block.text)
    assert match is not None, f"{block.place}: begins with `# NAME.yaml`"
    return match[1]


def parse(command: str, arguments: list[str]) -> argparse.Namespace:
    """With the command's own parser, as `lora_core.commands.main.main` does."""
    (subcommands,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert command in subcommands.choices, f"no command {command}"
    parser: argparse.ArgumentParser = subcommands.choices[command]
    return parser.parse_intermixed_args(arguments)


def check_our_command(command: str, arguments: list[str]) -> None:
    if arguments == ["--help"]:
        return
    parsed = parse(command, arguments)
    if getattr(parsed, "cfg", None) is not None:
        load_config(parsed.cfg, parsed.overrides, parsed.model)


def check_script(script: str, arguments: list[str]) -> None:
    """`python SCRIPT`: a command of ours, or a script whose source knows every option given."""
    if Path(script).parent.name == "launch":
        assert Path(script).is_file(), script
        check_our_command(Path(script).stem, arguments)
        return
    source = Path(script).read_text(encoding="utf-8")
    if "add_config_arguments(" in source:  # the options of our commands are known to the script too
        source += (ROOT / "lora_core/commands/command_line.py").read_text(encoding="utf-8")
    unknown = [word for word in arguments if word.startswith("--") and f'"{word}"' not in source]
    assert not unknown, f"{script} has no {unknown}"


def check_launched(arguments: argparse.Namespace) -> None:
    """What a launcher starts: a script, or with `-m` our command."""
    if not arguments.module:
        check_script(arguments.training_script, arguments.training_script_args)
        return
    assert arguments.training_script == "lora_core"
    check_our_command(arguments.training_script_args[0], arguments.training_script_args[1:])


def check_pip(arguments: list[str]) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in arguments:
        if word.startswith("."):
            extras = re.findall(r"[\w-]+", word.partition("[")[2])
            assert set(extras) <= set(setup["options.extras_require"]), word
        elif not word.startswith("-"):
            assert Path(word).is_file(), word


def check(words: list[str]) -> None:
    """One shell command. Fails on a kind of command that it does not know."""
    if words[:2] == ["taskset", "-c"]:
        words = words[3:]
    if re.fullmatch(r"[A-Z_]+=\w+", words[0]):  # a variable for this command
        words = words[1:]
    match words:
        case ["lora-core", "--help"] | ["python", "-m", "lora_core"]:
            assert build_parser().format_help()
        case ["lora-core", command, *arguments] | ["python", "-m", "lora_core", command, *arguments]:
            check_our_command(command, arguments)
        case ["python", "-m", "pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths), paths
        case ["python", "-m", module, *arguments]:
            check_script(f"{module.replace('.', '/')}.py", arguments)
        case ["python", script, *arguments]:
            check_script(script, arguments)
        case ["accelerate", "launch", *arguments]:
            launched = launch_command_parser().parse_args(arguments)
            assert launched.config_file is None or Path(launched.config_file).is_file(), launched.config_file
            check_launched(launched)
        case ["torchrun", *arguments]:
            check_launched(get_args_parser().parse_args(arguments))
        case ["pip", "install", *arguments]:
            check_pip(arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
        case _:
            raise AssertionError("no such command is known here")


@pytest.mark.parametrize(("place", "line"), LINES, ids=[place for place, _ in LINES])
@pytest.mark.usefixtures("folder")
def test_a_command_line_is_accepted(place: str, line: str) -> None:
    if line not in NOT_RUN:
        check(shlex.split(line))


@pytest.mark.usefixtures("folder")
def test_commands_in_running_text_are_accepted() -> None:
    """Between backticks, but for `NAMES` and what has an ellipsis or a placeholder such as NAME or FILE."""
    for place, line in inline_commands():
        try:
            check(shlex.split(line))
        except (AssertionError, SystemExit) as error:
            raise AssertionError(f"{place}: {line}: {error}") from error


def inline_commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in re.findall(r"`((?:lora-core|accelerate|torchrun|make|python) [^`]*)`", text):
            if line not in NAMES and not re.search(r"\.\.\.|\b[A-Z]{4}\b", line):
                yield page.name, line


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_a_yaml_block_is_a_configuration(block: Block, folder: Path) -> None:
    load_config(folder / yaml_name(block))


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.place)
def test_json_lines_are_rows(block: Block) -> None:
    for line in block.text.splitlines():
        assert parse_json_row(line).messages


def rows_of_tables() -> list[tuple[str, str, str]]:
    """(heading, JSON, what is said of it) of each row of docs/data.md's tables with JSON in the second cell."""
    found = []
    for heading, text in sections((ROOT / "docs/data.md").read_text(encoding="utf-8")):
        cells = re.findall(r"^\|.*\| `(\{.*\})` \| `(.*)` \|$", text, flags=re.MULTILINE)
        found += [(heading, row, said) for row, said in cells]
    return found


def in_short(conversation: Conversation) -> str:
    """`user: Hi / assistant: (reasoning) Hello! [name {"x": 1}]`."""
    if conversation.text is not None:
        return f"text: {conversation.text}"
    turns = []
    for message in conversation.messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        parts = [f"({message['reasoning_content']})"] if "reasoning_content" in message else []
        parts += [message["content"].replace("\n", "⏎")] if message["content"] else []
        parts += [f"[{call['name']} {json.dumps(call['arguments'])}]" for call in calls]
        turns.append(f"{message['role']}: {' '.join(parts)}")
    return " / ".join(turns)


@pytest.mark.parametrize(("heading", "row", "said"), rows_of_tables())
def test_rows_in_tables_are_read_or_refused_as_the_page_says(heading: str, row: str, said: str) -> None:
    if heading == "Rows":
        assert in_short(parse_json_row(row)) == said
    elif heading == "Turns":
        ask, reply = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "reply"}
        turns = parse_row({"messages": [ask, json.loads(row), reply]})
        assert in_short(turns) == f"user: ask / {said} / assistant: reply"
        assert turns.unused_keys == ()
    else:
        with pytest.raises(RowError, match=re.escape(said)):
            parse_json_row(row)


def test_pages_name_every_role_and_pair() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    names = {*ROLES, *WEIGHTS, *TURNS, *(name for pair in PAIRS for name in pair)}
    assert [name for name in names if f"`{name}`" not in page] == []
    assert {heading for heading, _, _ in rows_of_tables()} == {"Rows", "Turns", "Refused, and counted"}


@pytest.mark.usefixtures("folder")
def test_python_blocks_run(tiny_model_dir: Path) -> None:
    """In the order of the page, in one folder, so that later ones find what earlier ones made; each by itself."""
    Path("configs").unlink()
    Path("configs").mkdir()
    settings = [
        f"model: {{name_or_path: {tiny_model_dir}, dtype: float32}}",
        f"data: {{cache_dir: {Path.cwd() / 'cache'}}}",
        "train: {bf16: false, num_sample_replies: 0, num_train_epochs: 1}",
    ]
    for name in CONFIGURATIONS:  # found before the shipped ones
        Path("configs", f"{name}.yaml").write_text("\n".join(settings), encoding="utf-8")
    for block in blocks("python"):
        source = block.text
        for model in MODELS:
            source = source.replace(model, str(tiny_model_dir))
        exec(compile(source, block.place, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks("text"), ids=lambda block: block.place)
def test_quoted_output_is_what_is_printed(block: Block) -> None:
    ((part, module),) = ((part, module) for part, module in OUTPUT.items() if part in block.text)
    assert part in (ROOT / module).read_text(encoding="utf-8")


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", "json", "text"}
    assert set(NOT_RUN) <= {line for _, line in LINES}
