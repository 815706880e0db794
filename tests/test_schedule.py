"""Contract 2: the plan is the run."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_linear_schedule_with_warmup

from lora_core import schedule
from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.model.optimizer import build_scheduler
from lora_core.schedule import SchedulePlan, plan_schedule


def planned(config_name: str, num_processes: int = 1) -> SchedulePlan:
    train = load_config(config_name).train
    return plan_schedule(
        78,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        num_train_epochs=train.num_train_epochs,
        num_processes=num_processes,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        warmup_ratio=train.warmup_ratio,
    )


def test_the_failure_this_project_was_born_from() -> None:
    plan = plan_schedule(78, per_device_train_batch_size=8, gradient_accumulation_steps=1, warmup_steps=100)
    assert plan.total_optimizer_steps == 10
    # The ten updates use 0/100 to 9/100 of the learning rate. The scheduler would show 10/100 after the last one.
    assert plan.learning_rates() == pytest.approx([5e-5 * step / 100 for step in range(10)])
    assert plan.peak_fraction == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("config_name", "steps"),
    [
        ("qwen0.5b", {1: 50, 2: 25, 4: 15, 8: 10}),
        ("qwen1.5b", {1: 80, 2: 40, 4: 20, 8: 12}),
        ("qwen7b", {1: 60, 2: 30, 4: 15, 8: 9}),
    ],
)
def test_the_shipped_remedies(config_name: str, steps: dict[int, int]) -> None:
    assert {n: planned(config_name, n).total_optimizer_steps for n in steps} == steps
    assert planned(config_name).peak_fraction == 1.0
    assert planned(config_name).warmup_steps == steps[1] // 10


counts = st.integers(1, 40)


@given(
    rows=st.integers(1, 300), batch=counts, accumulation=counts, processes=st.integers(1, 9), epochs=st.integers(1, 5)
)
def test_equals_a_brute_force_loop(rows: int, batch: int, accumulation: int, processes: int, epochs: int) -> None:
    micro_batches = steps = 0
    for _ in range(epochs):
        left, in_window = rows, 0
        while left > 0:
            for _ in range(processes):
                last_taken = min(batch, left)
                left -= last_taken
            micro_batches += 1
            in_window += 1
            if in_window == accumulation or left == 0:
                steps, in_window = steps + 1, 0
    plan = plan_schedule(
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_processes=processes,
        num_train_epochs=epochs,
    )
    assert (plan.micro_batches_per_epoch * epochs, plan.total_optimizer_steps) == (micro_batches, steps)
    assert plan.optimizer_steps_per_epoch * epochs == steps
    assert 1 <= plan.last_step_rows <= plan.rows_per_optimizer_step
    assert (plan.optimizer_steps_per_epoch - 1) * plan.rows_per_optimizer_step + plan.last_step_rows == rows


@settings(max_examples=50)
@given(
    total=st.integers(1, 60),
    warmup=st.one_of(st.integers(0, 120), st.floats(0, 0.99)),
    learning_rate=st.sampled_from([5e-5, 1e-4, 3e-3]),
)
def test_learning_rates_are_the_real_schedulers(total: int, warmup: float, learning_rate: float) -> None:
    plan = plan_schedule(
        1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=total,
        learning_rate=learning_rate,
        warmup_steps=warmup if isinstance(warmup, int) else None,
        warmup_ratio=warmup if isinstance(warmup, float) else None,
    )
    if isinstance(warmup, float):
        assert plan.warmup_steps == math.ceil(total * warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, plan.warmup_steps, plan.total_optimizer_steps)
    real = []
    for _ in range(total):
        real.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert plan.learning_rates() == pytest.approx(real, rel=1e-12)
    assert plan.peak_learning_rate == pytest.approx(max(real), rel=1e-12)


SCHEDULES = st.one_of(
    st.tuples(st.sampled_from(["linear", "constant", "constant_with_warmup"]), st.just({})),
    st.tuples(st.just("cosine"), st.fixed_dictionaries({}, optional={"num_cycles": st.floats(0, 3)})),
    st.tuples(
        st.just("cosine_with_min_lr"),
        st.fixed_dictionaries({"min_lr_rate": st.floats(0, 1)}, optional={"num_cycles": st.floats(0, 3)}),
    ),
    st.tuples(
        st.just("warmup_stable_decay"),
        st.fixed_dictionaries(
            {"num_decay_steps": st.integers(1, 70)},
            optional={
                "min_lr_ratio": st.floats(0, 1),
                "warmup_type": st.sampled_from(["linear", "cosine", "1-sqrt"]),
                "decay_type": st.sampled_from(["linear", "cosine", "1-sqrt"]),
                "num_cycles": st.floats(0, 3),
            },
        ),
    ),
)


@settings(max_examples=200)
@given(total=st.integers(1, 60), warmup=st.integers(0, 80), schedule_of=SCHEDULES, ratio=st.sampled_from([1.0, 16.0]))
def test_every_schedule_is_the_one_that_transformers_runs(
    total: int, warmup: int, schedule_of: tuple[str, dict[str, Any]], ratio: float
) -> None:
    name, kwargs = schedule_of
    plan = plan_schedule(
        1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=total,
        learning_rate=2e-4,
        warmup_steps=warmup,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=kwargs,
    )
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": 2e-4 * scale} for scale in (1.0, ratio)]
    optimizer = torch.optim.SGD(groups, lr=2e-4)
    scheduler = build_scheduler(optimizer, plan)
    real: list[list[float]] = []
    for _ in range(total):
        real.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert plan.learning_rates() == pytest.approx([rates[0] for rates in real], rel=1e-12, abs=1e-12 * 2e-4)
    assert [rate * ratio for rate in plan.learning_rates()] == pytest.approx(
        [rates[1] for rates in real], rel=1e-12, abs=1e-12 * 2e-4 * ratio
    )
    assert plan.peak_learning_rate == pytest.approx(max(rates[0] for rates in real), rel=1e-12, abs=1e-16)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.lr_scheduler_type=polynomial"], r"must be one of linear\|cosine\|constant"),
        (
            ["train.lr_scheduler_type=cosine_with_min_lr"],
            r"needs lr_scheduler_kwargs with min_lr_rate; fix: 'train\.lr_scheduler_kwargs=\{min_lr_rate: 0\.1\}'",
        ),
        (["train.lr_scheduler_type=warmup_stable_decay"], r"fix: 'train\.lr_scheduler_kwargs=\{num_decay_steps: 10\}'"),
        (["train.lr_scheduler_kwargs={min_lr_rate: 0.1}"], "min_lr_rate: lr_scheduler_type=linear takes none"),
        (
            ["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_cycles: -1}"],
            r"num_cycles=-1: must be a float in \[0, 100\]",
        ),
        (
            ["train.lr_scheduler_type=constant", "train.warmup_steps=3"],
            r"has no warmup, and warmup_steps=3; fix: train\.lr_scheduler_type=constant_with_warmup",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_what_can(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("demo", overrides)


@pytest.mark.parametrize(
    "fix", ["train.lr_scheduler_kwargs={min_lr_rate: 0.1}", "train.lr_scheduler_kwargs={min_lr_rate: 0}"]
)
def test_the_fix_of_a_schedule_works(fix: str) -> None:
    assert load_config("demo", ["train.lr_scheduler_type=cosine_with_min_lr", fix]).train.lr_scheduler_kwargs


def test_the_first_step_of_a_short_warmup_is_said_to_move_nothing() -> None:
    def lost(total: int, **settings: Any) -> bool:
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": total}
        return plan_schedule(1, **sizes, **settings).first_step_is_lost

    assert lost(50, warmup_steps=5)
    assert not lost(101, warmup_steps=5)
    assert not lost(50, warmup_steps=0)
    assert not lost(50, warmup_steps=5, lr_scheduler_type="constant")


def test_max_steps_replaces_epochs() -> None:
    plan = plan_schedule(
        78, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=5, max_steps=7
    )
    assert (plan.total_optimizer_steps, plan.optimizer_steps_per_epoch) == (7, 10)


def test_refuses_counts_below_one_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_rows=0: must be an int >= 1; gradient_accumulation_steps=-1: "):
        plan_schedule(0, per_device_train_batch_size=1, gradient_accumulation_steps=-1)
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        plan_schedule(1, per_device_train_batch_size=1, gradient_accumulation_steps=1, warmup_steps=-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_rows": 7.5},
        {"num_rows": True},
        {"per_device_train_batch_size": 0.5},
        {"warmup_ratio": 2.0},
        {"warmup_ratio": -0.1},
        {"warmup_ratio": math.nan},
        {"warmup_steps": 2.5},
        {"learning_rate": -1e-4},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
    ],
)
def test_what_no_run_can_have_is_refused_by_name(wrong: dict[str, Any]) -> None:
    settings = {"num_rows": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plan_schedule(**settings)


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(schedule).failed == 0
