"""The shipped Accelerate configurations are ones that Accelerate takes; FSDP settings that do not work are refused."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.devices import build_accelerator
from lora_core.runtime.launcher import check_launch, check_restarts, num_machines, own_command, speaks_for_machine
from lora_core.runtime.sharding import check_sharding, check_units, fsdp_plugin, loads_on_first_rank
from tests.conftest import ROOT
from tests.tiny import make_model

FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def command_of(file: Path) -> list[str]:
    """The words of the command in a file's head."""
    (line,) = [
        line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#   accelerate launch")
    ]
    return shlex.split(line[1:])


def test_there_is_one_for_each_topology() -> None:
    names = [file.stem for file in FILES]
    assert names == ["cpu", "ddp", "fsdp2", "fsdp2_qlora", "multinode_ddp", "single"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_takes_it_and_its_command(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    in_file = load_config_from_file(str(file))  # refuses keys that it does not know
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command_of(file)[2:]))
    assert arguments.config_file == str(file.relative_to(ROOT))
    assert arguments.training_script == "launch/train.py"
    cfg_option, cfg, *overrides = arguments.training_script_args
    assert cfg_option == "--cfg"
    config = load_config(cfg, overrides)
    assert arguments.num_machines == in_file.num_machines
    assert arguments.multi_gpu == file.stem.endswith("ddp")
    assert arguments.use_fsdp == file.stem.startswith("fsdp2")
    if arguments.use_fsdp:
        for name, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(name, value)
        plugin = fsdp_plugin(config)
        assert plugin is not None
        assert plugin.reshard_after_forward is True
        assert loads_on_first_rank() == (file.stem == "fsdp2")  # quantized weights are loaded by each rank
        assert config.train.optim == "adamw_torch"


def test_the_file_beside_the_readme_is_the_one_for_a_single_device() -> None:
    single, beside = (load_config_from_file(str(ROOT / name)) for name in (FILES[-1], "accelerate_config.yaml"))
    assert single.to_dict() == beside.to_dict()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 1: not supported"),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "true",
            "recomputes with other dropout masks; fix, in the accelerate config: ",
        ),
        ("FSDP_OFFLOAD_PARAMS", "true", "fix, in the accelerate config: fsdp_offload_params: false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fix, in .*: fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ("FSDP_IGNORED_MODULES", ".*lora.*", r"fsdp_ignored_modules: \.\*lora\.\*: not supported, it leaves what"),
        ("FSDP_STATE_DICT_TYPE", "WHOLE", "Accelerate does not take its settings: 'WHOLE'; fix: configs/accelerate"),
    ],
)
def test_what_fsdp_cannot_do_right_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for key, given in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ConfigError, match=said):
        fsdp_plugin(load_config("demo"))


def test_rank_0_alone_loads_what_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = fsdp_plugin(load_config("demo", ["model.quantization=none"]))
    assert plugin is not None
    assert not plugin.cpu_ram_efficient_loading  # it is ours
    assert loads_on_first_rank()
    said = "fsdp_cpu_ram_efficient_loading: true with model.quantization=nf4: not supported, .*_loading: false"
    with pytest.raises(ConfigError, match=said):
        fsdp_plugin(load_config("demo", ["model.quantization=nf4"]))


def test_losses_and_gradients_of_ranks_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    bf16, float32 = (fsdp_plugin(load_config("demo", [f"train.bf16={on}"])) for on in ("true", "false"))
    assert bf16 is not None
    assert float32 is not None
    bf16.set_mixed_precision("bf16")  # as Accelerate does on GPUs: it leaves a policy that is there
    policy = bf16.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert (policy.output_dtype, policy.cast_forward_inputs) == (None, False)
    assert float32.mixed_precision_policy == MixedPrecisionPolicy()


def test_fsdp_gathers_one_decoder_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = fsdp_plugin(load_config("demo", ["train.bf16=false"]))
    model = CausalLMLoss(make_model(64, num_layers=3))
    assert plugin is not None
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert is_unit is not None
    units = [module for module in model.modules() if is_unit(module)]
    assert units == list(model.model.model.layers)


