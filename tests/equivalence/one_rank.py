"""One rank of a run on CPUs, sharded by FSDP2 or with DDP's copies; run it under torchrun, or alone.

python -m tests.equivalence.one_rank {ddp,fsdp2} CFG [--resume [CHECKPOINT]] [key=value ...]

Accelerate shards on GPUs only. What it sets there (`AcceleratorState.__init__`) is set here; all else is as it comes.
"""

from __future__ import annotations

import importlib
import os
import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from lora_core.commands.main import main
from lora_core.config.schema import RunConfig
from lora_core.runtime.devices import build_accelerator
from lora_core.runtime.sharding import fsdp_plugin


def build_sharding_accelerator(config: RunConfig) -> Accelerator:
    """As `build_accelerator` gives it where there are GPUs and `accelerate launch` was told to shard."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    accelerator = build_accelerator(config)
    accelerator.state.fsdp_plugin = fsdp_plugin(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


if __name__ == "__main__":
    if sys.argv[1] == "fsdp2":
        setup = importlib.import_module("lora_core.training.setup")
        setup.build_accelerator = build_sharding_accelerator
    sys.exit(main(["train", "--cfg", sys.argv[2], *sys.argv[3:]]))
