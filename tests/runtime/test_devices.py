"""What a run is given by its machine, its launcher and its shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import accelerate
import pytest
import torch

from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.errors import ConfigError
from lora_core.runtime import ranks
from lora_core.runtime.devices import (
    _bf16,
    build_accelerator,
    device_memory,
    look_around,
    random_states,
    set_random_states,
)
from lora_core.runtime.launcher import refuse_settings_of_the_shell
from tests.conftest import ROOT


def test_accelerates_variables_change_neither_gradients_nor_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False)))
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


# What each variable of Accelerate's does to a run, as `refuse_settings_of_the_shell` says. A version of Accelerate with
# a variable that is not here fails the test below: look what it does, and put it in its place.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_TORCH_DEVICE": "cuda:1",
}
OBEYED = {"ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"}
TOLD_IN_ITS_PLACE = re.compile(
    "ACCELERATE_(MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DYNAMO_.*)"  # Accelerate reads none of them then
)
OF_WHAT_IS_REFUSED = re.compile(
    "ACCELERATE_(DEEPSPEED_.*|CONFIG_DS_FIELDS|GRADIENT_CLIPPING|SAGEMAKER_.*|FP8_.*|DOWNCAST_BF16|ALLOW_CP_STANDALONE)"
)
WITHOUT_EFFECT = {
    "ACCELERATE_BYPASS_DEVICE_MAP",  # of models on several devices
    "ACCELERATE_CPU_AFFINITY",  # which cores feed a GPU
    "ACCELERATE_DEBUG_MODE",  # checks Accelerate's own exchanges
    "ACCELERATE_DEBUG_RDV_FILE",  # of its notebook launcher
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_INIT_INCLUDE_BUFFERS",  # of `init_empty_weights`, which is not used here
    "ACCELERATE_LOG_LEVEL",
}


def test_each_variable_that_accelerate_reads_has_been_looked_at() -> None:
    folder = Path(accelerate.__file__).parent
    files = [
        file for file in folder.rglob("*.py") if not {"commands", "test_utils"} & set(file.relative_to(folder).parts)
    ]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    read = set(re.findall(r"[\"'](ACCELERATE_[A-Z0-9_]*[A-Z0-9])[\"']", text))
    assert {"ACCELERATE_USE_FSDP", "ACCELERATE_FP8_BACKEND"} <= read
    known = OBEYED | REFUSED.keys() | WITHOUT_EFFECT
    left = {name for name in read - known if not TOLD_IN_ITS_PLACE.fullmatch(name)}
    assert {name for name in left if not OF_WHAT_IS_REFUSED.fullmatch(name)} == set()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_otherwise_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, REFUSED[name])
    with pytest.raises(ConfigError, match=f"{name}={REFUSED[name]}: not supported, .*; fix: unset {name}, and "):
        build_accelerator(RunConfig(train=TrainConfig(bf16=False)))


def test_the_ranks_own_device_may_be_said_as_ray_train_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:3")
    refuse_settings_of_the_shell("cuda:3")
    # Accelerate makes the device that it finds by itself the current one; what it is told it does not.
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    assert build_accelerator(RunConfig(train=TrainConfig(bf16=False))).device.type == "cpu"


def test_accelerates_precision_is_that_of_the_run_whatever_the_shell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert build_accelerator(RunConfig(train=TrainConfig(bf16=False))).mixed_precision == "no"
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=True)))
    assert (accelerator.mixed_precision, accelerator.fp8_backend.value) == ("bf16", "NO")


def test_ranks_meet_over_both_backends_and_no_forward_waits_for_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "backend", lambda: "cuda:nccl,cpu:gloo")
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False, rank_timeout_s=77)))
    assert accelerator.init_handler.to_kwargs() == {"backend": "cuda:nccl,cpu:gloo", "timeout": timedelta(seconds=77)}
    assert accelerator.ddp_handler.to_kwargs() == {"broadcast_buffers": False}


def test_a_run_that_was_told_to_use_the_cpu_looks_at_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_memory().kind == "cpu"
    assert random_states().keys() == {"cpu"}
    assert _bf16() in ("native", "emulated")


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


class Device:
    """What `torch.xpu` is to an XPU: random numbers of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.get_rng_state, self.set_rng_state = self.generator.get_state, self.generator.set_state


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "npu"])
def test_random_states_of_any_device_are_put_back_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr("lora_core.runtime.devices._accelerator", lambda: (kind, device))
    states = random_states()
    assert states.keys() == {"cpu", kind}
    drawn = torch.rand(3, generator=device.generator)
    assert not torch.equal(torch.rand(3, generator=device.generator), drawn)
    set_random_states(states)
    assert torch.equal(torch.rand(3, generator=device.generator), drawn)
    set_random_states({"cpu": states["cpu"]})  # of a run that began on a CPU


def test_the_devices_of_torch_have_random_states() -> None:
    for module in (torch.cuda, torch.xpu, torch.mps):
        assert callable(module.get_rng_state)
        assert callable(module.set_rng_state)


def test_no_tensor_of_a_device_becomes_float64() -> None:
    """MPS has none."""
    folders = ("checkpoints", "evaluation", "model", "training")
    files = [file for folder in folders for file in (ROOT / "lora_core" / folder).glob("*.py")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if ".double()" in line]
    assert len(lines) > 2
    assert [line for line in lines if ".cpu().double()" not in line] == []


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
