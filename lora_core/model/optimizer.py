"""The optimizer over the adapter's parameters, and the learning-rate schedule over the planned steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_core.config.schema import TrainConfig
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what trains; betas 0.9 and 0.999, epsilon 1e-8.

    Paged state (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) moves to host memory when the GPU runs short,
    which only means something on CUDA: elsewhere bitsandbytes' plain 8-bit AdamW runs (preflight notes it).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    if config.optim == "adamw_torch":
        # One kernel a parameter in place of ten operations: a third of the time on a CPU.
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    paged = config.optim == "paged_adamw_8bit" and device.type == "cuda"
    optimizer: torch.optim.Optimizer = (PagedAdamW8bit if paged else AdamW8bit)(parameters, **settings)
    return optimizer


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
