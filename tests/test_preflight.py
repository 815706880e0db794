"""Every check: something that trips it, and a healthy run that trips none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_core.config import load_config
from lora_core.data import load_data
from lora_core.errors import ConfigError, PreflightError
from lora_core.preflight import ERROR_IDS, Facts, Finding, apply_fixes, plan_for, refuse_errors, run_checks

from .conftest import ROOT, chat

TRAIN = [chat(f"question {i}", f"answer {i}") for i in range(78)]
HELD_OUT = [chat(f"another {i}", f"answer {i}") for i in range(10)]

# id -> (severity, overrides that trip it on 78 short rows, the fix)
TRIPS = {
    "warmup_past_end": ("error", ["train.warmup_steps=50"], "train.warmup_steps=5"),
    "warmup_long": ("warning", ["train.warmup_steps=16"], "train.warmup_steps=5"),
    "few_steps": ("warning", ["train.num_train_epochs=1"], "train.num_train_epochs=3"),
    "batch_larger_than_data": (
        "warning",
        ["train.gradient_accumulation_steps=40", "train.num_train_epochs=30"],
        "train.gradient_accumulation_steps=9",
    ),
    "small_last_step": ("note", ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=11"], None),
    "logging_steps_past_end": ("warning", ["train.logging_steps=51"], "train.logging_steps=5"),
    "eval_steps_past_end": ("warning", ["train.eval_steps=51"], "train.eval_steps=5"),
    "save_steps_past_end": ("warning", ["train.save_steps=51"], "train.save_steps=5"),
    "targets_q_v_only": (
        "warning",
        ["lora.target_modules=[q_proj,v_proj]"],
        "lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    ),
    "alpha_unusual": ("warning", ["lora.alpha=200"], "lora.alpha=32"),
    "learning_rate_unusual": ("warning", ["train.learning_rate=5e-3"], "train.learning_rate=1e-4"),
    "rows_truncated": ("warning", ["data.max_seq_length=24"], None),
    "no_held_out_rows": ("note", ["data.eval_file=null"], "data.eval_fraction=0.1"),
}


@pytest.fixture
def base(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    return [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={write_rows(TRAIN)}",
        f"data.eval_file={write_rows(HELD_OUT, 'heldout.jsonl')}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]


@pytest.fixture
def find(base: list[str], tokenizer: PreTrainedTokenizerFast) -> Any:
    def run(*overrides: str, cfg: str = "qwen0.5b", num_processes: int = 1) -> dict[str, Finding]:
        config = load_config(cfg, [*base, *overrides])
        train_data, eval_data = load_data(config, tokenizer)
        plan = plan_for(config, len(train_data.lengths), num_processes)
        return {finding.id: finding for finding in run_checks(Facts(config, plan, train_data, eval_data))}

    return run


@pytest.mark.parametrize("cfg", ["qwen0.5b", "qwen1.5b", "qwen7b"])
def test_the_shipped_configs_find_nothing_on_78_rows(find: Any, cfg: str) -> None:
    assert find(cfg=cfg) == {}


@pytest.mark.parametrize("name", TRIPS)
def test_each_check_trips_alone_and_its_fix_mends_it(find: Any, name: str) -> None:
    severity, overrides, fix = TRIPS[name]
    findings = find(*overrides)
    assert list(findings) == [name]
    found = findings[name]
    assert found.severity == severity
    assert (severity == "error") == (name in ERROR_IDS)
    if name != "rows_truncated":
        assert found.fix == fix
    if found.fix:
        assert find(*overrides, found.fix) == {}


def test_rows_that_stand_on_both_sides_are_named_by_line(find: Any, write_rows: Any) -> None:
    held_out = write_rows([TRAIN[3], HELD_OUT[0], TRAIN[70]], "both.jsonl")
    finding = find(f"data.eval_file={held_out}")["eval_overlap"]
    assert "2 training rows also stand among the held-out rows (lines 4, 71)" in finding.message


def test_rows_that_are_not_trained_on_are_counted(find: Any, write_rows: Any) -> None:
    rows = write_rows([*TRAIN, {"text": "no chat"}], "bad.jsonl")
    finding = find(f"data.train_file={rows}", "data.on_bad_row=skip")["rows_dropped"]
    assert "1 of 79 rows are not trained on: 1 unreadable, 0 with nothing supervised" in finding.message


def test_a_default_warmup_of_a_single_step_run_is_an_error_too(find: Any) -> None:
    # 10% of one step, rounded up, is that step: its learning rate would be 0.
    assert find("train.max_steps=1")["warmup_past_end"].fix == "train.warmup_steps=0"


def test_the_same_settings_on_eight_processes_are_few_steps(find: Any) -> None:
    assert find(num_processes=8)["few_steps"].value == 10


def test_errors_are_refused_together_unless_allowed_by_id(find: Any) -> None:
    findings = list(find("train.warmup_steps=100").values())
    with pytest.raises(PreflightError, match=r"preflight\.allow=\[warmup_past_end\]"):
        refuse_errors(findings, [])
    refuse_errors(findings, ["warmup_past_end"])
    with pytest.raises(ConfigError, match=r"no such error; known: warmup_past_end"):
        refuse_errors(findings, ["warmup"])


def test_the_old_settings_mended_find_nothing(base: list[str], find: Any) -> None:
    old = [
        "train.num_train_epochs=1",
        "train.warmup_steps=100",
        "train.per_device_train_batch_size=8",
        "train.gradient_accumulation_steps=1",
        "train.logging_steps=20",
        "lora.target_modules=[q_proj,v_proj]",
    ]
    assert set(find(*old)) == {"warmup_past_end", "few_steps", "logging_steps_past_end", "targets_q_v_only"}
    mended = apply_fixes("qwen0.5b", [*base, *old], None, 1)
    assert mended.train.num_train_epochs == 3
    assert apply_fixes("qwen0.5b", [*base, *old], None, 1) == mended


def test_the_command_prints_json_alone_and_exits_with_2_on_an_error(base: list[str], tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.yaml"
    command = [sys.executable, "launch/preflight.py", "--cfg", "qwen0.5b", "--json", *base]
    done = subprocess.run(
        [*command, "train.warmup_steps=100", "--write", str(fixed)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    printed = json.loads(done.stdout)
    assert [finding["id"] for finding in printed["findings"]] == ["warmup_past_end"]
    assert printed["plan"]["total_optimizer_steps"] == 50
    assert printed["data"]["train"]["read"] == 78
    assert "this run is not started" in done.stderr
    again = [sys.executable, "launch/preflight.py", "--cfg", str(fixed), "--num-processes", "1"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing found" in done.stdout
