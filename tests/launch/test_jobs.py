"""The job files: taken by the engine's own schema where it is small, and their commands by torchrun's parser and ours.

`docs/multi-gpu.md` says how each was tried by hand.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.run import get_args_parser

from lora_core.commands.main import build_parser
from lora_core.configuration import load_config
from lora_core.runtime.sharding import fsdp_plugin
from tests.conftest import ROOT

JOBS = ROOT / "launch/jobs"


def load(name: str) -> Any:
    return yaml.safe_load((JOBS / name).read_text(encoding="utf-8"))


def check_training(arguments: list[str]) -> None:
    """What stands behind `lora-core train`: it parses, its configuration loads, and it resumes by itself."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert isinstance(commands.choices, dict)
    parsed = commands.choices["train"].parse_intermixed_args(arguments)
    assert parsed.resume == "auto"
    assert load_config(parsed.cfg, parsed.overrides).data.train_file is not None


def check_torchrun(arguments: list[str]) -> Namespace:
    """One that can start again after a rank is lost, and trains."""
    launched: Namespace = get_args_parser().parse_args(arguments)
    assert launched.rdzv_backend == "c10d"  # torchrun's own default cannot start again
    assert launched.max_restarts > 0
    training = launched.training_script_args
    if launched.module:
        assert (launched.training_script, training[0]) == ("lora_core", "train")
        training = training[1:]
    else:
        assert (ROOT / launched.training_script) == ROOT / "launch/train.py"
    check_training(training)
    return launched


def arguments_of(command: str, script: str, folder: Path, variables: dict[str, str]) -> list[str]:
    """What bash gives to a command in a script, which is recorded and not run. pip is not run either."""
    recorded = folder / "recorded"
    # Without the variable, torchrun would give ranks that are started again the addresses of those before them.
    record = f'test "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 && printf "%s\\0" "$@" > {shlex.quote(str(recorded))}'
    for name, line in ((command, record), ("pip", "true")):
        (folder / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], env=environment, cwd=ROOT, check=True, timeout=60)
    return recorded.read_text(encoding="utf-8").split("\0")[:-1]


def test_each_has_its_command_in_its_head() -> None:
    heads = {path.name: path.read_text(encoding="utf-8")[:600] for path in JOBS.iterdir() if path.is_file()}
    assert sorted(heads) == ["dstack.yml", "kubernetes.yaml", "ray_train.py", "skypilot.yaml", "slurm.sbatch"]
    for name, head in heads.items():
        assert re.search(rf"^#? +(sbatch|sky|kubectl|dstack|ray) .*launch/jobs/{re.escape(name)}", head, re.MULTILINE)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_takes_the_service_and_the_job(version: str) -> None:
    for resource in yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text(encoding="utf-8")):
        assert kubernetes_validate.validate(resource, version, strict=True) == version


