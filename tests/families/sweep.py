"""One family at a time: built small, planned, trained, saved; against plain transformers and PEFT on single rows."""

from __future__ import annotations

import logging
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lora_core.checkpoints.adapter_folder import adapter_on
from lora_core.config.schema import RunConfig
from lora_core.data.packing import collate, collate_packed, to_device
from lora_core.errors import LoraCoreError, SimulationError
from lora_core.memory.micro_batch import MicroBatch
from lora_core.memory.plan import predict_memory
from lora_core.model.attention import SEGMENT_ATTENTION, attention_of_text, use_attention
from lora_core.model.base import add_adapter, load_base_model, load_model_config
from lora_core.model.decoder import attention_for
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from lora_core.model.starting_adapter import check_reload
from lora_core.preflight.model_facts import model_facts, with_packing
from lora_core.runtime.devices import DeviceMemory
from lora_core.training.step import check_gradient
from tests.families.build import tiny_model

VOCABULARY = 128
LENGTHS = (9, 17, 6)
LIMIT = 1e-5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 are rounded to ten bits otherwise


def outcome(family: str, folder: Path) -> dict[str, Any]:
    """What came of a family: {family, trains, why, ...}. `traceback` holds an error that is not a sentence."""
    result: dict[str, Any] = {"family": family, "trains": "not", "why": ""}
    try:
        model = tiny_model(family, VOCABULARY)
        model.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001  # a family's config has its own idea of what is small
        reason = " ".join(str(error).split())[:150]
        return result | {"trains": "not built", "why": f"{type(error).__name__}: {reason}"}
    result["class"] = type(model).__name__
    try:
        del model
        result |= _train(folder, result)
    except LoraCoreError as error:
        result["why"] = str(error).splitlines()[0]
    except Exception as error:  # noqa: BLE001  # what this is here to find
        result["why"] = f"{type(error).__name__}: {str(error)[:300]}"
        result["traceback"] = "".join(traceback.format_exception(error)[-6:])
    result["why"] = str(result["why"]).replace(str(folder), "FOLDER")
    return result


