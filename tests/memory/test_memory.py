"""Predicted memory against what a real step takes, and the shortcuts against the long way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lora_core.configuration import load_config
from lora_core.memory import simulate, without_storage
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.model.attention import segment_attention
from lora_core.runtime.devices import DeviceMemory
from tests.conftest import make_model

GPU = DeviceMemory("cuda", 24 * 2**30)


def predict(*overrides: str, lengths: tuple[int, ...] = (128, 128), **settings: object) -> dict[str, int]:
    config = load_config("demo", overrides)
    batch = MicroBatch(lengths, sum(lengths) // 2, config.data.packing)
    return predict_memory(config, batch, GPU, **settings).components  # type: ignore[arg-type]


def test_weights_are_those_of_the_model(demo_model_dir: Path) -> None:
    size = (demo_model_dir / "model.safetensors").stat().st_size  # bfloat16, tied head
    assert predict()["weights"] == pytest.approx(size, rel=0.01)


def test_equal_layers_are_run_few_times_and_known_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_model_dir: Path
) -> None:
    model = AutoConfig.from_pretrained(demo_model_dir)
    model.num_hidden_layers = 8  # the demo model with a quarter of its layers
    model.save_pretrained(tmp_path)
    for changed in ([], ["train.gradient_checkpointing=true"], ["model.quantization=nf4"], ["data.packing=false"]):
        overrides = [f"model.name_or_path={tmp_path}", *changed]
        config = load_config("demo", overrides)
        # Of few layers, the larger evaluation batch takes more than training does; of all, training.
        evaluation = MicroBatch((1024,) * 2, 1024, config.data.packing)
        for settings in ({}, {"lengths": (1024,), "eval_micro_batch": evaluation}):
            short = predict(*overrides, **settings)
            with monkeypatch.context() as patch:
                patch.setattr(simulate, "_LAYERS_RUN", (2, 8))  # so all are run
                assert predict(*overrides, **settings) == short


@pytest.mark.parametrize("overrides", [[], ["train.gradient_checkpointing=true"]], ids=["plain", "checkpointing"])
def test_many_segments_at_once_hold_what_each_on_its_own_does(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    config, batch = load_config("demo", overrides), MicroBatch((150, 7, 400, 33), 300, True)
    cpu = DeviceMemory("cpu", 24 * 2**30)
    at_once = predict_memory(config, batch, cpu, eval_micro_batch=batch).components
    monkeypatch.setattr(without_storage, "_segments", segment_attention)
    assert at_once == predict_memory(config, batch, cpu, eval_micro_batch=batch).components


def test_layers_of_different_sizes_are_all_run(tmp_path: Path) -> None:
    make_model(300).save_pretrained(tmp_path)
    config = load_config("demo", [f"model.name_or_path={tmp_path}"])
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 2
    assert predict_memory(config, MicroBatch((8,), 4, True), GPU).components["weights"] > 0


def test_checkpointing_nf4_and_smaller_batches_take_less() -> None:
    plain = predict()
    assert predict("train.gradient_checkpointing=true")["activations"] < plain["activations"] / 3
    assert predict("model.quantization=nf4")["weights"] < plain["weights"] / 2
    assert predict("model.quantization=int8")["weights"] < plain["weights"] * 0.75
    assert predict(lengths=(128,))["activations"] < plain["activations"] * 0.6


def test_logits_are_those_of_one_chunk_however_long_the_batch() -> None:
    few, many = (
        predict_memory(load_config("demo"), MicroBatch((8192,), n, True), GPU).components for n in (4096, 8192)
    )
    assert few["logits"] == many["logits"]


def test_ranks_share_what_fsdp_shards_and_ddp_repeats() -> None:
    alone, ddp = predict(), predict(num_processes=4)
    fsdp = predict(num_processes=4, sharding="fsdp")
    assert ddp["weights"] == alone["weights"]
    assert ddp["gradients"] == 2 * alone["gradients"]
    assert alone["weights"] / 4 < fsdp["weights"] < alone["weights"]
    assert fsdp["adapter"] == pytest.approx(alone["adapter"] / 4, abs=4)
    assert fsdp["gradients"] == alone["gradients"]


def test_fsdp_keeps_embedding_and_head_whole_and_loads_the_whole_model_where_each_rank_reads_it() -> None:
    alone, fsdp = predict(), predict(num_processes=64, sharding="fsdp", each_rank_loads=True)
    embedding_bytes = 49152 * 576 * 2  # SmolLM2's, which is its head too
    assert fsdp["weights"] > embedding_bytes + alone["weights"] / 64
    assert sum(fsdp.values()) - fsdp["process"] >= alone["weights"] * 65 // 64
    assert alone["loading"] == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_rank_0_sends_are_nowhere_whole_and_quantized_ones_are(quantization: str) -> None:
    override = f"model.quantization={quantization}"
    each, first = (
        predict(override, lengths=(8,), num_processes=64, sharding="fsdp", each_rank_loads=each_rank_loads)
        for each_rank_loads in (True, False)
    )
    assert each["loading"] > 0
    assert first == (each if quantization == "nf4" else {**each, "loading": 0})


def test_evaluation_changes_no_weights() -> None:
    config = load_config("demo", ["model.quantization=nf4"])
    small, large = MicroBatch((64,), 32, True), MicroBatch((1024,) * 4, 2048, True)
    with_evaluation = predict_memory(config, small, GPU, eval_micro_batch=large)
    assert with_evaluation.components["weights"] == predict_memory(config, small, GPU).components["weights"]


def test_an_evaluation_batch_larger_than_training_decides_the_peak() -> None:
    config = load_config("demo", ["train.gradient_checkpointing=true"])
    small, large = MicroBatch((64,), 32, True), MicroBatch((1024,) * 16, 8192, True)
    without, with_it = (predict_memory(config, small, GPU, eval_micro_batch=batch) for batch in (None, large))
    hidden_state_bytes = 16 * 1024 * 576 * 2
    assert with_it.total_bytes > without.total_bytes + 2 * hidden_state_bytes


# One process each, because the resident set only grows.
MEASURE = """
import sys
import torch
from lora_core.commands.command_line import quiet_libraries
from lora_core.configuration import load_config
from lora_core.data.packing import collate_packed
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.loss import CausalLMLoss
from lora_core.model.optimizer import build_optimizer
from lora_core.runtime.devices import build_accelerator, device_memory, peak_memory_bytes, with_precision

