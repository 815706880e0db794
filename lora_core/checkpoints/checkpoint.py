"""All state of the loop on disk, so that a resumed run ends as if it had never been stopped.

A checkpoint is a folder that appears whole or not at all:

    step-000050/
      adapter.safetensors       what trains, by parameter name
      optimizer.safetensors     the optimizer's tensors, "<parameter>/<key>"
      rng-00000.safetensors     random states, a file a rank
      state.json                counters, schedule, losses so far, the configuration, a hash of the data
      manifest.json             size and SHA-256 of each file above

Which rows a step takes is a function of seed and step (`packing.step_rows`), so the data's position is the step.
Nothing is unpickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.checkpoints.adapter_folder import named_trainable, trainable_tensors
from lora_core.errors import ConfigError
from lora_core.runtime.devices import random_states, seed_everything, set_random_states
from lora_core.runtime.ranks import from_first_rank, gather_from_ranks
from lora_core.runtime.run_folder import json_text, remove_leftovers, whole_folder, write_json
from lora_core.runtime.sharding import shared_out_as, whole

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

# What schedule-free optimizers keep beside the learning rate, by group.
_GROUP_STATE = ("k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file is there, with the size and hash that its manifest says."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """By file, as in `Snapshot`: rank 0 reads them, and the other ranks may be on machines without the files."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


@dataclass(frozen=True)
class Snapshot:
    """Copies, in host memory, of all that a checkpoint holds: training may continue while they are written."""

    tensors: dict[str, dict[str, Tensor]]
    """By file."""
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for file in self.tensors.values() for tensor in file.values())


def take_snapshot(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    state: dict[str, Any],
) -> Snapshot:
    """Copy everything; call it in every rank, between two optimizer steps.

    Args:
        state: what the loop itself has to remember, plain values; `step` is the number of steps taken.
    """
    of_ranks = gather_from_ranks(random_states())
    optimizer_tensors, scalars = _optimizer_state(model, optimizer)
    return Snapshot(
        tensors={
            "adapter.safetensors": trainable_tensors(model),
            "optimizer.safetensors": optimizer_tensors,
            **{f"rng-{rank:05d}.safetensors": random_state for rank, random_state in enumerate(of_ranks)},
        },
        state={
            **state,
            "world_size": accelerator.num_processes,
            "optimizer": scalars,
            "schedule": {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"},
            "optimizer_groups": [
                {name: group[name] for name in _GROUP_STATE if name in group} for group in optimizer.param_groups
            ],
            "learning_rates": [group["lr"] for group in optimizer.param_groups],
        },
    )


class CheckpointWriter:
    """Writes checkpoints one after the other, in a thread of the main process, so that no step waits for a disk."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[Path] | None = None

    def start(self, path: Path, snapshot: Snapshot, limit: int, best: str | None = None) -> None:
        """Begin to write, and `keep_newest(path.parent, limit, best)` once it is whole. `wait` before the next one."""
        if self._accelerator.is_main_process:
            self._writing = self._thread.submit(_write_and_tidy, path, snapshot, limit, best)

    def wait(self) -> Path | None:
        """Until what was begun is on disk; call it in every rank.

        Returns:
            In the main process, the checkpoint that was written; None if none was begun.

        Raises:
            OSError: in every rank: the disk is full or cannot be written; the checkpoints before it are whole.
        """
        problem, path = None, None
        if self._writing is not None:
            try:
                path = self._writing.result()
            except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
                problem = str(error)
            self._writing = None
        problem = from_first_rank(lambda: problem)  # all ranks stop, or none
        if problem is not None:
            raise OSError(problem)
        return path


def _write_and_tidy(path: Path, snapshot: Snapshot, limit: int, best: str | None) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as folder:
            for name, tensors in snapshot.tensors.items():
                save_file(tensors, folder / name)
            write_json(folder / "state.json", snapshot.state)
            write_json(folder / "manifest.json", {file.name: _identity(file) for file in sorted(folder.iterdir())})
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.anchor).free
        sizes = f"it takes {snapshot.num_bytes / 2**20:.1f} MiB and the disk has {free / 2**20:.1f} MiB left"
        raise OSError(f"{path} could not be written: {error} ({sizes}); earlier checkpoints are whole") from error
    keep_newest(path.parent, limit, best)
    return path


def keep_newest(folder: Path, limit: int, best: str | None = None) -> None:
    """Remove all but the newest checkpoints of a run, and the one named `best`."""
    for path in sorted(folder.glob("step-*"))[:-limit]:
        if path.name != best:
            shutil.rmtree(path)


def find_checkpoint(run_folder: Path, asked: Path | None, say: Callable[[str], None], may_rename: bool) -> Checkpoint:
    """The newest whole checkpoint of a run, or the one that is named.

    A damaged one is named and set aside (`damaged-step-000050`), and the one before it is taken. What interrupted saves
    left behind is removed.

    Args:
        may_rename: change the folder; one process of a run does, and while none writes.

    Raises:
        ConfigError: there is none, or the named one is damaged.
    """
    if may_rename:
        remove_leftovers(run_folder)
        remove_leftovers(run_folder / "checkpoints")
    if asked is not None:
        problem = _damage(asked)
        if problem is not None:
            raise ConfigError(f"--resume {asked}: {problem}; fix: --resume without a path takes the newest whole one")
        return _read(asked)
    for path in sorted((run_folder / "checkpoints").glob("step-*"), reverse=True):
        problem = _damage(path)
        if problem is None:
            return _read(path)
        say(f"checkpoint {path} is damaged ({problem}); set aside; the one before it is used")
        if may_rename:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)  # the same step may have been damaged and written again before
            path.rename(aside)
    raise ConfigError(
        f"--resume: {run_folder} has no whole checkpoint; fix: start without --resume, and set train.save_steps"
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that is to be read alone, outside of its run.

    Raises:
        ConfigError: it is damaged.
    """
    problem = _damage(path)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}; fix: another checkpoint of the run, or its adapter/")
    return _read(path)