def _train(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    config = with_packing(
        RunConfig.model_validate(
            {
                "model": {"name_or_path": str(folder), "dtype": "float32"},
                "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
                "train": {"bf16": False, "optim": "adamw_torch"},
            }
        )
    )
    packs = bool(config.data.packing)
    facts = model_facts(config)
    result |= {"packs": packs, "targets": facts.auto_targets, "without": [*dict(facts.without_adapter)]}
    note = ""
    try:
        memory = predict_memory(config, MicroBatch(LENGTHS, 20, packs), DeviceMemory("cpu", 10**12))
        result["idle"] = memory.idle_adapters
        if memory.idle_adapters:
            names = {".".join(name.split(".")[-2:]) for name in memory.idle_adapters}
            note = f"; preflight warns that no gradient reaches {', '.join(sorted(names))}"
    except SimulationError as error:  # a run says so, and goes on
        note = f"; {error}"
    rows = rows_of(LENGTHS)
    batch_rows = [{"input_ids": row, "loss_mask": [False, False, *[True] * (len(row) - 2)]} for row in rows]

    base = load_base_model(config.model, DEVICE, packs)
    adapted = add_adapter(base, config.lora, seed=0)
    check_head(adapted)
    check_reload(adapted)
    away_from_zero(adapted)
    loss = CausalLMLoss(adapted).train()
    adapter = folder / "adapter"
    adapted.save_pretrained(adapter)
    batches = ({"packed": collate_packed(batch_rows)} if packs else {}) | {"padded": collate(batch_rows, 0)}
    got = {}
    for name, batch in batches.items():
        if name == "padded" and base.config.get_text_config()._attn_implementation == SEGMENT_ATTENTION:
            use_attention(base, "sdpa")
        got[name] = _ours(loss, batch)
    wanted = _plain(folder, adapter, rows, config)
    result["loss"] = wanted["loss"].item()
    result |= {name: difference(gradients, wanted) for name, gradients in got.items()}
    unused = [name for name, gradient in wanted.items() if "lora_B" in name and not gradient.abs().sum() > 0]
    result["without_gradient"] = unused
    worst = max((result[name] for name in batches), default=1.0)
    # Attention without a scale, as Gemma 4's, multiplies what float32 rounds; by how much depends on the CPU.
    result["limit"] = LIMIT if worst <= LIMIT else max(LIMIT, 2 * _rounding(folder, adapter, rows, config, wanted))
    if worst <= result["limit"]:
        result["trains"] = "packed" if packs else "padded"
        result["why"] = (("" if packs else str(facts.packing_problem)) + note).removeprefix("; ")
    else:
        result["why"] = f"differs from plain transformers and PEFT by {worst:.1e}"
    return result


def _ours(loss: CausalLMLoss, batch: dict[str, Any]) -> dict[str, Tensor]:
    loss.zero_grad()
    sums = loss(**to_device(batch, DEVICE))
    check_gradient(sums.loss_sum)
    sums.loss_sum.backward()
    return {"loss": sums.loss_sum.detach()} | gradients_of(loss.model)


def _plain(
    folder: Path,
    adapter: Path,
    rows: list[list[int]],
    config: RunConfig,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Summed loss and gradients of the rows, one at a time, by transformers and PEFT alone: the adapter reloaded."""
    model_config = load_model_config(config.model)
    by_part = attention_of_text(model_config, attention_for(model_config, attention))
    base = plain_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation=by_part).to(DEVICE)
    model = adapter_on(base, adapter, is_trainable=True).to(dtype).train()
    return summed_by_row(model, base, rows)


def _rounding(folder: Path, adapter: Path, rows: list[list[int]], config: RunConfig, plain: dict[str, Tensor]) -> float:
    """What plain transformers and PEFT in float32 differ by from the same in float64, or with attention by hand."""
    exact = _plain(folder, adapter, rows, config, dtype=torch.float64)
    by_hand = _plain(folder, adapter, rows, config, attention="eager")
    return max(difference(plain, exact), difference(plain, by_hand))


def rows_of(lengths: Sequence[int]) -> list[list[int]]:
    """Random tokens."""
    torch.manual_seed(1)
    return [torch.randint(2, VOCABULARY, (length,)).tolist() for length in lengths]


def summed_by_row(model: Any, base: Any, rows: list[list[int]]) -> dict[str, Tensor]:
    """Summed loss and gradients of the rows, one at a time, all but the first two tokens of each being loss tokens."""
    # In transformers 5.24, the whole forward of Llama 4 and Kosmos-2 wants images.
    inner = base.get_decoder()
    has_head = isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None
    forward = inner if has_head else model
    total = torch.zeros((), device=DEVICE)
    for row in rows:
        ids = torch.tensor([row], device=DEVICE)
        logits = forward(input_ids=ids, use_cache=False).logits[0, 1:-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="sum")
        loss.backward()
        total += loss.detach()
    return {"loss": total} | gradients_of(model)


def plain_class(folder: Path) -> Any:
    """The class that a user loads a checkpoint by: the one that it names."""
    return getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    named = ((name.removeprefix("model."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The larger of the loss's and the whole gradient's relative difference."""
    strip = {name.removeprefix("base_model.model."): value for name, value in wanted.items()}
    ours = {name.removeprefix("base_model.model."): value for name, value in got.items()}
    assert strip.keys() == ours.keys(), sorted(strip.keys() ^ ours.keys())[:4]
    names = [name for name in strip if name != "loss"]
    one, other = (torch.cat([side[name].flatten() for name in names]) for side in (strip, ours))
    by_gradient = float((one - other).norm() / one.norm())
    return max(by_gradient, abs(float(strip["loss"] - ours["loss"])) / float(strip["loss"]))


def away_from_zero(model: torch.nn.Module) -> None:
    """B begins at zero, where A has no gradient."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def quiet() -> None:
    """Without the libraries' own words."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def outcomes(names: list[str]) -> Iterator[dict[str, Any]]:
    """One family after the other."""
    quiet()
    for family in names:
        with tempfile.TemporaryDirectory() as folder:
            yield outcome(family, Path(folder))
