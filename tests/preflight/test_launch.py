"""Preflight on several devices names the command line that starts the run, by predicted memory; it can be pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from lora_core.commands.main import main
from lora_core.config.schema import TrainConfig
from lora_core.configuration import load_config
from lora_core.preflight.launch import choose_launch
from lora_core.preflight.memory import fsdp_changes
from lora_core.preflight.plan import plan_for
from lora_core.preflight.preflight import look_at_run
from lora_core.preflight.ranks import steps_of_one_process
from tests.conftest import ROOT, chat
from tests.tiny import run_settings

LARGE = 24 * 2**30


@pytest.fixture
def choose(tmp_path: Path, tiny_model_dir: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What preflight chooses for a run on a few rows, in a folder with nothing else in it."""
    rows = write_rows([chat(f"question {i}", f"answer {i}") for i in range(8)])
    words = ["--cfg", "qwen0.5b", *run_settings(tmp_path, tiny_model_dir, rows), "data.eval_file=null"]
    empty = tmp_path / "my folder"
    empty.mkdir()
    monkeypatch.chdir(empty)

    def run(processes: int, machines: int, gpu_bytes: int | None, *overrides: str, as_facts: bool = False) -> Any:
        config = load_config(words[1], [*words[2:], *overrides])
        facts = look_at_run(config, processes, None if gpu_bytes is None else gpu_bytes / 2**30, machines)
        return facts if as_facts else choose_launch(facts, [*words, *overrides])

    return run


def launched(command: str) -> Any:
    """What `accelerate launch` makes of a command line; the training's own words are checked here."""
    program, launch, *words = shlex.split(command)
    assert (program, launch) == ("accelerate", "launch")
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.module
    assert arguments.training_script == "lora_core"
    train, cfg_option, cfg, *overrides = arguments.training_script_args
    assert (train, cfg_option) == ("train", "--cfg")
    arguments.config = load_config(cfg, overrides)
    return arguments


def test_where_a_copy_fits_it_is_ddp_with_the_file_of_the_package_or_of_this_folder(choose: Any) -> None:
    launch = choose(4, 1, LARGE)
    assert launch.config_file == "ddp.yaml"
    assert "24.0 GiB predicted" in launch.reason
    arguments = launched(launch.command)
    assert Path(arguments.config_file).samefile(ROOT / "configs/accelerate/ddp.yaml")
    assert (arguments.multi_gpu, arguments.num_processes, arguments.num_machines) == (True, 4, 1)
    assert main(["launch-files"]) == 0
    assert launched(choose(4, 1, LARGE).command).config_file == "configs/accelerate/ddp.yaml"


def test_on_several_machines_the_command_has_what_each_must_say(choose: Any) -> None:
    launch = choose(16, 4, LARGE)
    assert launch.config_file == "multinode_ddp.yaml"
    arguments = launched(launch.command)
    assert (arguments.num_processes, arguments.num_machines, arguments.machine_rank) == (16, 4, 0)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("10.0.0.1", 29500)
    assert "its own --machine_rank (0 to 3), and with the address of the first for --main_process_ip" in str(launch)
    assert "its own --node_rank (0 to 3)" in str(choose(16, 4, None, "model.dtype=float32", "train.bf16=false"))
    assert choose(4, 1, LARGE).to_fill_in is None


def test_a_run_that_takes_smaller_micro_batches_by_itself_is_started(choose: Any) -> None:
    of_eight = ["data.packing=false", "train.per_device_train_batch_size=8", "train.auto_batch_size=true"]
    limit = choose(2, 1, LARGE, *of_eight, as_facts=True).memory.total_bytes - 1
    launch = choose(2, 1, limit, *of_eight)
    assert launch.config_file == "ddp.yaml"
    assert "micro-batches of at most 2 rows (train.auto_batch_size)" in launch.reason
    assert "train.auto_batch_size" not in choose(2, 1, limit, *of_eight[:2]).reason


def test_where_no_way_fits_it_says_what_would(choose: Any) -> None:
    of_eight = ["data.packing=false", "train.per_device_train_batch_size=8", "train.fp16=true", "train.bf16=false"]
    facts = choose(2, 1, LARGE, *of_eight, as_facts=True)
    launch = choose(2, 1, facts.memory.total_bytes - 1, *of_eight)
    assert "start: as configured, no way fits" in str(launch)
    fix = re.search(r"; with (.+) it would fit", launch.reason)
    assert fix is not None
    assert choose(2, 1, facts.memory.total_bytes - 1, *of_eight, *fix[1].split()).command is not None
    assert "would fit" not in choose(2, 1, 2**20, *of_eight).reason


