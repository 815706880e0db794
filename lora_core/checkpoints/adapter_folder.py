"""The adapter on disk: saved with tokenizer and model card, and loaded again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_core.checkpoints.card import write_card
from lora_core.config.schema import RunConfig
from lora_core.data.counts import RowCounts
from lora_core.errors import ConfigError
from lora_core.model.base import load_base_model
from lora_core.model.language_part import towers_may_be_out
from lora_core.model.lora_linear import use_lean_lora
from lora_core.preflight.model_facts import with_packing
from lora_core.runtime.devices import with_precision
from lora_core.runtime.ranks import meet
from lora_core.runtime.run_folder import whole_folder, write_json
from lora_core.runtime.sharding import share_out_again, whole

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def load_adapter(config: RunConfig, adapter_dir: str | Path, device: torch.device) -> PeftModel:
    """A saved adapter on a fresh base model, as PEFT loads it.

    Raises:
        ConfigError: the base model cannot be loaded, or PEFT does not load the whole adapter.
    """
    config, _ = with_precision(config)  # the weights as they were trained on
    config = with_packing(config)
    base = load_base_model(config.model, device, bool(config.data.packing))
    model = adapter_on(base, adapter_dir)
    use_lean_lora(model)
    return model


def adapter_on(base: nn.Module, adapter_dir: str | Path, is_trainable: bool = False) -> PeftModel:
    """A saved adapter on a base model, by PEFT alone.

    Raises:
        ConfigError: PEFT finds no weights in the file for some of its layers, which it only warns of: it looks for them
            by the names of another version of the model's family. Or there is no file of weights.
    """
    import peft

    if not any((Path(adapter_dir) / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ConfigError(f"{adapter_dir}: holds no adapter_model.safetensors; fix: a checkpoint of the run, or a copy")
    with towers_may_be_out():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model: PeftModel = peft.PeftModel.from_pretrained(base, str(adapter_dir), is_trainable=is_trainable)
        except UserWarning as warning:
            raise ConfigError(
                f"{adapter_dir}: PEFT {peft.__version__} does not load all of this adapter: {str(warning)[:200]}...; "
                "fix: train without these layers, by names in lora.target_modules"
            ) from warning
    return model


ADAPTER_START = "adapter_start"
"""Beside adapter/: what A and B began with, where `lora.init_lora_weights` took it out of the base weights."""


def save_adapter_start(model: PeftModel, folder: Path) -> None:
    """Write what A and B begin with to the run folder; `save_adapter` takes it from the trained adapter."""
    with whole_folder(folder / ADAPTER_START) as start:
        model.save_pretrained(start, save_embedding_layers=False)


def named_trainable(model: nn.Module, all_names: bool = False) -> list[tuple[str, nn.Parameter]]:
    """What trains, by the names that it has on one device; a tied parameter by its first name, or by all of them.

    Of a sharded model, what the optimizer knows: this rank's shares.
    """
    share_out_again(model)
    named = model.named_parameters(remove_duplicate=not all_names)
    return [(name.removeprefix("module."), parameter) for name, parameter in named if parameter.requires_grad]


def trainable_tensors(model: nn.Module, all_names: bool = False) -> dict[str, Tensor]:
    """Copies of what trains, whole and in host memory; call it in every rank."""
    return {
        name: whole(parameter.detach()).cpu().clone().contiguous()
        for name, parameter in named_trainable(model, all_names)
    }


def save_adapter(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    counts: RowCounts,
    path: Path,
) -> None:
    """Write the adapter as PEFT does, with tokenizer and model card; the folder appears whole or not at all."""
    adapted = accelerator.unwrap_model(model).model
    state = trainable_tensors(model, all_names=True)  # PEFT asks for a head that is tied by its own name
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as folder:
            if config.lora.changes_base_weights:
                # As what it adds to the untouched base: PEFT takes from it what A and B began with.
                start = str(path.with_name(ADAPTER_START))
                adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
            else:
                trained = {name.removeprefix("model."): tensor for name, tensor in state.items()}
                adapted.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
            tokenizer.save_pretrained(folder)
            # PEFT wrote the model's name into it.
            adapter_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            write_json(folder / "adapter_config.json", adapter_config)
            write_card(folder, config, counts)
    meet()
