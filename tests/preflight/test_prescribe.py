"""What is prescribed: by table for known cases, and never a plan that the checks of the plan warn of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_core.commands.main import main
from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, DataError
from lora_core.preflight.adapter import check_alpha, check_learning_rate, check_targets
from lora_core.preflight.findings import Facts
from lora_core.preflight.plan import plan_for
from lora_core.preflight.prescribe import PrescribeFacts, choose, fit, memory_changes
from lora_core.preflight.schedule import (
    check_batch_large_for_rows,
    check_batch_larger_than_data,
    check_few_steps,
    check_intervals_past_end,
    check_single_pass,
    check_warmup_long,
    check_warmup_past_end,
)
from tests.conftest import chat

SEED = PrescribeFacts(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    train_file="rows.jsonl",
    num_rows=78,
    loss_tokens=2306,
    longest=99,
    length_99=99,
    num_processes=1,
    device="cuda",
    model_type="qwen2",
    hidden_size=896,
    max_positions=32768,
    linear_names=tuple(ALL_SEVEN_PROJECTIONS),
    parameters_per_rank=549_888,
)
CHECKS = (
    check_warmup_past_end,
    check_warmup_long,
    check_single_pass,
    check_few_steps,
    check_batch_larger_than_data,
    check_batch_large_for_rows,
    check_intervals_past_end,
    check_targets,
    check_alpha,
    check_learning_rate,
)


def values(facts: PrescribeFacts) -> dict[str, Any]:
    return {choice.key: choice.value for choice in choose(facts).choices}


def test_the_first_case_of_this_project_gets_its_remedy() -> None:
    config = load_config("base", choose(SEED).overrides)
    shipped = load_config("qwen0.5b")
    assert config.lora == shipped.lora
    for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_ratio"):
        assert getattr(config.train, name) == getattr(shipped.train, name)
    assert config.data.max_seq_length == shipped.data.max_seq_length
    assert (config.train.learning_rate, config.data.eval_fraction) == (7.5e-4, 0.1)  # where it differs


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"num_rows": 4}, {"train.num_train_epochs": 10, "train.per_device_train_batch_size": 1}),
        ({"num_rows": 20_000}, {"train.num_train_epochs": 2, "train.gradient_accumulation_steps": 8}),
        ({"num_rows": 1_000_000}, {"train.num_train_epochs": 1, "train.gradient_accumulation_steps": 64}),
        ({"num_rows": 1_000_000}, {"data.eval_fraction": 0.0005, "train.warmup_steps": 100}),
        ({"num_processes": 8}, {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1}),
        ({"longest": 3000}, {"data.max_seq_length": 3072}),
        ({"longest": 3000, "max_positions": 2048}, {"data.max_seq_length": 2048, "data.truncation": "drop"}),
        ({"loss_tokens": 30_000_000}, {"lora.rank": 32, "lora.alpha": 64, "train.learning_rate": 3.7e-4}),
        ({"linear_names": ("Wqkv", "fc1")}, {"lora.target_modules": "all-linear"}),
        ({"device": "cpu"}, {"train.optim": "adamw_torch"}),
        ({"eval_file": "e.jsonl"}, {"data.eval_file": "e.jsonl", "train.keep_adapter": "best"}),
    ],
)
def test_choices(changed: dict[str, Any], expected: dict[str, Any]) -> None:
    chosen = values(replace(SEED, **changed))
    assert {key: chosen[key] for key in expected} == expected


def test_fewer_rows_than_processes_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(DataError, match=r"3 rows for 8 processes.*fix: --num-processes 3"):
        choose(replace(SEED, num_rows=3, num_processes=8))


def test_the_cheapest_change_that_fits_is_taken_with_those_before_it() -> None:
    def fits(candidate: Any) -> bool:
        return any(choice.key == "model.quantization" for choice in candidate.choices)

    chosen = {choice.key: choice.value for choice in fit(choose(SEED), memory_changes(SEED), fits).choices}
    assert chosen["model.quantization"] == "nf4"
    assert chosen["train.gradient_checkpointing"] is True
    assert "data.truncation" not in chosen  # it would have come after
    with pytest.raises(ConfigError, match="fix: a smaller model"):
        fit(choose(SEED), memory_changes(SEED), lambda candidate: False)


@given(
    st.integers(1, 3_000_000),
    st.integers(1, 64),
    st.integers(1, 200_000),
    st.integers(1, 10**10),
    st.sampled_from([("qwen3", 1024), ("llama", 8192), ("gemma3_text", 2560)]),
    st.booleans(),
)
def test_no_plan_is_prescribed_that_preflight_refuses_or_warns_of(
    num_rows: int, num_processes: int, longest: int, loss_tokens: int, model: tuple[str, int], has_eval_file: bool
) -> None:
    facts = replace(
        SEED,
        num_rows=num_rows,
        num_processes=min(num_processes, num_rows),
        longest=longest,
        loss_tokens=loss_tokens,
        model_type=model[0],
        hidden_size=model[1],
        eval_file="e.jsonl" if has_eval_file else None,
    )
    prescription = choose(facts)
    config = load_config("base", prescription.overrides)
    rows = num_rows - round(num_rows * config.data.eval_fraction)
    plan = plan_for(config, rows, facts.num_processes)
    assert plan == prescription.plan
    assert config.data.max_seq_length <= SEED.max_positions or 0
    # What the checks of plan and adapter look at, and nothing else.
    targeted = tuple(f"layers.0.{name}" for name in ALL_SEVEN_PROJECTIONS)
    facts_of_model = SimpleNamespace(model_type=model[0], hidden_size=model[1], targeted=targeted)
    seen = SimpleNamespace(config=config, plan=plan, model=facts_of_model)
    found = [finding for check in CHECKS for finding in check(cast(Facts, seen))]
    assert found == []


def test_the_command_writes_a_file_that_loads_and_says_each_reason(
    tmp_path: Path, tiny_model_dir: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows([chat(f"question {i}", f"answer {i}") for i in range(60)])
    target = tmp_path / "mine.yaml"
    command = ["prescribe", "--model", str(tiny_model_dir), "--data", str(rows), "--write", str(target)]
    assert main([*command, f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    said = capsys.readouterr().out
    assert "train.num_train_epochs=5\n    usual for 54 training rows" in said
    assert "prescribed " in said
    assert "warning" not in said
    config = load_config(target)
    assert (config.model.name_or_path, config.data.train_file) == (str(tiny_model_dir), str(rows))
    assert config.data.cache_dir == str(tmp_path / "cache")
    text = target.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) < 200
    assert yaml.safe_load(text)["train"]["num_train_epochs"] == 5
    assert main(command) == 2  # the file exists
    assert "exists, and would be lost" in capsys.readouterr().err
    assert main(["prescribe", "--model", "x", "--data", "y", "lora.rank=4"]) == 2
    assert "is what prescribe chooses" in capsys.readouterr().err
