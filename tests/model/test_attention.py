"""Contract 4: packing changes speed, not results."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, Lfm2Config, Lfm2ForCausalLM

from lora_core.data.packing import collate, collate_packed
from lora_core.errors import ConfigError
from lora_core.model import attention
from lora_core.model.attention import attend_varlen, check_packing, segment_attention, use_segment_attention
from lora_core.model.loss import CausalLMLoss
from tests.conftest import make_model
from tests.families import FAMILIES


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


def test_a_model_whose_packed_examples_see_each_other_is_refused() -> None:
    def ignores_segments(*arguments: Any, segment_lengths: Any = None, **keywords: Any) -> Any:
        return segment_attention(*arguments, **keywords)

    AttentionInterface.register("ignores_segments", ignores_segments)
    torch.manual_seed(0)
    model = make_model(300)
    model.set_attn_implementation("ignores_segments")
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM lets packed examples see each other.*data\.packing=false"):
        check_packing(model)


def test_a_convolution_that_reaches_into_the_example_before_is_refused() -> None:
    """LFM2's short convolutions do, by so little on a tiny model that only equal shapes show it."""
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    )
    use_segment_attention(model)
    with pytest.raises(ConfigError, match=r"Lfm2ForCausalLM lets packed examples see each other"):
        check_packing(model)


def test_roundings_that_depend_on_the_shape_are_no_leak() -> None:
    """7B in 4 bits and bfloat16 gives 7 tokens alone other states than among 12, by 5.2%, on an H100."""
    torch.manual_seed(0)
    model = make_model(300)
    use_segment_attention(model)
    model.model.norm.register_forward_hook(lambda _, __, states: states * (1 + 0.06 * (states.shape[1] % 2)))
    check_packing(model)


def test_padded_rows_are_refused() -> None:
    model = make_model(300)
    use_segment_attention(model)
    with pytest.raises(ValueError, match=r"one row and no mask; got 2 rows; fix: data\.packing=false"):
        model(torch.ones(2, 3, dtype=torch.long))


def documented_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, word by word, a query at a time; the kernel itself needs a GPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    left, right = window_size
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        for at in range(start, end):
            first = start if left < 0 else max(start, at - left)
            last = end if right < 0 else min(end, at + right + 1)
            scores = torch.einsum("hd,khd->hk", query[at], key[first:last]) * (scale or query.shape[2] ** -0.5)
            outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[first:last]))
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_the_gpus_kernel_is_asked_for_what_the_cpu_computes(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = (5, 1, 7)
    query, key, value = (torch.randn(1, heads, 13, 8) for heads in (4, 2, 2))
    wanted, _ = segment_attention(
        torch.nn.Identity(), query, key, value, None, segment_lengths=lengths, scaling=0.3, sliding_window=window
    )
    got = attend_varlen(query, key, value, lengths, 0.3, window, kernel=documented_varlen)
    torch.testing.assert_close(got, wanted)
    assert inspect.signature(documented_varlen).parameters.keys() <= inspect.signature(varlen_attn).parameters.keys()
