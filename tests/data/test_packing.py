"""Which rows a step takes, and how they are cut: nothing lost, nothing twice, the same on any machine."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data.packing import (
    Batching,
    BatchPrefetcher,
    MicroBatchRows,
    StepBatches,
    collate,
    collate_packed,
    epoch_order,
    micro_batches,
    packed_micro_batches,
    step_rows,
)
from lora_core.schedule import plan_schedule


@given(
    rows=st.integers(1, 90),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    processes=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_an_epoch_takes_every_row_once_over_all_ranks(
    rows: int, batch: int, accumulation: int, processes: int, seed: int
) -> None:
    plan = plan_schedule(
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_processes=processes,
        num_train_epochs=2,
    )
    lengths = np.random.default_rng(seed).integers(1, 100, rows)
    taken: list[list[int]] = [[], []]
    micro_steps = 0
    for step in range(plan.total_optimizer_steps):
        chosen = step_rows(rows, plan.rows_per_optimizer_step, seed, step)
        per_rank = [micro_batches(chosen, lengths, batch, processes, rank) for rank in range(processes)]
        assert len({len(cuts) for cuts in per_rank}) == 1, "ranks that synchronise must run in step"
        micro_steps += len(per_rank[0])
        assert len(per_rank[0]) <= accumulation
        for cut in (cut for cuts in per_rank for cut in cuts):
            assert 1 <= len(cut.rows) <= batch
            if not cut.is_filler:
                taken[step // plan.optimizer_steps_per_epoch] += cut.rows.tolist()
    assert micro_steps == 2 * plan.micro_batches_per_epoch
    assert sorted(taken[0]) == sorted(taken[1]) == list(range(rows))


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    max_tokens=st.integers(1, 300),
    processes=st.integers(1, 4),
)
def test_packed_micro_batches_hold_every_row_once_within_the_budget(
    lengths: list[int], max_tokens: int, processes: int
) -> None:
    sizes = np.array(lengths)
    rows = np.random.default_rng(0).permutation(len(sizes))
    per_rank = [packed_micro_batches(rows, sizes, max_tokens, processes, rank) for rank in range(processes)]
    assert len({len(cuts) for cuts in per_rank}) == 1
    cuts = [cut for cuts in per_rank for cut in cuts]
    assert sorted(row for cut in cuts if not cut.is_filler for row in cut.rows.tolist()) == list(range(len(sizes)))
    assert all(len(cut.rows) == 1 or sizes[cut.rows].sum() <= max_tokens for cut in cuts)


def test_packed_micro_batches_are_few_and_even() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 256)
    cuts = packed_micro_batches(np.arange(256), lengths, 2048, 2, 0) + packed_micro_batches(
        np.arange(256), lengths, 2048, 2, 1
    )
    tokens = [int(lengths[cut.rows].sum()) for cut in cuts]
    assert len(cuts) == 2 * -(-int(lengths.sum()) // 4096)
    assert min(tokens) > 0.97 * max(tokens)


def test_collate_packed_restarts_positions_and_supervises_no_first_token() -> None:
    rows = [
        {"input_ids": [1, 2, 9], "loss_mask": [False, True, True]},
        {"input_ids": [3, 4], "loss_mask": [True, True]},
    ]
    batch = collate_packed(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["loss_mask"].tolist() == [[False, True, True, False, True]]
    assert batch["segment_lengths"] == (3, 2)
    assert not collate_packed(rows, is_filler=True)["loss_mask"].any()


def test_order_differs_by_epoch_and_by_seed_and_is_the_same_everywhere() -> None:
    first = epoch_order(8, seed=42, epoch=0).tolist()
    assert first == [3, 4, 2, 7, 6, 1, 5, 0]  # numpy keeps PCG64 streams stable; a change here changes every run
    assert epoch_order(8, 42, 1).tolist() != first
    assert epoch_order(8, 43, 0).tolist() != first


def test_collate_pads_on_the_right_and_a_pad_that_is_eos_hides_no_eos() -> None:
    eos = 9
    rows = [
        {"input_ids": [1, 2, eos], "loss_mask": [False, True, True]},
        {"input_ids": [3], "loss_mask": [True]},
    ]
    batch = collate(rows, pad_token_id=eos)
    assert batch["input_ids"].tolist() == [[1, 2, eos], [3, eos, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # Nothing predicts a row's first token, so it cannot be supervised.
    assert batch["loss_mask"].tolist() == [[False, True, True], [False, False, False]]
    filler = collate(rows, pad_token_id=eos, is_filler=True)
    assert not filler["loss_mask"].any()
    assert torch.equal(filler["input_ids"], batch["input_ids"])


def test_what_was_made_ahead_is_what_would_have_been_made_then() -> None:
    made: list[tuple[int, int, bool]] = []

    def make(step: int, batching: Batching) -> StepBatches:
        made.append((step, batching.limit, threading.current_thread() is threading.main_thread()))
        if step == 4:
            raise OSError("the disk is gone")
        return StepBatches([MicroBatchRows(np.array([step]))], [{"limit": batching.limit}])

    wide = Batching(1, pad_token_id=0, max_tokens=100)
    prefetcher = BatchPrefetcher(make, num_steps=5)
    # A step again with a lower limit, as where memory ran out; one out of turn, as where a run is resumed.
    for step, batching in [(0, wide), (1, wide), (1, wide.limited(50)), (2, wide.limited(50)), (0, wide), (3, wide)]:
        taken = prefetcher.take(step, batching)
        assert taken.cuts[0].rows.tolist() == [step]
        assert taken.batches == [{"limit": batching.limit}]
    in_turn = [(step, limit) for step, limit, is_main in made if is_main]
    assert in_turn == [(0, 100), (1, 50), (0, 100), (3, 100)]  # the others were there already
    with pytest.raises(OSError, match="the disk is gone"):
        prefetcher.take(4, wide)
    assert max(step for step, _, _ in made) == 4
