"""A run folder, read: what is missing or broken is named, not fatal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml

from lora_core.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """What a run folder holds. What is missing is empty here and named in `gaps`."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    preflight: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Any]
    train_events: list[dict[str, Any]]
    """One an optimizer step, in order; of a step that was taken again after a resume, the later."""
    eval_events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    """To the first sample prompts, one an evaluation and prompt, in order."""
    alarms: list[dict[str, Any]]
    """Raised while the run was at work, in order."""
    skipped_steps: list[int]
    """Steps that were not applied: loss or gradient was not finite."""
    gaps: list[str]
    """Sentences on files that are missing or broken."""

    def get(self, file: str, *keys: str) -> Any:
        """`run.get("config", "lora", "rank")`: the value, or None if any of the keys is missing."""
        value = getattr(self, file)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, file: str, *keys: str) -> float | None:
        """As `get`; None also for what is no number."""
        value = self.get(file, *keys)
        return value if is_number(value) else None

    def count(self, file: str, *keys: str) -> int | None:
        """As `number`, of what is counted."""
        value = self.number(file, *keys)
        return None if value is None else round(value)

    def points(self, events: str, key: str) -> list[tuple[int, float]]:
        """(optimizer step, value) of every event that has a number there."""
        return [(event["step"], event[key]) for event in getattr(self, events) if is_number(event.get(key))]


def read_run(folder: Path) -> Run:
    """Read what there is of a run.

    Raises:
        ConfigError: there is no config.yaml, which every run writes first.
    """
    if not (folder / "config.yaml").is_file():
        problem = "holds no config.yaml, so it is no run" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {problem}; fix: name the output_dir of a run, such as outputs/demo")
    gaps: list[str] = []
    config_text, config = _read_config(folder / "config.yaml", gaps)
    events = _read_events(folder / "metrics.jsonl", gaps)
    return Run(
        folder=folder,
        config_text=config_text,
        config=config,
        preflight=_read_json(folder / "preflight.json", dict, gaps),
        summary=_read_summary(folder / "summary.json", gaps),
        rows=_read_json(folder / "rows.json", list, gaps),
        train_events=_last_of_each_step(events, "train"),
        eval_events=_last_of_each_step(events, "eval"),
        samples=[event for event in events if event.get("event") == "sample"],
        replies=[event for event in events if event.get("event") == "reply" and is_number(event.get("step"))],
        alarms=[event for event in events if event.get("event") == "alarm"],
        skipped_steps=[event["step"] for event in _last_of_each_step(events, "skipped")],
        gaps=gaps,
    )


# What a summary has had since it has a verdict.
_SINCE_VERDICT = ("verdict", "date", "hardware", "data_hash", "working_dir", "adapter_norm", "num_eval_examples_better")


def _read_summary(path: Path, gaps: list[str]) -> dict[str, Any]:
    summary = _read_json(path, dict, gaps)
    missing = [key for key in _SINCE_VERDICT if key not in summary]
    if summary and missing:
        gaps.append(f"{path.name} is of an earlier version: it has no {', '.join(missing)}.")
    return summary


_Kind = TypeVar("_Kind", dict[str, Any], list[Any])


def _read_json(path: Path, kind: type[_Kind], gaps: list[str]) -> _Kind:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing.")
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read: {error}.")
    else:
        if isinstance(value, kind):
            return value
        gaps.append(f"{path.name} holds a {type(value).__name__} where a {kind.__name__} was expected; left out.")
    return kind()


def _read_config(path: Path, gaps: list[str]) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        gaps.append(f"{path.name} is not valid YAML: {error}.")
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_events(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        gaps.append(f"{path.name} is missing.")
        return []
    # Not splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line) if line.strip() else {}
        except ValueError:
            if number == len(lines):
                gaps.append(f"{path.name} ends in the middle of line {number}, as when a run is killed; left out.")
            else:
                gaps.append(f"{path.name} line {number} is not valid JSON; left out.")
            continue
        events.append(event)
    return [event for event in events if isinstance(event, dict)]


def _last_of_each_step(events: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    by_step = {event["step"]: event for event in events if event.get("event") == kind and is_number(event.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def is_number(value: Any) -> TypeGuard[float]:
    """And one that can be calculated with: not NaN, not infinite, no integer of a thousand digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
