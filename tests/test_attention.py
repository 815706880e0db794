"""Contract 4: packing changes speed, not results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from lora_core import attention
from lora_core.attention import check_packing, segment_attention, use_segment_attention
from lora_core.errors import ConfigError
from lora_core.loss import CausalLMLoss
from lora_core.packing import collate, collate_packed

from .conftest import make_model
from .families import FAMILIES


def make_rows() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    rows = []
    for length in (12, 3, 1, 9):
        mask = torch.rand(length) < 0.5
        rows.append({"input_ids": torch.randint(10, 300, (length,)).tolist(), "loss_mask": mask.tolist()})
    return rows


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = CausalLMLoss(model)(**batch)
    sums.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(sums.loss_sum.detach()), gradients


@pytest.mark.parametrize("fused_from", [10_000, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_the_padded_batch(
    family: str, fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FUSED_FROM_TOKENS_ON_CPU", fused_from)
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    model.set_attn_implementation("eager")  # the models' own words for what they compute
    rows = make_rows()
    wanted_loss, wanted = loss_and_gradients(model, collate(rows, pad_token_id=0))
    use_segment_attention(model)
    check_packing(model)
    loss, gradients = loss_and_gradients(model, collate_packed(rows))
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_generation_with_a_cache_is_the_same() -> None:
    model = make_model(300).eval()
    prompt = torch.arange(10, 20)[None]
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    use_segment_attention(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True), wanted)


def test_a_model_whose_conversations_see_each_other_is_told_apart() -> None:
    def ignores_segments(*arguments: Any, segment_lengths: Any = None, **keywords: Any) -> Any:
        return segment_attention(*arguments, **keywords)

    AttentionInterface.register("ignores_segments", ignores_segments)
    torch.manual_seed(0)
    model = make_model(300)
    model.set_attn_implementation("ignores_segments")
    with pytest.raises(
        ConfigError, match=r"Qwen2ForCausalLM lets packed conversations see each other.*data\.packing=false"
    ):
        check_packing(model)


def test_padded_rows_are_refused() -> None:
    model = make_model(300)
    use_segment_attention(model)
    with pytest.raises(ValueError, match=r"one row and no mask; got 2 rows; fix: data\.packing=false"):
        model(torch.ones(2, 3, dtype=torch.long))
