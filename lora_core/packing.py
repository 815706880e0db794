"""Which rows each optimizer step takes, how they are cut into micro-batches, and the tensors of one micro-batch.

Everything here is a function of its arguments: the same seed, epoch and step give the same rows on any machine, so
a run can be picked up at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

RowIndices = npt.NDArray[np.int64]


def epoch_order(num_rows: int, seed: int, epoch: int) -> RowIndices:
    """(num_rows,) a permutation of the rows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def step_rows(num_rows: int, rows_per_optimizer_step: int, seed: int, optimizer_step: int) -> RowIndices:
    """The rows of one optimizer step, counted from 0 over the whole run; over all ranks. Fewer at an epoch's end."""
    steps_per_epoch = -(-num_rows // rows_per_optimizer_step)
    epoch, step = divmod(optimizer_step, steps_per_epoch)
    start = step * rows_per_optimizer_step
    return epoch_order(num_rows, seed, epoch)[start : start + rows_per_optimizer_step]


@dataclass(frozen=True)
class MicroBatchRows:
    """What one rank takes in one micro-batch."""

    rows: RowIndices
    is_filler: bool = False
    """True when this rank has no row left but others do. It then runs a row with nothing supervised, which adds 0 to
    the loss: ranks that synchronise gradients must all run the same number of micro-batches."""


def micro_batches(
    rows: RowIndices, lengths: RowIndices, per_device_batch_size: int, num_processes: int = 1, rank: int = 0
) -> list[MicroBatchRows]:
    """Cut one step's rows into this rank's micro-batches; every rank gets the same number of them.

    Rows of like length go together, which changes how much padding is computed and nothing else (the step's loss is
    one sum over all of its tokens). With 10 rows sorted by length, 2 ranks and 2 rows a micro-batch:

        micro-batch      0        1        2
        rank 0         0  2     4  6       8
        rank 1         1  3     5  7       9

    Args:
        rows: (R,) the step's row indices, over all ranks.
        lengths: (num_rows,) tokens of every row in the dataset.
    """
    by_length = rows[np.argsort(-lengths[rows], kind="stable")]
    size = per_device_batch_size * num_processes
    batches = []
    for start in range(0, len(by_length), size):
        mine = by_length[start : start + size][rank::num_processes]
        batches.append(MicroBatchRows(mine) if len(mine) else MicroBatchRows(by_length[-1:], is_filler=True))
    return batches


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, is_filler: bool = False) -> dict[str, torch.Tensor]:
    """Rows -> one right-padded micro-batch of (B, T) tensors: input_ids, attention_mask, loss_mask.

    `loss_mask` says what is supervised. It does not look at the ids, so a pad token that equals the EOS token
    cannot hide an EOS.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    loss_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.as_tensor(row["input_ids"])
        attention_mask[index, :length] = 1
        if not is_filler:
            loss_mask[index, :length] = torch.as_tensor(row["loss_mask"])
    loss_mask[:, 0] = False  # nothing comes before the first token to predict it from
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
