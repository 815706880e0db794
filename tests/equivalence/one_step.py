"""One optimizer step of a tiny model over the same conversations, cut as asked; run alone or as several ranks.

python -m tests.equivalence.one_step MODEL_DIR CUTS.json

CUTS.json: a list of {"rows": FILE, "batch_size": ..., "accumulation": ..., "max_tokens": ..., "out": FILE}, one step
for each, as `one_step` takes it: max_tokens 0 pads; otherwise micro-batches are packed up to so many tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lora_core.config.schema import LoraConfig, ModelConfig, RunConfig, TrainConfig
from lora_core.data.encoded import encode_file, pad_id
from lora_core.data.packing import Batching, step_rows
from lora_core.model.base import add_adapter, load_base_model, load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.devices import build_accelerator
from lora_core.training.step import train_step
from lora_core.verification.gradients import KeepsGradients


def one_step(
    model_dir: Path, rows_file: Path, batch_size: int, accumulation: int, max_tokens: int = 0
) -> dict[str, Any]:
    accelerator = build_accelerator(RunConfig(train=TrainConfig(bf16=False)))
    config = ModelConfig(name_or_path=str(model_dir), dtype="float32")
    tokenizer = load_tokenizer(config)
    with accelerator.main_process_first():
        data = encode_file(rows_file, tokenizer, max_seq_length=512, cache_dir=rows_file.parent / "cache")
    base = load_base_model(config, accelerator.device, packing=max_tokens > 0)
    adapted = add_adapter(base, LoraConfig(rank=4, alpha=8, dropout=0.0), seed=0)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start of training, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1)
    optimizer = KeepsGradients([p for p in adapted.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    model = accelerator.prepare(CausalLMLoss(adapted))
    model.train()
    num_rows = len(data.lengths)
    rows = step_rows(num_rows, batch_size * accumulation * accelerator.num_processes, 42, 0)
    batching = Batching(batch_size, pad_id(tokenizer), max_tokens or None)
    cuts = batching.cut(rows, data.lengths, accelerator.num_processes, accelerator.process_index)
    batches = [batching.tensors(data.dataset, cut) for cut in cuts]
    result = train_step(accelerator, model, optimizer, scheduler, batches, max_grad_norm=None)
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "num_tokens": result.num_supervised_tokens,
        "gradients": optimizer.seen,
        "micro_batches": len(cuts),
        "world_size": accelerator.num_processes,
        "is_main": accelerator.is_main_process,
    }


if __name__ == "__main__":
    for cut in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        size = (cut["batch_size"], cut["accumulation"], cut["max_tokens"])
        result = one_step(Path(sys.argv[1]), Path(cut["rows"]), *size)
        if result["is_main"]:
            torch.save(result, cut["out"])
