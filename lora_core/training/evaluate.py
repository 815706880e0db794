"""Held-out loss, perplexity and accuracy, weighted by token; and sample replies."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import Batching, eval_batching, to_device
from lora_core.errors import ConfigError
from lora_core.model.base import load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.devices import build_accelerator, with_precision
from lora_core.training.adapter_folder import load_adapter

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvalResult:
    """Over all supervised tokens of the held-out rows."""

    loss: float
    """Mean cross-entropy, nats per supervised token."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of supervised tokens that were the model's first guess, 0 to 1."""
    num_tokens: int
    num_conversations: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, token accuracy {self.token_accuracy:.1%} "
            f"({self.num_conversations} conversations, {self.num_tokens:,} supervised tokens)"
        )


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, data: EncodedFile, batching: Batching) -> EvalResult:
    """Run the held-out rows through the model, shared out over the ranks. Leaves the model's mode as it was.

    Args:
        model: a `CausalLMLoss`, as `accelerator.prepare` returned it.
        batching: how the rows are cut.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    rows = np.arange(len(data.lengths))
    for cut in batching.cut(rows, data.lengths, accelerator.num_processes, accelerator.process_index):
        result = model(**to_device(batching.tensors(data.dataset, cut), accelerator.device))
        sums += torch.stack([value.detach().double().cpu() for value in result])
    sums = accelerator.reduce(sums.to(_reduce_device(accelerator)), "sum").cpu()
    model.train(was_training)
    loss_sum, num_tokens, num_correct = sums.tolist()
    loss = loss_sum / num_tokens
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=num_correct / num_tokens,
        num_tokens=int(num_tokens),
        num_conversations=len(rows),
    )


def _reduce_device(accelerator: Accelerator) -> torch.device:
    # MPS has no float64; everything else reduces where the model is.
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device


def evaluate_adapter(config: RunConfig, adapter_dir: str | Path) -> EvalResult:
    """Held-out loss of a saved adapter, the way `train` measures it.

    Raises:
        ConfigError: there is no adapter in the folder, or the configuration names no held-out rows.
    """
    if not (Path(adapter_dir) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{adapter_dir}: holds no adapter_config.json; fix: --adapter FOLDER, such as outputs/demo/adapter"
        )
    config, _ = with_precision(config)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    with accelerator.main_process_first():
        _, eval_data = load_data(config, tokenizer)
    if eval_data is None:
        raise ConfigError("no held-out rows; fix: data.eval_file=PATH or data.eval_fraction=0.1")
    adapted = load_adapter(config, adapter_dir, accelerator.device)
    model = accelerator.prepare_model(CausalLMLoss(adapted), evaluation_mode=True)
    return evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer)))