def set_aside_newer(checkpoint: Checkpoint) -> list[str]:
    """Rename the run's checkpoints of later steps: the run that resumes from this one will write its own.

    Returns:
        Their names now, such as `superseded-step-000080`.
    """
    newer = [path for path in checkpoint.path.parent.glob("step-*") if path.name > checkpoint.path.name]
    for path in newer:
        target = path.with_name(f"superseded-{path.name}")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier time
        path.rename(target)
    return sorted(f"superseded-{path.name}" for path in newer)


def restore(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
) -> None:
    """Put adapter, optimizer, schedule and random states back as they were; call it in every rank.

    On another number of ranks each draws its dropout masks anew: they are then others in any case.

    Args:
        scheduler: None where a new schedule begins here.
    """
    restore_adapter(checkpoint, model)
    _restore_optimizer(checkpoint, dict(named_trainable(model)), optimizer)
    for group, values in zip(optimizer.param_groups, checkpoint.state.get("optimizer_groups", []), strict=False):
        group.update(values)
    if scheduler is not None:
        # The lambdas are code: the plan has made them anew.
        lambdas = [None] * len(optimizer.param_groups)
        scheduler.load_state_dict({**checkpoint.state["schedule"], "lr_lambdas": lambdas})
        for group, rate in zip(optimizer.param_groups, checkpoint.state["learning_rates"], strict=True):
            group["lr"] = rate
    rank = accelerator.process_index
    if checkpoint.state["world_size"] == accelerator.num_processes:
        set_random_states(checkpoint.tensors[f"rng-{rank:05d}.safetensors"])
    else:
        seed_everything(checkpoint.state["config"]["train"]["seed"] + checkpoint.step, rank)


@torch.no_grad()
def restore_adapter(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put what trains back as it was; call it in every rank."""
    trainable = dict(named_trainable(model))
    for name, tensor in checkpoint.tensors["adapter.safetensors"].items():
        trainable[name].copy_(shared_out_as(trainable[name], tensor))


# ---------------------------------------------------------------------------------------------------------------


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors, plain values) of the optimizer, by parameter."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in named_trainable(model):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                # A copy: parameters share bitsandbytes' tables, and safetensors stores no tensor twice.
                tensors[f"{name}/{key}"] = whole(value.detach()).cpu().clone().contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def _restore_optimizer(
    checkpoint: Checkpoint, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    for name, values in checkpoint.state["optimizer"].items():
        inner.state[trainable[name]].update(values)
    for full_name, tensor in checkpoint.tensors["optimizer.safetensors"].items():
        name, key = full_name.rsplit("/", 1)
        parameter = trainable[name]
        if getattr(inner, "is_paged", False) and key in ("state1", "state2"):
            buffer = inner.get_state_buffer(parameter, dtype=tensor.dtype)
            buffer.copy_(tensor)
            inner.state[parameter][key] = buffer
        else:
            # The counter of steps too: torch's fused AdamW, which is the one we build, wants it beside its parameter.
            of_whole_run = tensor.dim() == 0
            inner.state[parameter][key] = (
                tensor.to(parameter.device) if of_whole_run else shared_out_as(parameter, tensor)
            )


def _identity(file: Path) -> dict[str, Any]:
    content = file.read_bytes()  # an adapter or its optimizer's state: tens of megabytes
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if not path.is_dir():
        return "no such folder"
    try:
        text = (path / "manifest.json").read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != json_text(manifest):  # nothing vouches for the manifest itself: not even a space may differ
            return "its manifest.json is not as it was written"
        wrong = [
            name
            for name, identity in manifest.items()
            if Path(name).name != name or not (path / name).is_file() or _identity(path / name) != identity
        ]
    except (OSError, ValueError, AttributeError) as error:
        return f"its manifest.json cannot be read: {error}"
    if not {"adapter.safetensors", "optimizer.safetensors", "state.json"} <= manifest.keys():
        return "its manifest.json names too few files"
    return f"{', '.join(wrong)} differs from its manifest.json" if wrong else None


def _read(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        tensors = {name: load_file(path / name) for name in manifest if name.endswith(".safetensors")}
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: it cannot be read: {error}") from error
    return Checkpoint(path, state, tensors)
