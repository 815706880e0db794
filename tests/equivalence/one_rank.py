"""One rank of several runs on CPUs, one after the other; run it under torchrun.

python -m tests.equivalence.one_rank RUNS.json

RUNS.json: a list of {"sharding": "ddp", "fsdp2" or "fsdp2, loaded by one", "settings": [...], "copy": FOLDER or null,
"resume": STEP or null}. `copy` is a run folder that rank 0 copies to this run's, to resume there at a step. Each rank
writes RUN-rank-N.json: the bytes of weights that it held before they were shared out.

Accelerate shards on GPUs only. What it sets there (`AcceleratorState.__init__`) is set here; all else is as it comes.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

from lora_core.commands.command_line import quiet_libraries
from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config
from lora_core.runtime.devices import build_accelerator
from lora_core.runtime.ranks import leave
from lora_core.runtime.sharding import fsdp_plugin
from lora_core.training.setup import train

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def build_sharding_accelerator(config: RunConfig) -> Accelerator:
    """As `build_accelerator` gives it where there are GPUs and `accelerate launch` was told to shard."""
    os.environ |= FSDP2
    accelerator = build_accelerator(config)
    accelerator.state.fsdp_plugin = fsdp_plugin(config)
    set_distributed_type(accelerator, DistributedType.FSDP)
    return accelerator


def build_sharding_accelerator_of_first_rank(config: RunConfig) -> Accelerator:
    """The same, where rank 0 alone loads the weights."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    return build_sharding_accelerator(config)


def build_copying_accelerator(config: RunConfig) -> Accelerator:
    """After runs that were sharded, one that is not."""
    for name in FSDP2:
        os.environ.pop(name, None)
    accelerator = build_accelerator(config)
    set_distributed_type(accelerator, DistributedType.MULTI_CPU)
    return accelerator


def set_distributed_type(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.distributed_type = kind
    PartialState._shared_state["distributed_type"] = kind


def run(sharding: str, settings: list[str], copy: str | None = None, resume: int | None = None) -> None:
    setup: Any = importlib.import_module("lora_core.training.setup")
    build = {
        "ddp": build_copying_accelerator,
        "fsdp2": build_sharding_accelerator,
        "fsdp2, loaded by one": build_sharding_accelerator_of_first_rank,
    }[sharding]
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    folder = Path(load_config("demo", settings).output_dir)
    # The other ranks may be on other machines, which know nothing of the run's folder.
    elsewhere = [] if os.environ["RANK"] == "0" else [f"output_dir={folder.parent / 'elsewhere'}"]
    config = load_config("demo", [*settings, *elsewhere])

    def build_recording_accelerator(config: RunConfig) -> Accelerator:
        accelerator = build(config)
        prepare: Any = accelerator.prepare

        def record_and_prepare(model: nn.Module, *others: Any) -> Any:
            held = [p for p in model.parameters() if not p.is_meta]
            frozen, trained = (sum(p.nbytes for p in held if p.requires_grad is which) for which in (False, True))
            file = folder.with_name(f"{folder.name}-rank-{accelerator.process_index}.json")
            file.write_text(json.dumps({"frozen": frozen, "trained": trained}))
            return prepare(model, *others)

        vars(accelerator)["prepare"] = record_and_prepare
        return accelerator

    setup.build_accelerator = build_recording_accelerator
    if copy is not None and os.environ["RANK"] == "0":
        shutil.copytree(copy, folder)
    train(config, None if resume is None else folder / f"checkpoints/step-{resume:06d}")


def leave_out_the_page() -> None:
    """Drawing a run's page takes longer than the run."""
    importlib.import_module("lora_core.training.finish").write_report = lambda folder: folder  # type: ignore[attr-defined]


if __name__ == "__main__":
    quiet_libraries()
    leave_out_the_page()
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(**each)
    leave()
