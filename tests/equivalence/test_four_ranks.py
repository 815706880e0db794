"""Fifty steps of the same run on one, two and four ranks, with DDP and FSDP2: the same losses, the same adapter, each
example once an epoch, and one exchange of gradients a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_core.data.packing import Batching, step_rows
from tests.conftest import chat
from tests.equivalence.forked_ranks import MEMORY
from tests.equivalence.test_ranks import assert_same_run, events
from tests.forked import python

NUM_ROWS, STEPS, EPOCHS, LAYERS = 38, 50, 10, 2
STEPS_A_EPOCH = STEPS // EPOCHS  # of 8 rows, the last one of 6
STOPPED = ["SIGTERM-2", "SIGUSR1-2"]
SHARED_OUT = ["ddp-2", "fsdp2-2", "ddp-4", "fsdp2-4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder of the runs in `SHARED_OUT` and `ddp-1`, which is one rank alone: all at the same time."""
    folder = tmp_path_factory.mktemp("four-ranks")
    rows = [chat(f"question {i} " + "word " * (i % 5), f"answer {i} " + "reply " * (i % 7)) for i in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::6]), encoding="utf-8")

    def of(sharding: str, ranks: int, resumed: bool = False) -> dict[str, Any]:
        name = f"{'resumed-' * resumed}{sharding}-{ranks}"
        settings = {
            "model.name_or_path": tiny_model_dir,
            "data.train_file": folder / "rows.jsonl",
            "data.eval_file": folder / "eval.jsonl",
            "data.cache_dir": folder / f"cache-{ranks}",
            "output_dir": folder / name,
            "train.bf16": "false",
            "model.dtype": "float32",
            "lora.dropout": 0,
            "train.optim": "adamw_torch",
            "train.learning_rate": 1e-3,
            "train.num_train_epochs": EPOCHS,
            "train.max_tokens_per_device_batch": 80,  # several micro-batches
            "train.num_sample_replies": 0,
            "train.eval_steps": STEPS,
            "train.save_steps": STEPS // 2,
            "train.per_device_train_batch_size": 4 // ranks,
            "train.gradient_accumulation_steps": 2,
        }
        run = {"name": name, "sharding": sharding, "settings": [f"{key}={value}" for key, value in settings.items()]}
        return {**run, "copy": str(folder / f"{sharding}-{ranks}"), "resume": STEPS // 2} if resumed else run

    def other(name: str, *settings: str) -> dict[str, Any]:
        run = of("ddp", 2)
        return {**run, "name": name, "settings": [*run["settings"], f"output_dir={folder / name}", *settings]}

    def ended(name: str) -> dict[str, Any]:
        return {**other(name), "signal_to_rank_1": name.removesuffix("-2")}

    gets_worse = ("train.learning_rate=1", "train.on_alarm=warn", "train.eval_steps=2")
    early = other("early-2", *gets_worse, "train.early_stopping_patience=2", "train.keep_adapter=best")
    asked = {
        1: [of("ddp", 1)],
        2: [of("ddp", 2), of("fsdp2", 2), early, *(ended(name) for name in STOPPED)],
        4: [of("ddp", 4), of("fsdp2", 4), of("ddp", 4, True)],
    }
    (folder / "runs.json").write_text(json.dumps(asked), encoding="utf-8")
    done = python("-m", "tests.equivalence.forked_ranks", str(folder))
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


def seen(runs: Path, name: str) -> list[dict[str, Any]]:
    """What each rank of a run took and sent."""
    return [json.loads((runs / f"{name}-seen-{rank}.json").read_text()) for rank in range(int(name[-1]))]


@pytest.mark.parametrize("name", SHARED_OUT)
def test_all_have_the_losses_and_the_adapter_of_one_rank(runs: Path, name: str) -> None:
    assert len(events(runs / "ddp-1", "train")) == STEPS
    assert_same_run(runs / name, runs / "ddp-1")


def test_four_ranks_resume_to_the_same_bits(runs: Path) -> None:
    ours, theirs = (runs / f"{name}ddp-4/adapter/adapter_model.safetensors" for name in ("resumed-", ""))
    assert ours.read_bytes() == theirs.read_bytes()


def test_two_ranks_stop_early_at_the_same_step_and_keep_the_best_adapter(runs: Path) -> None:
    measured = {event["step"]: event["loss"] for event in events(runs / "early-2", "eval")}
    best = min(measured, key=measured.__getitem__)
    assert max(measured) == best + 4 < STEPS
    assert [max(event["step"] for event in events(runs / "early-2", "train"))] == [best + 4]
    summary = json.loads((runs / "early-2/summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss_after"] == pytest.approx(measured[best], abs=1e-5)
    ours, kept = (
        load_file(runs / "early-2" / name)
        for name in ("adapter/adapter_model.safetensors", f"checkpoints/step-{best:06d}/adapter.safetensors")
    )
    assert sorted(map(float, map(torch.sum, ours.values()))) == sorted(map(float, map(torch.sum, kept.values())))
    assert [len(rank["rows"]) > 0 and rank["exit_code"] for rank in seen(runs, "early-2")] == [0, 0]


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(runs: Path, name: str) -> None:
    checkpoints = runs / name / "checkpoints"
    (saved,) = checkpoints.glob("*")
    assert (saved / "manifest.json").is_file()
    for rank in seen(runs, name):
        assert rank["exit_code"] == 75
        assert rank["stopped"].startswith(f"stopped by {name[:-2]} after step {int(saved.name[-6:])} of {STEPS}; ")


@pytest.mark.parametrize("name", ["ddp-1", *SHARED_OUT])
def test_each_example_is_taken_once_an_epoch(runs: Path, name: str) -> None:
    ranks = seen(runs, name)
    taken = sorted(row for rank in ranks for row in rank["rows"])
    assert taken == sorted([*range(NUM_ROWS)] * EPOCHS)
    tokens = [event["num_supervised_tokens"] for event in events(runs / name, "train")]
    an_epoch = {sum(tokens[start : start + STEPS_A_EPOCH]) for start in range(0, STEPS, STEPS_A_EPOCH)}
    assert len(an_epoch) == 1


@pytest.mark.parametrize("name", SHARED_OUT)
def test_gradients_are_exchanged_once_a_step(runs: Path, name: str) -> None:
    # FSDP2 exchanges a layer at a time; DDP once more, to settle its order.
    once = STEPS * LAYERS if name.startswith("fsdp2") else STEPS + 1
    for rank in seen(runs, name):
        assert rank["exchanges"] == once
        assert rank["most_micro_batches"] > 1


@pytest.mark.parametrize("name", ["fsdp2-2", "fsdp2-4"])
def test_between_micro_batches_fsdp2_holds_the_whole_gradients_that_are_predicted(runs: Path, name: str) -> None:
    facts = json.loads((runs / name / "preflight.json").read_text(encoding="utf-8"))
    assert facts["memory"]["sharding"] == "fsdp"
    predicted = facts["memory"]["components"]["gradients"]
    assert [rank["gradient_bytes"] for rank in seen(runs, name)] == [predicted] * int(name[-1])


@pytest.mark.parametrize("name", SHARED_OUT)
def test_evaluation_is_equal_to_the_token(runs: Path, name: str) -> None:
    ours, theirs = (events(runs / each, "eval") for each in (name, "ddp-1"))
    assert len(ours) == 2
    for counted in ("num_tokens", "num_conversations", "token_accuracy"):
        assert [event[counted] for event in ours] == [event[counted] for event in theirs]


@pytest.mark.parametrize("name", SHARED_OUT)
def test_memory_is_that_of_the_fullest_rank(runs: Path, name: str) -> None:
    fullest = max(MEMORY[: int(name[-1])])
    summary = json.loads((runs / name / "summary.json").read_text(encoding="utf-8"))
    logged = [event["peak_memory_bytes"] for event in events(runs / name, "train")]
    assert {summary["peak_memory_bytes"], *logged} == {fullest}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_equally_many_tokens(ranks: int) -> None:
    """With lengths as chats have them, eight rows a rank and step; loss tokens are left to chance within them."""
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(150), 0.6, 16_000).clip(8, 1024).astype(np.int64)
    loss_tokens = (lengths * draw.beta(4, 4, len(lengths))).astype(np.int64)
    batching, rows_a_step = Batching(2, pad_token_id=0, max_tokens=2048), 8 * ranks
    totals = np.zeros((2, ranks))
    for step in range(len(lengths) // rows_a_step):
        rows = step_rows(len(lengths), rows_a_step, 42, step)
        for rank in range(ranks):
            mine = np.concatenate([cut.rows for cut in batching.cut(rows, lengths, ranks, rank)])
            totals[:, rank] += lengths[mine].sum(), loss_tokens[mine].sum()
    spread = (totals.max(axis=1) - totals.min(axis=1)) / totals.mean(axis=1)
    assert spread[0] < 0.01
    assert spread[1] < 0.03
