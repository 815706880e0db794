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
    should_stop: Callable[[], bool] | None = None,
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    loss = sum over all loss tokens of all micro-batches and ranks / number of those tokens (both by their weights), so
    the gradient is the same however the step is divided into micro-batches. If loss or gradient is not finite,
    parameters and optimizer are left as they were; the schedule advances either way, because it is a function of the
    step.

    Args:
        should_stop: asked between two micro-batches, in every rank; all must get the same answer.

    Raises:
        StepDropped: `should_stop` said so; parameters and optimizer are as they were.
        TrainingError: there is no loss token.
    """
    local = torch.tensor([_tokens_and_weight(batch) for batch in batches], dtype=torch.float64).sum(dim=0)
    num_tokens, total_weight = sum_over_ranks(local).tolist()
    if total_weight == 0:
        raise TrainingError("an optimizer step has no loss token; fix: drop rows without loss tokens before training")
    learning_rate = optimizer.param_groups[0]["lr"]

    loss_sum = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    for index, batch in enumerate(batches):
        if index > 0 and should_stop is not None and should_stop():
            optimizer.zero_grad()
            raise StepDropped
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            micro_loss_sum = model(**to_device(batch, accelerator.device)).loss_sum
            # DDP and FSDP average gradients over ranks; times their number, the average is the sum.
            accelerator.backward(micro_loss_sum * (accelerator.num_processes / total_weight))
        loss_sum += micro_loss_sum.detach()
    loss = float(sum_over_ranks(loss_sum.cpu().double())) / total_weight  # on the CPU: MPS has no float64

    limit = math.inf if max_grad_norm is None else max_grad_norm
    grad_norm = float(whole(accelerator.clip_grad_norm_(model.parameters(), limit)))
    result = StepResult(loss, grad_norm, learning_rate, int(num_tokens))
    if result.is_finite:
        optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return result


def _tokens_and_weight(batch: dict[str, Any]) -> tuple[float, float]:
    """(number of loss tokens, their summed weight) of a micro-batch."""
    mask = batch["loss_mask"][:, 1:]
    number = float(mask.sum())
    return number, float(batch["loss_weights"][:, 1:][mask].sum()) if "loss_weights" in batch else number
