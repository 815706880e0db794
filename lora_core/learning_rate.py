"""A learning rate for LoRA from the model, the adapter and the length of the run. Arithmetic only; imports no torch.

The formula is that of Thinking Machines' tinker-cookbook, `get_lr` up to 2025, for AdamW and alpha 32 with the scale
alpha / rank: 5e-5 for full fine-tuning, times 10 for LoRA, times (2000 / hidden size) to a power of the model's family.
Their later versions give the best rates of a sweep instead (780 steps of 128 examples): 3e-4 or 1e-3 for most models,
and 72 of the 80 runs that diverged were those of 3e-3. That the best rate does not depend on the rank, and is about
10 times that of full fine-tuning (15 times for short runs), is from "LoRA Without Regret",
https://thinkingmachines.ai/blog/lora/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_BASE = 5e-4
_BASE_HIDDEN_SIZE = 2000
_ALPHA = 32
_POWERS = {"Qwen": 0.0775, "Llama": 0.781}
# Hidden sizes of the models that the formula's source lists: Llama 3 of 1B to 70B, Qwen3 of 4B to 235B.
_FOUND_WITHIN = (2048, 8192)
# For other families: the rate that was best for most models of the later sweep, whatever their family.
_OTHER_FAMILIES = 3e-4
# Fewer steps are a short run: 15 times the rate of full fine-tuning in place of 10. Over 30 and 40 steps of other
# people's rows 1e-3 learned more than 5e-4 (benchmarks/learning_rate.py).
SHORT_RUN_STEPS = 100
_SHORT_RUN = 1.5
# Never more: at 3e-3 most models of the sweep diverged.
_MOST = 1e-3


@dataclass(frozen=True)
class SuggestedRate:
    """A learning rate, and how it was arrived at."""

    value: float
    """To two digits."""
    arithmetic: str
    """One line, such as `5e-4 x (2000 / 2048)^0.0775 x 32 / alpha 16 = 0.001`."""
    remarks: tuple[str, ...]
    """Where the formula is used outside the range in which it was found, and what was done."""

    def __str__(self) -> str:
        return "; ".join([self.arithmetic, *self.remarks])


def suggest_learning_rate(
    *, model_type: str, hidden_size: int, alpha: int, rank: int, use_rslora: bool = False, total_steps: int
) -> SuggestedRate:
    """The peak learning rate that the formula gives.

    The update of an adapter is scaled by alpha / rank, and the best rate for that scale does not depend on the rank, so
    that another alpha needs the rate to change by 32 / alpha. With rsLoRA the scale is alpha / sqrt(rank), as of an
    alpha that is sqrt(rank) times as large.

    >>> suggest_learning_rate(model_type="qwen2", hidden_size=3584, alpha=32, rank=16, total_steps=500).arithmetic
    '5e-4 x (2000 / 3584)^0.0775 = 0.00048'

    Args:
        model_type: of the model's config, such as qwen2.
        hidden_size: of the model.
        total_steps: optimizer steps of the run.
    """
    remarks = []
    family = next((name for name in _POWERS if model_type.startswith(name.lower())), None)
    if family is None:
        rate, terms = _OTHER_FAMILIES, f"{_OTHER_FAMILIES:g}"
        remarks.append(
            f"no formula is known for {model_type} models: {terms} was the best rate for most models of a sweep"
        )
    else:
        low, high = _FOUND_WITHIN
        size = min(max(hidden_size, low), high)
        rate = _BASE * (_BASE_HIDDEN_SIZE / size) ** _POWERS[family]
        terms = f"5e-4 x ({_BASE_HIDDEN_SIZE} / {size})^{_POWERS[family]}"
        if size != hidden_size:
            remarks.append(
                f"found for hidden sizes of {low:,} to {high:,}; the nearest is taken, this model has {hidden_size:,}"
            )
    if total_steps < SHORT_RUN_STEPS:
        rate *= _SHORT_RUN
        terms += f" x {_SHORT_RUN:g}"
        remarks.append(
            f"x {_SHORT_RUN:g} for {total_steps} steps, fewer than {SHORT_RUN_STEPS}: 15 times the rate of full "
            "fine-tuning in place of 10"
        )
    scaled_alpha = alpha * math.sqrt(rank) if use_rslora else alpha
    if scaled_alpha != _ALPHA:
        rate *= _ALPHA / scaled_alpha
        terms += f" x {_ALPHA} / {f'(alpha {alpha} x sqrt(rank {rank}))' if use_rslora else f'alpha {alpha}'}"
    if rate > _MOST:
        rate, terms = _MOST, f"{terms}, at most {_MOST:g}"
    value = float(f"{rate:.2g}")
    arithmetic = terms if terms == f"{value:g}" else f"{terms} = {value:g}"
    return SuggestedRate(value, arithmetic, tuple(remarks))
