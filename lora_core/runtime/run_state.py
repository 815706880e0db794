"""`state.json` of a run folder: whether its run is at work, or how it ended."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import psutil  # comes with Accelerate

from lora_core.runtime.run_folder import write_json

State = Literal["running", "finished", "stopped", "failed"]

STATE_FILE = "state.json"


def write_state(folder: Path, state: State, reason: str | None = None) -> None:
    """Write down what becomes of a run, by the process that runs it.

    Args:
        reason: why it stopped or failed.
    """
    process = psutil.Process()
    values = {
        "state": state,
        "reason": reason,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": process.create_time(),
    }
    write_json(folder / STATE_FILE, values)


def read_state(folder: Path) -> tuple[State | None, str | None]:
    """(state, reason) of a run folder; (None, None) of one that has no readable `state.json`.

    A run that was killed had no time to write how it ended: on the machine that it ran on, it counts as failed once its
    process is gone.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state, reason = values["state"], values["reason"]
    except (OSError, ValueError, TypeError, KeyError):
        return None, None
    if state not in ("running", "finished", "stopped", "failed"):
        return None, None
    if state == "running" and not _may_be_at_work(values):
        return "failed", "its process is gone and left no word: killed, or the machine was restarted"
    if state == "running" and values.get("host") != platform.node():
        reason = f"on {values.get('host')}; only that machine knows whether its process is still there"
    return state, reason if isinstance(reason, str) else None


def _may_be_at_work(values: dict[str, Any]) -> bool:
    if values.get("host") != platform.node():
        return True
    try:
        started = psutil.Process(int(values["pid"])).create_time()
    except (psutil.Error, ValueError, TypeError, KeyError):
        return False
    # Another process may have the number by now.
    return bool(abs(started - float(values.get("process_started", 0))) < 1.0)
