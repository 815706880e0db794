"""However a run ends, its folder says how: state.json, the last line of train.log, trackers closed, a page."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_core.config.schema import RunConfig
from lora_core.errors import ConfigError, LoraCoreError, RunStopped
from lora_core.report.page import write_report
from lora_core.runtime.console import Console
from lora_core.runtime.ranks import from_first_rank
from lora_core.runtime.run_state import State, write_state
from lora_core.watch.trackers import Trackers, start_trackers


class RecordedEnd:
    """Of a run that may not have a folder yet: `begin` is called when it has."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._folder: Path | None = None
        """Of the main process alone."""
        self.trackers: Sequence[Trackers] = ()

    def begin(self, folder: Path, data_hash: str, resumed_at_step: int | None, is_main: bool) -> None:
        """The run has its folder: open the log, and start the trackers. Call it in every rank.

        Raises:
            ConfigError: in every rank: a tracker cannot start.
        """
        if is_main:
            self._folder = folder
            write_state(folder, "running")
            self._console.open_log(folder)

        def start() -> None:
            self.trackers = [start_trackers(self._config, folder, data_hash, resumed_at_step, self._console)]

        from_first_rank(start)

    def end(self, state: State, reason: str | None = None) -> None:
        """Write down how the run ended."""
        if self._folder is None:
            return
        if reason is not None:
            self._console.note(f"{state}: {reason}")
        for trackers in self.trackers:
            trackers.finish()
        write_state(self._folder, state, reason)
        if state != "finished":
            self._write_page(self._folder)
        self._console.close_log()

    def _write_page(self, folder: Path) -> None:
        """`report.html` of a run without a summary."""
        try:
            self._console.say(f"report: {write_report(folder)}")
        except (ConfigError, OSError) as error:  # why the run ended matters more
            self._console.say(f"report: not written: {error}")


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """A launcher that Ctrl-C has ended sends SIGTERM after it: the page and the last line are to be written first."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main one only
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def recorded_end(config: RunConfig, console: Console) -> Iterator[RecordedEnd]:
    """While entered, whatever ends the run is written into its folder, and raised on."""
    end = RecordedEnd(config, console)
    try:
        yield end
    except RunStopped as error:
        with _without_sigterm():
            end.end("stopped", str(error))
        raise
    except KeyboardInterrupt:
        end.end("stopped", "interrupted at once")
        raise
    except LoraCoreError as error:
        end.end("failed", str(error))
        raise
    except BaseException as error:
        end.end("failed", f"{type(error).__name__}: {error}")
        raise
    end.end("finished")
