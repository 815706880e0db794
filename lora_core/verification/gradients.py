"""Check: the same gradient however a step is divided into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import pad_id
from lora_core.data.packing import Batching, RowIndices
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.model.attention import use_segment_attention
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.loss import CausalLMLoss
from lora_core.model.packing_check import check_packing
from lora_core.runtime.devices import build_accelerator, device_memory
from lora_core.training.step import train_step
from lora_core.verification.table import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_GRADIENT_ROWS = 8
# Sums in another order differ in the last bits of float32 (2^-24 each); a wrong one differs by 1e-2 and more.
GRADIENT_LIMIT = 1e-5


class KeepsGradients(torch.optim.SGD):
    """Notes the gradients in place of a step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


class OneStep:
    """An adapter on the float32 base model, B random (at zero, where training starts, A has no gradient)."""

    def __init__(self, config: RunConfig) -> None:
        self.accelerator = build_accelerator(config)
        self.base = load_base_model(config.model, self.accelerator.device)
        _compute_each_row_alone(self.base)
        self.adapted = add_adapter(self.base, config.lora, config.train.seed)
        for name, parameter in self.adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = KeepsGradients([p for p in self.adapted.parameters() if p.requires_grad])
        self.model = self.accelerator.prepare(CausalLMLoss(self.adapted, config=config.train))
        self.model.eval()  # the base's own dropout, if it has any, must not differ between them

    def gradient(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """(all adapter parameters,) of one optimizer step over these micro-batches."""
        scheduler: Any = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        train_step(self.accelerator, self.model, self.optimizer, scheduler, batches, max_grad_norm=None)
        return torch.cat([part.flatten().float().cpu() for part in self.optimizer.seen])


def check_gradients(config: RunConfig, data: EncodedFile, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """One optimizer step over a few short rows, divided in several ways, against one padded micro-batch.

    Raises:
        ConfigError: the model cannot keep packed examples apart.
    """
    rows = short_rows(data.lengths, NUM_GRADIENT_ROWS)
    in_float32 = with_overrides(config, float32_overrides(config))
    unable = "there is 1 row, and nothing to divide" if len(rows) < 2 else does_not_fit(in_float32, data, rows)
    if unable is not None:
        return [Check.not_applicable("gradient", "accumulation, packing", unable)]
    step = OneStep(in_float32)

    def gradient(batching: Batching) -> tuple[Tensor, int]:
        """(gradient, number of micro-batches)"""
        cuts = batching.cut(rows, data.lengths)
        return step.gradient([batching.tensors(data.dataset, cut) for cut in cuts]), len(cuts)

    def check(batching: Batching, wanted: Tensor) -> Check:
        got, micro_batches = gradient(batching)
        difference = float((got - wanted).norm() / wanted.norm())
        return Check.judged(
            "gradient",
            f"{number} rows {'padded' if batching.max_tokens is None else 'packed'} into {micro_batches}",
            f"{GRADIENT_LIMIT:g} of its norm",
            f"{difference:.1e}",
            None if difference <= GRADIENT_LIMIT else f"the gradient differs by {difference:.2g} of its norm",
        )

    number, padding = len(rows), pad_id(tokenizer)
    whole, _ = gradient(Batching(number, padding))
    checks = [check(Batching(size, padding), whole) for size in (1, -(-number // 2))]
    if not config.data.packing:
        return [*checks, Check.not_applicable("gradient", "packing", "data.packing=false: the run does not pack")]
    if in_float32.model.attn_implementation == "sdpa":
        use_segment_attention(step.base)
    check_packing(step.adapted)
    if config.model.quantization == "int8":
        whole, _ = gradient(Batching(number, padding, max_tokens=1))
    longest, total = int(data.lengths[rows].max()), int(data.lengths[rows].sum())
    return [*checks, *(check(Batching(number, padding, tokens), whole) for tokens in (longest, 2 * longest, total))]


def float32_overrides(config: RunConfig) -> list[str]:
    """What shows a difference in the maths and not in the rounding."""
    overrides = ["model.dtype=float32", "train.bf16=false", "train.fp16=false", "lora.dropout=0.0"]
    if config.model.attn_implementation.startswith("flash"):
        overrides.append("model.attn_implementation=sdpa")  # flash attention has no float32
    return overrides


def _compute_each_row_alone(base: torch.nn.Module) -> None:
    """Quantized weights stay what they are; what is multiplied with them depends on nothing but itself."""
    module: Any
    for module in base.modules():
        if hasattr(module, "compute_dtype"):  # 4 bits
            module.compute_dtype = torch.float32
        if hasattr(
            getattr(module, "state", None), "threshold"
        ):  # 8 bits: columns with outliers are found over the whole micro-batch
            module.state.threshold = 0.0


def does_not_fit(config: RunConfig, data: EncodedFile, rows: RowIndices) -> str | None:
    """Why a step over these rows does not fit this device; None if it does."""
    num_loss_tokens = sum(sum(data.dataset[int(row)]["loss_mask"]) for row in rows)
    micro_batch = MicroBatch(tuple(int(length) for length in data.lengths[rows]), num_loss_tokens, packed=False)
    plan = predict_memory(config, micro_batch, device_memory())
    if plan.fits:
        return None
    return f"the model in float32 needs {plan.total_bytes / 2**30:.1f} of {plan.limit_bytes / 2**30:.1f} GiB"


def short_rows(lengths: RowIndices, number: int) -> RowIndices:
    """(number,) of the shortest quarter, from its shortest to its longest; the shortest ones if that is too few."""
    by_length = np.argsort(lengths, kind="stable")
    candidates = by_length[: max(number, len(lengths) // 4)]
    number = min(number, len(candidates))
    chosen: RowIndices = candidates[np.linspace(0, len(candidates) - 1, number).round().astype(np.int64)]
    return chosen
