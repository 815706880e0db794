"""A chat replies as the run's samples did; without the adapter, as the base model does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.errors import ChatTemplateError, ConfigError, DataError
from lora_core.inference.chat import Asking, Chat, answer, answer_prompts, prompt_of
from lora_core.inference.opened import LoadedModel, load_opened, open_base, open_model
from lora_core.rows.messages import Conversation

GREEDY = Asking(8)


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> LoadedModel:
    return load_opened(open_model(str(finished_run)))


def samples(run: Path) -> list[dict[str, str]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in lines if event["event"] == "sample"]


def test_a_chat_replies_as_the_samples_of_the_run_and_the_base_as_before_training(
    finished_run: Path, loaded: LoadedModel
) -> None:
    alone = load_opened(open_base(loaded.opened.config))
    for sample in samples(finished_run):
        pieces: list[str] = []
        assert Chat(loaded, GREEDY).ask(sample["prompt"], pieces.append).text == sample["after"]
        assert "".join(pieces).strip() == sample["after"]
        base = Chat(loaded, replace(GREEDY, without_adapter=True)).ask(sample["prompt"])
        assert base == Chat(alone, GREEDY).ask(sample["prompt"])
        assert base.text == sample["before"]
    assert [sample["after"] == sample["expected"] for sample in samples(finished_run)][:3] == [True] * 3


def test_what_was_said_is_part_of_the_next_prompt_until_it_is_forgotten(loaded: LoadedModel) -> None:
    talk = Chat(loaded, GREEDY, "Be brief.")
    first = talk.ask("red")
    second = talk.ask("green")
    assert [turn["content"] for turn in talk.history] == ["red", first.text, "green", second.text]
    turns = [{"role": "system", "content": "Be brief."}, *talk.history[:3]]
    assert second == answer(loaded, Conversation(turns), GREEDY)
    talk.reset(None)
    assert talk.ask("red") == Chat(loaded, GREEDY).ask("red")


def test_messages_that_leave_no_room_are_refused_and_not_remembered(loaded: LoadedModel) -> None:
    talk = Chat(loaded, Asking(4096))
    talk.ask("red")
    said = [*talk.history]
    with pytest.raises(DataError, match=r"the messages take \d,\d\d\d tokens, and the model takes 2,048 .*; fix: "):
        talk.ask("word " * 2100)
    assert talk.history == said


def test_a_reply_ends_where_the_context_does(loaded: LoadedModel) -> None:
    (unit,) = [len(loaded.tokenizer(" word" * 100)["input_ids"]) // 100]
    reply = Chat(loaded, replace(GREEDY, max_new_tokens=500)).ask(" word" * (2030 // unit))
    assert reply.is_whole or reply.num_tokens < 20


def test_tools_are_shown_and_a_template_may_refuse(loaded: LoadedModel) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    tokenizer = loaded.tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('has ' ~ tools[0].function.name) }}"
        with pytest.raises(ChatTemplateError, match="has clock"):
            Chat(loaded, GREEDY, tools=tools).ask("red")
        tokenizer.chat_template = None
        with pytest.raises(ConfigError, match=r"has no chat template; fix: data\.chat_template=chatml"):
            Chat(loaded, GREEDY).ask("red")
    finally:
        tokenizer.chat_template = template


def test_a_model_alone_has_no_adapter_to_leave_out(loaded: LoadedModel) -> None:
    alone = load_opened(open_base(loaded.opened.config))
    with pytest.raises(ConfigError, match="is a model without an adapter; fix: "):
        answer(alone, Conversation([{"role": "user", "content": "red"}]), replace(GREEDY, without_adapter=True))


def test_so_many_replies_that_memory_runs_out_are_refused_with_fewer(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("lora_core.inference.chat.generate_replies", run_out)
    prompts = [prompt_of(loaded, Conversation([{"role": "user", "content": "red"}]), GREEDY)] * 8
    with pytest.raises(ConfigError, match=r"cpu has no memory left for 8 replies at once .*eval_batch_size=4"):
        answer_prompts(loaded, prompts, GREEDY)
