"""Optimizers, LoRA+, NEFTune, label smoothing, float16 and schedules, in whole runs on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.configuration import load_config
from lora_core.errors import ConfigError, PreflightError, TrainingError
from lora_core.evaluation.evaluate import evaluate_adapter
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.preflight.plan import plan_for
from lora_core.runtime.devices import DeviceMemory
from lora_core.training.setup import train
from tests.conftest import chat
from tests.tiny import run_settings

pytestmark = pytest.mark.usefixtures("without_page")

OPTIMIZERS = [
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "lion_8bit",
    "paged_lion_32bit",
    "sgd",
]


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"question {i}", f"answer {i % 5}") for i in range(24)])
    return [
        *run_settings(tmp_path, tiny_model_dir, rows, write_rows([chat("question 1", "answer 1")], "eval.jsonl")),
        "train.num_sample_replies=0",
        "train.learning_rate=2e-3",
        "train.max_steps=4",
        "train.save_steps=2",
        "train.save_total_limit=9",
        "train.bf16=false",
        "train.optim=adamw_torch",
        "model.dtype=float32",
        "overwrite_output_dir=true",
    ]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def run_and_resume(config: Any, folder: Path) -> Any:
    """The run's summary, once it has been seen to end the same when it is resumed from step 2."""
    summary = train(config)
    file = folder / "adapter/adapter_model.safetensors"
    whole, losses = file.read_bytes(), [event["loss"] for event in events(folder, "train")]
    train(config, folder / "checkpoints/step-000002")
    assert file.read_bytes() == whole
    assert [event["loss"] for event in events(folder, "train")] == losses
    return summary


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_learns_resumes_bit_for_bit_and_is_predicted(
    settings: list[str], tmp_path: Path, optim: str
) -> None:
    config = load_config("demo", [*settings, f"train.optim={optim}", "lora.rank=64"])  # 8 bits are for larger tensors
    summary = run_and_resume(config, tmp_path / "run")
    assert summary.eval_loss_after < summary.eval_loss_before
    predicted = predict_memory(config, MicroBatch((64,), 32, True), DeviceMemory("cpu", 2**34)).components
    state = tmp_path / "run/checkpoints/step-000004/optimizer.safetensors"
    # The file also has a table and a counter for each parameter, which share one in memory.
    assert predicted["optimizer"] <= state.stat().st_size
    per_parameter = predicted["optimizer"] / (predicted["adapter"] / 4)
    bytes_each = {"adamw_bnb_8bit": 2, "lion_8bit": 1, "paged_lion_32bit": 4, "sgd": 0}
    if optim != "adafactor":  # it keeps rows and columns in place of the square
        assert per_parameter == pytest.approx(bytes_each.get(optim, 8), abs=0.6)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_schedule_free_optimizer_evaluates_and_saves_its_average_and_resumes(
    settings: list[str], tmp_path: Path, keep: str
) -> None:
    overrides = [
        "train.optim=schedule_free_adamw",
        "train.lr_scheduler_type=constant_with_warmup",
        f"train.keep_adapter={keep}",
        "train.learning_rate=0.03",  # eval loss falls, then rises
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.max_steps=6",
        "lora.loraplus_lr_ratio=2",
    ]
    config = load_config("demo", [*settings, *overrides])
    summary = run_and_resume(config, tmp_path / "run")
    assert evaluate_adapter(config, tmp_path / "run/adapter").loss == pytest.approx(summary.eval_loss_after, abs=1e-5)
    assert summary.eval_loss_after < summary.eval_loss_before
    assert summary.adapter_step == (summary.best_step if keep == "best" else 6)
    planned = plan_for(config, 24, 1).learning_rates()
    assert [event["learning_rate"] for event in events(tmp_path / "run", "train")] == pytest.approx(planned, rel=1e-12)
    with pytest.raises(ConfigError, match=r"not their average; fix: model\.adapter=.*/run/adapter"):
        train(config.model_copy(update={"model": config.model.model_copy(update={"adapter": CHECKPOINT % tmp_path})}))
    with pytest.raises(ConfigError, match=r"averages its steps.* fix: train\.lr_scheduler_type=constant_with_warmup"):
        load_config("demo", ["train.optim=schedule_free_adamw"])


CHECKPOINT = "%s/run/checkpoints/step-000002"


def test_a_stop_between_evaluations_of_a_schedule_free_run_is_exact(settings: list[str], tmp_path: Path) -> None:
    overrides = ["train.optim=schedule_free_adamw", "train.lr_scheduler_type=constant", "train.eval_steps=3"]
    config = load_config("demo", [*settings, *overrides, "train.max_steps=6"])
    run_and_resume(config, tmp_path / "run")  # from step 2, which was not evaluated


def test_betas_and_epsilon_reach_the_optimizer(settings: list[str], tmp_path: Path) -> None:
    plain = train(load_config("demo", settings))
    other = train(load_config("demo", [*settings, "train.adam_beta1=0.5", "train.adam_epsilon=1e-3"]))
    assert other.eval_loss_after != plain.eval_loss_after
    with pytest.raises(
        ConfigError, match=r"train\.optim = 'galore_adamw': must be one of paged_adamw_8bit\|paged_adamw_32bit"
    ):
        load_config("demo", ["train.optim=galore_adamw"])


