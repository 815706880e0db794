"""The largest micro-batch of a run: the one that decides its memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.packing import Batching, step_rows, train_batching
from lora_core.schedule import SchedulePlan

# Every step of an epoch is looked at for its largest micro-batch, up to so many.
_STEPS_LOOKED_AT = 20_000


@dataclass(frozen=True)
class MicroBatch:
    """The shape of one micro-batch."""

    lengths: tuple[int, ...]
    """Tokens of each example in it."""
    num_loss_tokens: int
    packed: bool

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return sum(self.lengths) if self.packed else len(self.lengths) * max(self.lengths)


def largest_micro_batch(config: RunConfig, data: EncodedFile, plan: SchedulePlan) -> MicroBatch:
    """The micro-batch of the run with the most computed tokens, in the run's own order of rows."""
    steps = min(plan.total_optimizer_steps, max(plan.optimizer_steps_per_epoch, 50), _STEPS_LOOKED_AT)
    batching, limit = train_batching(config, 0), config.data.max_seq_length
    candidates = (
        largest_cut(
            batching,
            step_rows(plan.num_rows, plan.rows_per_optimizer_step, config.train.seed, step),
            data,
            limit,
            plan.num_processes,
        )
        for step in range(steps)
    )
    return max(candidates, key=lambda micro_batch: micro_batch.num_tokens)


def largest_cut(
    batching: Batching, rows: npt.NDArray[np.int64], data: EncodedFile, max_seq_length: int, num_processes: int
) -> MicroBatch:
    lengths = np.minimum(
        data.lengths, max_seq_length
    )  # the limit may be shorter than the one that rows were truncated to
    loss_share = data.num_supervised / int(data.lengths.sum())
    made = (
        MicroBatch(
            tuple(lengths[share].tolist()),
            max(1, round(loss_share * int(lengths[share].sum()))),
            packed=batching.max_tokens is not None,
        )
        for share in batching.shares(rows, lengths, num_processes)
        if len(share)  # a filler is no larger than another
    )
    return max(made, key=lambda micro_batch: micro_batch.num_tokens)
