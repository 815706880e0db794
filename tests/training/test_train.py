"""The whole run, on a tiny random Qwen2 and on the demo's real model."""

from __future__ import annotations

import filecmp
import html
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from markupsafe import escape
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lora_core.config.schema import LoraConfig, ModelConfig
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, PreflightError, TrainingError
from lora_core.evaluation.evaluate import evaluate_adapter
from lora_core.model.base import _one_tensor_at_a_time, add_adapter, count_parameters, load_base_model
from lora_core.model.lora_settings import check_target_modules
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.run_folder import write_json
from lora_core.schedule import plan_schedule
from lora_core.training.setup import train
from lora_core.training.step import StepResult, train_step
from lora_core.watch.summary import Summary
from tests.conftest import ROOT, chat, make_model
from tests.tiny import write_jsonl

SUMMARY_KEYS = {
    "total_optimizer_steps",
    "warmup_steps",
    "peak_learning_rate",
    "eval_loss_before",
    "eval_loss_after",
    "num_train_conversations",
    "num_dropped_conversations",
    "num_supervised_tokens",
    "world_size",
    "wall_time_s",
    "train_time_s",
    "tokens_per_s",
    "peak_memory_bytes",
    "adapter_dir",
}


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> Any:
    """Train on 78 short rows under a shipped config; returns (summary, run folder)."""
    rows = write_rows([chat(f"q{i}", f"a{i % 7}", "and?", "no") for i in range(78)])
    held_out = write_rows([chat(f"Q{i}", f"a{i}") for i in range(5)], "eval.jsonl")

    def run(config_name: str, *overrides: str, folder: str = "run") -> tuple[Summary, Path]:
        config = load_config(
            config_name,
            [
                f"model.name_or_path={tiny_model_dir}",
                f"data.train_file={rows}",
                f"data.eval_file={held_out}",
                f"data.cache_dir={tmp_path / 'cache'}",
                f"output_dir={tmp_path / folder}",
                "train.sample_max_new_tokens=4",
                *overrides,
            ],
        )
        return train(config), tmp_path / folder

    return run


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize(("config_name", "steps"), [("qwen0.5b", 50), ("qwen1.5b", 80), ("qwen7b", 60), ("demo", 50)])
def test_every_shipped_config_runs_as_planned(tiny_run: Any, config_name: str, steps: int) -> None:
    summary, folder = tiny_run(config_name)
    assert set(summary.to_dict()) >= SUMMARY_KEYS
    assert summary.to_dict() == json.loads((folder / "summary.json").read_text())
    assert summary.verdict.startswith(("learned", "this run "))
    assert f">{escape(summary.verdict)}</p>" in (folder / "report.html").read_text(encoding="utf-8")
    assert (summary.total_optimizer_steps, summary.num_train_conversations) == (steps, 78)
    config = load_config(folder / "config.yaml")
    plan = plan_schedule(
        78,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        num_train_epochs=config.train.num_train_epochs,
        learning_rate=config.train.peak_learning_rate,
        warmup_ratio=config.train.warmup_ratio,
    )
    logged = events(folder, "train")
    assert [event["step"] for event in logged] == list(range(1, steps + 1))
    assert [event["learning_rate"] for event in logged] == pytest.approx(plan.learning_rates(), rel=1e-12)
    keys = ["epoch", "loss", "grad_norm", "num_supervised_tokens", "tokens_per_s", "peak_memory_bytes"]
    assert all(set(keys) <= set(event) for event in logged)
    # before, at the end of each epoch, and the last of those is the result
    assert [event["step"] for event in events(folder, "eval")] == list(
        range(0, steps + 1, plan.optimizer_steps_per_epoch)
    )
    assert summary.eval_loss_after == events(folder, "eval")[-1]["loss"] < summary.eval_loss_before
    assert len(events(folder, "sample")) == 3
    assert {path.name for path in folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "eval_examples.json",
        "metrics.jsonl",
        "preflight.json",
        "report.html",
        "rows.json",
        "state.json",
        "summary.json",
        "train.log",
    }


@pytest.mark.usefixtures("without_page")
def test_two_runs_give_the_same_adapter_and_another_seed_does_not(tiny_run: Any) -> None:
    adapters = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        _, folder = tiny_run("demo", f"train.seed={seed}", "train.max_steps=6", folder=name)
        adapters.append(folder / "adapter/adapter_model.safetensors")
    assert filecmp.cmp(adapters[0], adapters[1], shallow=False)
    assert not filecmp.cmp(adapters[0], adapters[2], shallow=False)


