"""`lora-core evaluate`: the eval loss of an adapter."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command, add_config_arguments, heavy_imports, quiet_libraries
from lora_core.config.load import load_config


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--adapter", metavar="DIR", help="default: adapter/ in the run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _run(arguments: Namespace) -> None:
    config = load_config(arguments.cfg, arguments.overrides, arguments.model)
    with heavy_imports():
        quiet_libraries()
        from lora_core.runtime.ranks import leave
        from lora_core.training.evaluate import evaluate_adapter

    result = evaluate_adapter(config, arguments.adapter or Path(config.output_dir).expanduser() / "adapter")
    print(json.dumps(result.to_dict()) if arguments.json else result)
    leave()


COMMAND = Command("eval loss of an adapter: lora-core evaluate --cfg NAME [--adapter DIR]", _add_arguments, _run)
