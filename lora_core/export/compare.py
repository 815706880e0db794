"""Base model with the adapter beside it against the two merged: do the logits differ by more than rounding?

Merging adds two matrices and rounds the sum to the type of the base model's files, so the merged logits cannot be
equal; how far they may be off is measured and not guessed. Base and adapter run once more side by side, where each
adapted weight W of the base is moved by what rounding does to the sum, round(W + update) - (W + update), and the update
itself still comes from the adapter beside it. (Random noise of that size would not do: an update far below the last
place of W is lost whole, in one direction.) A merge that differs from base and adapter by more than that is wrong. All
of it is computed in float32, so that nothing else is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.errors import TrainingError, counted
from lora_core.export.base_files import WeightFiles
from lora_core.export.streamed import Part, StreamedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# In the tests the two are equal to 2 digits; with DoRA, which scales what rounding does, to 1. An adapter that is
# scaled by a wrong factor or missing in a layer is off by 10 times and more.
_MOST = 1.5
# Of the largest logit: sums in another order differ so much in float32 (2^-24 each, thousands of them a logit).
_FLOAT32_NOISE = 1e-5


@dataclass(frozen=True)
class Difference:
    """Between two models' logits over the compared tokens."""

    rms: float
    """Root mean square."""
    largest: float

    @staticmethod
    def between(one: Tensor, other: Tensor) -> Difference:
        difference = one - other
        return Difference(float(difference.square().mean(dtype=torch.float64).sqrt()), float(difference.abs().max()))


@dataclass(frozen=True)
class Comparison:
    """Merged model against base + adapter."""

    num_rows: int
    num_tokens: int
    dtype: str
    difference: Difference
    noise: Difference
    """By which rounding to `dtype` alone moves the logits."""
    effect: Difference
    """By which the adapter moves the logits."""
    largest_logit: float
    num_same_first: int
    """Tokens for which both models have the same first guess."""

    @property
    def limit(self) -> Difference:
        """The most that `difference` may be."""
        least = _FLOAT32_NOISE * self.largest_logit
        return Difference(max(_MOST * self.noise.rms, least), max(_MOST * self.noise.largest, least))

    @property
    def is_within_noise(self) -> bool:
        limit = self.limit
        return self.difference.rms <= limit.rms and self.difference.largest <= limit.largest

    @property
    def is_blurred(self) -> bool:
        """Rounding moves the logits by more than a twentieth of what the adapter does."""
        return self.effect.rms <= 20 * self.noise.rms

    def __str__(self) -> str:
        return (
            f"logits of merged and base + adapter over {counted(self.num_tokens, 'token')} of "
            f"{counted(self.num_rows, 'row')}: differ by {self.difference.rms:.2g} (root mean square; largest "
            f"{self.difference.largest:.2g}); rounding to {self.dtype} alone {self.noise.rms:.2g} (largest "
            f"{self.noise.largest:.2g}), the adapter {self.effect.rms:.2g} (largest {self.effect.largest:.2g}); same "
            f"first guess for {self.num_same_first:,} of {counted(self.num_tokens, 'token')}"
        )


def compare(
    config: PretrainedConfig,
    base: WeightFiles,
    adapter: Path,
    merged_config: PretrainedConfig,
    merged: WeightFiles,
    batch: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Run base, base + adapter and merged over the same rows, a layer at a time.

    Args:
        config: of the base model; `merged_config` of the merged one.
        batch: input_ids and attention_mask, (B, T).
        dtype: of the merged weights; None is each weight's own in the base.
    """
    beside = StreamedModel(config, base, adapter, device, dtype)
    wanted = beside.logits(batch)
    noise = Difference.between(wanted, _rounded_logits(beside, batch))
    with beside.model.disable_adapter():
        effect = Difference.between(wanted, beside.logits(batch))
    del beside
    got = StreamedModel(merged_config, merged, None, device).logits(batch)
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in merged.dtypes.values()})
    return Comparison(
        num_rows=len(batch["input_ids"]),
        num_tokens=len(wanted),
        dtype=" and ".join(dtypes),
        difference=Difference.between(wanted, got),
        noise=noise,
        effect=effect,
        largest_logit=float(wanted.abs().max()),
        num_same_first=int((wanted.argmax(-1) == got.argmax(-1)).sum()),
    )


def refuse_beyond_noise(comparison: Comparison) -> None:
    """
    Raises:
        TrainingError: the merged model is not base + adapter.
    """
    if comparison.is_within_noise:
        return
    limit = comparison.limit
    raise TrainingError(
        f"the merged model is not base + adapter: {comparison}. The limit is {limit.rms:.2g} "
        f"(largest {limit.largest:.2g}); nothing was written; fix: use the adapter as it is (PEFT, or vllm serve "
        "--enable-lora), and report this",
        "merge_differs",
    )


def _rounded_logits(model: StreamedModel, batch: dict[str, Tensor]) -> Tensor:
    """Base + adapter, with what rounding the sum does to each weight added to the base's."""

    def rounded(part: Part) -> dict[str, Tensor]:
        moved = {}
        for name, merged in model.merged(part).items():
            error = merged.to(model.dtype_of(name)).float() - merged
            moved[name] = model.read(part, name) + error
        return moved

    whole: list[tuple[Any, Tensor]] = []
    for part in model.parts:
        if part.is_adapted:
            dtype = model.dtype_of(next(iter(part.weights)))
            for name, parameter in part.module.named_parameters():
                if "modules_to_save." in name or "trainable_tokens_delta" in name:  # they replace weights
                    whole.append((parameter, parameter.data))
                    parameter.data = parameter.data.to(dtype).float()
    try:
        return model.logits(batch, rounded)
    finally:
        for parameter, data in whole:
            parameter.data = data