def test_where_only_a_share_fits_it_is_fsdp_with_the_optimizer_that_it_needs(choose: Any) -> None:
    of_copy = choose(2, 1, LARGE, as_facts=True).memory.total_bytes
    launch = choose(2, 1, of_copy - 1)
    assert launch.config_file == "fsdp2.yaml"
    assert "does not fit on each device" in launch.reason
    arguments = launched(launch.command)
    assert arguments.use_fsdp
    assert arguments.config.train.optim == "adamw_torch"
    several = launched(choose(2, 2, of_copy - 1).command)
    assert (several.use_fsdp, several.num_machines, several.main_process_port) == (True, 2, 29500)
    too_small = choose(2, 1, 2**20)
    assert too_small.command is too_small.config_file is None
    assert "nor does a share of it" in too_small.reason
    assert "cannot be shared out" in choose(2, 1, 2**20, "train.fp16=true", "train.bf16=false").reason


def test_on_cpus_it_is_torchrun(choose: Any) -> None:
    program, *words = shlex.split(choose(4, 2, None, "model.dtype=float32", "train.bf16=false").command)
    arguments = get_args_parser().parse_args(words)
    assert (program, arguments.nproc_per_node, arguments.nnodes) == ("torchrun", "2", "2")
    assert (arguments.training_script, arguments.training_script_args[0]) == ("lora_core", "train")


def test_4_bits_and_8_are_stored_as_fsdp_can_share_them() -> None:
    changes = {name: fsdp_changes(load_config("qwen7b", [f"model.quantization={name}"])) for name in ("nf4", "int8")}
    assert changes["nf4"] == ["model.quant_storage=bfloat16", "train.optim=adamw_torch"]
    assert changes["int8"] == ["model.quantization=nf4", *changes["nf4"]]
    assert fsdp_changes(load_config("qwen7b", [*changes["nf4"]])) == []


@given(st.integers(1, 8), st.integers(1, 16), st.integers(2, 40))
def test_the_same_steps_have_as_many_examples(batch: int, accumulation: int, processes: int) -> None:
    train = TrainConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    overrides = steps_of_one_process(train, processes)
    assert (overrides is None) == (batch * accumulation % processes != 0)
    if overrides is not None:
        settings = dict(part.removeprefix("train.").split("=") for part in overrides.split())
        of_one = int(settings.get("per_device_train_batch_size", batch))
        steps = int(settings.get("gradient_accumulation_steps", accumulation))
        assert of_one * steps * processes == batch * accumulation
        assert of_one <= batch


def cells_of(line: str) -> list[str]:
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


def test_the_page_has_the_steps_that_are_planned() -> None:
    lines = (ROOT / "docs/multi-gpu.md").read_text(encoding="utf-8").splitlines()
    picked = [cells_of(line) for line in lines if re.match(r"\| \d+ GPU", line)]
    assert [int(cells[0].split()[0]) for cells in picked] == [1, 4, 4, 16]
    for gpus, _, steps, warmup, *_ in picked:
        plan = plan_for(load_config("qwen7b"), 1000, int(gpus.split()[0]))
        assert (str(plan.total_optimizer_steps), str(plan.warmup_steps)) == (steps, warmup)
    (head,) = (cells_of(line) for line in lines if line.startswith("| `--cfg` |"))
    for name, *steps in (cells_of(line) for line in lines if line.startswith("| `qwen")):
        planned = [plan_for(load_config(name), 78, int(cell.split()[0])) for cell in head[1:]]
        assert [str(plan.total_optimizer_steps) for plan in planned] == [cell.split()[0] for cell in steps]


def test_the_page_has_the_memory_that_is_predicted() -> None:
    """The GiB of `1 x 1024` with checkpointing: after the slash in the table that is written from predictions."""
    lines = (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines()
    (head,) = (cells_of(line)[3:] for line in lines if line.startswith("| model | weights |"))
    of_weights = {
        cells[1]: {name: cell.split(" / ")[1] for name, cell in zip(head, cells[3:], strict=True)}
        for cells in map(cells_of, lines)
        if cells[:1] == ["Qwen2.5-7B-Instruct"] and cells[2] == "1 x 1024"
    }
    page = (ROOT / "docs/multi-gpu.md").read_text(encoding="utf-8").splitlines()
    picked = [cells_of(line) for line in page if re.match(r"\| \d+ GPU", line)]
    for cells, column in zip(picked, ["1 GPU", "DDP, 2 to 8", "FSDP, 4", "DDP, 2 to 8"], strict=True):
        assert cells[4:6] == [of_weights[weights][column] for weights in ("NF4", "bf16")]


def test_started_by_a_launcher_it_is_about_that_launch_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = ["preflight", "--cfg", "demo", "--num-machines", "2"]
    assert main(command) == 2
    assert "--num-machines 2: 3 processes cannot be spread evenly" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")
