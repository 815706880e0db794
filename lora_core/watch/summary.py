"""What a run leaves behind in one object: `summary.json`, and what `train` returns."""

from __future__ import annotations

import math
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_core._version import __version__
from lora_core.config.schema import RunConfig
from lora_core.untrusted.limits import allowed_cores


@dataclass(frozen=True)
class Summary:
    """A run that has ended: what came of it, what it was, and how to get it again."""

    verdict: str
    """Whether it worked, in one sentence."""
    date: str
    """When it ended: UTC, ISO 8601."""
    hardware: str
    """What it ran on."""
    data_hash: str
    """SHA-256 of the tokens that were trained and measured on: the same rows, template and length give the same."""
    learning_rate: float
    """The one asked for."""
    peak_learning_rate: float
    """The largest that any planned step uses."""
    total_optimizer_steps: int
    """Planned; fewer were taken where `stopped_early_at_step` is set."""
    warmup_steps: int
    eval_loss_before: float | None
    """Mean cross-entropy per loss token of the eval set, before the first step; None without an eval set."""
    eval_loss_after: float | None
    """The same, of the adapter in `adapter_dir`."""
    eval_loss_change_error: float | None
    """Standard error of after minus before, over eval examples (`evaluate.compare_examples`)."""
    num_eval_examples: int | None
    num_eval_examples_better: int | None
    """Eval examples with a lower loss after than before."""
    num_eval_examples_worse: int | None
    eval_perplexity_after: float | None
    eval_token_accuracy_after: float | None
    """Share of the eval set's loss tokens that are the model's first guess, 0 to 1."""
    num_train_conversations: int
    """Training examples."""
    num_dropped_conversations: int
    """Of the whole training file, whatever share of it is the eval set."""
    train_rows: dict[str, int]
    """`RowCounts` of the whole training file: read = trained + eval + dropped."""
    eval_rows: dict[str, int] | None
    """`RowCounts` of data.eval_file; None without it."""
    num_supervised_tokens: int
    """Loss tokens trained on, over all steps."""
    num_skipped_steps: int
    """Steps that were not applied because loss or gradient was not finite."""
    stopped_early_at_step: int | None
    best_step: int | None
    """Step of the lowest eval loss; None without an eval set."""
    adapter_step: int
    """Step that the adapter in `adapter_dir` is of."""
    adapter_norm: float
    """Frobenius norm of all that the adapter adds to the base's weights; 0 before the first step."""
    alarms: list[dict[str, Any]]
    """Raised while it ran, each with its step; see `alarms.py`."""
    tracker_failures: dict[str, int]
    """Calls that a tracker failed at, of those with any."""
    git_commit: str | None
    """Checked out in `working_dir` when the run ended; None where that is no git repository."""
    micro_batch_limit: int
    """Of a micro-batch: tokens where it is packed, examples where it is padded."""
    world_size: int
    """Processes."""
    resumed_at_step: int | None
    train_time_s: float
    """Of the steps alone, over all parts of a resumed run."""
    wall_time_s: float
    """Of this process, from its start to its summary."""
    tokens_per_s: float
    """Tokens of the examples trained on, not loss tokens alone, over `train_time_s`; all processes together."""
    peak_memory_bytes: int
    """Of the fullest process: what the GPU's allocator gave out, or the resident memory on a CPU."""
    adapter_dir: str
    working_dir: str
    """The folder that relative paths in the configuration start from."""
    command: str
    """For a shell: it starts this run again, from any folder."""
    versions: dict[str, str]
    """Of what decides a run's numbers."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
    return {
        "lora_core": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def git_commit() -> str | None:
    """The commit that is checked out in the working folder; what is not committed does not show in it."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware(num_processes: int) -> str:
    """Such as `1 x NVIDIA H100 80GB HBM3; 16 cores of AMD EPYC 9654`."""
    cores = f"{allowed_cores()} cores of {_processor()}" if allowed_cores() > 1 else f"1 core of {_processor()}"
    if torch.cuda.is_available():
        return f"{num_processes} x {torch.cuda.get_device_name()}; {cores}"
    return f"{platform.processor() or platform.machine()} GPU; {cores}" if torch.backends.mps.is_available() else cores


def _processor() -> str:
    information = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows the name
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def adapter_norm(adapter_dir: Path) -> float:
    """Frobenius norm of the update that a saved adapter adds: sqrt(sum over modules of ||scaling * B A||^2).

    Of B A (out, in) only the two (r, r) Gram matrices are made: ||B A||^2 = sum((B^T B) * (A A^T)). B starts at zero,
    so the norm is how far training has moved the weights. DoRA's magnitudes and what is trained whole are not in it.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    settings = LoraConfig.from_pretrained(str(adapter_dir))
    square = 0.0
    with safe_open(adapter_dir / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if "lora_B" in name:
                up = file.get_tensor(name).double()  # (out, r)
                down = file.get_tensor(name.replace("lora_B", "lora_A")).double()  # (r, in)
                module = name.split(".lora_B")[0]
                alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern, module), settings.lora_alpha)
                scaling = alpha / (math.sqrt(len(down)) if settings.use_rslora else len(down))
                square += scaling**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(max(0.0, square))


# What may stand between a shell and this process.
_LAUNCHER = re.compile(
    r"(^|/)(accelerate|accelerate-launch|torchrun)$|accelerate[./]commands[./]|torch[./]distributed[./](run|launch)"
)


def command_again(argv: Sequence[str], config: RunConfig) -> str:
    """The command that started this process, for a shell in any folder.

    A launcher (`accelerate launch`, `torchrun`) is a part of it; `--resume` is not, and a run that may not be replaced
    gets another output_dir. Code that was not in a file, such as a notebook's, has no command; then it is the one that
    trains from the configuration in the run folder.

    Args:
        argv: `sys.argv`.
    """
    script = Path(argv[0]).name if argv else ""
    launcher = _launcher()
    another = [] if config.overwrite_output_dir else [f"output_dir={config.output_dir.rstrip('/')}-again"]
    if launcher is not None:
        command = [*without_resume(launcher), *another]
    elif script in ("", "-c", "-m") or "ipykernel" in argv[0]:
        command = ["lora-core", "train", "--cfg", str(Path(config.output_dir) / "config.yaml"), *another]
    elif script.startswith("lora-core"):
        command = ["lora-core", *without_resume(argv[1:]), *another]
    elif script == "__main__.py":
        command = [sys.executable, "-m", Path(argv[0]).absolute().parent.name, *without_resume(argv[1:]), *another]
    elif script == "train.py":
        command = [sys.executable, argv[0], *without_resume(argv[1:]), *another]
    else:  # a script of the user's own
        command = [sys.executable, *argv]
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)}"


def without_resume(arguments: Sequence[str]) -> list[str]:
    """A command line without `--resume` and the checkpoint that follows it."""
    kept: list[str] = []
    follows_resume = False
    for argument in arguments:
        is_checkpoint = follows_resume and not argument.startswith("-") and "=" not in argument
        follows_resume = argument == "--resume"
        if not (follows_resume or is_checkpoint or argument.startswith("--resume=")):
            kept.append(argument)
    return kept


def _launcher() -> list[str] | None:
    """The command line of the launcher that started this process; None where a shell or a program did."""
    import psutil  # comes with Accelerate

    parent = psutil.Process().parent()
    try:
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:  # it is gone, or another user's
        return None
    return command if any(_LAUNCHER.search(part) for part in command[:4]) else None
