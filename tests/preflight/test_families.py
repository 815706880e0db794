"""What preflight says of models that are not like Llama: experts, layers with a state, an attention of their own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_core.configuration import load_config
from lora_core.data.encoded import load_data
from lora_core.errors import SimulationError
from lora_core.model.base import add_adapter, load_base_model, load_tokenizer
from lora_core.model.targets import find_targets, without_adapter
from lora_core.preflight.findings import Finding
from lora_core.preflight.model_facts import model_facts, with_packing
from lora_core.preflight.preflight import gather_facts, run_checks
from lora_core.runtime.devices import look_around
from lora_core.training.setup import train
from tests.conftest import chat
from tests.families.build import tiny_model
from tests.tiny import write_jsonl


@pytest.fixture
def config_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_rows: Any) -> Any:
    def build(family: str, *overrides: str) -> Any:
        folder = tmp_path / family
        if not folder.exists():
            tiny_model(family, len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        settings = [
            f"model.name_or_path={folder}",
            f"data.train_file={write_rows([chat(f'question {i}', f'answer {i}') for i in range(8)])}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"output_dir={tmp_path / 'run'}",
            "train.bf16=auto",
            "train.optim=adamw_torch",
        ]
        return load_config("base", [*settings, *overrides])

    return build


@pytest.fixture
def find(config_of: Any) -> Any:
    def run(family: str, *overrides: str) -> dict[str, Finding]:
        config = with_packing(config_of(family, *overrides))
        tokenizer = load_tokenizer(config.model, config.data)
        train_data, eval_data = load_data(config, tokenizer)
        environment = replace(look_around(config, 1), bf16="native", asked_processes=None)
        facts = gather_facts(config, environment, tokenizer, train_data, eval_data)
        return {finding.id: finding for finding in run_checks(facts)}

    return run


def test_experts_have_neither_dropout_nor_dora(find: Any) -> None:
    found = find("mixtral", "lora.dropout=0.1", "lora.use_dora=true")
    assert found["experts_dora"].severity == "error"
    assert found["experts_dora"].fix == "lora.use_dora=false"
    found = find("mixtral", "lora.dropout=0.1")
    assert "lora.dropout=0.1 is not applied to experts." in found["experts_without_dropout"].message
    others = {"experts_dora", "memory_unknown", "packing_off", "router_loss_off", "towers_left_out", "without_adapter"}
    assert not others & set(found)


def test_names_of_another_family_are_answered_with_all_of_this_one(find: Any) -> None:
    found = find("mixtral", "lora.target_modules=[q_proj,gate_proj]")
    assert found["targets_missing"].fix == "lora.target_modules=auto"
    assert "by lora.target_modules=auto also experts." in found["targets_missing"].message


def test_a_model_whose_layers_carry_a_state_is_padded_unless_packing_is_asked_for_by_name(find: Any) -> None:
    found = find("lfm2")
    assert found["packing_off"].severity == "note"
    assert "its layers (conv) carry a state" in found["packing_off"].message
    found = find("lfm2", "data.packing=true")
    assert (found["packing_impossible"].severity, found["packing_impossible"].fix) == ("error", "data.packing=false")


def test_a_router_loss_that_the_config_asks_for_is_off_and_said(find: Any, config_of: Any, tmp_path: Path) -> None:
    config_of("qwen2_moe")
    path = tmp_path / "qwen2_moe" / "config.json"
    asked = json.loads(path.read_text()) | {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    path.write_text(json.dumps(asked))
    note = find("qwen2_moe")["router_loss_off"]
    assert (note.severity, note.fix) == ("note", None)
    assert "asks for 0.02 times its routers' auxiliary loss" in note.message


def test_towers_that_are_not_loaded_are_named(find: Any) -> None:
    note = find("mistral3", "lora.target_modules=[q_proj,v_proj]")["towers_left_out"]
    assert note.severity == "note"
    assert "model.vision_tower, model.multi_modal_projector: not loaded" in note.message


def test_what_no_adapter_reaches_is_named(find: Any, config_of: Any) -> None:
    note = find("dbrx")["without_adapter"]
    assert (note.severity, note.fix, note.value) == ("note", None, ["mlp.w1", "mlp.v1", "mlp.w2"])
    assert not model_facts(config_of("dbrx", "lora.target_modules=[Wqkv]")).without_adapter
    # Dense layers and shared experts, whose names PEFT takes for the experts': as parameters, which 4 bits are not.
    assert not model_facts(config_of("deepseek_v3")).without_adapter
    facts = model_facts(config_of("deepseek_v3", "model.quantization=nf4"))
    left = dict(facts.without_adapter)
    assert not left.keys() & {*facts.auto_targets.in_short()}
    assert left.keys() == {f"{of}.{name}_proj" for of in ("mlp", "shared_experts") for name in ("gate", "up", "down")}
    assert "shared_experts.up_proj" in find("deepseek_v3", "lora.dropout=0.1")["experts_without_dropout"].message


def test_what_is_said_to_be_without_adapter_in_4_bits_is_without(config_of: Any) -> None:
    config = config_of("deepseek_v3", "model.quantization=nf4", "model.dtype=float32", "train.bf16=false")
    adapted = add_adapter(load_base_model(config.model, torch.device("cpu"), packing=False), config.lora, seed=0)
    said, seen = dict(model_facts(config).without_adapter), without_adapter(adapted, find_targets(adapted))
    assert said.keys() == seen.keys()


def test_tokens_that_the_model_has_no_embedding_for_are_refused_and_trained_once_it_has(
    tokenizer: PreTrainedTokenizerFast, find: Any, config_of: Any, tmp_path: Path
) -> None:
    rows, larger = len(tokenizer), copy.deepcopy(tokenizer)
    config_of("llama")  # whose embedding has so many rows
    larger.add_tokens(["<one>", "<two>"])
    larger.save_pretrained(tmp_path / "llama")
    file = write_jsonl(tmp_path / "new.jsonl", [chat(f"question {i} <one>", f"answer {i} <two>") for i in range(8)])
    error = find("llama", f"data.train_file={file}")["tokens_without_embedding"]
    assert (error.severity, error.value, error.limit) == ("error", rows + 1, rows - 1)
    assert f"resize_token_embeddings({rows + 2})" in error.message
    trained = f"lora.trainable_token_indices=[{rows},{rows + 1}]"
    assert error.message.endswith(trained)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    larger.save_pretrained(tmp_path / "resized")
    settings = [f"data.train_file={file}", trained, "train.max_steps=2", "train.num_sample_replies=0"]
    train(config_of("resized", *settings))
    adapter = tmp_path / "run" / "adapter"
    assert len(AutoTokenizer.from_pretrained(adapter)) == rows + 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "resized", dtype=torch.float32)
    before = base.get_input_embeddings().weight.clone()
    after = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().get_input_embeddings().weight
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [rows, rows + 1]


def test_an_encoder_is_an_error_before_its_weights_are_loaded(config_of: Any, find: Any, tmp_path: Path) -> None:
    config_of("bert")
    file = tmp_path / "bert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_decoder": False}))
    found = find("bert")
    assert found["not_causal"].severity == "error"
    assert "a bert model whose config.json does not say is_decoder=true" in found["not_causal"].message


def test_a_model_whose_head_has_layers_of_its_own_trains_and_says_so(
    config_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(config_of("roberta", "train.max_steps=2", "train.num_sample_replies=0"))
    printed = capsys.readouterr().out
    assert "model: RobertaForCausalLM has more than an output embedding after its decoder" in printed
    assert "it counts positions from the id of padding on" in printed
    assert summary.total_optimizer_steps == 2


def test_an_adapter_where_no_text_passes_is_a_warning(find: Any) -> None:
    idle = find("git", "lora.target_modules=all-linear")["adapter_idle"]
    assert (idle.severity, idle.fix) == ("warning", "lora.target_modules=auto")
    assert "no gradient reaches the adapter on mlp.fc1, mlp.fc2, self_attn.k_proj" in idle.message
    assert all("image_encoder" in name or "visual" in name for name in idle.value)
    assert "adapter_idle" not in find("git")


def test_checkpointing_that_a_family_has_not_is_an_error_and_never_advised(find: Any) -> None:
    found = find("jetmoe", "train.gradient_checkpointing=true")
    assert found["checkpointing_missing"].severity == "error"
    assert found["checkpointing_missing"].fix == "train.gradient_checkpointing=false"
    assert not {"checkpointing_missing", "memory_unknown"} & set(find("jetmoe"))


def test_a_step_that_cannot_be_simulated_is_a_note(find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any, **__: Any) -> None:
        raise SimulationError("its memory cannot be predicted: ValueError: a value is needed")

    monkeypatch.setattr("lora_core.memory.plan.predict_memory", cannot)
    note = find("llama")["memory_unknown"]
    assert (note.severity, note.fix) == ("note", None)
    assert "ValueError: a value is needed; the run may not fit" in note.message


def test_an_adapter_on_experts_is_trained_with_dropout_elsewhere_and_loaded_by_peft(
    config_of: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = config_of("mixtral", "train.max_steps=2", "lora.dropout=0.1", "train.num_sample_replies=0")
    train(config)
    printed = capsys.readouterr().out
    assert "adapter: on q_proj 2, k_proj 2, v_proj 2, o_proj 2, experts." in printed
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_dropout"] == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    before = base(input_ids=ids).logits
    after = peft.PeftModel.from_pretrained(base, str(adapter))(input_ids=ids).logits
    assert not torch.equal(before, after)
