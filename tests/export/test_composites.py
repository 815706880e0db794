"""Checkpoints that also see or hear, merged whole: their language part by the adapter, all else as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from lora_core.commands.main import main
from lora_core.config.schema import LoraConfig, ModelConfig
from lora_core.export.as_adapter import as_adapter
from lora_core.export.merge import Merged, merge
from lora_core.inference.opened import open_model
from lora_core.model.base import add_adapter, load_base_model
from tests.families.build import tiny_model

IDS = torch.arange(5, 29)[None]
CPU = torch.device("cpu")
# What is in the files beside the language part.
TOWERS = {
    "gemma3": ("vision_tower.", "multi_modal_projector."),
    "qwen3_5": ("model.visual.",),
    "mllama": ("vision_model.", "multi_modal_projector."),
    "llama4": ("vision_model.", "multi_modal_projector."),
}


def make_base(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Its files hold the towers in bfloat16, and the language part in float32."""
    whole = tiny_model(family, len(tokenizer)).eval()
    for name, parameter in whole.named_parameters():
        if name.removeprefix("model.").startswith(("vis", "multi_modal")):
            parameter.data = parameter.data.bfloat16()
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "AnyImageProcessor", "size": 7}\n')
    return whole.float()


def make_adapter(base: Path, folder: Path, settings: LoraConfig | None = None) -> None:
    """As a run would, with random numbers."""
    model = load_base_model(ModelConfig(name_or_path=str(base), dtype="float32"), CPU)
    adapted = add_adapter(model, settings or LoraConfig(rank=4), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))


def merged(adapter: Path, output: Path, **options: Any) -> tuple[Merged, list[str]]:
    said: list[str] = []
    with as_adapter(open_model(str(adapter))) as source:
        return merge(source, output, say=said.append, **options), said


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    inner = model.get_decoder()  # Llama 4's whole forward takes no text without images
    result: Tensor = (inner if hasattr(inner, "lm_head") else model)(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("family", TOWERS)
def test_the_merged_folder_is_the_whole_checkpoint(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = make_base(family, tmp_path / "base", tokenizer)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    done, said = merged(tmp_path / "adapter", tmp_path / "merged", max_shard_size="200KB")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    assert after.keys() == before.keys()
    towers = {name for name in before if name.startswith(TOWERS[family])}
    assert {after[name].dtype for name in towers} == {torch.bfloat16}
    assert all(torch.equal(after[name], before[name]) for name in towers)
    assert {after[name].dtype for name in after.keys() - towers} == {torch.float32}
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    targets = {"q_proj", "v_proj", "down_proj"} | ({"experts.gate_up_proj"} if family == "llama4" else set())
    assert all(any(target in name for name in changed) for target in targets)
    assert done.num_files > 1
    assert any(f"{len(towers)} tensors beside it" in line for line in said)

    result = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(result) is type(whole)
    adapted = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    beside = logits(adapted)
    torch.testing.assert_close(logits(result), beside, atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        assert (logits(adapted) - beside).abs().max() > 1e-2
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "merged" / file).read_text()) == json.loads(
            (tmp_path / "base" / file).read_text()
        )


def test_a_head_that_is_no_longer_the_embedding(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = make_base("gemma3", tmp_path / "base", tokenizer)
    assert whole.config.tie_word_embeddings
    make_adapter(
        tmp_path / "base",
        tmp_path / "adapter",
        LoraConfig(rank=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    merged(tmp_path / "adapter", tmp_path / "merged")
    result = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(result), logits(adapted), atol=1e-5, rtol=0)


def test_in_another_type_towers_stay_as_they_are(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_base("gemma3", tmp_path / "base", tokenizer)
    (tmp_path / "base/chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"), "--dtype", "float16"]
    assert main(command) == 0
    assert "chat_template.json of the base model is left out" in capsys.readouterr().out
    assert not (tmp_path / "merged/chat_template.json").exists()
    dtypes = {name: tensor.dtype for name, tensor in weights(tmp_path / "merged").items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith(TOWERS["gemma3"])} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if not name.startswith(TOWERS["gemma3"])} == {torch.float16}
    result = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in result.parameters()} == {torch.float16}
    _, front_matter, body = (tmp_path / "merged/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "transformers"
    assert "model = AutoModelForMultimodalLM.from_pretrained" in body


def test_a_gguf_file_is_refused_before_anything_is_merged(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    make_base("gemma3", tmp_path / "base", tokenizer)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--gguf", "--output", str(tmp_path / "gguf")]
    for arguments in (command, [*command, "--adapter-only"]):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert "gemma3: is converted by llama.cpp alone" in said.err
        assert "set LLAMA_CPP to its folder" in said.err
        assert "merge:" not in said.out
        assert not (tmp_path / "gguf").exists()