def test_loraplus_gives_b_its_own_rate_through_the_whole_schedule(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["lora.loraplus_lr_ratio=8", "train.lr_scheduler_type=cosine", "train.optim=adamw_8bit", "lora.rank=64"]
    config = load_config("demo", [*settings, *overrides])
    run_and_resume(config, tmp_path / "run")
    logged = events(tmp_path / "run", "train")
    planned = plan_for(config, 24, 1).learning_rates()
    assert [event["learning_rate"] for event in logged] == pytest.approx(planned, rel=1e-12)
    assert [event["learning_rate_b"] for event in logged] == pytest.approx([8 * rate for rate in planned], rel=1e-12)
    assert "LoRA+: B learns at 8 times these rates, at most 0.016" in capsys.readouterr().out


def test_neftune_is_off_in_evaluation_and_repeats(settings: list[str], tmp_path: Path) -> None:
    plain = train(load_config("demo", settings))
    noisy = run_and_resume(load_config("demo", [*settings, "train.neftune_noise_alpha=5"]), tmp_path / "run")
    assert noisy.eval_loss_before == plain.eval_loss_before
    assert noisy.eval_loss_after != plain.eval_loss_after


@pytest.mark.parametrize(
    "schedule",
    [
        ["train.lr_scheduler_type=constant_with_warmup"],
        ["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr_rate: 0.2}"],
        ["train.lr_scheduler_type=warmup_stable_decay", "train.lr_scheduler_kwargs={num_decay_steps: 2}"],
    ],
    ids=["constant", "min_lr", "wsd"],
)
def test_the_schedule_of_a_run_is_the_plan(settings: list[str], tmp_path: Path, schedule: list[str]) -> None:
    config = load_config("demo", [*settings, *schedule, "train.max_steps=5"])
    run_and_resume(config, tmp_path / "run")
    planned = plan_for(config, 24, 1).learning_rates()
    written = json.loads((tmp_path / "run/preflight.json").read_text(encoding="utf-8"))["plan"]["learning_rates"]
    assert [event["learning_rate"] for event in events(tmp_path / "run", "train")] == pytest.approx(planned, rel=1e-12)
    assert written == planned


def test_fp16_scales_the_loss_finds_its_scale_and_resumes(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = torch.amp.GradScaler
    # So large that the first steps overflow: more of them in a row than train.max_skipped_steps lets be faults.
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: real(device, init_scale=2.0**28))
    overrides = ["train.fp16=true", "train.max_steps=12", "train.max_skipped_steps=2", "lora.dropout=0"]
    config = load_config("demo", [*settings, *overrides])
    assert config.train.bf16 is False
    summary = run_and_resume(config, tmp_path / "run")
    skipped, logged = events(tmp_path / "run", "skipped"), events(tmp_path / "run", "train")
    assert len(skipped) == summary.num_skipped_steps > 2
    assert [event["loss_scale"] for event in skipped] == [2.0 ** (28 - i) for i in range(len(skipped))]
    assert all(math.isfinite(event["loss"]) and event["loss_scale"] < 2.0**28 for event in logged)
    assert "overflowed float16 at a loss scale of 2.68435e+08" in capsys.readouterr().out
    state = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text(encoding="utf-8"))
    assert state["scaler"]["scale"] == 2.0**26
    assert summary.eval_loss_after < summary.eval_loss_before


def test_fp16_takes_the_steps_of_float32(settings: list[str], tmp_path: Path) -> None:
    runs = []
    for overrides in ([], ["train.fp16=true"]):
        train(load_config("demo", [*settings, "lora.dropout=0", *overrides]))
        runs.append([(event["loss"], event["grad_norm"]) for event in events(tmp_path / "run", "train")])
    for exact, half in zip(*runs, strict=True):
        assert half == pytest.approx(exact, rel=5e-3)


def test_float16_weights_without_a_scaler_are_refused(settings: list[str]) -> None:
    with pytest.raises(PreflightError, match=r"without loss scaling.* fix: train\.fp16=true  \[float16_unscaled\]"):
        train(load_config("demo", [*settings, "model.dtype=float16"]))
    with pytest.raises(ConfigError, match=r"fp16=true and bf16=True are both set; fix: train\.bf16=false"):
        load_config("demo", ["train.fp16=true", "train.bf16=true"])


def test_attention_that_is_not_here_is_refused_with_what_is(settings: list[str]) -> None:
    for name, said in (
        ("flash_attention_2", r"needs the package flash_attn, which is not installed; sdpa needs none"),
        ("kernels-community/flash-attn2", r"needs the package kernels"),
        ("flash", r"must be sdpa, eager, flash_attention_2"),
    ):
        with pytest.raises(PreflightError, match=said):
            train(load_config("demo", [*settings, f"model.attn_implementation={name}"]))


def test_a_loss_that_is_not_finite_is_a_fault_under_fp16_too(settings: list[str]) -> None:
    overrides = ["train.fp16=true", "train.max_skipped_steps=1", "train.learning_rate=1", "lora.alpha=1000000"]
    with pytest.raises(TrainingError, match=r"not finite|not a finite number"):
        train(load_config("demo", [*settings, *overrides, "preflight.allow=[]", "train.max_steps=8"]))
