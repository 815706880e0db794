"""Contract 1: same gradient however the work is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import chat
from tests.equivalence.one_step import one_step
from tests.forked import on_ranks
from tests.tiny import write_jsonl

# Lengths and shares of supervised tokens differ widely, so a mean of means would be far off.
ROWS = [chat("q" * (7 * i % 40 + 1), "answer " * (i % 5 * 3 + 1), "and?", "no" * (i % 3)) for i in range(8)]
ROWS[2]["messages"][1]["weight"] = 0.25
ROWS[5]["messages"][3]["weight"] = 3


def on_two_ranks(*arguments: str) -> None:
    for done in on_ranks(2, *arguments):
        assert done.returncode == 0, done.stdout + done.stderr


def assert_same_step(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["num_tokens"] == wanted["num_tokens"]
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted["gradients"])
    for mine, theirs in zip(got["gradients"], wanted["gradients"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale)


@pytest.fixture
def whole(tiny_model_dir: Path, write_rows: Any) -> tuple[Path, dict[str, Any]]:
    """Batch 8, one micro-batch: what every other cut must equal."""
    rows_file = write_rows(ROWS)
    result = one_step(tiny_model_dir, rows_file, 8, 1)
    assert result["micro_batches"] == 1
    assert any(gradient.abs().max() > 1e-3 for gradient in result["gradients"])
    return rows_file, result


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 3), (5, 2)])
def test_accumulation(tiny_model_dir: Path, whole: Any, batch_size: int, accumulation: int) -> None:
    rows_file, wanted = whole
    assert_same_step(one_step(tiny_model_dir, rows_file, batch_size, accumulation), wanted)


@pytest.mark.parametrize(("max_tokens", "micro_batches"), [(4096, 1), (150, 4), (1, 8)])
def test_packed_rows(tiny_model_dir: Path, whole: Any, max_tokens: int, micro_batches: int) -> None:
    rows_file, wanted = whole
    got = one_step(tiny_model_dir, rows_file, 8, 1, max_tokens)
    assert got["micro_batches"] == micro_batches
    assert_same_step(got, wanted)


# (rows, batch size, accumulation, max_tokens) of each of two ranks.
CUTS = [
    (8, 2, 2, 0),
    (8, 7, 1, 0),  # one rank has a row more than the other
    (8, 4, 1, 150),
    (7, 1, 4, 0),  # an odd number of rows leaves one rank a filler
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with what came of each of `CUTS`: all in one launch, as to start two ranks costs some seconds."""
    folder = tmp_path_factory.mktemp("two-ranks")
    cuts = []
    for number, (num_rows, batch_size, accumulation, max_tokens) in enumerate(CUTS):
        size = {"batch_size": batch_size, "accumulation": accumulation, "max_tokens": max_tokens}
        rows = write_jsonl(folder / f"{number}.jsonl", ROWS[:num_rows])
        cuts.append({"rows": str(rows), **size, "out": str(folder / f"{number}.pt")})
    (folder / "cuts.json").write_text(json.dumps(cuts), encoding="utf-8")
    on_two_ranks("-m", "tests.equivalence.one_step", str(tiny_model_dir), str(folder / "cuts.json"))
    return folder


@pytest.mark.parametrize("number", range(len(CUTS)), ids=map(str, CUTS))
def test_two_ranks(tiny_model_dir: Path, on_two: Path, write_rows: Any, number: int) -> None:
    num_rows = CUTS[number][0]
    wanted = one_step(tiny_model_dir, write_rows(ROWS[:num_rows]), num_rows, 1)
    assert wanted["micro_batches"] == 1
    got = torch.load(on_two / f"{number}.pt", weights_only=True)
    assert got["world_size"] == 2
    assert_same_step(got, wanted)
