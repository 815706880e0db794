from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from lora_core.config.schema import TrainConfig
from lora_core.model import loss
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from tests.conftest import make_model
from tests.families.small import FAMILIES


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(10, 300, (3, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    loss_mask = (torch.rand(3, 12) < 0.4) & attention_mask.bool()
    loss_mask[:, 0] = False
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


@pytest.mark.parametrize("head", ["trains", "frozen", "frozen, sharp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss_on_the_same_labels(family: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    check_head(model)
    if head != "trains":
        chunk = 5 * model.config.get_text_config().vocab_size
        monkeypatch.setattr(loss, "logits_per_chunk", lambda _: chunk)
        weight = model.get_output_embeddings().weight.requires_grad_(False)
        if head == "frozen, sharp":  # probabilities that float32 cannot hold
            weight.mul_(1000)
    inputs = batch()
    labels = torch.where(inputs["loss_mask"], inputs["input_ids"], -100)
    own = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    sums = CausalLMLoss(model)(**inputs)
    assert int(sums.num_tokens) == int(inputs["loss_mask"].sum())
    assert float(sums.loss_sum.detach() / sums.num_tokens) == pytest.approx(float(own.loss.detach()), rel=1e-5)
    right = own.logits[:, :-1].argmax(-1) == inputs["input_ids"][:, 1:]
    assert int(sums.num_correct) == int((right & inputs["loss_mask"][:, 1:]).sum())
    each = nn.functional.cross_entropy(own.logits[:, :-1].transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
    torch.testing.assert_close(sums.token_losses, each.detach()[inputs["loss_mask"][:, 1:]], rtol=1e-4, atol=1e-4)


def test_the_vocabulary_projection_runs_for_supervised_positions_only() -> None:
    model = make_model(300)
    inputs = batch()
    causal_lm_loss = CausalLMLoss(model)
    causal_lm_loss(**inputs)  # the first one looks at what the head is
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    causal_lm_loss(**inputs)
    assert seen == [int(inputs["loss_mask"].sum())]


def test_a_head_that_trains_gets_its_gradient_and_a_frozen_one_gives_the_same_to_the_rest() -> None:
    model = make_model(300)
    inputs = batch()
    CausalLMLoss(model)(**inputs).loss_sum.backward()
    wanted = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    (CausalLMLoss(model)(**inputs).loss_sum * 2).backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad / 2, wanted, rtol=1e-5, atol=1e-6)


def test_a_filler_adds_nothing_and_still_reaches_the_parameters() -> None:
    model = make_model(300)
    inputs = batch()
    inputs["loss_mask"][:] = False
    sums = CausalLMLoss(model)(**inputs)
    assert (float(sums.loss_sum.detach()), int(sums.num_tokens)) == (0.0, 0)
    sums.loss_sum.backward()
    assert all(not p.grad.any() for p in model.model.layers.parameters() if p.grad is not None)
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_filler_reaches_a_head_that_trains() -> None:
    """A parameter without a gradient in one rank would keep the others waiting."""
    model = make_model(300)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # not tied
    inputs = batch()
    inputs["loss_mask"][:] = False
    CausalLMLoss(model)(**inputs).loss_sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("head", ["trains", "frozen"])
def test_a_weight_scales_the_loss_of_its_token_and_its_gradient(head: str) -> None:
    torch.manual_seed(0)
    model = make_model(300)
    if head == "frozen":
        model.get_output_embeddings().weight.requires_grad_(False)
    inputs = batch()
    weights = torch.rand(inputs["loss_mask"].shape)
    plain = CausalLMLoss(model)(**inputs)
    weighted = CausalLMLoss(model)(**inputs, loss_weights=weights)
    assert torch.equal(weighted.token_losses, plain.token_losses)
    used = weights[inputs["loss_mask"]]
    torch.testing.assert_close(weighted.loss_sum, (plain.token_losses * used).sum())
    (got,) = torch.autograd.grad(weighted.loss_sum, model.model.norm.weight)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
    wanted = (losses * weights[:, 1:])[inputs["loss_mask"][:, 1:]].sum()
    torch.testing.assert_close(got, torch.autograd.grad(wanted, model.model.norm.weight)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", ["trains", "frozen"])
def test_label_smoothing_is_that_of_transformers(head: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make_model(300)
    monkeypatch.setattr(loss, "logits_per_chunk", lambda _: 5 * 300)
    if head == "frozen":
        model.get_output_embeddings().weight.requires_grad_(False)
    inputs = batch()
    weights = torch.rand(inputs["loss_mask"].shape) if weighted else None
    ours = CausalLMLoss(model, config=TrainConfig(label_smoothing_factor=0.3))
    sums = ours(**inputs, loss_weights=weights)
    assert torch.equal(sums.token_losses, CausalLMLoss(model)(**inputs).token_losses)  # eval loss is not smoothed
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = torch.where(inputs["loss_mask"], inputs["input_ids"], -100)[:, 1:]
    smoother = LabelSmoother(epsilon=0.3)
    if weights is None:
        wanted = smoother({"logits": logits}, labels) * sums.num_tokens
    else:  # a token at a time
        wanted = torch.stack(
            [
                smoother({"logits": logits[row, place][None, None]}, labels[row, place][None, None])
                * weights[row, place + 1]
                for row, place in (labels != -100).nonzero().tolist()
            ]
        ).sum()
    torch.testing.assert_close(sums.loss_sum, wanted, rtol=1e-5, atol=1e-4)
    (got,) = torch.autograd.grad(sums.loss_sum, model.model.norm.weight)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, model.model.norm.weight)[0], rtol=1e-4, atol=1e-5)


def test_noise_on_embeddings_has_the_size_of_the_paper_by_example_and_none_in_evaluation() -> None:
    model = make_model(300)
    ours = CausalLMLoss(model, config=TrainConfig(neftune_noise_alpha=5))
    embedding, seen = model.get_input_embeddings(), []
    embedding.register_forward_hook(lambda _, __, embedded: seen.append(embedded.detach()))
    lengths = (30, 6)
    packed = {
        "input_ids": torch.arange(10, 46)[None],
        "loss_mask": torch.ones(1, 36, dtype=torch.bool),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "segment_lengths": lengths,
    }
    padded = batch()
    for inputs, sizes in ((packed, [*[30] * 30, *[6] * 6]), (padded, None)):
        ours.train()
        ours(**inputs)
        ours.eval()
        ours(**inputs)
        noisy, plain = seen[-2:]
        assert torch.equal(plain, embedding.weight[inputs["input_ids"]])
        per_row = (
            padded["attention_mask"].sum(-1, keepdim=True).expand(3, 12) if sizes is None else torch.tensor([sizes])
        )
        limit = 5 / (per_row * model.config.hidden_size).sqrt()
        share = (noisy - plain).abs().amax(-1) / limit  # the largest of 64 draws is near the limit
        assert float(share.max()) <= 1 + 1e-5
        assert float(share.min()) > 0.8
