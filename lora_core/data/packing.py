"""Which rows each optimizer step takes, how they are divided into micro-batches, and the tensors of one micro-batch.

Everything here is a function of its arguments: the same seed, epoch and step give the same rows on any machine, so
a run can be resumed at any step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_core.config.schema import RunConfig

if TYPE_CHECKING:
    import torch

RowIndices = npt.NDArray[np.int64]


@lru_cache(maxsize=2)  # every step of an epoch asks for it, and a million rows take 20 ms
def epoch_order(num_rows: int, seed: int, epoch: int) -> RowIndices:
    """(num_rows,) a permutation of the rows that depends on seed and epoch alone; read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False
    return order


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
    """True when this rank has no row left but others do. It then runs a row without loss tokens, which adds 0 to
    the loss: ranks that synchronise gradients must all run the same number of micro-batches."""


@dataclass(frozen=True)
class Batching:
    """How rows become micro-batches: packed into flat rows, or padded."""

    per_device_batch_size: int
    """Rows in a padded micro-batch."""
    pad_token_id: int
    max_tokens: int | None = None
    """Tokens in a packed micro-batch; None pads instead. A longer row gets a micro-batch of its own."""

    def cut(self, rows: RowIndices, lengths: RowIndices, num_processes: int = 1, rank: int = 0) -> list[MicroBatchRows]:
        """Cut one step's rows into this rank's micro-batches; every rank gets the same number of them.

        Args:
            rows: (R,) the step's row indices, over all ranks.
            lengths: (num_rows,) tokens of every row in the dataset.
        """
        if self.max_tokens is None:
            return micro_batches(rows, lengths, self.per_device_batch_size, num_processes, rank)
        return packed_micro_batches(rows, lengths, self.max_tokens, num_processes, rank)

    def shares(self, rows: RowIndices, lengths: RowIndices, num_processes: int) -> list[RowIndices]:
        """The rows of every micro-batch of one step, of all ranks at once: `rank` has those at `[rank::num_processes]`.

        One with no row is a rank's filler.
        """
        if self.max_tokens is None:
            return _padded_shares(rows, lengths, self.per_device_batch_size, num_processes)
        return _packed_shares(rows, lengths, self.max_tokens, num_processes)

    @property
    def limit(self) -> int:
        """Of a micro-batch: tokens where it is packed, rows where it is padded."""
        return self.per_device_batch_size if self.max_tokens is None else self.max_tokens

    def limited(self, limit: int) -> Batching:
        """Another limit. What a step holds, and so its gradient, stays as it is; it takes more micro-batches."""
        if self.max_tokens is None:
            return replace(self, per_device_batch_size=limit)
        return replace(self, max_tokens=limit)

    def halved(self, cuts: Sequence[MicroBatchRows], lengths: RowIndices) -> Batching | None:
        """A limit of half the largest of these micro-batches; None where each holds one row already."""
        shared = [cut.rows for cut in cuts if len(cut.rows) > 1]
        if not shared:
            return None
        return self.limited(
            max(len(rows) if self.max_tokens is None else int(lengths[rows].sum()) for rows in shared) // 2
        )

    def tensors(self, dataset: Any, cut: MicroBatchRows) -> dict[str, Any]:
        """One micro-batch, as `CausalLMLoss` takes it."""
        columns = dataset[cut.rows.tolist()]  # in one read: a read a row takes twice the time
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if self.max_tokens is None:
            return collate(rows, self.pad_token_id, cut.is_filler)
        return collate_packed(rows, cut.is_filler)


@dataclass(frozen=True)
class StepBatches:
    """One rank's share of an optimizer step."""

    cuts: list[MicroBatchRows]
    batches: list[dict[str, Any]]
    """The tensors of each."""


class BatchPrefetcher:
    """Gives each step's micro-batches, and has a thread make the next step's while this one runs."""

    def __init__(self, make: Callable[[int, Batching], StepBatches], num_steps: int) -> None:
        """
        Args:
            make: (step, counted from 0; how to cut it) -> its batches; a function of these alone.
            num_steps: none is made ahead past them.
        """
        self._make = make
        self._num_steps = num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Batching, Future[StepBatches]] | None = None

    def take(self, step: int, batching: Batching) -> StepBatches:
        """What `make` gives, already made where it could be foreseen; raises what `make` raised."""
        if self._next is not None and self._next[:2] == (step, batching):
            batches = self._next[2].result()
        else:
            batches = self._make(step, batching)
        self._next = None
        if step + 1 < self._num_steps:
            self._next = (step + 1, batching, self._thread.submit(self._make, step + 1, batching))
        return batches


def train_batching(config: RunConfig, pad_token_id: int) -> Batching:
    """How a run divides its training steps into micro-batches."""
    train, data = config.train, config.data
    budget = train.max_tokens_per_device_batch or train.per_device_train_batch_size * data.max_seq_length
    return Batching(train.per_device_train_batch_size, pad_token_id, budget if data.packing else None)


def eval_batching(config: RunConfig, pad_token_id: int) -> Batching:
    """How a run divides its eval set into micro-batches."""
    size = config.train.per_device_eval_batch_size
    return Batching(size, pad_token_id, size * config.data.max_seq_length if config.data.packing else None)


