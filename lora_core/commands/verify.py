"""`lora-core verify`: lora_core checked on the user's own model and rows."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    quiet_libraries,
)
from lora_core.errors import LoraCoreError


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _run(arguments: Namespace) -> None:
    with heavy_imports():
        quiet_libraries()
        from lora_core.verification.contracts import verify

    try:
        config = load_config_of(arguments)
        result = verify(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    except LoraCoreError as error:
        if arguments.json:
            print(json.dumps({"settings": [], "checks": [], "passed": None, "error": str(error)}))
        raise
    print(json.dumps({**result.to_dict(), "error": None}) if arguments.json else result)
    result.refuse_failed()


COMMAND = Command("masks, gradients, plan, resume and reload, checked on my model and rows", _add_arguments, _run)
