"""A reply: streamed as it is returned, and ended by what trained replies end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from lora_core.config.schema import DataConfig, ModelConfig
from lora_core.errors import TrainingError
from lora_core.evaluation.generation import encode_prompt, generate_replies, generate_reply, longest_context, stop_ids
from lora_core.evaluation.replies import sample_reply
from lora_core.model.attention import SEGMENT_ATTENTION
from lora_core.model.base import load_base_model, load_tokenizer
from lora_core.model.decoder import prepare_packing, takes_padding
from lora_core.rows.messages import Conversation
from tests.conftest import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return make_model(len(tokenizer))


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_of_a_streamed_reply_are_the_reply(seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a random model: any bytes, incomplete characters too."""
    model = make_model(len(tokenizer), seed)
    prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": f"question {seed}"}]))
    pieces: list[str] = []
    streamed = generate_reply(model, tokenizer, prompt, 40, on_text=pieces.append)
    assert "".join(pieces).strip() == streamed.text
    assert streamed == generate_reply(model, tokenizer, prompt, 40)
    assert len(pieces) > 1


def test_a_real_models_streamed_reply_is_its_sample_reply(demo_model_dir: Path) -> None:
    config = ModelConfig(name_or_path=str(demo_model_dir), dtype="float32")
    model, tokenizer = load_base_model(config, torch.device("cpu")), load_tokenizer(config)
    messages = [{"role": "user", "content": "Say the alphabet."}]
    pieces: list[str] = []
    reply = generate_reply(
        model, tokenizer, encode_prompt(tokenizer, Conversation(messages)), 12, on_text=pieces.append
    )
    assert "".join(pieces).strip() == reply.text == sample_reply(model, tokenizer, messages, None, 12)
    assert (reply.num_tokens, reply.is_whole) == (12, False)


def test_a_reply_ends_at_any_token_that_trained_replies_end_with(model: Qwen2ForCausalLM) -> None:
    tokenizer = make_tokenizer()
    prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": "Hi"}]))
    whole = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=8)[0, prompt.shape[1] :].tolist()
    tokenizer.stop_tokens = tokenizer.convert_ids_to_tokens([whole[2]])
    reply = generate_reply(model, tokenizer, prompt, 8)
    assert reply.is_whole
    assert reply.num_tokens == whole.index(whole[2]) + 1


def test_the_end_of_turn_of_the_template_stops_generation_where_the_models_own_eos_is_another(
    tmp_path: Path, model: Qwen2ForCausalLM
) -> None:
    """As in a base model that is trained with data.chat_template=chatml."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", None
    tokenizer.save_pretrained(tmp_path)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("</s>")
    model.save_pretrained(tmp_path)
    trained = load_tokenizer(ModelConfig(name_or_path=str(tmp_path)), DataConfig(chat_template="chatml"))
    expected = ["<|endoftext|>", "<|im_end|>", "</s>"]
    assert stop_ids(model, trained) == sorted(trained.convert_tokens_to_ids(expected))


def test_a_token_that_the_vocabulary_lacks_stops_nothing(model: Qwen2ForCausalLM) -> None:
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "<s>"
    tokenizer.stop_tokens = ["<no such token>"]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.stop_tokens = ["<s>"]
    assert tokenizer.convert_tokens_to_ids("<s>") in stop_ids(model, tokenizer)


def test_a_temperature_draws_other_tokens_and_the_same_ones_after_the_same_seed(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": "Hi"}]))
    replies = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        replies.append(generate_reply(model, tokenizer, prompt, 12, temperature=2.0).text)
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was_even_if_interrupted(
    training: bool, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    model.train(training)
    prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": "Hi"}]))
    generate_reply(model, tokenizer, prompt, 2)
    assert model.training is training
    with pytest.raises(KeyboardInterrupt):
        generate_reply(model, tokenizer, prompt, 8, on_text=interrupt)
    assert model.training is training
    assert longest_context(model) == 2048


def small_model(kind: str, vocab_size: int) -> PreTrainedModel:
    """Attention over all tokens before, or over a window that is shorter than the prompts."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": vocab_size}
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes))
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=5))


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_replies_at_once_are_what_each_is_alone(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompts and replies of several lengths: padding is masked, and what follows a reply's end is not part of it."""
    model = small_model(kind, len(tokenizer)).eval()
    prepare_packing(model)
    prompts = [
        encode_prompt(tokenizer, Conversation([{"role": "user", "content": content}]))
        for content in ("Hi", "What is the capital of France?", "a b c " * 7, "1")
    ]
    first = model.generate(input_ids=prompts[0], do_sample=False, max_new_tokens=9)[0, prompts[0].shape[1] :].tolist()
    model.generation_config.eos_token_id = first[4]
    alone = [generate_reply(model, tokenizer, prompt, 9) for prompt in prompts]
    assert generate_replies(model, tokenizer, prompts, 9) == alone
    assert alone[0].is_whole
    assert len({reply.num_tokens for reply in alone}) > 1
    assert model.config._attn_implementation == SEGMENT_ATTENTION  # training goes on with its own


def test_a_model_that_cannot_be_packed_takes_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Such as one with recurrent layers, which would read it."""
    model = small_model("qwen2", len(tokenizer))
    assert not takes_padding(model)
    prepare_packing(model)
    assert takes_padding(model)


def test_a_reply_is_made_at_the_positions_that_the_model_is_trained_at(tokenizer: PreTrainedTokenizerFast) -> None:
    """RoBERTa counts from the id of padding on; transformers' `generate` would have it count from 0."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(vocab_size=len(tokenizer), is_decoder=True, max_position_embeddings=64, **sizes)
    model = RobertaForCausalLM(config).eval()
    torch.nn.init.normal_(model.roberta.embeddings.position_embeddings.weight)
    prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": "Hi"}]))
    ids = prompt
    for _ in range(6):  # the logits that training sees, token by token
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    wanted = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert generate_reply(model, tokenizer, prompt, 6).text == wanted


class _Raises(Qwen2ForCausalLM):
    error: Exception

    def forward(self, *args: object, **kwargs: object) -> object:
        raise self.error


@pytest.fixture
def reply_despite(tokenizer: PreTrainedTokenizerFast) -> Any:
    def answer(error: Exception) -> None:
        model = _Raises(make_model(len(tokenizer)).config)
        model.error = error
        prompt = encode_prompt(tokenizer, Conversation([{"role": "user", "content": "Hi"}]))
        generate_reply(model, tokenizer, prompt, 4)

    return answer


def test_a_model_that_does_not_generate_is_told_in_a_sentence(reply_despite: Any) -> None:
    for error in (ValueError("no such cache"), RuntimeError("no such cache: size 8 is not 16"), NotImplementedError()):
        with pytest.raises(TrainingError, match=r"_Raises does not generate .*num_sample_replies=0"):
            reply_despite(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.distributed.DistBackendError("NCCL timeout"),
    ],
    ids=["GPU memory", "GPU", "rank", "memory", "NCCL"],
)
def test_what_the_machine_says_is_not_the_models_fault(reply_despite: Any, error: RuntimeError) -> None:
    with pytest.raises(type(error)) as raised:
        reply_despite(error)
    assert raised.value is error
