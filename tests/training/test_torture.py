"""The small end of benchmarks/torture.py: runs killed inside a save and elsewhere, and checkpoints damaged anywhere."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from benchmarks.torture import NUM_STEPS, SETTINGS, Run, damage_cases, kill_cases, make_inputs, undisturbed
from lora_core.checkpoints.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    work = tmp_path_factory.mktemp("torture")
    name = "packed, 4 micro-batches"
    return undisturbed(work, make_inputs(work), name, SETTINGS[name])


def test_killed_at_any_instant_a_run_goes_on_bit_for_bit_and_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    for case in kill_cases([run], 4, random.Random(0), tmp_path):
        assert case.problem is None, case
        assert not case.damaged_taken, case
        assert not case.left_in_the_end, case


def test_no_byte_of_a_checkpoint_can_change_unseen(run: Run, tmp_path: Path) -> None:
    damages = damage_cases(run, 60, random.Random(0), tmp_path)
    assert len(damages) == 60
    assert [damage for damage in damages if damage.problem] == []


def test_a_checkpoint_that_is_damaged_again_is_set_aside_again(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        shutil.copytree(run.folder / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
        (tmp_path / f"checkpoints/step-{NUM_STEPS:06d}/state.json").write_text("{}", encoding="utf-8")
        assert find_checkpoint(tmp_path, None, print, may_rename=True).step == NUM_STEPS - 1
