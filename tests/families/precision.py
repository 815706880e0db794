"""Families in bfloat16, NF4 and int8: against plain transformers and PEFT on the same weights, a row at a time.

    python -m tests.families.precision NAME ...

A line for each: the difference of loss and adapter gradients, and the most that it may be. Quantized weights are
widened to float32, and nothing but our own layers and loss can then differ. In bfloat16 every operation rounds: the
measure is twice what plain attention by hand (eager) and by SDPA differ from each other, or what plain bfloat16
differs from float32 with the same weights, as some families have one attention only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.checkpoints.adapter_folder import adapter_on
from lora_core.config.schema import RunConfig
from lora_core.data.packing import collate, to_device
from lora_core.errors import LoraCoreError
from lora_core.model.attention import attention_of_text
from lora_core.model.base import add_adapter, load_base_model, load_model_config, quantization_config
from lora_core.model.decoder import attention_for
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from tests.families.build import tiny_model
from tests.families.sweep import (
    DEVICE,
    LENGTHS,
    LIMIT,
    VOCABULARY,
    away_from_zero,
    difference,
    gradients_of,
    plain_class,
    quiet,
    rows_of,
    summed_by_row,
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"model": {"dtype": "bfloat16"}, "train": {"bf16": True}},
    "nf4": {"model": {"dtype": "float32", "quantization": "nf4"}, "train": {"bf16": False}},
    "int8": {"model": {"dtype": "float32", "quantization": "int8"}, "train": {"bf16": False}},
}


def outcome_in(precision: str, family: str, folder: Path) -> dict[str, Any]:
    """{family, precision, difference, limit}, or `why` where the family does not train in it."""
    result: dict[str, Any] = {"family": family, "precision": precision}
    tiny_model(family, VOCABULARY).save_pretrained(folder)
    given = PRECISIONS[precision]
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": str(folder), **given["model"]},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "train": {"optim": "adamw_torch", **given["train"]},
        }
    )
    rows = rows_of(LENGTHS)
    try:
        ours = _ours(config, rows, folder / "adapter")
    except LoraCoreError as error:
        return result | {"why": str(error).splitlines()[0].replace(str(folder), "FOLDER")}
    with _autocast(config):
        plain = _plain(config, rows, folder / "adapter", "sdpa")
    limit = LIMIT
    if precision == "bf16":
        with _autocast(config):
            by_hand = _plain(config, rows, folder / "adapter", "eager")
        exact = _plain(config, rows, folder / "adapter", "sdpa", widened=True)
        limit = 2 * max(difference(by_hand, plain), difference(plain, exact))
    return result | {"difference": difference(ours, plain), "limit": limit}


def _ours(config: RunConfig, rows: list[list[int]], adapter: Path) -> dict[str, Tensor]:
    adapted = add_adapter(load_base_model(config.model, DEVICE, packing=False), config.lora, seed=0)
    check_head(adapted)
    away_from_zero(adapted)
    adapted.save_pretrained(adapter)
    loss = CausalLMLoss(adapted).train()
    total = torch.zeros((), device=DEVICE)
    for row in rows:
        with _autocast(config):
            batch = collate([{"input_ids": row, "loss_mask": [False, False, *[True] * (len(row) - 2)]}], 0)
            sums = loss(**to_device(batch, DEVICE))
        sums.loss_sum.backward()
        total += sums.loss_sum.detach()
    return {"loss": total} | gradients_of(adapted)


def _plain(
    config: RunConfig, rows: list[list[int]], adapter: Path, attention: str, widened: bool = False
) -> dict[str, Tensor]:
    model_config = load_model_config(config.model)
    folder = Path(config.model.name_or_path)
    base = plain_class(folder).from_pretrained(
        folder,
        dtype=getattr(torch, config.model.dtype),
        quantization_config=quantization_config(config.model),
        attn_implementation=attention_of_text(model_config, attention_for(model_config, attention)),
    )
    if config.model.quantization == "none":
        base.to(DEVICE)
    if widened:
        base.float()
    return summed_by_row(adapter_on(base, adapter, is_trainable=True).train(), base, rows)


@contextmanager
def _autocast(config: RunConfig) -> Iterator[None]:
    """As Accelerate wraps a run's forward."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=config.train.bf16 is True):
        yield


def main(names: list[str]) -> None:
    quiet()
    for family in names:
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = outcome_in(precision, family, Path(folder))
                except Exception as error:  # noqa: BLE001  # what this is here to find
                    said = "".join(traceback.format_exception(error)[-6:])
                    result = {"family": family, "precision": precision, "traceback": said}
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
