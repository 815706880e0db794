"""Families that stand for the rest: dense, fused projections, experts, sinks, layers with a state, views in place.

All of transformers' causal language models: `make families`, which writes docs/families.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.precision import PRECISIONS, outcome_in
from tests.families.sweep import LIMIT, outcome

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DENSE, SHARED, SHARED_ONE = (
    [f"{part}.{name}_proj.weight" for name in ("gate", "up", "down")]
    for part in ("mlp", "shared_experts", "shared_expert")
)
BERT_DENSE = [
    f"bert.encoder.layer.{layer}.{part}.dense"
    for layer in range(2)
    for part in ("attention.output", "intermediate", "output")
]
# family -> (how it trains, linear layers with an adapter, experts and what is reached as a parameter beside them)
EXPECTED: dict[str, tuple[str, list[str], list[str]]] = {
    "llama": ("packed", SEVEN, []),
    "qwen3": ("packed", SEVEN, []),
    "gemma3_text": ("packed", SEVEN, []),
    "phi3": ("packed", ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"], []),
    "gpt2": ("packed", ["c_attn", "c_proj", "c_fc"], []),
    "falcon": ("padded", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], []),
    "olmo": ("packed", SEVEN, []),
    "mixtral": ("packed", SEVEN[:4], EXPERTS),
    "qwen3_moe": ("packed", SEVEN[:4], EXPERTS),
    "gpt_oss": ("padded", SEVEN[:4], EXPERTS),
    "deepseek_v3": ("packed", LATENT, [*EXPERTS, *DENSE, *SHARED]),
    "llama4_text": ("padded", SEVEN, EXPERTS),
    "qwen3_next": ("padded", [*SEVEN[:4], "in_proj_qkvz", "in_proj_ba"], [*EXPERTS, *SHARED_ONE]),
    "bert": ("packed", ["query", "key", "value", *BERT_DENSE], []),
    "lfm2": ("padded", [*SEVEN[:3], "in_proj", "out_proj", "w1", "w2", "w3"], []),
    "stablelm": ("padded", SEVEN, []),
    # With towers: audio that has no SDPA; layers that attend to images.
    "gemma4": ("packed", [*SEVEN, "per_layer_input_gate", "per_layer_projection"], []),
    "mllama": ("packed", SEVEN, []),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_a_family_trains_as_plain_transformers_and_peft_do(family: str, tmp_path: Path) -> None:
    trains, modules, experts = EXPECTED[family]
    got = outcome(family, tmp_path)
    assert (got["trains"], got["why"] if trains == "packed" else "") == (trains, ""), got
    assert got["packs"] == (trains == "packed")
    assert got["padded"] <= got["limit"]
    assert got.get("packed", 0.0) <= got["limit"] < 10 * LIMIT
    assert (sorted(got["targets"].modules), sorted(got["targets"].parameters)) == (sorted(modules), sorted(experts))
    assert got["without_gradient"] == got["without"] == []


def test_a_family_that_does_not_train_says_so_in_a_sentence(tmp_path: Path) -> None:
    got = outcome("prophetnet", tmp_path)
    assert got["trains"] == "not"
    assert "traceback" not in got
    assert "ProphetNetForCausalLM computes its logits from more than its decoder's last hidden states" in got["why"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "olmo", "gpt2", "mixtral", "falcon_mamba", "deepseek_v3", "gemma4"])
def test_a_family_trains_as_plain_peft_does_on_the_same_weights(precision: str, family: str, tmp_path: Path) -> None:
    got = outcome_in(precision, family, tmp_path)
    assert got["difference"] <= got["limit"], got


@pytest.mark.parametrize(
    ("precision", "family"),
    [
        ("nf4", "mamba"),  # takes a layer's weight as a matrix
        ("nf4", "gemma3n_text"),  # clamps one in place, while it trains
        ("nf4", "rwkv"),  # divides its weights in place, where it does not train
    ],
)
def test_quantized_weights_that_a_family_cannot_compute_with_are_a_sentence(
    precision: str, family: str, tmp_path: Path
) -> None:
    said = outcome_in(precision, family, tmp_path)["why"]
    assert "ForCausalLM does not run on quantized weights" in said
    assert said.endswith("fix: model.quantization=none")
