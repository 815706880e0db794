"""Training that starts from an adapter that is there, and runs that are extended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_core.configuration import load_config
from lora_core.errors import ConfigError, PreflightError
from lora_core.schedule import SchedulePlan
from lora_core.training.setup import train
from tests.conftest import chat

pytestmark = pytest.mark.usefixtures("without_page")


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"question {i}", f"answer {i % 5}") for i in range(20)])
    return [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={rows}",
        f"data.eval_file={write_rows([chat('question 1', 'answer 1')], 'eval.jsonl')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "train.num_sample_replies=0",
        "train.learning_rate=1e-3",
        "train.num_train_epochs=2",  # of three steps each
        "train.save_total_limit=9",
        "train.bf16=false",
        "model.dtype=float32",
    ]


def run(settings: list[str], folder: Path, *overrides: str, resume: Any = None) -> list[dict[str, Any]]:
    """The events of a run in this folder."""
    train(load_config("demo", [*settings, f"output_dir={folder}", *overrides]), resume)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_at(events: list[dict[str, Any]], step: int) -> float:
    return next(event["loss"] for event in events if event["event"] == "eval" and event["step"] == step)


def rates(events: list[dict[str, Any]]) -> list[float]:
    return [event["learning_rate"] for event in events if event["event"] == "train"]


def plan_of(folder: Path) -> SchedulePlan:
    written = json.loads((folder / "preflight.json").read_text(encoding="utf-8"))["plan"]
    return SchedulePlan.from_dict({name: value for name, value in written.items() if name in vars(NO_PLAN)})


NO_PLAN = SchedulePlan(1, 1, 1, 1, 1, 1, 1, 0, 1.0)


def test_training_starts_from_an_adapter_of_any_kind_of_folder(settings: list[str], tmp_path: Path) -> None:
    first = run(settings, tmp_path / "first")
    for folder in ("first", "first/adapter", "first/checkpoints/step-000006"):
        events = run(settings, tmp_path / "next", f"model.adapter={tmp_path / folder}", "overwrite_output_dir=true")
        assert loss_at(events, 0) == pytest.approx(loss_at(first, 6), abs=1e-6)
        assert loss_at(events, 6) < loss_at(events, 0)
    # As initial weights alone, also in the middle of a run: the optimizer and the schedule begin anew.
    events = run(settings, tmp_path / "third", f"model.adapter={tmp_path / 'first/checkpoints/step-000003'}")
    assert loss_at(events, 0) == pytest.approx(loss_at(first, 3), abs=1e-6)
    assert rates(events) == rates(first)


def test_the_start_of_a_plain_peft_adapter_is_that_adapter(
    settings: list[str], tmp_path: Path, tiny_model_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "theirs")
    same = ["lora.rank=4", "lora.alpha=4", f"model.adapter={tmp_path / 'theirs'}", "train.max_steps=3"]
    run(settings, tmp_path / "run", *same, "train.save_steps=1", "train.learning_rate=1e-12")
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert saved.keys() == theirs.keys()
    assert all(float((saved[name] - theirs[name]).abs().max()) < 1e-8 for name in saved)


def test_an_adapter_that_does_not_fit_is_refused_with_the_fix(settings: list[str], tmp_path: Path) -> None:
    run(settings, tmp_path / "first", "train.max_steps=2", "lora.target_modules=[q_proj,k_proj]", "lora.rank=8")
    start = f"model.adapter={tmp_path / 'first'}"
    with pytest.raises(
        PreflightError, match=r"lora\.rank=16 and 8 in the adapter.* fix: lora\.rank=8 lora\.target_mod"
    ):
        run(settings, tmp_path / "run", start)
    with pytest.raises(
        ConfigError, match=r"lora_A.*: only in the configuration(.|\n)*target_modules=\[k_proj,q_proj\]"
    ):
        run(settings, tmp_path / "run", start, "lora.rank=8", "lora.target_modules=all-linear")
    with pytest.raises(ConfigError, match=r"no such folder; fix: model\.adapter=FOLDER"):
        run(settings, tmp_path / "run", f"model.adapter={tmp_path / 'nowhere'}")
    shutil.rmtree(tmp_path / "first/adapter")
    with pytest.raises(ConfigError, match=r"is no checkpoint; fix: model\.adapter=.*/first/checkpoints/step-000002"):
        run(settings, tmp_path / "run", start)
    weights = tmp_path / "first/checkpoints/step-000002/adapter.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"adapter\.safetensors differs from its manifest"):
        run(settings, tmp_path / "run", f"model.adapter={weights.parent}", *FITS)


FITS = ["lora.target_modules=[q_proj,k_proj]", "lora.rank=8"]


def test_a_run_is_extended_with_a_schedule_of_its_own_and_resumes_in_it_bit_for_bit(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = run(settings, folder)
    longer = ["train.num_train_epochs=4", "train.lr_scheduler_type=cosine", "train.warmup_steps=2"]
    with pytest.raises(ConfigError, match=r"num_train_epochs: 2 before, 4 now(.|\n)*or train\.extend=true"):
        run(settings, folder, *longer, resume="newest")
    with pytest.raises(ConfigError, match=r"is at step 6, .* end at step 3; fix: train\.num_train_epochs=3"):
        run(settings, folder, "train.extend=true", "train.num_train_epochs=1", resume="newest")
    longer += ["train.extend=true", "train.save_steps=1"]
    whole = run(settings, folder, *longer, resume="newest")
    assert "planned anew from step 6 on: a schedule of 6 steps" in capsys.readouterr().out
    plan = plan_of(folder)
    assert (plan.first_step, plan.total_optimizer_steps, plan.warmup_steps) == (6, 12, 2)
    assert rates(whole) == pytest.approx(plan.learning_rates(), rel=1e-12)
    assert rates(whole)[:6] == rates(first)
    assert rates(whole)[6:11] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * (2 + 2**0.5) / 4, 5e-4])
    expected = (folder / "adapter/adapter_model.safetensors").read_bytes()
    for step in (12, 8, 6):  # where it ended, in the extension, and where it was extended
        again = run(settings, folder, *longer, resume=folder / f"checkpoints/step-{step:06d}")
        assert (folder / "adapter/adapter_model.safetensors").read_bytes() == expected
        assert [(e["event"], e.get("step"), e.get("loss")) for e in again] == [
            (e["event"], e.get("step"), e.get("loss")) for e in whole
        ]
