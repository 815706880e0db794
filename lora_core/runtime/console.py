"""Where a run's lines and events go: the terminal, JSON lines for a program, and the log file of the run folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from lora_core.untrusted.text import showable, values_without_secrets

Mode = Literal["lines", "quiet", "json"]
Kind = Literal["detail", "event", "always"]
"""detail: for people who watch; event: a line that an event says too; always: warnings, alarms and the verdict."""

LOG_FILE = "train.log"


class Console:
    """Of a run's main process; in the others it says nothing.

    Args:
        mode: lines prints every line; quiet prints only what is always said; json prints one JSON object an event, and
            other lines as `{"event": "message"}`.
        stream: where to print; None is the stdout of the moment.
    """

    def __init__(self, mode: Mode = "lines", stream: TextIO | None = None) -> None:
        self.mode: Mode = mode
        self.stream = stream
        self._is_main = os.environ.get("RANK", "0") == "0"
        self._log: TextIO | None = None
        self._waiting: list[str] = []
        """Lines for the log file, as long as there is no run folder."""

    @property
    def has_bar(self) -> bool:
        """Whether a progress bar may be drawn, on stderr, if that is a terminal."""
        return self._is_main and self.mode == "lines"

    def say(self, text: str, kind: Kind = "detail") -> None:
        """Print and log lines, without secrets and control characters."""
        if not self._is_main:
            return
        text = showable(text)
        if self.mode == "json":
            if kind != "event":
                self.event("message", {"text": text.strip("\n")})
        elif self.mode == "lines" or kind == "always":
            self._print(text)
        self.note(text)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Print an event, where events are what is printed."""
        if self._is_main and self.mode == "json":
            event = values_without_secrets({"event": name, **values})
            # ASCII alone: no line break of Unicode, and any terminal's encoding will do.
            self._print(json.dumps(event, allow_nan=False))

    def note(self, text: str) -> None:
        """Into the log file alone: each line after its time, in UTC."""
        if not self._is_main:
            return
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._waiting += [f"{now} {line}\n" for line in showable(text).split("\n") if line]
        if self._log is not None:
            self._log.writelines(self._waiting)
            self._log.flush()
            self._waiting = []

    def open_log(self, folder: Path) -> None:
        """Begin to write `train.log`, or continue it, with all that was said before there was a folder."""
        if self._is_main:
            self.close_log()
            self._log = (folder / LOG_FILE).open("a", encoding="utf-8", errors="backslashreplace")
            self.note("")

    def close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _print(self, text: str) -> None:
        stream = sys.stdout if self.stream is None else self.stream
        tqdm.write(text, file=stream)  # above a bar, if there is one
        stream.flush()
