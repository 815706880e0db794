"""The optimizer over the adapter's parameters, and the learning-rate schedule over the planned steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core.config.schema import TrainConfig
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR

B_GROUP = "lora_B"
"""The name of the parameter groups that LoRA+ gives a learning rate of their own."""


def build_optimizer(
    model: nn.Module, config: TrainConfig, device: torch.device, loraplus_lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `train.optim` names, over what trains.

    Paged state (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) moves to host memory when the GPU runs short,
    which only means something on CUDA: elsewhere bitsandbytes' optimizer of the same bits runs (preflight notes it).

    Args:
        loraplus_lr_ratio: LoRA+: B learns at so many times the rate of A, in PEFT's own groups.
    """
    kind, settings = optimizer_kind(config, device)
    if loraplus_lr_ratio is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer: Any = kind(parameters, lr=config.peak_learning_rate, weight_decay=config.weight_decay, **settings)
        return _ready(optimizer)
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model,
        kind,
        lr=config.peak_learning_rate,
        loraplus_lr_ratio=loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
        loraplus_lr_embedding=config.peak_learning_rate,
        **settings,
    )
    for group in optimizer.param_groups[2:]:  # after A and embeddings
        group["name"] = B_GROUP
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    return _ready(optimizer)


def _ready(optimizer: Any) -> torch.optim.Optimizer:
    """Schedule-free optimizers have two sets of weights: those that are trained, and their average, for evaluation."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    made: torch.optim.Optimizer = optimizer
    return made


def optimizer_kind(config: TrainConfig, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The class that `train.optim` names, with its settings besides learning rate and weight decay."""
    name, betas = config.optim, (config.adam_beta1, config.adam_beta2)
    if name in ("adamw_torch", "adamw_torch_fused"):
        # One kernel a parameter in place of ten operations: a third of the time on a CPU.
        return torch.optim.AdamW, {"betas": betas, "eps": config.adam_epsilon, "fused": True}
    if name == "sgd":
        return torch.optim.SGD, {}
    if name == "adafactor":
        from transformers import Adafactor

        # As transformers' Trainer has it: the rate is the schedule's.
        return Adafactor, {"scale_parameter": False, "relative_step": False}
    if name == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        # Defazio et al. 2024, https://arxiv.org/abs/2405.15682; warmup is the schedule's.
        return AdamWScheduleFree, {"betas": betas, "eps": config.adam_epsilon}
    from bitsandbytes import optim

    paged = "Paged" if name.startswith("paged") and device.type == "cuda" else ""
    bits = "8bit" if name.endswith("8bit") else "32bit"
    if "lion" in name:
        return getattr(optim, f"{paged}Lion{bits}"), {"betas": betas}
    return getattr(optim, f"{paged}AdamW{bits}"), {"betas": betas, "eps": config.adam_epsilon}


def build_scheduler(optimizer: torch.optim.Optimizer, plan: SchedulePlan) -> LambdaLR:
    """transformers' own schedule with exactly the plan's numbers; step it once an optimizer step.

    It must not go through `Accelerator.prepare`: a prepared scheduler steps once per process.
    """
    from transformers import get_scheduler

    scheduler: LambdaLR = get_scheduler(
        plan.lr_scheduler_type,
        optimizer,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.scheduled_steps,
        scheduler_specific_kwargs=dict(plan.lr_scheduler_kwargs),
    )
    return scheduler
