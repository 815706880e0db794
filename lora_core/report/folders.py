"""The run folders under a folder: found, described, filtered, compared."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.report.page import config_differences
from lora_core.report.read import Run, read_run
from lora_core.report.verdict import judge, outcome_of
from lora_core.report.words import (
    change_text,
    eval_losses,
    model_text,
    num_steps,
    number_text,
    setting_text,
    steps_taken,
)
from lora_core.runtime.run_state import read_state

# How deep below the folder run folders are looked for.
_DEPTH = 3
# Every run writes one of these at once, beside its config.yaml.
_OF_A_RUN = ("state.json", "preflight.json", "metrics.jsonl")


@dataclass(frozen=True)
class Entry:
    """A run folder in short."""

    run: str
    """Its path."""
    state: str
    """running, finished, stopped, failed; `not finished` where nothing says what became of it."""
    reason: str | None
    """Why it stopped or failed."""
    verdict_kind: str
    """good, poor, bad, or open where it cannot be said."""
    verdict: str
    model: str
    steps: int | None
    """Optimizer steps taken, or seen so far."""
    planned_steps: int | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    alarms: list[str]
    """Their ids."""
    date: str | None
    """When it ended; None of one that has not finished."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, itself included, by name.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; fix: lora-core runs FOLDER, such as outputs")
    return sorted(_search(folder, _DEPTH))


def _search(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file() and any((folder / name).is_file() for name in _OF_A_RUN):
        yield folder
    elif depth > 0:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield from _search(entry, depth - 1)


def describe_run(run: Run) -> Entry:
    state, reason = read_state(run.folder)
    before, after = eval_losses(run)
    verdict = judge(outcome_of(run))
    date = run.get("summary", "date")
    return Entry(
        run=str(run.folder),
        state=state or ("finished" if run.summary else "not finished"),
        reason=reason,
        verdict_kind=verdict.kind,
        verdict=verdict.sentence,
        model=model_text(run),
        steps=steps_taken(run),
        planned_steps=num_steps(run),
        eval_loss_before=before,
        eval_loss_after=after,
        alarms=[str(alarm.get("id")) for alarm in run.alarms],
        date=date if isinstance(date, str) else None,
    )


def matching(folders: Sequence[Path], conditions: Sequence[str]) -> list[tuple[Run, Entry]]:
    """The runs that meet all conditions, the newest first.

    Args:
        conditions: `KEY=VALUE`: a field of `Entry`, such as state or verdict_kind, or a key of the configuration.

    Raises:
        ConfigError: a condition has no `=`, or no run has such a key.
    """
    wanted = [_condition(text) for text in conditions]
    runs = [(run, describe_run(run)) for run in map(read_run, folders)]
    for key, _ in wanted:
        if runs and all(_value(run, entry, key) is None for run, entry in runs):
            fields = ", ".join(Entry.__dataclass_fields__)
            raise ConfigError(f"--where {key}: no run has it; fix: one of {fields}, or a key such as lora.rank")
    found = [(run, entry) for run, entry in runs if all(_value(run, entry, key) == value for key, value in wanted)]
    return sorted(found, key=lambda pair: (pair[1].date or "9999", pair[1].run), reverse=True)


def _condition(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--where {text}: must be KEY=VALUE; fix: --where state=finished, or --where lora.rank=16")
    return key.strip(), value.strip()


def _value(run: Run, entry: Entry, key: str) -> str | None:
    """A field or a setting as text; None where the run has none of that name."""
    if key in Entry.__dataclass_fields__:
        return setting_text(getattr(entry, key))
    parts = key.split(".")
    holds: Any = run.get("config", *parts[:-1]) if len(parts) > 1 else run.config
    return setting_text(holds[parts[-1]]) if isinstance(holds, dict) and parts[-1] in holds else None


def table(entries: Sequence[Entry]) -> str:
    """Two lines or more a run: its figures, and what came of it."""
    heads = ("run", "state", "steps", "eval loss", "change", "date", "model")
    rows = [
        (
            entry.run,
            entry.state,
            f"{number_text(entry.steps)}/{number_text(entry.planned_steps)}",
            f"{number_text(entry.eval_loss_before, '.3f')} -> {number_text(entry.eval_loss_after, '.3f')}",
            change_text(entry.eval_loss_before, entry.eval_loss_after),
            (entry.date or "-").replace("+00:00", "Z"),
            entry.model,
        )
        for entry in entries
    ]
    head, *lines_of_runs = _columns([heads, *rows])
    lines = [head]
    room = max(60, shutil.get_terminal_size((120, 24)).columns)
    for entry, line in zip(entries, lines_of_runs, strict=True):
        lines.append(line)
        said = [entry.verdict, *([f"{entry.state}: {entry.reason}"] if entry.reason else [])]
        said += [f"alarms: {', '.join(entry.alarms)}"] if entry.alarms else []
        lines += textwrap.wrap("; ".join(said), room, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def differences(runs: Sequence[Run]) -> str:
    """The keys of the configuration that differ, a line each, a column a run."""
    rows = [(key, *values) for key, values in config_differences(runs)]
    if not rows:
        return "no key of the configurations differs"
    return "\n".join(_columns([("key", *(run.folder.name for run in runs)), *rows]))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, with each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
