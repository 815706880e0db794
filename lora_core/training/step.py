"""The maths of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_core.data.packing import to_device
from lora_core.errors import TrainingError
from lora_core.model.optimizer import B_GROUP
from lora_core.runtime.ranks import sum_over_ranks
from lora_core.runtime.sharding import whole

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler


class StepDropped(Exception):
    """A step was given up between two micro-batches, and nothing of it is left."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float
    """Mean cross-entropy per loss token, over the step's loss tokens, by their weights."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """That this step used."""
    num_supervised_tokens: int
    learning_rate_b: float | None = None
    """Of the B matrices, with LoRA+."""
    loss_scale: float | None = None
    """That the loss was multiplied by, with train.fp16."""

    @property
    def overflowed(self) -> bool:
        """The loss is finite, and its gradient, scaled, was too large for float16: the next step has a smaller scale.

        At a scale of 1 it is not the scale's doing.
        """
        return not self.is_finite and math.isfinite(self.loss) and self.loss_scale is not None and self.loss_scale > 1

    @property
    def is_finite(self) -> bool:
        """False: loss or gradient was not finite, and the step was not applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    batches: Sequence[dict[str, Any]],
    max_grad_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    loss = sum over all loss tokens of all micro-batches and ranks / number of those tokens (both by their weights), so
    the gradient is the same however the step is divided into micro-batches. If loss or gradient is not finite,
    parameters and optimizer are left as they were; the schedule advances either way, because it is a function of the
    step.

    Args:
        scaler: for float16: the loss is multiplied before the backward, and gradients are divided before they are seen.
        should_stop: asked between two micro-batches, in every rank; all must get the same answer.

    Raises:
        StepDropped: `should_stop` said so; parameters and optimizer are as they were.
        TrainingError: there is no loss token, or the loss does not depend on what trains.
    """
    local = torch.tensor([_tokens_and_weight(batch) for batch in batches], dtype=torch.float64).sum(dim=0)
    num_tokens, total_weight = sum_over_ranks(local).tolist()
    if total_weight == 0:
        raise TrainingError("an optimizer step has no loss token; fix: drop rows without loss tokens before training")
    learning_rate = optimizer.param_groups[0]["lr"]
    rate_b = next((group["lr"] for group in optimizer.param_groups if group.get("name") == B_GROUP), None)
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper

    loss_sum = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    for index, batch in enumerate(batches):
        if index > 0 and should_stop is not None and should_stop():
            optimizer.zero_grad()
            raise StepDropped
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            micro_loss_sum = model(**to_device(batch, accelerator.device)).loss_sum
            check_gradient(micro_loss_sum)
            # DDP and FSDP average gradients over ranks; times their number, the average is the sum.
            share = micro_loss_sum * (accelerator.num_processes / total_weight)
            accelerator.backward(share if scaler is None else scaler.scale(share))
        loss_sum += micro_loss_sum.detach()
    loss = float(sum_over_ranks(loss_sum.cpu().double())) / total_weight  # on the CPU: MPS has no float64

    loss_scale = None
    if scaler is not None:
        loss_scale = scaler.get_scale()
        scaler.unscale_(inner)
    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = float(whole(accelerator.clip_grad_norm_(model.parameters(), limit)))
    result = StepResult(loss, grad_norm, learning_rate, int(num_tokens), rate_b, loss_scale)
    if result.is_finite:
        optimizer.step()
    if scaler is not None:
        scaler.update()  # smaller after gradients that were not finite, larger after many that were
    scheduler.step()
    optimizer.zero_grad()
    return result


def check_gradient(loss_sum: torch.Tensor) -> None:
    """Check that a micro-batch's loss hangs on what trains.

    Raises:
        TrainingError: it does not: such as reversible layers, which want a gradient on what goes in (Reformer).
    """
    if not loss_sum.requires_grad:
        raise TrainingError(
            "no gradient reaches the adapter: this model's layers compute none where its embedding is frozen; fix: "
            "another model.name_or_path"
        )


def _tokens_and_weight(batch: dict[str, Any]) -> tuple[float, float]:
    """(number of loss tokens, their summed weight) of a micro-batch."""
    mask = batch["loss_mask"][:, 1:]
    number = float(mask.sum())
    return number, float(batch["loss_weights"][:, 1:][mask].sum()) if "loss_weights" in batch else number
