"""Checkpoints that also see or hear, trained as text models: what is loaded, and whose names the adapter has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from lora_core.checkpoints.adapter_folder import load_adapter
from lora_core.config.schema import LoraConfig, ModelConfig
from lora_core.configuration import load_config
from lora_core.errors import ConfigError, TrainingError
from lora_core.export.as_adapter import as_adapter
from lora_core.export.merge import merge
from lora_core.inference.opened import open_model
from lora_core.model.attention import decoder_of
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.decoder import check_positions, why_not_packed
from lora_core.model.head import check_head
from lora_core.model.language_part import left_out, model_class
from lora_core.model.lora_settings import targeted_names
from lora_core.training.setup import train
from tests.conftest import chat
from tests.families.build import tiny_config, tiny_model

CPU = torch.device("cpu")
TOWERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "gemma4": ["model.vision_tower", "model.embed_vision", "model.audio_tower", "model.embed_audio"],
    "llama4": ["vision_model", "multi_modal_projector"],
    "qwen2_5_vl": ["model.visual"],
    "qwen3_5": ["model.visual"],
    "mllama": ["model.vision_model", "model.multi_modal_projector"],
}


@pytest.mark.parametrize("family", TOWERS)
def test_towers_are_left_out_and_all_else_has_the_names_and_weights_of_the_whole(family: str, tmp_path: Path) -> None:
    whole = tiny_model(family, 128)
    whole.save_pretrained(tmp_path)
    part = load_base_model(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), CPU)
    assert type(part) is type(whole)
    assert sorted(left_out(part)) == sorted(TOWERS[family])
    kept, given = part.state_dict(), whole.state_dict()
    assert kept.keys() == {name for name in given if not name.startswith(tuple(f"{t}." for t in TOWERS[family]))}
    assert all(torch.equal(tensor, given[name]) for name, tensor in kept.items())
    on_meta = load_base_model(ModelConfig(name_or_path=str(tmp_path)), torch.device("meta"))
    assert on_meta.state_dict().keys() == kept.keys()


def test_a_model_of_text_alone_is_loaded_as_ever() -> None:
    assert model_class(tiny_config("llama", 128)) is transformers.AutoModelForCausalLM
    text = tiny_config("emu3", 128).get_text_config()
    text.architectures = ["Emu3ForCausalLM"]  # which AutoModelForCausalLM does not find by this config
    assert model_class(text) is transformers.Emu3ForCausalLM


def test_layers_that_attend_to_images_get_no_adapter(tmp_path: Path) -> None:
    config = tiny_config("mllama", 128)
    (cross,) = config.text_config.cross_attention_layers
    tiny_model("mllama", 128).save_pretrained(tmp_path)
    base = load_base_model(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), CPU)
    names = targeted_names(base, LoraConfig())
    assert names
    assert not [name for name in names if f".layers.{cross}." in name]
    adapted = add_adapter(base, LoraConfig(exclude_modules=["down_proj"]), seed=0)
    with_adapter = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    assert with_adapter
    assert not [name for name in with_adapter if f".layers.{cross}." in name or "down_proj" in name]


def test_the_adapter_of_a_run_is_loaded_by_plain_peft_on_the_whole_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write_rows: Any
) -> None:
    tiny_model("gemma3", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [
        f"model.name_or_path={tmp_path / 'model'}",
        f"data.train_file={write_rows([chat(f'question {i}', f'answer {i}') for i in range(8)])}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        "train.bf16=false",
        "model.dtype=float32",
        "train.optim=adamw_torch",
        "train.max_steps=2",
        "train.num_sample_replies=0",
        "lora.target_modules=[q_proj,v_proj,up_proj]",  # the tower has layers of the first two names
    ]
    trained = load_config("base", settings)
    train(trained)
    adapter = tmp_path / "run" / "adapter"
    assert "vision_tower" in json.loads((adapter / "adapter_config.json").read_text())["exclude_modules"]
    whole: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    ids = torch.arange(5, 21)[None]
    before = whole(input_ids=ids).logits
    model = peft.PeftModel.from_pretrained(whole, str(adapter)).eval()
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "vision_tower" in name]
    after = model(input_ids=ids).logits
    assert not torch.equal(before, after)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload().eval()
    assert type(merged) is type(whole)
    torch.testing.assert_close(merged(input_ids=ids).logits, after, atol=1e-5, rtol=0)
    for place in (".", "checkpoints/step-000002"):
        with as_adapter(open_model(str(tmp_path / "run" / place))) as source:
            merge(source, tmp_path / "merged", overwrite=True)
        result: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(result(input_ids=ids).logits, after, atol=1e-5, rtol=0)
    ours = load_adapter(trained, adapter, CPU).eval()
    hidden = decoder_of(ours)(input_ids=ids, segment_lengths=(16,), use_cache=False).last_hidden_state
    torch.testing.assert_close(ours.get_output_embeddings()(hidden), after, atol=1e-5, rtol=0)


def test_files_that_lack_weights_are_refused_and_not_filled_with_random_ones(tmp_path: Path) -> None:
    whole = tiny_model("qwen3_vl", 128)
    whole.model.language_model.save_pretrained(tmp_path)  # without its head
    whole.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"its files lack .* tensors of Qwen3VLFor") as refused:
        load_base_model(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), CPU)
    assert "which would be random" in str(refused.value)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        (
            "paligemma",
            "PaliGemmaForConditionalGeneration sees later tokens",
        ),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration does not run on tokens alone"),
    ],
)
def test_a_model_that_is_not_one_of_text_is_refused(family: str, sentence: str, tmp_path: Path) -> None:
    tiny_model(family, 128).save_pretrained(tmp_path)
    base = load_base_model(ModelConfig(name_or_path=str(tmp_path), dtype="float32"), CPU)
    with pytest.raises((ConfigError, TrainingError), match=sentence):
        check_head(base)


def test_positions_that_do_not_start_at_0_are_not_packed(tmp_path: Path) -> None:
    tiny_model("kosmos-2.5", 128).save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path), dtype="float32")
    base = load_base_model(model, CPU)
    assert why_not_packed(base) == "it counts positions from the id of padding on, and not from 0"
    with pytest.raises(ConfigError, match="does not count positions from 0"):  # and by its numbers
        check_positions(base)
