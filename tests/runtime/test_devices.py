"""What a run is given by its machine, its launcher and its shell."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.runtime.devices import build_accelerator, random_states, set_random_states


def test_accelerates_variables_change_neither_gradients_nor_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False)))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_random_states_are_put_back() -> None:
    states = random_states()
    drawn = torch.rand(3)
    assert not torch.equal(torch.rand(3), drawn)
    set_random_states(states)
    assert torch.equal(torch.rand(3), drawn)


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it() -> None:
    code = (
        "import subprocess, sys, numpy\n"
        "held = numpy.ones(1500 * 2**20, dtype=numpy.uint8)\n"
        "child = 'import torch; from lora_core.runtime.devices import peak_memory_bytes; "
        'print(peak_memory_bytes(torch.device("cpu")))\'\n'
        "subprocess.run([sys.executable, '-c', child], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(done.stdout) < 1000 * 2**20