def test_the_pods_of_the_job_find_each_other_and_start_all_ranks() -> None:
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    launched = check_torchrun(container["command"][1:])
    machines = job["spec"]["completions"]
    assert machines == job["spec"]["parallelism"] == int(launched.nnodes)
    assert int(launched.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    # Kubernetes names the pod of index 0 so, as the host that the service's name belongs to.
    assert launched.rdzv_endpoint.split(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["workingDir"] == mounted["runs"]


def test_skypilot_starts_torchrun_on_all_machines(tmp_path: Path) -> None:
    job = load("skypilot.yaml")
    assert job["envs"]["RUN"].count("/runs/") == 2
    assert list(job["file_mounts"]) == ["/runs"]
    variables = {
        **job["envs"],
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "sky-managed-1",
    }
    launched = check_torchrun(arguments_of("torchrun", job["setup"] + job["run"], tmp_path, variables))
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")


def test_dstack_starts_torchrun_on_all_machines(tmp_path: Path) -> None:
    job = load("dstack.yml")
    variables = {
        **dict(line.split("=", 1) for line in job["env"]),
        "DSTACK_NODES_NUM": "2",
        "DSTACK_GPUS_PER_NODE": "8",
        "DSTACK_MASTER_NODE_IP": "10.0.0.1",
        "DSTACK_RUN_NAME": job["name"],
    }
    launched = check_torchrun(arguments_of("torchrun", "\n".join(job["commands"]), tmp_path, variables))
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (2, False), (75, True), (138, True)])
def test_slurm_requeues_what_a_signal_stopped_and_nothing_else(tmp_path: Path, code: int, is_requeued: bool) -> None:
    """The script under bash: `srun` is one that starts one of 8 processes, and `python` one that ends with a code."""
    commands = {
        "scontrol": f'[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "$@" >> {tmp_path / "scontrol.log"}',
        "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=5 SLURM_LOCALID=1 exec "$@"',
        "python": f'env > {tmp_path / "environment"}; printf "%s\\0" "$@" > {tmp_path / "recorded"}; exit {code}',
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    numbers = {"SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4, "SLURM_CPUS_PER_TASK": 8, "SLURM_JOB_ID": 31337}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in numbers.items()},
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    head = (JOBS / "slurm.sbatch").read_text(encoding="utf-8")
    command = re.search(r"^#   (sbatch .*)$", head, re.MULTILINE)
    assert command is not None
    sbatch, script, *arguments = shlex.split(command[1])
    assert sbatch == "sbatch"
    done = subprocess.run(["bash", script, *arguments], env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == code
    log = tmp_path / "scontrol.log"
    assert (log.read_text(encoding="utf-8") if log.exists() else "") == ("requeue 31337\n" if is_requeued else "")
    script_run, *training = (tmp_path / "recorded").read_text(encoding="utf-8").split("\0")[:-1]
    assert (ROOT / script_run).is_file()
    check_training(training)
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
    assert {name: seen[name] for name in expected} == expected
    assert 1024 < int(seen["MASTER_PORT"]) < 32768  # below the ports that systems give out


def test_slurm_signals_each_process_and_may_requeue() -> None:
    lines = re.findall(r"^#SBATCH (.*)$", (JOBS / "slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(lines)


def test_slurm_shards_as_the_accelerate_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a user uncomments, against what `accelerate launch` puts into the environment."""
    config = load_config("demo")
    line = re.search(r"^# export (ACCELERATE.*)$", (JOBS / "slurm.sbatch").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    in_file = load_config_from_file(str(ROOT / "configs/accelerate/fsdp2.yaml"))
    command = ["--config_file", str(ROOT / "configs/accelerate/fsdp2.yaml"), "launch/train.py"]
    launched, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    plugins = []
    for variables in (dict(word.split("=") for word in line[1].split()), prepare_multi_gpu_env(launched)):
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            plugin = fsdp_plugin(config)
            assert plugin is not None
            plugins.append(plugin)
    assert in_file.distributed_type.value == "FSDP"
    for name in ("fsdp_version", "reshard_after_forward", "cpu_ram_efficient_loading", "activation_checkpointing"):
        assert getattr(plugins[0], name) == getattr(plugins[1], name), name
    assert plugins[0].auto_wrap_policy == plugins[1].auto_wrap_policy


def test_ray_train_gives_its_command_line_to_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray is too large to be here: a module in its place says what it was given, and starts nothing."""
    (tmp_path / "ray/train").mkdir(parents=True)
    recorded = "class Recorded:\n    def __init__(self, *a, **k): self.given = k\n"
    (tmp_path / "ray/__init__.py").touch()
    (tmp_path / "ray/train/__init__.py").write_text(f"{recorded}FailureConfig = RunConfig = ScalingConfig = Recorded\n")
    (tmp_path / "ray/train/torch.py").write_text(
        f"{recorded}TorchConfig = Recorded\n"
        "class TorchTrainer(Recorded):\n    def fit(self): print(self.given['train_loop_config'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--cfg", "qwen7b", "data.train_file=chats.jsonl"])
    runpy.run_path(str(JOBS / "ray_train.py"), run_name="__main__")
    assert capsys.readouterr().out == "{'cfg': ['qwen7b'], 'overrides': ['data.train_file=chats.jsonl']}\n"
