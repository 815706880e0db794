"""The model of a run: loaded by every rank, or under FSDP2 by the first alone and shared out on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.packing import Batching, MicroBatchRows, to_device
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from lora_core.model.starting_adapter import StartingAdapter, check_reload, put_on
from lora_core.runtime.ranks import from_first_rank
from lora_core.runtime.sharding import loads_on_first_rank, share_out

if TYPE_CHECKING:
    from peft import PeftModel


def build_model(
    config: RunConfig, accelerator: Accelerator, start: StartingAdapter | None, say: Callable[[str], None]
) -> tuple[PeftModel, PeftModel | None]:
    """Base model and adapter; call it in every rank.

    Args:
        say: takes a line on a head of another kind, where there is one.

    Returns:
        (the model that is to be prepared, None). Where the first rank alone loads: a model whose frozen weights have
        no storage, in all ranks alike; and in the first rank another one, with weights, on the CPU, for `fill`.

    Raises:
        ConfigError, TrainingError: it cannot be loaded, or does not suit; in all ranks.
    """
    packing = bool(config.data.packing)
    if not loads_on_first_rank():
        model = _adapted(config, accelerator.device, accelerator.device, packing)
        if start is not None:
            put_on(start, model)
        check_reload(model)
        with accelerator.autocast():
            _say_of_head(check_head(model), say)
        return model, None

    loaded: PeftModel | None = None

    def load() -> Any:
        nonlocal loaded
        loaded = _adapted(config, torch.device("cpu"), accelerator.device, packing=False)  # it only gives weights
        if start is not None:
            put_on(start, loaded)
        check_reload(loaded)
        return loaded.generation_config

    generation_config = from_first_rank(load)
    model = _adapted(config, torch.device("meta"), accelerator.device, packing)
    model.base_model.model.generation_config = generation_config  # read with the weights
    _give_storage_to_what_trains(model, accelerator.device)
    return model, loaded


def _say_of_head(note: str | None, say: Callable[[str], None]) -> None:
    if note is not None:
        say(f"model: {note}")


def _adapted(config: RunConfig, device: torch.device, computes_on: torch.device, packing: bool) -> PeftModel:
    base = load_base_model(config.model, device, packing)
    return add_adapter(base, config.lora, config.train.seed, config.train.gradient_checkpointing, computes_on.type)


def _give_storage_to_what_trains(model: nn.Module, device: torch.device) -> None:
    """Accelerate finds an optimizer's parameters in the model by where they are stored."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may be tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                setattr(module, name, made[parameter])


def fill(
    config: RunConfig, accelerator: Accelerator, model: nn.Module, loaded: PeftModel | None, say: Callable[[str], None]
) -> None:
    """Give a prepared model the weights of `build_model`'s second one, and check them; call it in every rank.

    Without a first rank that loads alone, this does nothing: the weights are there, and checked.

    Raises:
        ConfigError, TrainingError: in all ranks, the weights do not suit.
    """
    if not loads_on_first_rank():
        return
    share_out(model, None if loaded is None else CausalLMLoss(loaded), accelerator.device)
    with accelerator.autocast():
        _say_of_head(accelerator.unwrap_model(model).check_weights(bool(config.data.packing)), say)


def settle_exchange(model: nn.Module, optimizer: torch.optim.Optimizer, batching: Batching, data: EncodedFile) -> None:
    """Let DDP order the gradients in its buckets as it will all through the run; without DDP this does nothing.

    It orders them anew after its first backward, and with more than two ranks the order decides how their sums are
    rounded: the first step of a resumed run would round otherwise than the same step of the run that went on. So the
    first backward is one of the shortest example, in all ranks alike, before anything is drawn or taken.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    was_training = model.training
    model.train()
    shortest = MicroBatchRows(np.array([int(np.argmin(data.lengths))]))
    batch = to_device(batching.tensors(data.dataset, shortest), next(model.parameters()).device)
    model(**batch).loss_sum.backward()
    optimizer.zero_grad()
    model.train(was_training)
