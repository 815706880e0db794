"""Runs of several numbers of ranks at once, on CPUs, forked from one process that has imported everything.

python -m tests.equivalence.forked_ranks FOLDER

FOLDER/runs.json: {"4": [{"name": NAME, "sharding": ..., "settings": ...}]} for 4 ranks and so on, as `one_rank` takes
them, and maybe "signal_to_rank_1". Each rank writes what it took and sent to FOLDER/NAME-seen-RANK.json: the
attributes of `Seen`.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lora_core.commands.command_line import quiet_libraries
from lora_core.data.packing import Batching, StepBatches
from lora_core.errors import RunStopped
from lora_core.runtime.ranks import leave
from lora_core.training.loop import Run
from tests.equivalence import one_rank

for _name in ("peft", "lora_core.training.setup", "lora_core.training.finish", "lora_core.memory.plan"):
    importlib.import_module(_name)


MEMORY = (3 * 2**30, 7 * 2**30, 5 * 2**30, 2**30)
"""Bytes that the ranks say they held at most."""


class Seen:
    """What one rank of one run takes and sends."""

    def __init__(self, signal_name: str | None) -> None:
        self.signal_name = signal_name
        """That this rank gets in its fifth step."""
        self.stopped: str | None = None
        self.exit_code = 0
        self.rows: list[int] = []
        self.exchanges = 0
        self.most_micro_batches = 0
        self.gradient_bytes = 0
        """Of FSDP2: the most that is held between two micro-batches."""

    def takes(self, run: Run, step: int, batching: Batching) -> StepBatches:
        """`Run.batches`; a filler's row is another rank's."""
        batches = _batches(run, step, batching)
        if self.signal_name is not None and run.progress.step == 4:
            os.kill(os.getpid(), getattr(signal, self.signal_name))
        self.rows += [int(row) for cut in batches.cuts if not cut.is_filler for row in cut.rows]
        self.most_micro_batches = max(self.most_micro_batches, len(batches.cuts))
        return batches

    def copies(self, model: DistributedDataParallel, *arguments: Any, **settings: Any) -> None:
        """DDP, with its own exchange of a bucket of gradients: the adapter of these runs is one bucket."""
        _init(model, *arguments, **settings)
        model.register_comm_hook(None, self._exchange)

    def _exchange(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.exchanges += 1
        return allreduce_hook(state, bucket)

    @contextmanager
    def accumulates(self, accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
        """`Accelerator.no_sync`, around each micro-batch of a step but the last."""
        with _no_sync(accelerator, model):
            yield
        units = [each for each in model.modules() if isinstance(each, FSDPModule)]
        groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group) is not None]
        whole = [
            each.unsharded_param.grad
            for group in groups
            for each in group.fsdp_params
            if hasattr(each, "_unsharded_param")
        ]
        held = sum(gradient.nbytes for gradient in whole if gradient is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)

    def shares(self, *arguments: Any, **settings: Any) -> Any:
        """FSDP2's exchange of the gradients of one decoder layer."""
        self.exchanges += 1
        return _reduce_scatter(*arguments, **settings)


# As torch's FSDP2 calls it, in 2.13 and before.
_NAME = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
_no_sync = Accelerator.no_sync
_batches, _init, _reduce_scatter = Run.batches, DistributedDataParallel.__init__, getattr(dist, _NAME)


def take_part(run: dict[str, Any]) -> Seen:
    """Take part in a run, as `one_rank.run` takes it."""
    seen = Seen(run.get("signal_to_rank_1") if os.environ["RANK"] == "1" else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "batches", lambda run, step, batching: seen.takes(run, step, batching))
        patch.setattr(DistributedDataParallel, "__init__", lambda model, *a, **s: seen.copies(model, *a, **s))
        patch.setattr(dist, _NAME, seen.shares)
        patch.setattr(Accelerator, "no_sync", lambda accelerator, model: seen.accumulates(accelerator, model))
        patch.setattr("lora_core.training.loop.peak_memory_bytes", lambda device: MEMORY[int(os.environ["RANK"])])
        try:
            one_rank.run(run["sharding"], run["settings"], run.get("copy"), run.get("resume"))
        except RunStopped as error:
            seen.stopped, seen.exit_code = str(error), error.exit_code
    return seen


def rank_main(folder: Path, runs: list[dict[str, Any]], rank: int, world: int, port: int) -> None:
    """In a forked process: one rank through its runs."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for run in runs:
        seen = take_part(run)
        file = folder / f"{run['name']}-seen-{rank}.json"
        file.write_text(json.dumps(vars(seen)), encoding="utf-8")
    leave()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main(folder: Path) -> None:
    asked = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    forks = multiprocessing.get_context("fork")
    processes = []
    for world, runs in asked.items():
        port = free_port()
        for rank in range(int(world)):
            processes.append(forks.Process(target=rank_main, args=(folder, runs, rank, int(world), port)))
            processes[-1].start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    quiet_libraries()
    one_rank.leave_out_the_page()
    main(Path(sys.argv[1]))
