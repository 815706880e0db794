"""A run as one HTML page, several as a comparison: python launch/report.py RUN [RUN ...] [--output FILE.html]"""

import argparse
import sys
from pathlib import Path

from lora_core.commands.command_line import run_command
from lora_core.untrusted.text import showable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as outputs/demo")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in RUN, or here for several runs"
    )
    arguments = parser.parse_args()
    from lora_core.report.page import compare_reports, write_report

    if len(arguments.runs) == 1:
        page = write_report(arguments.runs[0], arguments.output)
    else:
        page = compare_reports(arguments.runs, arguments.output or Path("report.html"))
    print(showable(str(page)))


if __name__ == "__main__":
    sys.exit(run_command(main))
