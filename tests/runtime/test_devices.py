"""What a run is given by its machine, its launcher and its shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.runtime.devices import build_accelerator, look_around, random_states, set_random_states


def test_accelerates_variables_change_neither_gradients_nor_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False)))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_the_folder_that_a_fix_names_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}")
    Path("outputs/run").mkdir(parents=True)
    Path("outputs/run/config.yaml").touch()
    for asked, named in (("outputs/run/", "outputs/run-2"), ("rows.jsonl/run", "outputs/run-2")):
        environment = look_around(RunConfig(output_dir=asked), 1)
        assert environment.output_dir_problem is not None
        assert environment.free_output_dir == named
        assert look_around(RunConfig(output_dir=named), 1).output_dir_problem is None


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
