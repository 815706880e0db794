"""The lean LoRA branch against PEFT's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_core.config.schema import ModelConfig
from lora_core.data.packing import collate
from lora_core.model.base import load_base_model
from lora_core.model.lora_linear import BitMask, ByteMask, use_lean_lora
from lora_core.model.loss import CausalLMLoss
from tests.families.small import FAMILIES


def with_adapter(base: Any, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base.requires_grad_(False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at the start, where A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model: Any, bf16: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    rows = [
        {"input_ids": list(range(10 * i + 1, 10 * i + n)), "loss_mask": [True] * (n - 1)} for i, n in ((1, 9), (2, 5))
    ]
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sums = CausalLMLoss(model)(**collate(rows, pad_token_id=0))
    sums.loss_sum.backward()
    return float(sums.loss_sum.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_4_bit_model_trains_in_another_type_than_bfloat16(tiny_model_dir: Path, dtype: Any) -> None:
    config = ModelConfig(name_or_path=str(tiny_model_dir), quantization="nf4", dtype=dtype)
    model = with_adapter(load_base_model(config, torch.device("cpu")), lora_dropout=0.1)
    computed_in = {module.compute_dtype for module in model.modules() if hasattr(module, "compute_dtype")}
    assert computed_in == {getattr(torch, dtype)}
    use_lean_lora(model)
    _, gradients = step(model, bf16=True)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients.values())


def assert_same(ours: Any, peft_own: Any, tolerance: float) -> None:
    assert ours[0] == pytest.approx(peft_own[0], rel=tolerance)
    assert ours[1].keys() == peft_own[1].keys()
    scale = max(float(gradient.norm()) for gradient in peft_own[1].values())
    for name, gradient in ours[1].items():
        assert float((gradient - peft_own[1][name]).norm()) < tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_peft(family: str) -> None:
    torch.manual_seed(0)
    model = with_adapter(FAMILIES[family]())
    peft_own, rounded = step(model), step(model, bf16=True)
    use_lean_lora(model)
    assert_same(step(model), peft_own, 1e-5)
    assert_same(step(model, bf16=True), rounded, 0.03)


def test_rank_stabilised_scaling_is_pefts() -> None:
    torch.manual_seed(0)
    model = with_adapter(FAMILIES["qwen2"](), use_rslora=True)
    peft_own = step(model)
    use_lean_lora(model)
    assert_same(step(model), peft_own, 1e-5)


def test_dora_is_left_to_peft() -> None:
    torch.manual_seed(0)
    model = with_adapter(FAMILIES["qwen2"](), use_dora=True)
    peft_own = step(model)
    use_lean_lora(model)
    assert step(model)[0] == peft_own[0]


@torch.no_grad()
def test_switched_off_and_merged_adapters_are_left_to_peft() -> None:
    torch.manual_seed(0)
    base = FAMILIES["qwen2"]().eval()
    input_ids = torch.tensor([[1, 2, 3]])
    unadapted = base(input_ids).logits
    model = with_adapter(base).eval()
    use_lean_lora(model)
    adapted = model(input_ids).logits
    assert (adapted - unadapted).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids).logits, unadapted)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids).logits, adapted)


@pytest.mark.parametrize("mask", [BitMask, ByteMask])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_dropout_drops_p_of_the_values_and_repeats_with_the_seed(mask: Any, p: float) -> None:
    x = torch.ones(401, 1003, dtype=torch.bfloat16)
    torch.manual_seed(0)
    kept, exact = mask.draw(x, p)
    assert exact == pytest.approx(p, abs=1 / 256)
    assert sum(mask.draw(x[:1, :1], p)[1] for _ in range(4000)) / 4000 == pytest.approx(
        p, abs=0.004 if p > 0.9 else 3e-4
    )
    torch.manual_seed(0)
    dropped = (mask.apply(x, kept) == 0).float()
    assert float(dropped.mean()) == pytest.approx(exact, abs=0.003)
    flat = dropped.flatten() - exact
    for lag in range(1, 9):  # neighbours share a draw, and must not share a fate
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 0.003
    torch.manual_seed(0)
    assert torch.equal(mask.draw(x, p)[0], kept)
    assert torch.equal(mask.unpack(mask.pack(kept), x.shape), kept)


class MultipliesByItself(nn.Linear):
    """Stands for layers of 4 and 8 bits, which give y and its gradient themselves."""


@pytest.mark.parametrize("base", [nn.Linear, MultipliesByItself])
@pytest.mark.parametrize("mask", [BitMask, ByteMask])
def test_gradients_with_dropout_are_those_of_the_function_that_was_computed(mask: Any, base: Any) -> None:
    layer = nn.Sequential(base(12, 8)).double()
    model: Any = peft.get_peft_model(layer, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_dropout=0.4))
    model = model.double().train()
    nn.init.normal_(model.base_model.model[0].lora_B.default.weight)
    model.device = torch.device("cpu")
    use_lean_lora(model, mask)

    def computed(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        output: torch.Tensor = model(x)
        return output

    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(computed, (x, *parameters))
    wanted = computed(x)
    with torch.no_grad():
        many = torch.stack([model(x) for _ in range(4000)]).mean(0)  # the expected value is the value without dropout
        assert float((many - model.eval()(x)).norm() / wanted.norm()) < 0.03


def test_a_step_keeps_seven_tenths_at_most_of_what_pefts_layers_keep() -> None:
    def kept_bytes(model: Any) -> int:
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = CausalLMLoss(model)(input_ids=torch.ones(1, 512, dtype=torch.long), loss_mask=torch.ones(1, 512) > 0)
        del loss
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    torch.manual_seed(0)
    model = with_adapter(FAMILIES["llama"]().bfloat16(), lora_dropout=0.1)
    peft_own = kept_bytes(model)
    use_lean_lora(model)
    assert kept_bytes(model) < 0.7 * peft_own
