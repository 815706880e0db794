"""The program that started this process: `accelerate launch`, `torchrun`, or a user."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path

import psutil  # comes with Accelerate
import yaml

from lora_core.errors import ConfigError

_ACCELERATE = re.compile(r"(^|/)accelerate(-launch)?$|accelerate[./]commands[./]")


def asked_processes() -> int | None:
    """What the `accelerate launch` above this process was asked for; it passes the number on only where it uses it."""
    command = next(filter(None, map(_command_of_accelerate_launch, psutil.Process().parents()[:2])), None)
    if command is None:
        return None
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--num_processes", "--num-processes", type=int)
    options.add_argument("--config_file", "--config-file")
    known, _ = options.parse_known_args(command)
    if known.num_processes is not None:
        return int(known.num_processes)
    file = known.config_file
    if file is None and "--cpu" not in command:  # it reads the one that `accelerate config` wrote
        from accelerate.commands.config.config_args import default_config_file

        file = default_config_file
    if file is not None and Path(file).is_file():
        asked = yaml.safe_load(Path(file).read_text(encoding="utf-8")).get("num_processes")
        return asked if isinstance(asked, int) else None
    return None


def own_command() -> str:
    """What a launcher would start in place of this process's command, as `-m lora_core train --cfg qwen7b`."""
    program = Path(sys.argv[0])
    if program.parent.name == "launch":
        return shlex.join(sys.argv)
    if program.stem == "lora-core" or program.parts[-2:] == ("lora_core", "__main__.py"):
        return shlex.join(["-m", "lora_core", *sys.argv[1:]])
    return "YOUR_SCRIPT.py"  # of a program that calls `train` itself


def check_launch() -> None:
    """Refuse variables of a launch that contradict each other.

    torch and Accelerate take them as they are, and end in a traceback, or wait for ranks that nobody started.

    Raises:
        ConfigError: names the variable, and what to do.
    """
    for name, least in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        value = os.environ.get(name, str(least))
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
            raise ConfigError(f"{name}={value} in the environment: must be an int >= {least}; fix: unset {name}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and "LOCAL_RANK" not in os.environ:
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    fix = f"unset WORLD_SIZE RANK LOCAL_RANK, or torchrun --nproc_per_node {world_size} {own_command()}"
    if missing:
        name = "WORLD_SIZE" if world_size > 1 else "LOCAL_RANK"
        raise ConfigError(
            f"{name}={os.environ[name]} in the environment, without {', '.join(missing)}: a launcher sets all of "
            f"them in each process; fix: {fix}"
        )
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        limit = os.environ.get(size, str(world_size))
        if int(os.environ[name]) >= int(limit):
            raise ConfigError(f"{name}={os.environ[name]} in the environment: must be below {size}={limit}; fix: {fix}")


def refuse_several(what: str) -> None:
    """Refuse a launcher that started several processes of what runs in one.

    Raises:
        ConfigError: it did, by WORLD_SIZE.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched not in ("", "1"):
        raise ConfigError(
            f"{what} runs in one process, and WORLD_SIZE={launched}; fix: env -u WORLD_SIZE python {own_command()}"
        )


def speaks_for_machine() -> bool:
    """Whether this process says what all of its machine find: the first one there, or one without a launcher."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") in ("", "0")


def num_machines(num_processes: int) -> int:
    """That the launcher spread the processes over evenly; one, where it does not say how many are on each."""
    return max(1, num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)))


def _command_of_accelerate_launch(process: psutil.Process) -> list[str] | None:
    """The command line of a process that is an `accelerate launch`; None of another."""
    try:
        command = process.cmdline()
    except psutil.Error:  # gone, or another user's
        return None
    # Not any word that holds "accelerate": a script in a folder of that name may well end before what it started.
    return command if any(_ACCELERATE.search(part) for part in command[:4]) else None


