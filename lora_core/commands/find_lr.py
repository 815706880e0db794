"""`lora-core find-lr`: a learning rate that was tried on the user's own rows."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    new_file,
    quiet_libraries,
    say_first,
)
from lora_core.config.schema import RunConfig
from lora_core.configuration import find_config, with_overrides
from lora_core.errors import ConfigError
from lora_core.runtime.launcher import refuse_several
from lora_core.untrusted.text import showable

EVAL_SHARE = 0.2
"""Share of the rows that the candidates are judged on, where the configuration has no eval set."""


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=5.0,
        metavar="N",
        help="for all of it, loading the model too; with fewer steps and examples where it must; default: 5",
    )
    parser.add_argument("--output", metavar="FILE.html", help="where the page goes; default: beside the run folders")
    parser.add_argument(
        "--write", metavar="FILE.yaml", help="put the rate into the file of --cfg, or write a new one with it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _run(arguments: Namespace) -> None:
    started = time.monotonic()
    refuse_several("find-lr")
    if not arguments.budget_minutes > 0:
        raise ConfigError(f"--budget-minutes {arguments.budget_minutes:g}: must be above 0; fix: --budget-minutes 5")
    config = load_config_of(arguments, quiet=arguments.json)
    path = find_config(arguments.cfg)
    page = new_file("--output", arguments.output)
    target = None if arguments.write is None else Path(arguments.write).expanduser()
    if target is not None:
        from lora_core.rate_search.config_file import check_target

        check_target(arguments.cfg, path, target)

    def say(line: str) -> None:
        if not arguments.json:
            say_first(line)

    say("importing PyTorch and transformers ...")
    with heavy_imports():
        quiet_libraries()
        from lora_core.preflight.preflight import look_at_run, refuse_errors, run_checks
        from lora_core.rate_search.config_file import write_rate
        from lora_core.rate_search.page import candidate_rows, in_words, write_search
        from lora_core.rate_search.search import find_rate

    facts = look_at_run(with_eval_set(config, say), 1)
    # Nothing is written to the run folder.
    facts = replace(facts, environment=replace(facts.environment, output_dir_problem=None))
    refuse_errors(run_checks(facts), config.preflight.allow)
    search = find_rate(facts, 60 * arguments.budget_minutes, say, started=started)
    if page is None:
        folder = Path(config.output_dir).expanduser()
        folder.parent.mkdir(parents=True, exist_ok=True)
        page = folder.parent / f"{folder.name}-find-lr.html"
    write_search(search, arguments.cfg, page)
    if target is not None:
        write_rate(config.to_yaml(), path, target, search.rate)
    if arguments.json:
        print(json.dumps(search.to_dict() | {"page": str(page)}))
        return
    header = ["learning rate", "eval loss", "change", "worse than the best by"]
    lines = ["", *aligned([header, *candidate_rows(search)]), "", in_words(search)]
    lines += [
        f"learning rate: {search.rate:g} (configured: {search.asked:g}; by the formula: {search.formula:g})",
        f"page: {page}",
        f"wrote {target}" if target is not None else f"fix: train.learning_rate={search.rate:g}",
    ]
    print(showable("\n".join(lines)))


def with_eval_set(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """With a share of the rows as eval set, where there is none."""
    if config.data.eval_file is not None or config.data.eval_fraction > 0:
        return config
    say(f"no eval set: {EVAL_SHARE:.0%} of the rows become one, to judge on")
    return with_overrides(config, [f"data.eval_fraction={EVAL_SHARE}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


COMMAND = Command(
    "a learning rate tried on your rows: lora-core find-lr --cfg NAME [--budget-minutes N] [--write FILE.yaml]",
    _add_arguments,
    _run,
)
