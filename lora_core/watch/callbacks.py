"""What a program can be told while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.watch.summary import Summary


class Callback:
    """Told what happens in a run, in the main process. Inherit from it, and write the methods that you need.

        class PrintLoss(Callback):
            def on_log(self, values):
                print(values["step"], values["loss"])

        train(config, callbacks=[PrintLoss()])

    What a method raises ends the run.
    """

    def on_log(self, values: Mapping[str, Any]) -> None:
        """A line of the log: step, epoch, loss, learning_rate, grad_norm, num_supervised_tokens, tokens_per_s,
        peak_memory_bytes, seconds_left (of the whole run); as in `metrics.jsonl`."""

    def on_evaluate(self, values: Mapping[str, Any]) -> None:
        """An evaluation: step, loss, perplexity, token_accuracy, num_tokens, num_conversations. The first is of step 0,
        before training."""

    def on_save(self, path: Path) -> None:
        """A checkpoint is whole on disk, in the folder `path`."""

    def on_end(self, summary: Summary) -> None:
        """The run is done; its adapter is in `summary.adapter_dir`."""