def micro_batches(
    rows: RowIndices, lengths: RowIndices, per_device_batch_size: int, num_processes: int = 1, rank: int = 0
) -> list[MicroBatchRows]:
    """Padded micro-batches: at most `per_device_batch_size` rows each.

    Rows of like length go together, which changes how much padding is computed and nothing else (the step's loss is
    one sum over all of its tokens). With 10 rows sorted by length, 2 ranks and 2 rows a micro-batch:

        micro-batch      0        1        2
        rank 0         0  2     4  6       8
        rank 1         1  3     5  7       9
    """
    shares = _padded_shares(rows, lengths, per_device_batch_size, num_processes)
    return _of_rank(shares[rank::num_processes], rows, lengths)


def _padded_shares(
    rows: RowIndices, lengths: RowIndices, per_device_batch_size: int, num_processes: int
) -> list[RowIndices]:
    by_length = _longest_first(rows, lengths)
    size = per_device_batch_size * num_processes
    return [
        by_length[start : start + size][rank::num_processes]
        for start in range(0, len(by_length), size)
        for rank in range(num_processes)
    ]


def packed_micro_batches(
    rows: RowIndices, lengths: RowIndices, max_tokens: int, num_processes: int = 1, rank: int = 0
) -> list[MicroBatchRows]:
    """Packed micro-batches: as few as hold the step at `max_tokens` each, and as even as they can be.

    Longest first, each row goes to the bin that holds least (Graham 1969, LPT); if that overfills one, there is one
    more micro-batch. Even bins keep ranks in step, and no token is padding.
    """
    shares = _packed_shares(rows, lengths, max_tokens, num_processes)
    return _of_rank(shares[rank::num_processes], rows, lengths)


def _packed_shares(rows: RowIndices, lengths: RowIndices, max_tokens: int, num_processes: int) -> list[RowIndices]:
    by_length = _longest_first(rows, lengths)
    to_hold_all_tokens = -(-int(lengths[rows].sum()) // (max_tokens * num_processes))
    per_rank = min(to_hold_all_tokens, -(-len(rows) // num_processes))
    while True:
        bins = _spread(by_length, lengths, per_rank * num_processes)
        if all(len(rows_) <= 1 or lengths[rows_].sum() <= max_tokens for rows_ in bins):
            return bins
        per_rank += 1


def _of_rank(shares: Sequence[RowIndices], rows: RowIndices, lengths: RowIndices) -> list[MicroBatchRows]:
    """A rank without rows of its own takes the step's shortest, as filler."""
    filler = MicroBatchRows(_longest_first(rows, lengths)[-1:], is_filler=True)
    return [MicroBatchRows(mine) if len(mine) else filler for mine in shares]


def _spread(by_length: RowIndices, lengths: RowIndices, num_bins: int) -> list[RowIndices]:
    heap = [(0, index) for index in range(num_bins)]
    bins: list[list[int]] = [[] for _ in heap]
    for row in by_length:
        tokens, index = heapq.heappop(heap)
        bins[index].append(int(row))
        heapq.heappush(heap, (tokens + int(lengths[row]), index))
    return [np.array(rows, dtype=np.int64) for rows in bins]


def _longest_first(rows: RowIndices, lengths: RowIndices) -> RowIndices:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int, is_filler: bool = False) -> dict[str, torch.Tensor]:
    """Rows -> one right-padded micro-batch of (B, T) tensors: input_ids, attention_mask, loss_mask, and loss_weights if
    a row has any.

    `loss_mask` marks the loss tokens. It does not look at the ids, so a pad token that equals the EOS token
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
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
    if any(len(row.get("loss_weights", ())) for row in rows):
        batch["loss_weights"] = torch.zeros((len(rows), longest))
        for index, row in enumerate(rows):
            batch["loss_weights"][index, : len(row["input_ids"])] = torch.as_tensor(_loss_weights(row))
    return batch


def collate_packed(rows: Sequence[dict[str, Any]], is_filler: bool = False) -> dict[str, Any]:
    """Rows -> one flat row of (1, T) tensors, whole examples end to end.

        input_ids         a0 a1 a2 b0 b1 c0 c1 c2
        position_ids       0  1  2  0  1  0  1  2
        segment_lengths   (3, 2, 3)

    The first token of an example is never a loss token: what comes before it belongs to another example.
    """
    import torch

    lengths = tuple(len(row["input_ids"]) for row in rows)
    input_ids = torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    loss_mask = torch.cat([torch.as_tensor(row["loss_mask"], dtype=torch.bool) for row in rows])
    loss_mask[np.cumsum((0, *lengths[:-1]))] = False
    if is_filler:
        loss_mask[:] = False
    batch: dict[str, Any] = {
        "input_ids": input_ids[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "loss_mask": loss_mask[None],
        "segment_lengths": lengths,
    }
    if any(len(row.get("loss_weights", ())) for row in rows):
        batch["loss_weights"] = torch.cat([torch.as_tensor(_loss_weights(row)) for row in rows])[None]
    return batch


def _loss_weights(row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """(T,) of a row; 1 for all tokens where it has none of its own."""
    weights = row.get("loss_weights", ())
    return np.asarray(weights if len(weights) else np.ones(len(row["input_ids"])), dtype=np.float32)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a micro-batch on a device; segment lengths stay ints."""
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