def test_a_run_that_would_not_be_sharded_or_by_other_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = build_accelerator(load_config("demo", ["train.bf16=false"]))
    check_sharding(accelerator)
    check_units(accelerator, ["Qwen2DecoderLayer"])
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="this run is 1 process on cpu; fix: unset ACCELERATE_USE_FSDP"):
        check_sharding(accelerator)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    plugin = fsdp_plugin(load_config("demo", ["train.bf16=false"]))
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    check_sharding(accelerator)
    check_units(accelerator, ["LlamaDecoderLayer"])
    with pytest.raises(ConfigError, match=r"layer_cls_to_wrap: LlamaDecoderLayer: .* \(Qwen2DecoderLayer\); fix"):
        check_units(accelerator, ["Qwen2DecoderLayer"])


def test_an_early_torch_shards_no_float32_adapter_in_bfloat16_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("lora_core.runtime.sharding.is_torch_version", lambda *_: True)
    with pytest.raises(ConfigError, match=r"fix: pip install 'torch>=2\.9'"):
        fsdp_plugin(load_config("demo", ["model.dtype=bfloat16"]))
    assert fsdp_plugin(load_config("demo", ["model.dtype=float32", "train.bf16=false"])) is not None


def test_more_processes_than_gpus_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes were started on this machine, which has 2 GPUs"):
        build_accelerator(load_config("demo"))


@pytest.mark.parametrize(
    ("restarts", "shares", "is_refused"), [("3", "True", True), ("0", "True", False), ("3", "False", False)]
)
def test_restarts_that_torchrun_cannot_make_are_refused_at_the_first_start(
    monkeypatch: pytest.MonkeyPatch, restarts: str, shares: str, is_refused: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares)
    if is_refused:
        with pytest.raises(ConfigError, match="fix: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
            check_restarts()
    else:
        check_restarts()


@pytest.mark.parametrize(
    ("num_processes", "on_each", "machines"), [(8, "4", 2), (8, "8", 1), (8, None, 1), (1, "1", 1)]
)
def test_machines_are_counted_by_the_processes_on_each(
    num_processes: int, on_each: str | None, machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's memory is shared by the processes on its machine alone."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if on_each is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_each)
    assert num_machines(num_processes) == machines


WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 in the environment, without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment, without RANK, MASTER_ADDR, MASTER_PORT: "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: must be an int >= 1; fix: unset WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment: must be an int >= 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment: must be an int >= 0; fix: unset LOCAL_RANK"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 in the environment: must be below WORLD_SIZE=2; fix: unset "),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 in the environment: must be below LOCAL_WORLD_SIZE=1"),
    ],
)
def test_a_launch_that_cannot_be_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    """torch and Accelerate end in a traceback, wait for ranks that nobody started, or share nothing out."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        build_accelerator(load_config("demo", ["train.bf16=false", "model.dtype=float32"]))


def test_what_launchers_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WHOLE, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    check_launch()
    assert not speaks_for_machine()  # of two ranks, the other says it
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert speaks_for_machine()


@pytest.mark.parametrize(
    "command",
    [
        ["verify", "--cfg", "demo"],
        ["find-lr", "--cfg", "demo"],
        ["chat", "outputs/demo"],
        ["train", "--cfg", "demo", "--models", "a,b"],
        ["evaluate", "--cfg", "demo", "--adapter", "none", "--lm-eval", "arc_easy"],
    ],
    ids=lambda command: command[0],
)
def test_what_runs_in_one_process_refuses_a_launcher_with_a_command_to_paste(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # commands set their own
    monkeypatch.setattr(sys, "argv", ["lora-core", *command])
    for name, value in {**WHOLE, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert re.search(r"runs in one process, and WORLD_SIZE=2; fix: env -u WORLD_SIZE python -m lora_core ", said)
    assert said.endswith(f" {shlex.join(command)}\n")


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("launch/train.py", "launch/train.py --cfg 'my file.yaml'"),
        ("/usr/bin/lora-core", "-m lora_core --cfg 'my file.yaml'"),
        ("/site-packages/lora_core/__main__.py", "-m lora_core --cfg 'my file.yaml'"),
        ("own_loop.py", "YOUR_SCRIPT.py"),
    ],
)
def test_a_fix_names_the_command_that_was_given(monkeypatch: pytest.MonkeyPatch, program: str, command: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "--cfg", "my file.yaml"])
    assert own_command() == command
