"""`lora-core runs`: what runs there are, and what came of them."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command
from lora_core.untrusted.text import showable, values_without_secrets


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="default: outputs")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this state, verdict_kind, model, ... or key of the configuration; may be repeated",
    )
    parser.add_argument("--compare", action="store_true", help="also the keys of the configuration that differ")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")


def _run(arguments: Namespace) -> None:
    from lora_core.report.folders import differences, find_runs, matching, table

    found = matching(find_runs(arguments.folder), arguments.where)
    if arguments.json:
        print(json.dumps(values_without_secrets([entry.to_dict() for _, entry in found])))
        return
    if not found:
        print(showable(f"{arguments.folder}: no run" + (" that is so" if arguments.where else "")))
        return
    print(showable(table([entry for _, entry in found])))
    if arguments.compare:
        print(showable("\n" + differences([run for run, _ in found])))


COMMAND = Command("list, filter and compare runs: lora-core runs [FOLDER] [--where KEY=VALUE]", _add_arguments, _run)
