"""`lora-core train`: fine-tune as a configuration says."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    quiet_libraries,
)
from lora_core.commands.several import train_several
from lora_core.errors import ConfigError, LoraCoreError, RunStopped
from lora_core.runtime.console import Console


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="continue the run in output_dir, from its newest whole checkpoint or from the one named; "
        "auto: the same, or start where there is none yet",
    )
    parser.add_argument(
        "--models",
        metavar="A,B,C",
        help="train each of these in turn, the smallest first, in folders of output_dir; skip what does not fit",
    )
    add_output_arguments(parser)


def add_output_arguments(parser: ArgumentParser) -> None:
    """`--quiet` and `--json-lines`."""
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print warnings, alarms and the verdict only")
    shown.add_argument(
        "--json-lines", action="store_true", help="print one JSON object an event on stdout, and nothing else there"
    )


@contextmanager
def console_of(arguments: Namespace) -> Iterator[Console]:
    """The console that the options ask for; an error that ends the command is an event too."""
    if not arguments.json_lines:
        yield Console("quiet" if arguments.quiet else "lines")
        return
    with _stdout_for_events() as stream:
        console = Console("json", stream)
        try:
            yield console
        except LoraCoreError as error:
            console.event("error", {"message": str(error), "exit_code": error.exit_code})
            raise


@contextmanager
def _stdout_for_events() -> Iterator[TextIO]:
    """The real stdout. What anything else prints meanwhile, libraries in C included, goes to stderr."""
    sys.stdout.flush()
    python_stdout, real = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with os.fdopen(real, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout = python_stdout
        os.dup2(real, 1)
        os.close(real)


def _names(arguments: Namespace) -> list[str]:
    """Of `--models`."""
    names = list(dict.fromkeys(name.strip() for name in arguments.models.split(",") if name.strip()))
    if not names or arguments.model:
        raise ConfigError(f"--models {arguments.models}: needs names, and no --model beside it; fix: --models A,B")
    if arguments.resume not in (None, "newest", "auto"):
        raise ConfigError(f"--resume {arguments.resume}: with --models each resumes its newest; fix: --resume alone")
    return names


def _run(arguments: Namespace) -> None:
    if arguments.resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        raise ConfigError(f"--resume took {arguments.resume} for a checkpoint; fix: put --resume at the end")
    with console_of(arguments) as console:
        if arguments.models:
            train_several(arguments, _names(arguments), console)
            return
        config = load_config_of(arguments, quiet=arguments.quiet)
        console.say("importing PyTorch and transformers ...")
        with heavy_imports():
            quiet_libraries()
            from lora_core.runtime.ranks import leave
            from lora_core.training.setup import train

        try:
            train(config, arguments.resume, console=console)
        except RunStopped:
            leave()  # all ranks are here; after another error some may be gone, and this would wait for them
            raise
        leave()


COMMAND = Command("fine-tune: lora-core train --cfg NAME [--resume [CHECKPOINT]] [key=value ...]", _add_arguments, _run)
