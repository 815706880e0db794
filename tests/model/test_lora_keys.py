"""Each key of `lora` does what PEFT says it does, and what matches nothing is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_core.checkpoints.adapter_folder import load_adapter
from lora_core.config.schema import LoraConfig, ModelConfig
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, PreflightError
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.model.base import add_adapter, load_base_model
from lora_core.runtime.devices import DeviceMemory
from lora_core.training.setup import train
from tests.conftest import chat
from tests.tiny import run_settings

pytestmark = pytest.mark.usefixtures("without_page")

CPU = torch.device("cpu")
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(folder: Path, **lora: Any) -> peft.PeftModel:
    base = load_base_model(ModelConfig(name_or_path=str(folder), dtype="float32"), CPU)
    return add_adapter(base, LoraConfig(**lora), seed=0)


def layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    ("lora", "wanted"),
    [
        ({"target_modules": "all-linear"}, lambda name: True),
        ({"target_modules": r".*\.1\.self_attn\.[qv]_proj"}, lambda name: re.search(r"1\.self_attn\.[qv]_", name)),
        ({"exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}, lambda name: "o_proj" not in name and name[7:] != UP),
        ({"exclude_modules": r".*mlp.*"}, lambda name: "mlp" not in name),
        ({"layers_to_transform": [1]}, lambda name: name.startswith("layers.1")),
    ],
    ids=["all-linear", "regex", "exclude", "exclude regex", "layers"],
)
def test_the_modules_that_get_an_adapter(tiny_model_dir: Path, lora: dict[str, Any], wanted: Any) -> None:
    names = {name for layer in (0, 1) for name in NAMES[layer]}
    assert set(layers(adapted(tiny_model_dir, **lora))) == {name for name in names if wanted(name)}


UP = "0.mlp.up_proj"
NAMES = {
    layer: [
        f"layers.{layer}.{'self_attn' if part in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{part}"
        for part in sorted(SEVEN)
    ]
    for layer in (0, 1)
}


def test_ranks_and_alphas_by_pattern(tiny_model_dir: Path) -> None:
    pattern = {"rank_pattern": {"down_proj": 4, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 64}}
    for name, layer in layers(adapted(tiny_model_dir, rank=8, alpha=16, **pattern)).items():
        rank = 4 if "down_proj" in name else 2 if name == "layers.1.self_attn.q_proj" else 8
        assert layer.r["default"] == layer.lora_A["default"].weight.shape[0] == rank, name
        assert layer.scaling["default"] == (64 if "v_proj" in name else 16) / rank, name


def test_the_starts_of_a_and_b(tiny_model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    ids = torch.arange(5, 25)[None]
    wanted = base(ids).logits
    weight = base.model.layers[0].self_attn.q_proj.weight.detach()
    for init in (True, "gaussian", "olora", "pissa", "pissa_niter_8"):
        model = adapted(tiny_model_dir, rank=4, alpha=4, init_lora_weights=init).eval()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        layer: Any = layers(model)["layers.0.self_attn.q_proj"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if init in (True, "gaussian"):
            assert not b.any()
            assert torch.equal(layer.base_layer.weight, weight)
        else:
            torch.testing.assert_close(layer.base_layer.weight + b @ a, weight, rtol=1e-4, atol=1e-6)
    # The paper's own words: PiSSA's product is the best rank-4 part of W, with the square roots of its singular values.
    for init, tolerance in (("pissa", 1e-5), ("pissa_niter_8", 0.05)):  # the fast SVD is near the best one
        layer = layers(adapted(tiny_model_dir, rank=4, alpha=4, init_lora_weights=init))["layers.0.self_attn.q_proj"]
        u, s, v = torch.linalg.svd(weight)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = u[:, :4] * s[:4] @ v[:4]
        assert float((weight - product).norm() / (weight - best).norm()) == pytest.approx(1, abs=tolerance), init
    # OLoRA's B has orthonormal columns.
    layer = layers(adapted(tiny_model_dir, rank=4, alpha=4, init_lora_weights="olora"))["layers.0.self_attn.q_proj"]
    b = layer.lora_B["default"].weight
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.init_lora_weights=eva"], "EVA needs a pass over the rows.* fix: lora.init_lora_weights=true"),
        (["lora.init_lora_weights=loftq"], "LoftQ quantizes the base weights in its own way"),
        (["lora.init_lora_weights=false"], "B at random would begin with another model"),
        (["lora.init_lora_weights=pisa"], "there is no such start"),
        (
            ["lora.init_lora_weights=pissa"],
            r"would round what is left.*fix: model\.dtype=float32 model\.quantization=none",
        ),
        (
            ["lora.init_lora_weights=olora", "model.dtype=float32", "lora.use_dora=true"],
            r"cannot be saved as a plain adapter together with use_dora",
        ),
        (["lora.target_modules=q_proj("], "is no regular expression"),
        (["lora.target_modules=all-linear", "lora.layers_to_transform=[1]"], "goes with a list of names"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("qwen0.5b", overrides)


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> list[str]:
    rows = write_rows([chat(f"question {i}", f"answer {i % 5}") for i in range(24)])
    return [
        *run_settings(tmp_path, tiny_model_dir, rows),
        "train.num_sample_replies=0",
        "train.learning_rate=2e-3",
        "train.max_steps=4",
        "train.save_steps=2",
        "train.bf16=false",
        "train.optim=adamw_torch",
        "model.dtype=float32",
        "overwrite_output_dir=true",
    ]


WAYS = {
    "pissa": ["lora.init_lora_weights=pissa_niter_4", "lora.rank=4", "lora.rank_pattern={down_proj: 2}"],
    "olora, rslora": ["lora.init_lora_weights=olora", "lora.rank=4", "lora.use_rslora=true"],
    "dora": ["lora.use_dora=true", "lora.layers_to_transform=[1]", "lora.exclude_modules=[down_proj]"],
    "head": ["lora.modules_to_save=[lm_head]", r"lora.target_modules=.*\.0\..*_proj"],
    "tokens": ["lora.trainable_token_indices=[300,301]", "lora.alpha_pattern={q_proj: 8}"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_bit_for_bit_and_its_adapter_gives_the_same_logits_in_plain_peft(
    settings: list[str], tmp_path: Path, tiny_model_dir: Path, way: str
) -> None:
    config = load_config("demo", [*settings, *WAYS[way]])
    summary = train(config)
    assert summary.eval_loss_after < summary.eval_loss_before
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    whole = file.read_bytes()
    train(config, tmp_path / "run/checkpoints/step-000002")
    assert file.read_bytes() == whole
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype="float32")
    plain = peft.PeftModel.from_pretrained(base, file.parent).eval()
    ids = torch.arange(295, 320)[None]
    ours = load_adapter(
        config.model_copy(update={"data": config.data.model_copy(update={"packing": False})}), file.parent, CPU
    )
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    from lora_core.evaluation.evaluate import evaluate_adapter

    assert evaluate_adapter(config, file.parent).loss == pytest.approx(summary.eval_loss_after, abs=1e-5)
    names = "".join(load_file(file))
    assert ("lm_head" in names or "embed_tokens" in names) == (way in ("head", "tokens"))
    deltas = [layer.get_delta_weight("default") for layer in plain.modules() if isinstance(layer, LoraLayer)]
    norm = sum(float(delta.square().sum()) for delta in deltas) ** 0.5
    assert summary.adapter_norm == pytest.approx(norm, rel=1e-3)
    batch = MicroBatch((64, 64), 64, True)
    predicted = predict_memory(config, batch, DeviceMemory("cpu", 2**34)).components
    trained = summed(tmp_path / "run/checkpoints/step-000004/adapter.safetensors")
    assert predicted["adapter"] == pytest.approx(trained, rel=0.01)


def summed(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.target_modules=q_proj", r"a str is a regular expression.* fix: lora\.target_modules=\[q_proj\]"),
        (
            "lora.exclude_modules=[c_attn]",
            r"lora\.exclude_modules: c_attn matches nothing.* fix: lora\.exclude_modules=null",
        ),
        (
            "lora.modules_to_save=[score]",
            r"lora\.modules_to_save: score matches nothing.* fix: lora\.modules_to_save=\[\]",
        ),
        ("lora.rank_pattern={fc1: 4}", r"lora\.rank_pattern: fc1 matches nothing in this model that gets an adapter"),
        ("lora.layers_to_transform=[0,7]", r"lora\.layers_to_transform: 7 matches nothing"),
        ("lora.trainable_token_indices=[99999]", r"lora\.trainable_token_indices: 99999 matches nothing"),
        ("lora.exclude_modules=.*_proj", r"all that match are in lora\.exclude_modules"),
    ],
)
def test_names_that_match_nothing_stop_the_run_with_a_fix(settings: list[str], override: str, said: str) -> None:
    with pytest.raises(PreflightError, match=said):
        train(load_config("demo", [*settings, override]))
