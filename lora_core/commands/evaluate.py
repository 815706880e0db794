"""`lora-core evaluate`: a model measured on an eval set, alone or beside another one."""

from __future__ import annotations

import json
import os
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    new_file,
    quiet_libraries,
    say_first,
)
from lora_core.errors import ConfigError
from lora_core.untrusted.text import showable

if TYPE_CHECKING:
    from lora_core.inference.evaluation import Evaluation
    from lora_core.inference.harness import Scores
    from lora_core.inference.opened import Opened


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_arguments(parser, is_required=False)
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        help="a run, adapter, checkpoint or model folder, or none for the base model alone; default: adapter/ in the "
        "run folder of --cfg. Without --cfg, the settings are those of the run",
    )
    parser.add_argument("--against", metavar="PATH", help="measure this one too, as --adapter, and compare the two")
    parser.add_argument(
        "--replies", type=_number_of_replies, default=0, metavar="N", help="ask for N greedy replies, or for all"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="of a reply; default: train.sample_max_new_tokens"
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="write a line for each example to this new file")
    parser.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness too, such as arc_easy,piqa")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _number_of_replies(given: str) -> int | None:
    if given == "all":
        return None
    if not given.isdecimal():
        raise ArgumentTypeError(f"must be an int of 0 or more, or all: {given!r}")
    return int(given)


def _run(arguments: Namespace) -> None:
    output = new_file("--output", arguments.output)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens}: must be 1 or more; fix: --max-new-tokens 64")
    with heavy_imports():
        quiet_libraries()
        from lora_core.inference.evaluation import compare_evaluations, on_rows_of
        from lora_core.runtime.faults import naming_lost_ranks
        from lora_core.runtime.ranks import leave

    first = _open(arguments)
    second = None if arguments.against is None else on_rows_of(_open_other(arguments, first), first.config)
    if arguments.lm_eval is not None:
        from lora_core.inference.harness import check_harness

        check_harness()
    other = None
    with naming_lost_ranks(first.config.train.rank_timeout_s, "evaluate again"):
        evaluation, scores = _measure(first, arguments, arguments.lm_eval)
        if second is not None and evaluation is not None:
            other, _ = _measure(second, arguments, None)
    values: dict[str, Any] = {}
    lines: list[str] = []
    if evaluation is not None:
        values |= evaluation.to_dict()
        lines.append(str(evaluation))
    if evaluation is not None and other is not None:
        difference = compare_evaluations(evaluation, other)
        values |= {"against": other.to_dict(), "difference": difference.to_dict()}
        lines += [str(other), str(difference)]
    if scores is not None:
        values["lm_eval"] = scores
        lines += _score_lines(scores)
    leave()
    if os.environ.get("RANK", "0") != "0":
        return
    if output is not None and evaluation is not None:
        _write_rows(output, evaluation, other)
        lines.append(f"table of examples: {output}")
    print(json.dumps(values) if arguments.json else showable("\n".join(lines)))


def _open(arguments: Namespace) -> Opened:
    """What is measured, with its settings."""
    from lora_core.inference.opened import open_base, open_model

    given = arguments.adapter
    if arguments.cfg is None:
        if given is None or given == "none":
            raise ConfigError("which model? fix: --cfg NAME, or --adapter RUN with a run's folder")
        return open_model(given, arguments.overrides)
    config = load_config_of(arguments, quiet=arguments.json)
    if given == "none":
        return open_base(config)
    path = given or str(Path(config.output_dir).expanduser() / "adapter")
    if given is None and not (Path(path) / "adapter_config.json").is_file():
        train = shlex.join(["lora-core", "train", "--cfg", arguments.cfg, *arguments.overrides])
        raise ConfigError(
            f"{path}: there is no adapter yet; fix: {train}, or --adapter none for the base model alone, or --adapter "
            "RUN for another run"
        )
    return open_model(path, config=config)


def _open_other(arguments: Namespace, first: Opened) -> Opened:
    """What it is compared with: with its own settings where the first has its own."""
    from lora_core.inference.opened import open_base, open_model

    if arguments.against == "none":
        return replace(open_base(first.config), tokenizer_dir=first.tokenizer_dir)
    return open_model(arguments.against, config=None if arguments.cfg is None else first.config)


def _measure(opened: Opened, arguments: Namespace, tasks: str | None) -> tuple[Evaluation | None, Scores | None]:
    """Load the model, measure it, and let it go. No evaluation where only tasks are wanted and there is no eval set."""
    from lora_core.inference.evaluation import evaluate_loaded
    from lora_core.inference.harness import run_tasks
    from lora_core.inference.opened import load_opened
    from lora_core.runtime.faults import free_memory

    def say(line: str) -> None:
        if not arguments.json:
            say_first(line)

    has_eval_set = opened.config.data.eval_file is not None or opened.config.data.eval_fraction > 0
    loaded = load_opened(opened)
    max_new_tokens = arguments.max_new_tokens or loaded.config.train.sample_max_new_tokens
    evaluation = None
    if has_eval_set or tasks is None:
        evaluation = evaluate_loaded(loaded, arguments.replies, max_new_tokens, say)
    scores = None if tasks is None else run_tasks(loaded, tasks)
    del loaded
    free_memory()
    return evaluation, scores


def _score_lines(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{task}: " + ", ".join(f"{name.removesuffix(',none')} {value:.4g}" for name, value in measures.items())
        for task, measures in scores.items()
    ]


def _write_rows(path: Path, evaluation: Evaluation, other: Evaluation | None) -> None:
    rows = evaluation.rows()
    if other is not None:
        columns = ("loss", "reply", "exact")
        rows = [
            row | {f"against_{name}": beside[name] for name in columns if name in beside}
            for row, beside in zip(rows, other.rows(), strict=True)
        ]
    with path.open("x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


COMMAND = Command(
    "loss and replies of a model on an eval set: lora-core evaluate --adapter RUN, or --cfg NAME [--adapter DIR]",
    _add_arguments,
    _run,
)
