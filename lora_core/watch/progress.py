"""What the loop remembers from step to step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lora_core.evaluation.evaluate import EvalResult
from lora_core.watch.alarms import Watch


@dataclass
class Progress:
    """What the loop itself remembers from step to step; a checkpoint holds it."""

    step: int = 0
    """Optimizer steps taken."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    train_time_s: float = 0.0
    """Of the steps, over all parts of an interrupted run."""
    before: EvalResult | None = None
    after: EvalResult | None = None
    """The last evaluation."""
    best: EvalResult | None = None
    """The lowest eval loss since the first step, and its step."""
    best_step: int = 0
    evaluations_since_best: int = 0
    num_skipped_steps: int = 0
    """Steps that were not applied because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    micro_batch_limit: int | None = None
    """`Batching.limit`, where memory was too short for the configured one."""
    replies_before: list[str] | None = None
    ended_before: list[bool] | None = None
    """Whether each of them came to an end."""
    watch: Watch = field(default_factory=Watch)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What an earlier version did not write yet has its value of the start."""
        results = {key: EvalResult(**values[key]) for key in ("before", "after", "best") if values[key] is not None}
        watch = {"watch": Watch.from_dict(values["watch"])} if "watch" in values else {}
        return cls(**{**values, **results, **watch})

    def note_evaluation(self, result: EvalResult) -> bool:
        """Remember an evaluation; returns whether it is the best so far."""
        self.after = result
        is_best = self.best is None or result.loss < self.best.loss
        if is_best:
            self.best, self.best_step = result, self.step
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best
