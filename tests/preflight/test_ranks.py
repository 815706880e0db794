"""A run on a thousand devices, worked out without them: who takes what, and where more devices are of no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.commands.main import main
from lora_core.config.schema import TrainConfig
from lora_core.configuration import load_config
from lora_core.data.packing import Batching, step_rows
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.preflight.ranks import balance, most_processes
from lora_core.preflight.schedule import ENOUGH_STEPS
from lora_core.runtime.devices import DeviceMemory
from lora_core.schedule import SchedulePlan, plan_schedule
from tests.conftest import chat
from tests.tiny import run_settings

RANKS = 1024
PADDED = Batching(per_device_batch_size=2, pad_token_id=0)
PACKED = Batching(per_device_batch_size=2, pad_token_id=0, max_tokens=2048)


def plan_of(num_rows: int, batch: int, accumulation: int, processes: int, **lengths: Any) -> SchedulePlan:
    return plan_schedule(
        num_rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_processes=processes,
        **lengths,
    )


@pytest.mark.parametrize("batching", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("num_rows", [4 * 8 * RANKS, 2 * 8 * RANKS + 500], ids=["even", "uneven"])
def test_a_thousand_ranks_take_every_example_once_an_epoch(batching: Batching, num_rows: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.6, num_rows).astype(np.int64).clip(8, 1024)
    plan = plan_of(num_rows, 2, 4, RANKS)
    taken = []
    for step in range(plan.optimizer_steps_per_epoch):
        rows = step_rows(num_rows, plan.rows_per_optimizer_step, 0, step)
        shares = batching.shares(rows, lengths, RANKS)
        assert len(shares) % RANKS == 0, "ranks that synchronise must run in step"
        taken += [row for share in shares for row in share.tolist()]
        for rank in (0, 1, 513, RANKS - 1):  # what a rank itself works out when it trains
            cuts = batching.cut(rows, lengths, RANKS, rank)
            assert [cut.is_filler for cut in cuts] == [len(share) == 0 for share in shares[rank::RANKS]]
            mine = [cut.rows.tolist() for cut in cuts if not cut.is_filler]
            assert mine == [share.tolist() for share in shares[rank::RANKS] if len(share)]
    assert sorted(taken) == list(range(num_rows))
    found = balance(batching, lengths, plan, seed=0)
    assert found.mean_tokens == pytest.approx(lengths.sum() / RANKS)
    assert (found.fillers == 0) == (num_rows % (8 * RANKS) == 0)
    if (
        batching is PACKED and found.fillers == 0
    ):  # each row goes to the rank that has least; padded rows are dealt out, the longest first
        assert found.most_tokens / found.mean_tokens - 1 < 0.03


def test_the_balance_of_a_few_rows_can_be_counted_by_hand() -> None:
    lengths = np.array([40, 30, 20, 10])
    found = balance(Batching(1, 0), lengths, plan_of(4, 1, 2, 3), seed=0)  # one step: 40 and 10, 30, 20
    assert (found.least_tokens, found.most_tokens, found.fillers, found.micro_batches) == (20, 50, 2, 6)
    assert found.mean_tokens == pytest.approx(100 / 3)
    assert found.waiting == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("num_rows", "on_each", "overrides", "expected"),
    [
        (78, 8, {"num_train_epochs": 5}, 1),  # 16 of 78 rows in a step are 5 steps an epoch, 25 in all
        (78, 1, {"num_train_epochs": 5}, 15),
        (78, 1, {"num_train_epochs": 1}, 2),
        (50_000, 8, {"num_train_epochs": 1}, 215),
        (50_000, 1, {"num_train_epochs": 1}, 1724),
        (50_000, 8, {"max_steps": 100}, 1562),  # a quarter of the rows
        (50_000, 8, {"max_steps": 10}, 0),
        (3, 1, {"num_train_epochs": 50}, 0),
        (10, 4, {"num_train_epochs": 30}, 0),
    ],
)
def test_the_largest_useful_number(num_rows: int, on_each: int, overrides: dict[str, int], expected: int) -> None:
    assert most_processes(num_rows, on_each, TrainConfig(**overrides)) == expected


@given(st.integers(1, 400), st.integers(1, 6), st.integers(1, 40))
def test_it_is_where_the_plan_still_has_enough_steps(num_rows: int, on_each: int, epochs: int) -> None:
    def is_useful(processes: int) -> bool:
        plan = plan_of(num_rows, on_each, 1, processes, num_train_epochs=epochs)
        return plan.total_optimizer_steps >= ENOUGH_STEPS and 4 * plan.rows_per_optimizer_step <= num_rows

    useful = [processes for processes in range(1, num_rows + 2) if is_useful(processes)]
    assert most_processes(num_rows, on_each, TrainConfig(num_train_epochs=epochs)) == max(useful, default=0)


def test_a_checkpoint_is_as_large_as_predicted(finished_run: Path) -> None:
    config = load_config(finished_run / "config.yaml")
    predicted = predict_memory(config, MicroBatch((32,), 16, packed=True), DeviceMemory("cpu", 2**33))
    files = (finished_run / "checkpoints/step-000030").glob("*.safetensors")
    written = sum(file.stat().st_size for file in files)
    assert predicted.checkpoint_bytes == pytest.approx(written, rel=0.1)
    shared = predict_memory(config, MicroBatch((32,), 16, packed=True), DeviceMemory("cpu", 2**33), 4, "fsdp")
    assert shared.checkpoint_bytes == pytest.approx(predicted.checkpoint_bytes, rel=0.2)  # whole, whoever holds it


def test_preflight_plans_for_a_thousand_devices(
    tmp_path: Path, tiny_model_dir: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows([chat(f"question {i}", f"answer {i}") for i in range(78)])
    command = ["preflight", "--cfg", "demo", *run_settings(tmp_path, tiny_model_dir, rows), "train.num_train_epochs=40"]
    many = ["--num-processes", "1024", "--num-machines", "128", "--gpu-memory-gib", "80"]
    assert main([*command, *many]) == 0
    said = capsys.readouterr().out
    for line in (
        "1024           8192            1     40",
        "ranks: 1,024 on 128 machines, 8 on each",
        "946 of 1,024 micro-batches have no row",
        "0.1 MiB of gradients a step, for which each sends 0.2 MiB in a ring",
        "a checkpoint: 5.",
        "useful: up to 2 as configured, 19 with one example each in a step",
        "(400 steps of 8 examples) can be shared out evenly by 1, 2, 4, 8, and not by 1,024",
    ):
        assert line in said
    assert main([*command, *many, "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert (ranks["num_processes"], ranks["num_machines"], ranks["most_processes"]) == (1024, 128, 2)
    assert (ranks["same_steps"], ranks["steps_of_one"]) == (None, 400)
    assert ranks["launch"]["config_file"] == "multinode_ddp.yaml"
    assert f"start: {ranks['launch']['command']}" in said
    assert main([*command, "--num-processes", "8", "--num-machines", "3"]) == 2
    assert "fix: --num-processes 9 (of all machines together), or --num-machines 1" in capsys.readouterr().err
