"""Check: the saved adapter gives the loss that was logged, and merged the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.checkpoints.adapter_folder import load_adapter
from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import collate, eval_batching, to_device
from lora_core.evaluation.evaluate import evaluate
from lora_core.model.attention import causal_lm_of
from lora_core.model.base import load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.devices import build_accelerator
from lora_core.verification.gradients import does_not_fit, float32_overrides, short_rows
from lora_core.verification.runs import events
from lora_core.verification.table import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_MERGE_ROWS = 4
RELOAD_LIMIT = 1e-5
# Of the largest logit. Five steps' adapter was measured to move logits by 8e-3 of it in a warmup, 9e-2 at full rate.
MERGE_LIMIT = 1e-4


def check_reload(config: RunConfig, folder: Path) -> Check:
    """The adapter as PEFT loads it onto a fresh base model, against the loss that the run logged."""
    logged = [event["loss"] for event in events(folder) if event["event"] == "eval"][-1]
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data)
    _, eval_data = load_data(config, tokenizer)
    assert eval_data is not None
    adapted = load_adapter(config, folder / "adapter", accelerator.device)
    model = accelerator.prepare_model(CausalLMLoss(adapted, config=config.train), evaluation_mode=True)
    loss = evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer))).loss
    difference = abs(loss - logged)
    return Check.judged(
        "reload",
        f"adapter/ loaded by PEFT: loss on {len(eval_data.lengths)} rows",
        f"{RELOAD_LIMIT:g} of loss",
        f"{difference:.1e}",
        None if difference <= RELOAD_LIMIT else f"loss {logged:.6f} in memory, {loss:.6f} after loading",
    )


def check_merge(config: RunConfig, adapter_dir: Path, data: EncodedFile, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Base and adapter against the two merged, in float32: rounding to bfloat16 would hide a small adapter."""
    compared = "adapter/ merged: logits, float32"
    quantization = config.model.quantization
    if quantization != "none":
        reason = f"merging into {quantization} rounds the sum to {quantization} again; fix: merge into bfloat16"
        return Check.not_applicable("reload", compared, reason)
    in_float32 = with_overrides(config, float32_overrides(config))
    rows = short_rows(data.lengths, _NUM_MERGE_ROWS)
    too_large = does_not_fit(in_float32, data, rows)
    if too_large is not None:
        return Check.not_applicable("reload", compared, too_large)
    accelerator = build_accelerator(in_float32)
    adapted: Any = load_adapter(with_overrides(in_float32, ["data.packing=false"]), adapter_dir, accelerator.device)
    adapted.eval()
    batch = to_device(collate([data.dataset[int(row)] for row in rows], pad_id(tokenizer)), accelerator.device)

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        """(N, vocabulary) at the positions that are not padding."""
        mask = batch["attention_mask"]
        output = causal_lm_of(model)(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        result: Tensor = output.logits[mask.bool()].float().cpu()
        return result

    beside = logits(adapted)
    with adapted.disable_adapter():
        effect = float((beside - logits(adapted)).abs().max())
    merged = logits(adapted.merge_and_unload())
    limit = MERGE_LIMIT * float(beside.abs().max())
    difference = float((merged - beside).abs().max())
    measured = f"{difference:.1e} (the adapter: {effect:.1e})"
    if effect <= limit:
        reason = f"the short run's adapter moves no logit by more than {effect:.1e}: too little to test the merge"
        return Check("reload", compared, f"{limit:.1e}", measured, "not applicable", reason)
    problem = None if difference <= limit else f"a logit differs by {difference:.2g}"
    return Check.judged("reload", compared, f"{limit:.1e}", measured, problem)