quiet_libraries()
config, _ = with_precision(load_config("demo", sys.argv[1:]))
accelerator = build_accelerator(config)
lengths = [(70, 90, 120, 80), (150, 100, 60, 102)]  # the larger one with the optimizer's state in place
rows = [
    [{"input_ids": list(range(n)), "loss_mask": [i > n // 2 for i in range(n)]} for n in step] for step in lengths
]
batches = [collate_packed(step) for step in rows]
shape = MicroBatch(lengths[-1], int(batches[-1]["loss_mask"].sum()), True)
predicted = predict_memory(config, shape, device_memory()).total_bytes
base = load_base_model(config.model, accelerator.device, True)
model = add_adapter(base, config.lora, 0, config.train.gradient_checkpointing)
optimizer = build_optimizer(model, config.train, accelerator.device)
loss, optimizer = accelerator.prepare(CausalLMLoss(model), optimizer)
loss.train()
for batch in batches:
    accelerator.backward(loss(**batch).loss_sum)
    optimizer.step()
    optimizer.zero_grad()
print(predicted, peak_memory_bytes(torch.device("cpu")))
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.gradient_checkpointing=true"],
        # Multiplied in float32: many CPUs emulate bfloat16, a few tokens a second.
        [
            "model.quantization=nf4",
            "train.optim=paged_adamw_8bit",
            "model.dtype=float32",
            "train.bf16=false",
        ],
    ],
    ids=["as it comes", "checkpointing", "nf4"],
)
def test_the_prediction_is_within_15_percent_of_a_measured_step(demo_model_dir: Path, overrides: list[str]) -> None:
    assert demo_model_dir.is_dir()
    command = [sys.executable, "-c", MEASURE, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split()[-2:])
    assert predicted == pytest.approx(measured, rel=0.15)


def test_predicting_leaves_torch_as_it_was() -> None:
    state = torch.get_rng_state()
    predict("model.quantization=nf4")
    assert torch.equal(torch.get_rng_state(), state)
