"""`lora-core report`: a run as one HTML page, several as a comparison."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command
from lora_core.untrusted.text import showable


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as outputs/demo")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in RUN, or here for several runs"
    )


def _run(arguments: Namespace) -> None:
    from lora_core.report.page import compare_reports, write_report

    if len(arguments.runs) == 1:
        page = write_report(arguments.runs[0], arguments.output)
    else:
        page = compare_reports(arguments.runs, arguments.output or Path("report.html"))
    print(showable(str(page)))


COMMAND = Command(
    "a run as one HTML page, several as a comparison: lora-core report RUN [RUN ...]", _add_arguments, _run
)
