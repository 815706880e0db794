"""The job files under the engines themselves, which are too large for every test run: `make clusters`.

SLURM (Debian's `slurm-wlm`) has two nodes on this machine, Ray two workers, and dstack its parser; SkyPilot's is in
`skypilot_job.py`. Each run is interrupted, starts again by itself, and ends with the same bits as one that nothing
interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dstack._internal.core.models.configurations import TaskConfiguration, parse_apply_configuration

from tests.tiny import ROOT, chat, make_tokenizer, save_tiny_model, write_jsonl

JOBS = ROOT / "launch/jobs"
NUM_STEPS = 200
SLURM_CONF = """
ClusterName=two-nodes
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host},{host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port_1}-{port_2}] CPUs=2 Gres=gpu:1
PartitionName=gpu Nodes=ALL PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model", make_tokenizer())
    rows = write_jsonl(folder / "rows.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(40)])
    return [
        f"model.name_or_path={folder / 'model'}",
        f"data.train_file={rows}",
        "data.eval_file=null",
        f"data.cache_dir={folder / 'cache'}",
        f"train.max_steps={NUM_STEPS}",
        "train.save_steps=20",
        "train.logging_steps=1",
        "train.num_sample_replies=0",
        "train.optim=adamw_torch",
        "train.learning_rate=1e-3",
        "train.bf16=false",
        "overwrite_output_dir=false",
    ]


@pytest.fixture(scope="module")
def uninterrupted(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of two ranks under torchrun."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*torchrun, "launch/train.py", "--cfg", "demo", *settings, f"output_dir={run}"], cwd=ROOT, check=True
    )
    return adapter(run)


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def steps_of(run: Path) -> int:
    """That were logged so far."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"event": "train"' in line), default=0)


def wait_until(what: str, is_so: Callable[[], bool], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def test_dstack_takes_the_job() -> None:
    job = parse_apply_configuration(yaml.safe_load((JOBS / "dstack.yml").read_text(encoding="utf-8")))
    assert isinstance(job, TaskConfiguration)
    assert job.nodes == 2
    assert (job.resources.gpu.name, job.resources.gpu.count.min) == (["A100"], 8)
    assert job.retry.duration == 24 * 3600


def test_ray_starts_its_workers_again_when_one_is_lost(
    settings: list[str], uninterrupted: bytes, tmp_path: Path
) -> None:
    script = (JOBS / "ray_train.py").read_text(encoding="utf-8")
    here = {"SHARED_FOLDER": repr(str(tmp_path)), "NUM_WORKERS": "2", "USE_GPU": "False", "CPUS_PER_WORKER": "1"}
    for name, value in here.items():
        script, replaced = re.subn(rf"^{name} = .*$", f"{name} = {value}", script, flags=re.MULTILINE)
        assert replaced == 1
    (tmp_path / "ray_train.py").write_text(script, encoding="utf-8")
    run = tmp_path / "run"
    command = [sys.executable, str(tmp_path / "ray_train.py"), "--cfg", "demo", *settings, f"output_dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as ray:
        wait_until("50 steps", lambda: steps_of(run) >= 50 or ray.poll() is not None)
        workers = [each for each in psutil.Process(ray.pid).children(recursive=True) if "RayTrainWorker" in each.name()]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        said, _ = ray.communicate(timeout=600)
    assert ray.returncode == 0
    assert "resume: from" in said
    assert adapter(run) == uninterrupted


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which `sbatch` finds a cluster of two nodes, each with a GPU that is an empty file."""
    assert shutil.which("slurmctld"), "slurmctld is not installed; fix: apt-get install slurm-wlm"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    # Ranks look up the name of the first node, so it is this machine's.
    host = socket.gethostname().partition(".")[0]
    conf = SLURM_CONF.format(host=host, folder=tmp_path, port=port, port_1=port + 1, port_2=port + 2)
    (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    (tmp_path / "gpu0").touch()
    (tmp_path / "gres.conf").write_text(f"Name=gpu Count=1 File={tmp_path / 'gpu0'}\n", encoding="utf-8")
    for name in ("state", f"spool-{host}", f"spool-{host}-2"):
        (tmp_path / name).mkdir()
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": python, "PYTHONPATH": str(ROOT)}
    daemons = [
        subprocess.Popen([*command, "-D"], env=environment)
        for command in (["slurmctld"], ["slurmd", "-N", host], ["slurmd", "-N", f"{host}-2"])
    ]
    try:
        wait_until("both nodes are idle", lambda: asked(environment, "sinfo", "--noheader", "-o", "%D %t") == "2 idle")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


def asked(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = dict.fromkeys(done.stdout.strip().splitlines())
    return lines.popitem()[0] if lines else ""


def test_slurm_requeues_a_job_that_a_signal_or_another_job_stopped(
    settings: list[str], uninterrupted: bytes, slurm: dict[str, str], tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]
    arguments = ["launch/jobs/slurm.sbatch", "--cfg", "demo", *settings, f"output_dir={run}"]
    job = asked(slurm, "sbatch", "--parsable", f"--output={log}", *size, *arguments)
    wait_until("40 steps", lambda: steps_of(run) >= 40)
    asked(slurm, "scancel", "--signal=USR1", job)
    wait_until("the job is requeued", lambda: "PENDING" in state_of(slurm, job))
    assert "stopped by SIGUSR1 after step" in log.read_text(encoding="utf-8")
    wait_until("100 steps", lambda: steps_of(run) >= 100)
    asked(slurm, "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    wait_until("the job is preempted", lambda: "PENDING" in state_of(slurm, job))
    assert "stopped by SIGTERM after step" in log.read_text(encoding="utf-8")
    wait_until("the job is completed", lambda: "COMPLETED" in state_of(slurm, job))
    said = log.read_text(encoding="utf-8")
    assert said.count("has no checkpoint yet, so the run starts") == 1
    assert said.count("resume: from") == 2
    assert adapter(run) == uninterrupted


def state_of(slurm: dict[str, str], job: str) -> Any:
    return asked(slurm, "squeue", "--noheader", "--states=all", "-o", "%T", f"--jobs={job}")