@pytest.mark.usefixtures("without_page")
def test_checkpointing_changes_nothing_but_memory_and_really_is_on(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import checkpoint

    recomputed: list[bool] = []
    real = checkpoint.checkpoint

    def counting(*args: Any, **kwargs: Any) -> Any:
        recomputed.append(kwargs["use_reentrant"])
        return real(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counting)
    losses = []
    for on in ("false", "true"):
        _, folder = tiny_run(
            "demo", "train.max_steps=3", "train.bf16=false", f"train.gradient_checkpointing={on}", folder=on
        )
        losses.append([event["loss"] for event in events(folder, "train")])
        # steps x layers; a step is one packed micro-batch, and the memory prediction runs one more
        assert len(recomputed) == (0 if on == "false" else (3 + 1) * 2)
    assert not any(recomputed), "the reentrant kind gives a frozen embedding's successors no gradient"
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.usefixtures("without_page")
def test_compiled_layers_take_the_same_steps(tiny_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["train.max_steps=3", "train.bf16=false", "model.dtype=float32", "lora.dropout=0"]
    wanted, _ = tiny_run("demo", *settings, folder="plain")
    torch._dynamo.reset()
    got, _ = tiny_run("demo", *settings, "train.torch_compile=true", folder="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # it really is on
    assert got.eval_loss_before == pytest.approx(wanted.eval_loss_before, rel=1e-5)
    assert got.eval_loss_after == pytest.approx(wanted.eval_loss_after, rel=1e-5)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"torch_compile=true: torch\.compile cannot run on cpu.*fix: train\.torch_c"):
        tiny_run("demo", *settings, "train.torch_compile=true", folder="none")


@pytest.mark.usefixtures("without_page")
def test_intervals_checkpoints_and_a_held_out_fraction(tiny_run: Any) -> None:
    summary, folder = tiny_run(
        "demo",
        "data.eval_file=null",
        "data.eval_fraction=0.1",
        "train.max_steps=7",
        "train.logging_steps=3",
        "train.eval_steps=4",
        "train.save_steps=5",
    )
    assert summary.num_train_conversations == 70
    assert [event["step"] for event in events(folder, "train")] == [3, 6, 7]
    assert [event["step"] for event in events(folder, "eval")] == [0, 4, 7]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000007"]  # the last step is always kept
    assert (folder / "checkpoints/step-000005/adapter.safetensors").is_file()


@pytest.mark.usefixtures("without_page")
def test_without_an_eval_set_the_run_replies_to_training_prompts_and_says_what_it_cannot(
    tiny_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, folder = tiny_run("demo", "data.eval_file=null", "train.max_steps=4")
    assert (summary.eval_loss_before, summary.num_eval_examples_better) == (None, None)
    said = capsys.readouterr().out
    assert "is not measured; fix: data.eval_fraction=0.1" in said
    assert said.splitlines()[-1] == summary.verdict
    assert re.search(r"training loss .* \(.*, means of the first and last 2 steps\)", summary.verdict)
    assert "without an eval set it cannot be said whether" in summary.verdict
    samples = events(folder, "sample")
    assert [(sample["prompt"], sample["expected"], sample["from"]) for sample in samples] == [
        (f"q{i}", f"a{i}", "train") for i in range(3)
    ]
    assert not (folder / "eval_examples.json").exists()


@pytest.mark.usefixtures("without_page")
def test_a_run_that_would_not_learn_is_refused_before_it_starts_unless_told_to(
    tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ["train.num_train_epochs=1", "train.warmup_steps=100", "train.per_device_train_batch_size=8"]
    old.append("train.learning_rate=1e-4")
    with pytest.raises(PreflightError, match=r"9\.0% of the configured 0\.0001 .*fix: train\.warmup_steps=1"):
        tiny_run("demo", *old, "train.gradient_accumulation_steps=1")
    assert not (tmp_path / "run").exists()
    summary, folder = tiny_run("demo", *old, "train.gradient_accumulation_steps=1", "preflight.allow=[warmup_past_end]")
    assert summary.peak_learning_rate == pytest.approx(9e-6)
    cause = "the learning rate peaked at 9e-6, 9% of the 1e-4 asked for (100 warmup steps in a run of 10)"
    assert re.match(rf"this run learned next to nothing \([+-]0\.\d%\): {re.escape(cause)}", summary.verdict)
    assert "error: the model would learn next to nothing" in capsys.readouterr().out
    assert "warmup_past_end" in [f["id"] for f in json.loads((folder / "preflight.json").read_text())["findings"]]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a gradient of some steps an infinite value."""

    def spoil(is_spoiled: Any) -> None:
        calls = []

        def with_bad_steps(accelerator: Any, model: Any, *rest: Any) -> StepResult:
            calls.append(0)
            parameter = next(p for p in model.parameters() if p.requires_grad)
            hook = parameter.register_hook(lambda gradient: gradient + (math.inf if is_spoiled(len(calls)) else 0.0))
            result = train_step(accelerator, model, *rest)
            hook.remove()
            return result

        monkeypatch.setattr(sys.modules["lora_core.training.loop"], "train_step", with_bad_steps)

    return spoil


@pytest.mark.usefixtures("without_page")
def test_steps_that_are_not_finite_are_left_out_and_stop_the_run_when_they_do_not_end(
    tiny_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any
) -> None:
    spoil(lambda step: True)
    with pytest.raises(TrainingError, match=r"2 steps in a row .*were skipped; .*step-000002"):
        tiny_run("demo", "train.max_skipped_steps=2")
    said = capsys.readouterr().out
    assert re.search(r"step 1: loss .*, gradient norm inf: not finite, .*rows\.jsonl lines \d+, ", said)
    assert [event["step"] for event in events(tmp_path / "run", "skipped")] == [1, 2]
    saved = load_file(tmp_path / "run/checkpoints/step-000002/adapter.safetensors")
    assert all(not tensor.any() for name, tensor in saved.items() if "lora_B" in name)  # as the run began


@pytest.mark.usefixtures("without_page")
def test_a_step_that_is_not_finite_costs_that_step_and_no_other(tiny_run: Any, spoil: Any) -> None:
    spoil(lambda step: step == 3)
    summary, folder = tiny_run("demo", "train.num_train_epochs=1", "train.learning_rate=1e-4")
    assert (summary.num_skipped_steps, summary.total_optimizer_steps) == (1, 10)
    assert [event["step"] for event in events(folder, "skipped")] == [3]
    trained = events(folder, "train")
    assert [event["step"] for event in trained] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    plan = plan_schedule(
        78, per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-4, warmup_ratio=0.1
    )
    assert [event["learning_rate"] for event in trained] == pytest.approx(
        [rate for step, rate in enumerate(plan.learning_rates(), 1) if step != 3]
    )
    assert all(math.isfinite(event["loss"]) for event in trained)


@pytest.mark.usefixtures("without_page")
def test_a_model_that_gives_no_number_is_said_so(tiny_run: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="values that are not finite"):
        tiny_run("demo", f"model.name_or_path={broken}")
    with pytest.raises(TrainingError, match="values that are not finite"):
        tiny_run("demo", f"model.name_or_path={broken}", "data.packing=false")


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.usefixtures("without_page")
def test_the_adapter_is_the_best_or_the_last_and_says_which(
    tiny_run: Any, keep: str, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, folder = tiny_run(
        "demo",
        f"train.keep_adapter={keep}",
        "train.early_stopping_patience=3",
        "train.eval_steps=2",
        "train.save_steps=2",
        "train.save_total_limit=1",
        "train.learning_rate=0.02",  # eval loss falls, then rises
    )
    losses = {event["step"]: event["loss"] for event in events(folder, "eval") if event["step"] > 0}
    best, last = min(losses, key=lambda step: losses[step]), max(losses)
    assert last == best + 6 < 50  # three evaluations, two steps apart
    assert summary.stopped_early_at_step == last
    assert (summary.best_step, summary.adapter_step) == (best, best if keep == "best" else last)
    assert summary.eval_loss_after == losses[summary.adapter_step]
    assert f"adapter (of step {summary.adapter_step}, the {keep})" in capsys.readouterr().out
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step-{last:06d}"} | ({f"step-{best:06d}"} if keep == "best" else set())
    if keep == "best":
        written = load_file(folder / "adapter/adapter_model.safetensors")
        saved = load_file(folder / f"checkpoints/step-{best:06d}/adapter.safetensors")
        assert [tensor.tolist() for _, tensor in sorted(written.items())] == [
            tensor.tolist() for _, tensor in sorted(saved.items())
        ]


def test_a_module_that_matches_nothing_is_an_error_that_lists_what_there_is() -> None:
    model = make_model(300)
    check_target_modules(model, ["q_proj", "model.layers.0.mlp.up_proj"])
    with pytest.raises(
        ConfigError, match=r"query, c_attn matches nothing in Qwen2ForCausalLM; its linear layers: down_proj"
    ):
        check_target_modules(model, ["q_proj", "query", "c_attn"])


def test_only_the_adapter_trains_and_it_is_float32(tiny_model_dir: Path) -> None:
    base = load_base_model(ModelConfig(name_or_path=str(tiny_model_dir)), torch.device("cpu"))
    model = add_adapter(base, LoraConfig(rank=4), seed=0)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trains.items())
    assert {p.dtype for name, p in model.named_parameters() if name not in trains} == {torch.bfloat16}
    per_layer = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)  # rank x (in + out), over the seven
    assert count_parameters(model)[0] == 2 * per_layer


@pytest.mark.usefixtures("without_page")
def test_models_that_cannot_be_loaded_are_said_so_without_a_traceback(tiny_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        tiny_run("demo", f"model.name_or_path={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="the config cannot be loaded"):
        tiny_run("demo", f"model.name_or_path={tmp_path / 'empty'}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tiny_run("demo", "model.name_or_path=no-such-user/no-such-model")


@pytest.mark.parametrize(
    ("device", "is_quantized", "threads"), [("cpu", False, "one"), ("cuda", False, "several"), ("cuda", True, "one")]
)
def test_weights_that_are_quantized_on_the_way_are_loaded_one_by_one(
    device: str, is_quantized: bool, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    with _one_tensor_at_a_time(torch.device(device), is_quantized):
        assert ("HF_DEACTIVATE_ASYNC_LOAD" in os.environ) == (threads == "one")
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_each_rank_loads_all_of_a_model_that_is_only_evaluated(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers leaves part of it out where it takes Accelerate's FSDP to send it later."""
    config = ModelConfig(name_or_path=str(tiny_model_dir))
    wanted = dict(load_base_model(config, torch.device("cpu")).named_buffers())
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []

    def is_fsdp_enabled() -> bool:
        asked.append(transformers.integrations.is_fsdp_enabled())
        return bool(asked[-1])

    monkeypatch.setattr("transformers.modeling_utils.is_fsdp_enabled", is_fsdp_enabled)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        loaded = dict(load_base_model(config, torch.device("cpu")).named_buffers())
    finally:
        torch.distributed.destroy_process_group()
    assert set(asked) == {False}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(buffer, wanted[name]) for name, buffer in loaded.items())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"  # by which the run itself goes


def test_evaluating_nf4_leaves_its_gradients_as_they_were(tiny_model_dir: Path) -> None:
    base = load_base_model(ModelConfig(name_or_path=str(tiny_model_dir), quantization="nf4"), torch.device("cpu"))
    model = CausalLMLoss(add_adapter(base, LoraConfig(rank=4, dropout=0.0), seed=0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    input_ids = torch.arange(10, 30)[None]
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "loss_mask": input_ids > 15}

    def gradients() -> list[torch.Tensor]:
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs).loss_sum.backward()
        seen = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return seen

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(**inputs)
    after = gradients()
    assert len(before) == 2 * 2 * 7
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_nf4_learns_on_the_demo_model_and_its_adapter_gives_the_same_loss_again(
    demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    eval_lines = (ROOT / "examples/eval.jsonl").read_text(encoding="utf-8").splitlines()
    overrides = [
        "model.quantization=nf4",
        "train.optim=paged_adamw_8bit",
        # Multiplied in float32: many CPUs emulate bfloat16, a few tokens a second.
        "model.dtype=float32",
        "train.bf16=false",
        f"output_dir={tmp_path / 'run'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "train.max_steps=4",
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1",
        "train.learning_rate=2e-3",
        "train.num_sample_replies=0",
        f"data.eval_file={write_jsonl(tmp_path / 'eval.jsonl', map(json.loads, eval_lines[:2]))}",
    ]
    config = load_config("demo", overrides)
    summary = train(config)
    assert summary.eval_loss_after < summary.eval_loss_before - 0.2
    again = evaluate_adapter(config, summary.adapter_dir)
    assert again.loss == pytest.approx(summary.eval_loss_after, abs=1e-5)


def test_the_adapter_loads_with_plain_peft_as_the_report_says(tiny_model_dir: Path, tiny_run: Any) -> None:
    summary, folder = tiny_run("demo", "train.max_steps=2")
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    found = re.search(r'<div class="text">(from peft import .*?)</div>', page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    model = names["model"]
    assert isinstance(model, peft.PeftModel)
    # The norm of what it adds to the weights, module by module, with PEFT's own product.
    updates = [module.get_delta_weight("default") for module in model.modules() if isinstance(module, LoraLayer)]
    assert summary.adapter_norm == pytest.approx(math.sqrt(sum(float(u.square().sum()) for u in updates)), rel=1e-4)
    assert summary.adapter_norm > 0
    assert model.peft_config["default"].r == 16
    card = (folder / "adapter/README.md").read_text()
    assert tiny_model_dir.name in card
    assert str(tiny_model_dir) not in card  # a folder of this machine is nobody else's base model


def test_evaluating_without_an_adapter_or_held_out_rows_says_what_is_missing(tmp_path: Path) -> None:
    config = load_config("qwen0.5b")
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json; fix: --adapter FOLDER"):
        evaluate_adapter(config, tmp_path)
    write_json(tmp_path / "adapter_config.json", {})
