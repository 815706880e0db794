"""`lora-core train`: fine-tune as a configuration says."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    quiet_libraries,
    say_first,
)
from lora_core.errors import ConfigError, RunStopped


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="CHECKPOINT",
        help="continue the run in output_dir, from its newest whole checkpoint or from the one named",
    )


def _run(arguments: Namespace) -> None:
    if arguments.resume and "=" in arguments.resume and not Path(arguments.resume).exists():
        raise ConfigError(f"--resume took {arguments.resume} for a checkpoint; fix: put --resume at the end")
    config = load_config_of(arguments)
    say_first("importing PyTorch and transformers ...")
    with heavy_imports():
        quiet_libraries()
        from lora_core.runtime.ranks import leave
        from lora_core.training.setup import train

    try:
        train(config, arguments.resume)
    except RunStopped:
        leave()  # all ranks are here; after another error some may be gone, and this would wait for them
        raise
    leave()


COMMAND = Command("fine-tune: lora-core train --cfg NAME [--resume [CHECKPOINT]] [key=value ...]", _add_arguments, _run)
