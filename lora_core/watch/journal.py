"""What a run says: lines to the console and the log, events to metrics.jsonl, to JSON lines and to callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.report.words import duration_text
from lora_core.runtime.console import Console, Kind
from lora_core.runtime.run_folder import MetricsFile
from lora_core.watch.callbacks import Callback

if TYPE_CHECKING:
    from lora_core.watch.summary import Summary


@dataclass(frozen=True)
class Journal:
    """Of one run. Only the main process writes and says anything."""

    console: Console
    metrics: MetricsFile
    callbacks: Sequence[Callback]
    """Empty but in the main process."""

    def say(self, line: str, kind: Kind = "detail") -> None:
        self.console.say(line, kind)

    def record(self, event: str, values: Mapping[str, Any]) -> None:
        """Into metrics.jsonl, and to whoever reads events."""
        self.metrics.write(event, **values)
        self.console.event(event, values)

    def log_step(self, values: Mapping[str, Any], total: int) -> None:
        """A logged step.

        Args:
            total: optimizer steps of the run.
        """
        self.record("train", values)
        self.say(
            f"step {values['step']:>{len(str(total))}}/{total}  epoch {values['epoch']:.2f}  "
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad_norm {values['grad_norm']:.3f}  "
            f"{values['num_supervised_tokens']} loss tokens  {values['tokens_per_s']:.0f} tok/s  "
            f"{values['peak_memory_bytes'] / 2**30:.1f} GiB  {duration_text(values['seconds_left'])} left",
            "event",
        )
        for callback in self.callbacks:
            callback.on_log(values)

    def evaluated(self, values: Mapping[str, Any], in_words: str) -> None:
        """An evaluation."""
        self.record("eval", values)
        for callback in self.callbacks:
            callback.on_evaluate(values)
        self.say(f"eval at step {values['step']}: {in_words}", "event")

    def saved(self, path: Path) -> None:
        """A checkpoint is whole on disk."""
        self.console.event("checkpoint", {"path": str(path)})
        for callback in self.callbacks:
            callback.on_save(path)

    def ended(self, summary: Summary) -> None:
        """The run is done."""
        self.console.event("summary", summary.to_dict())
        for callback in self.callbacks:
            callback.on_end(summary)
