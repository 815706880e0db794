"""The suggested learning rate: the published formula, its range, and what is said outside it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.learning_rate import suggest_learning_rate

QWEN_7B = {"model_type": "qwen2", "hidden_size": 3584, "alpha": 32, "rank": 16, "total_steps": 500}


@pytest.mark.parametrize(
    ("changed", "rate"),
    [
        ({}, 5e-4 * (2000 / 3584) ** 0.0775),
        ({"model_type": "llama", "hidden_size": 4096}, 5e-4 * (2000 / 4096) ** 0.781),
        ({"model_type": "llama", "hidden_size": 8192}, 5e-4 * (2000 / 8192) ** 0.781),
        ({"rank": 128}, 5e-4 * (2000 / 3584) ** 0.0775),  # the scale is alpha / rank: the rank changes nothing
        ({"alpha": 64}, 5e-4 * (2000 / 3584) ** 0.0775 / 2),
        ({"alpha": 8, "use_rslora": True}, 5e-4 * (2000 / 3584) ** 0.0775),  # 8 x sqrt(16) = 32
        ({"model_type": "gemma3_text"}, 3e-4),
        ({"alpha": 1}, 1e-3),  # never more
        # 99 steps: 15 times the rate of full fine-tuning in place of 10
        ({"model_type": "llama", "hidden_size": 8192, "total_steps": 99}, 7.5e-4 * (2000 / 8192) ** 0.781),
        ({"model_type": "llama", "hidden_size": 8192, "total_steps": 100}, 5e-4 * (2000 / 8192) ** 0.781),
        ({"model_type": "gemma3_text", "total_steps": 50}, 4.5e-4),
    ],
)
def test_the_formula(changed: dict[str, object], rate: float) -> None:
    assert suggest_learning_rate(**{**QWEN_7B, **changed}).value == pytest.approx(rate, rel=0.05)  # type: ignore[arg-type]


def test_the_arithmetic_and_what_is_outside_the_formulas_range_are_said() -> None:
    said = str(suggest_learning_rate(**{**QWEN_7B, "hidden_size": 896, "alpha": 16}))  # type: ignore[arg-type]
    assert said == (
        "5e-4 x (2000 / 2048)^0.0775 x 32 / alpha 16 = 0.001; found for hidden sizes of 2,048 to 8,192; the "
        "nearest is taken, this model has 896"
    )
    unknown = str(suggest_learning_rate(**{**QWEN_7B, "model_type": "phi3"}))  # type: ignore[arg-type]
    assert unknown.startswith("0.0003; no formula is known for phi3 models")


@given(
    st.sampled_from(["qwen3", "llama", "mistral"]),
    st.integers(1, 100_000),
    st.integers(1, 4096),
    st.integers(1, 1024),
    st.booleans(),
    st.integers(1, 10**6),
)
def test_a_rate_is_always_a_rate(
    model_type: str, hidden_size: int, alpha: int, rank: int, use_rslora: bool, steps: int
) -> None:
    suggested = suggest_learning_rate(
        model_type=model_type,
        hidden_size=hidden_size,
        alpha=alpha,
        rank=rank,
        use_rslora=use_rslora,
        total_steps=steps,
    )
    assert 0 < suggested.value <= 1e-3
    assert math.isfinite(suggested.value)
