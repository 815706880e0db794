"""Logits by the output embedding, and by a model's own forward where it does more; no later token is seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, Qwen2ForCausalLM, XLNetConfig, XLNetLMHeadModel

from lora_core.errors import ConfigError, TrainingError
from lora_core.model import loss
from lora_core.model.attention import decoder_of
from lora_core.model.head import OwnHead, check_head, head_of
from lora_core.model.loss import CausalLMLoss
from tests.conftest import make_model
from tests.families.build import tiny_model


def make_bert(is_decoder: bool = True) -> BertLMHeadModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=is_decoder,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertLMHeadModel(config)
    nn.init.normal_(model.cls.predictions.bias)
    return model


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    loss_mask = torch.rand(2, 12) < 0.6
    loss_mask[:, 0] = False
    return {"input_ids": torch.randint(10, 300, (2, 12)), "loss_mask": loss_mask}


@pytest.mark.parametrize("head", ["trains", "frozen"])
def test_layers_between_decoder_and_logits_are_the_models_own(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "logits_per_chunk", lambda _: 5 * 300)
    model = make_bert()
    note = check_head(model)
    assert note == (
        "BertLMHeadModel has more than an output embedding after its decoder: its own forward gives the logits"
    )
    model.cls.requires_grad_(head == "trains")
    embedding = model.bert.embeddings.word_embeddings.weight.requires_grad_(head == "trains")
    inputs = batch()
    labels = torch.where(inputs["loss_mask"], inputs["input_ids"], -100)
    model(input_ids=inputs["input_ids"], labels=labels).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert ("cls.predictions.transform.dense.weight" in wanted) == (embedding.grad is not None) == (head == "trains")
    own_loss = float(model(input_ids=inputs["input_ids"], labels=labels).loss.detach())
    model.zero_grad()
    sums = CausalLMLoss(model)(**inputs)
    assert float(sums.loss_sum.detach() / sums.num_tokens) == pytest.approx(own_loss, rel=1e-5)
    (sums.loss_sum / sums.num_tokens).backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_decoder_is_itself_again_after_its_models_head_ran() -> None:
    model = make_bert().eval()
    ids = torch.arange(1, 9)[None]
    output = decoder_of(model)(input_ids=ids)
    head = head_of(model, output)
    assert isinstance(head, OwnHead)
    torch.testing.assert_close(head(output.last_hidden_state[0]), model(input_ids=ids).logits[0])
    assert "forward" not in vars(decoder_of(model))
    torch.testing.assert_close(decoder_of(model)(input_ids=ids).last_hidden_state, output.last_hidden_state)


def test_an_output_embedding_alone_is_used_as_it_is() -> None:
    model = make_model(300)
    output = decoder_of(model)(input_ids=torch.arange(1, 9)[None])
    assert not isinstance(head_of(model, output), OwnHead)
    assert check_head(model) is None


@pytest.mark.parametrize("family", ["BERT", "XLNet"])
def test_a_model_that_sees_the_token_it_should_predict_is_refused(family: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = make_bert(is_decoder=False)
    if family == "XLNet":
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=4, d_inner=48))
    with pytest.raises(ConfigError, match=f"{type(model).__name__} sees later tokens") as raised:
        check_head(model)
    assert raised.value.finding_id == "not_causal"


class _AddsItsTokens(Qwen2ForCausalLM):
    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + input_ids[..., None]
        return output


class _Refuses(Qwen2ForCausalLM):
    def forward(self, *args: object, **kwargs: object) -> object:
        raise ValueError("say which language first")


def test_logits_that_hidden_states_do_not_give_are_told_apart() -> None:
    with pytest.raises(TrainingError, match="_AddsItsTokens computes its logits in a way"):
        check_head(_AddsItsTokens(make_model(300).config))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_that_does_not_run_on_tokens_alone_is_told_in_a_sentence(autocast: bool) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TrainingError, match=r"_Refuses does not run on tokens alone .ValueError: say which language"),
    ):
        check_head(_Refuses(make_model(300).config))


def test_a_model_that_autocast_breaks_is_told_how_it_runs() -> None:
    """DBRX adds bfloat16 products up in a tensor of the type of its hidden states."""
    model = tiny_model("dbrx", 128)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TrainingError, match=r"under bfloat16 autocast .* fix: train\.bf16=false model\.dtype=float32"),
    ):
        check_head(model)
    assert check_head(model) is None  # float32, without autocast


def test_a_lack_of_memory_is_not_blamed_on_the_model() -> None:
    model = make_model(300)
    output = decoder_of(model)(input_ids=torch.arange(1, 9)[None])
    model.lm_head.register_forward_pre_hook(lambda *_: torch.empty(2**50))  # a plain RuntimeError on a CPU
    for ask in (lambda: check_head(model), lambda: head_of(model, output)):
        with pytest.raises(RuntimeError, match=r"allocate memory|enough memory"):
            ask()
