"""Predicted peak memory of a run on one device, by component, before any weight is loaded.

Nothing is estimated from parameter counts: the loop's own forward, backward, optimizer step and evaluation run on
tensors without storage (torch's FakeTensorMode), for the largest micro-batch of the run, and what is alive is counted.
A decoder of equal layers is run with 1 and with 2 of them, which is enough to know all: every component grows by the
same bytes a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import peft  # noqa: F401  # loaded here so that what it takes is in the process before that is measured
import torch

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.packing import eval_batching
from lora_core.errors import ConfigError, SimulationError, counted
from lora_core.memory.micro_batch import MicroBatch, largest_cut, largest_micro_batch
from lora_core.memory.simulate import live_at_peak
from lora_core.runtime.devices import DeviceMemory
from lora_core.schedule import SchedulePlan

Sharding = Literal["ddp", "fsdp"]
# What the C library's heap holds beyond what is alive, once freed blocks are kept for the next tensor
# (`heap.keep_freed_memory`): holes between live tensors, in part of the live bytes. Over the demo's 50 steps it was
# 0.4, with checkpointing 0.6, with NF4 0.8.
_HEAP_HOLES = 0.5
# The CUDA context and the workspaces of its libraries, which no allocator counts. An assumption: 0.5 to 0.8 GiB is
# what NVIDIA's tools show for an idle PyTorch process.
_CUDA_CONTEXT_BYTES = 768 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak bytes on one device."""

    device: str
    """cpu or cuda."""
    num_processes: int
    sharding: Sharding
    micro_batch: MicroBatch
    components: dict[str, int]
    """weights, adapter, gradients, optimizer, activations, logits, loading, allocator, process: bytes."""
    limit_bytes: int
    """What the device has for this process."""
    idle_adapters: tuple[str, ...] = ()
    """Dotted names of modules, of the first decoder layers, whose adapter no gradient reaches."""

    @property
    def adapter_file_bytes(self) -> int:
        """The adapter on disk, in float32 as it is trained."""
        return self.components["adapter"] * (self.num_processes if self.sharding == "fsdp" else 1)

    @property
    def checkpoint_bytes(self) -> int:
        """A checkpoint on disk: adapter and optimizer, whole, and the random state of each rank."""
        optimizer = self.components["optimizer"] * (self.num_processes if self.sharding == "fsdp" else 1)
        return self.adapter_file_bytes + optimizer + self.num_processes * torch.get_rng_state().nbytes

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "num_processes": self.num_processes,
            "sharding": self.sharding,
            "micro_batch_rows": len(self.micro_batch.lengths),
            "micro_batch_tokens": self.micro_batch.num_tokens,
            "components": self.components,
            "total_bytes": self.total_bytes,
            "limit_bytes": self.limit_bytes,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in self.components.items() if size)
        return (
            f"predicted peak memory: {self.total_bytes / 2**30:.1f} of {self.limit_bytes / 2**30:.1f} GiB "
            f"({self.device}, micro-batch of {counted(len(self.micro_batch.lengths), 'example')}, "
            f"{counted(self.micro_batch.num_tokens, 'token')}): {parts}"
        )


def predict_memory(
    config: RunConfig,
    micro_batch: MicroBatch,
    device: DeviceMemory,
    num_processes: int = 1,
    sharding: Sharding = "ddp",
    eval_micro_batch: MicroBatch | None = None,
    each_rank_loads: bool = False,
) -> MemoryPlan:
    """Predict the peak of one process of the run. Needs the model's config, not its weights.

    Args:
        micro_batch: the largest one of training, and `eval_micro_batch` of evaluation.
        num_processes: of the run; each has its own device, or its share of a CPU machine (`device.limit_bytes`).
        each_rank_loads: under FSDP each rank loads the whole model. Quantized ones are loaded so in any case.

    FSDP is worked out from the same counts: weights, adapter and optimizer state are shared out; the adapter's
    gradients are whole between the micro-batches of a step, which exchanges them once; embedding and head are whole
    through a step, and two decoder layers at a time (one at work, the next on its way). Rank 0 sends weights a tensor
    at a time, none larger than embedding and head; where each rank loads the whole model before it is
    shared out, `loading` is what that takes beyond a step's peak. It has not been measured.

    Raises:
        ConfigError: the model's config cannot be read, or a target module matches nothing.
        SimulationError: the family's code cannot run without values.
    """
    try:
        live, frozen, idle = live_at_peak(config, micro_batch, eval_micro_batch, device.kind)
    except ConfigError:
        raise
    except Exception as error:  # the code of one of two hundred families met tensors without values
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise SimulationError(f"its memory cannot be predicted: {type(error).__name__}: {reason}") from error
    components = {name: live.get(name, 0) for name in ("weights", "adapter", "gradients", "optimizer")}
    shards = num_processes > 1 and sharding == "fsdp"
    if shards:
        gradients = components["gradients"]
        components = {name: -(-size // num_processes) for name, size in components.items()}
        components["gradients"] = gradients  # summed up whole, until the step's last micro-batch sends them
        while_loading = components["weights"]
        if each_rank_loads or config.model.quantization != "none":
            while_loading += live["weights"]  # whole, until all is shared out
        components["weights"] += frozen.root + 2 * frozen.layer
    elif num_processes > 1:
        components["gradients"] *= 2  # DDP keeps a copy in the buckets that it sends
    components |= {name: live.get(name, 0) for name in ("activations", "logits")}
    components["loading"] = max(0, while_loading - sum(components.values())) if shards else 0
    components["allocator"] = round(_HEAP_HOLES * sum(components.values())) if device.keeps_freed_memory else 0
    components["process"] = device.process_bytes if device.kind == "cpu" else _CUDA_CONTEXT_BYTES
    return MemoryPlan(device.kind, num_processes, sharding, micro_batch, components, device.limit_bytes, idle)


def plan_memory(
    config: RunConfig,
    train_data: EncodedFile,
    eval_data: EncodedFile | None,
    plan: SchedulePlan,
    device: DeviceMemory,
    sharding: Sharding = "ddp",
    each_rank_loads: bool = False,
) -> MemoryPlan:
    """Predict the peak of a run on its own rows.

    Raises:
        ConfigError, SimulationError: as `predict_memory`.
    """
    training = largest_micro_batch(config, train_data, plan)
    evaluation = None
    if eval_data is not None:
        rows = np.arange(len(eval_data.lengths))
        evaluation = largest_cut(
            eval_batching(config, 0), rows, eval_data, config.data.max_seq_length, plan.num_processes
        )
    return predict_memory(config, training, device, plan.num_processes, sharding, evaluation, each_rank_loads)
