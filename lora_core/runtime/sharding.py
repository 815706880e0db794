"""FSDP2: which of Accelerate's settings are taken, and tensors that are shared out over the ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_torch_version, parse_flag_from_env
from torch import Tensor, nn

from lora_core.config.schema import RunConfig
from lora_core.errors import ConfigError, counted
from lora_core.runtime.ranks import from_first_rank

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def loads_on_first_rank() -> bool:
    """Whether it was told that rank 0 alone loads the weights, and the others get their shares from it."""
    return uses_fsdp() and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def fsdp_plugin(config: RunConfig) -> FullyShardedDataParallelPlugin | None:
    """Accelerate's FSDP settings, as `accelerate launch` put them into the environment, with a precision of our own.

    Accelerate's own policy returns the loss in bfloat16 and sums gradients over the ranks in bfloat16.

    Returns:
        None without FSDP.

    Raises:
        ConfigError: a setting is not supported, or this torch cannot shard such a model.
    """
    if not uses_fsdp():
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise _unsupported("fsdp_version: 1", "shards the adapter together with the frozen weights", "fsdp_version: 2")
    units = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if units.upper() != "TRANSFORMER_BASED_WRAP":
        raise _unsupported(
            f"fsdp_auto_wrap_policy: {units}",
            "gathers other parts than decoder layers, a LoRA layer without its adapter among them",
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        )
    if ignored := os.environ.get("FSDP_IGNORED_MODULES", ""):
        raise _unsupported(
            f"fsdp_ignored_modules: {ignored}",
            "leaves what trains in these modules to each rank alone",
            "no line fsdp_ignored_modules",
        )
    try:
        plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy=units,
            # Inputs stay as they are: loss weights have no exact value in bfloat16.
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
            )
            if config.train.bf16 is True
            else MixedPrecisionPolicy(),
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"FSDP: Accelerate does not take its settings: {error}; fix: configs/accelerate/fsdp2.yaml"
        ) from error
    if plugin.activation_checkpointing:
        raise _unsupported(
            "fsdp_activation_checkpointing: true",
            "recomputes with other dropout masks",
            "fsdp_activation_checkpointing: false, and train.gradient_checkpointing=true",
        )
    if plugin.cpu_ram_efficient_loading and config.model.quantization != "none":
        raise _unsupported(
            f"fsdp_cpu_ram_efficient_loading: true with model.quantization={config.model.quantization}",
            "leaves the other ranks without the scales of quantized weights, which are no tensors of the model",
            "fsdp_cpu_ram_efficient_loading: false",
        )
    # `share_out` does it. Accelerate's own way finds the optimizer's parameters by addresses that tensors without
    # storage do not have, and knows buffers only that are not saved.
    plugin.cpu_ram_efficient_loading = False
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise _unsupported("fsdp_offload_params: true", "is not tested", "fsdp_offload_params: false")
    if is_torch_version("<", "2.9") and config.model.dtype != "float32":
        raise ConfigError(
            f"torch {torch.__version__} cannot shard float32 adapters in layers of {config.model.dtype} (FSDP wants "
            "one type a layer before torch 2.9); fix: pip install 'torch>=2.9', or distributed_type: MULTI_GPU"
        )
    return plugin


def check_sharding(accelerator: Accelerator) -> None:
    """Check that a run that is to be sharded will be.

    Raises:
        ConfigError: it is on CPUs, or no launcher started it.
    """
    if uses_fsdp() and accelerator.distributed_type.value != "FSDP":
        raise ConfigError(
            "ACCELERATE_USE_FSDP=true: Accelerate shards what a launcher starts on GPUs, and this run is "
            f"{counted(accelerator.num_processes, 'process', 'processes')} on {accelerator.device}; fix: unset "
            "ACCELERATE_USE_FSDP, or another distributed_type in the accelerate config"
        )


def check_units(accelerator: Accelerator, layers: Sequence[str]) -> None:
    """Check that the accelerate config names no class of modules to gather at once but the decoder layers.

    Args:
        layers: the names of their classes.

    Raises:
        ConfigError: it names another.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    named = None if plugin is None else plugin.transformer_cls_names_to_wrap
    if named is not None and set(named) != set(layers):
        raise _unsupported(
            f"fsdp_transformer_layer_cls_to_wrap: {','.join(named)}",
            f"names other parts than this model's decoder layers ({', '.join(layers)})",
            "no line fsdp_transformer_layer_cls_to_wrap",
        )


def _unsupported(setting: str, reason: str, fix: str) -> ConfigError:
    return ConfigError(f"{setting}: not supported, it {reason}; fix, in the accelerate config: {fix}")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out over the ranks, put together; another as it is. Call it in every rank."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_out_again(model: nn.Module) -> None:
    """Free what FSDP2 has gathered and not let go: its outermost unit, with embedding and head, after an evaluation.

    Until then `model.parameters()` are the gathered tensors, which the optimizer does not know and which go at the next
    backward. Without FSDP2 this does nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shared_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, on the device of `like` and shared out over the ranks as it is. Call it in every rank."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def share_out(model: nn.Module, loaded: nn.Module | None, device: torch.device) -> None:
    """Give a model that is sharded and has no storage its weights: a tensor at a time, from rank 0 to all, of which
    each keeps its share. Call it in every rank.

    Args:
        loaded: in rank 0, the same model with its weights, on the CPU.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if loaded is None else loaded.state_dict(), options=options)
    # Buffers that are not saved, such as the frequencies of rotary positions.
    buffers = from_first_rank(lambda: {} if loaded is None else dict(loaded.named_buffers()))
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, buffer.to(device))