def end_with_launcher() -> None:
    """Have the system send this process SIGTERM when the `accelerate launch` that started it ends.

    `accelerate launch` passes no signal on: without this, stopping it leaves the training behind, with nobody to stop
    it. Linux only; elsewhere the signal has to go to the training process.
    """
    launcher = psutil.Process().parent()
    if platform.system() != "Linux" or launcher is None or _command_of_accelerate_launch(launcher) is None:
        return
    pr_set_pdeathsig = 1  # from linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if not launcher.is_running():  # it ended before it could be followed
        os.kill(os.getpid(), signal.SIGTERM)


def end_accelerate_launch() -> None:
    """End the `accelerate launch` that started this process and waits for it, with SIGTERM (exit code 143).

    It would print a traceback of its own below an error that this process has explained. Not where it was told to be
    quiet, and not where it watches several processes: those it reports on in any case.
    """
    launcher = psutil.Process().parent()
    command = _command_of_accelerate_launch(launcher) if launcher is not None else None
    if launcher is None or command is None or "TORCHELASTIC_RUN_ID" in os.environ or {"-q", "--quiet"} & set(command):
        return
    if platform.system() == "Linux":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which its end sends here
    launcher.terminate()


def check_restarts() -> None:
    """Refuse a torchrun that would start lost ranks again and give them the addresses of the ranks before them.

    It keeps one store for all starts, unless told not to, and its default rendezvous always does (torch 2.13).

    Raises:
        ConfigError: it was asked for restarts, with such a store.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun --max-restarts {restarts}: ranks that are started again would be given the addresses of those "
            "before them; fix: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and torchrun with --standalone, or on "
            "several machines with --rdzv-backend c10d"
        )


# Variables that Accelerate reads besides what it is told here, with what each would do to a run.
_SETTINGS_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "its engine counts optimizer steps on its own",
    "ACCELERATE_USE_MEGATRON_LM": "its engine counts optimizer steps on its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "ranks that share an example would be counted as ranks with their own",
    "ACCELERATE_USE_SAGEMAKER": "its own library would exchange gradients",
    "ACCELERATE_FP8_BACKEND": "it puts layers of 8 bits in place of the model's",
}


def refuse_settings_of_the_shell(own_device: str) -> None:
    """Refuse what the environment may tell Accelerate of how to train, where it does not go by our settings.

    ACCELERATE_MIXED_PRECISION, ACCELERATE_GRADIENT_ACCUMULATION_STEPS and ACCELERATE_DYNAMO_* it does not read, as it
    is told these; FSDP's are looked at where FSDP is set up. The others that it has (Accelerate 1.15) change no number.

    Args:
        own_device: of this rank, such as `cuda:1`. Ray Train says so in ACCELERATE_TORCH_DEVICE too, which is taken out
            of the environment: Accelerate would not make it the current device, which random states are read of.

    Raises:
        ConfigError: one is set.
    """
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", own_device)
    if device != own_device:
        raise ConfigError(
            f"ACCELERATE_TORCH_DEVICE={device}: not supported, this rank's device is {own_device}, and random states "
            "would be those of another; fix: unset ACCELERATE_TORCH_DEVICE, and export CUDA_VISIBLE_DEVICES=1, or "
            "another number"
        )
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    for name, reason in _SETTINGS_REFUSED.items():
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "false", "no"):
            fix = f"unset {name}, and distributed_type: MULTI_GPU (DDP) or FSDP in the accelerate config"
            raise ConfigError(f"{name}={value}: not supported, {reason}; fix: {fix}")


def omp_num_threads() -> int | None:
    """OMP_NUM_THREADS as the user exported it; None where it is not set, or a launcher set it."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # of torchrun, of Accelerate
        launcher = psutil.Process().parent()
        try:
            value = launcher.environ().get("OMP_NUM_THREADS", "") if launcher else ""
        except psutil.Error:  # it is gone, or the system does not show it
            value = ""
    return int(value) if value.isdigit() and int(value) > 0 else None
