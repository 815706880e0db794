"""The check that packed examples do not see each other, by the model's own numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.model.attention import causal_lm_of, decoder_of


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check that a packed example depends on nothing but itself, and that it is what it would be alone.

    Two packed rows that differ in their first example alone, of equal shapes and so of equal roundings, must give the
    second example the same hidden states. Alone and packed shapes differ, and with them the roundings; how much is
    seen on the first example, which nothing later can change.

    Raises:
        ConfigError: they do not; this model cannot be packed.
    """
    causal_lm = causal_lm_of(model)
    decoder = decoder_of(causal_lm)
    was_training = model.training
    model.eval()
    device = causal_lm.get_input_embeddings().weight.device
    first, other_first, second = (
        torch.arange(start, end, device=device)[None] for start, end in ((1, 8), (21, 28), (11, 16))
    )

    def hidden(*examples: Tensor) -> tuple[Tensor, ...]:
        """The states of each example, float32, all in one row."""
        lengths = tuple(example.shape[1] for example in examples)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        output = decoder(
            input_ids=torch.cat(examples, 1), position_ids=positions, segment_lengths=lengths, use_cache=False
        )
        states: tuple[Tensor, ...] = output.last_hidden_state[0].float().split(lengths)
        return states

    try:
        (first_alone,), (second_alone,) = hidden(first), hidden(second)
        first_packed, second_packed = hidden(first, second)
        _, second_after_another = hidden(other_first, second)
    except RuntimeError as error:  # for example a kernel that this GPU does not have
        raise ConfigError(
            f"data.packing=true: {type(causal_lm).__name__} cannot attend over packed examples on {device}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}; fix: data.packing=false"
        ) from error
    model.train(was_training)
    rounding = _difference(first_packed, first_alone)
    if not math.isfinite(rounding):
        raise ConfigError(
            f"{type(causal_lm).__name__} gives values that are not finite: its weights are damaged or do not suit the "
            "precision; fix: another model.name_or_path or model.dtype"
        )
    change_limit = 0.05 + 3 * rounding
    leak = _difference(second_after_another, second_packed)
    change = _difference(second_packed, second_alone)
    if not (leak < (change_limit if rounds_by_other_tokens(causal_lm) else 1e-6) and change < change_limit):
        raise ConfigError(
            f"data.packing=true: {type(causal_lm).__name__} lets packed examples see each other (their hidden "
            f"states change by {max(leak, change):.2g} of their size); fix: data.packing=false"
        )


def _difference(states: Tensor, wanted: Tensor) -> float:
    return float((states - wanted).norm() / wanted.norm())


def rounds_by_other_tokens(causal_lm: Any) -> bool:
    """Whether a token's rounding depends on the others in a row of the same length.

    int8 layers compute a column in 16 bits if any token is an outlier in it; experts multiply as many tokens at a time
    as were sent to them.
    """
    config = causal_lm.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return getattr(causal_lm, "is_loaded_in_8bit", False) or any(getattr(config, name, None) for name in names)
