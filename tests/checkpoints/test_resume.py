"""Which runs may resume, and how their optimizer steps stay the same on another number of processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.checkpoints.checkpoint import Checkpoint
from lora_core.checkpoints.resume import check_same_run, keep_rows_per_step, rows_per_step
from lora_core.configuration import load_config
from lora_core.errors import ConfigError


def checkpoint_of(batch: int, steps: int, num_processes: int, rows: int | None = None) -> Checkpoint:
    config = load_config("demo", cut(batch, steps)).to_dict()
    state = {"config": config, "world_size": num_processes, "data": "same", "step": 4}
    return Checkpoint(Path("step-000004"), state if rows is None else {**state, "rows_per_optimizer_step": rows}, {})


def cut(batch: int, steps: int) -> list[str]:
    return [f"train.per_device_train_batch_size={batch}", f"train.gradient_accumulation_steps={steps}"]


small = st.integers(1, 12)


@settings(max_examples=50)
@given(small, small, small, small)
def test_a_step_keeps_its_examples_or_the_fix_makes_it_keep_them(batch: int, steps: int, then: int, now: int) -> None:
    checkpoint, config = checkpoint_of(batch, steps, then), load_config("demo", cut(batch, steps))
    rows = batch * steps * then
    try:
        config, said = keep_rows_per_step(checkpoint, config, now)
    except ConfigError as refused:
        assert rows % (batch * now) != 0
        fix = str(refused).split("fix: ")[1]
        if fix.startswith("train."):
            config, said = keep_rows_per_step(checkpoint, load_config("demo", fix.split()), now)
            assert said is None
        else:
            assert rows % now != 0
            now = int(re.findall(r"\d+", fix)[-1])
            config, said = keep_rows_per_step(checkpoint, config, now)
    assert rows_per_step(config, now) == rows
    check_same_run(checkpoint, config, "same", now)  # refuses nothing


def test_the_first_command_serves_again_after_the_number_of_processes_has_changed() -> None:
    config, said = keep_rows_per_step(checkpoint_of(2, 2, 1, rows=8), load_config("demo", cut(2, 2)), 1)
    assert config.train.gradient_accumulation_steps == 4
    assert said is not None


def test_a_setting_that_the_user_changed_is_named_and_not_replaced() -> None:
    checkpoint, config = checkpoint_of(2, 2, 2), load_config("demo", cut(2, 3))
    assert keep_rows_per_step(checkpoint, config, 2) == (config, None)
    with pytest.raises(ConfigError, match=r"train\.gradient_accumulation_steps: 2 before, 3 now"):
        check_same_run(checkpoint, config, "same", 2)


def test_a_step_that_no_share_fits_says_which_numbers_of_processes_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"an optimizer step of this run has 8 examples, and 3 processes with 2 per device cannot share them "
        r"evenly; fix: a number of processes out of 1, 2, 4",
    ):
        keep_rows_per_step(checkpoint_of(2, 2, 2), load_config("demo", cut(2, 2)), 3)


def test_a_share_is_cut_into_the_largest_micro_batches_up_to_those_of_the_settings() -> None:
    with pytest.raises(
        ConfigError, match=r"fix: train\.per_device_train_batch_size=2 train\.gradient_accumulation_steps=2$"
    ):
        keep_rows_per_step(checkpoint_of(3, 1, 4), load_config("demo", cut(3, 1)), 3)
