"""What a run is given by its machine, its launcher and its shell."""

from __future__ import annotations

import pytest

from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.runtime.devices import build_accelerator


def test_accelerates_variables_change_neither_gradients_nor_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False)))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
