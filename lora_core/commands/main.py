"""The `lora-core` command with its subcommands; `launch/*.py` and `python -m lora_core` call it too."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lora_core._version import __version__
from lora_core.commands import (
    chat,
    convert,
    demo,
    evaluate,
    export,
    find_lr,
    launch_files,
    merge,
    preflight,
    prescribe,
    push,
    report,
    rows,
    runs,
    train,
    verify,
)
from lora_core.commands.command_line import Parser, run_command

COMMANDS = {
    "train": train.COMMAND,
    "preflight": preflight.COMMAND,
    "prescribe": prescribe.COMMAND,
    "find-lr": find_lr.COMMAND,
    "verify": verify.COMMAND,
    "evaluate": evaluate.COMMAND,
    "chat": chat.COMMAND,
    "report": report.COMMAND,
    "runs": runs.COMMAND,
    "rows": rows.COMMAND,
    "convert": convert.COMMAND,
    "demo": demo.COMMAND,
    "launch-files": launch_files.COMMAND,
    "merge": merge.COMMAND,
    "export": export.COMMAND,
    "push": push.COMMAND,
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="lora-core", description="LoRA and QLoRA fine-tuning of chat models.")
    parser.add_argument("--version", action="version", version=f"lora-core {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        _fill(commands.add_parser(name, help=command.summary.split(": ")[0]), name)
    return parser


def _fill(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = COMMANDS[name].summary
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    COMMANDS[name].add_arguments(parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see `run_command`).

    Args:
        arguments: default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        build_parser().parse_args(given)  # prints help, version or the mistake, and exits
    # By itself, because options may stand between key=value pairs, which argparse refuses below subcommands.
    parser = Parser(prog=f"lora-core {given[0]}")
    _fill(parser, given[0])
    parser.refuse_unknown_options(given[1:])
    parsed = parser.parse_intermixed_args(given[1:])
    wait_passively()
    return run_command(lambda: COMMANDS[given[0]].run(parsed))


def wait_passively() -> None:
    """OpenMP threads that wait for each other sleep and do not spin, unless the user said otherwise.

    Spinning threads take the cores from the very threads that they wait for, where other programs use the cores too.
    Must be set before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
