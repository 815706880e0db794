"""A merged model is base + adapter, whatever the adapter is; one that is not is never written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lora_core.commands.main import main
from lora_core.configuration import shipped_file
from lora_core.errors import ConfigError, DataError, TrainingError
from lora_core.export.as_adapter import as_adapter
from lora_core.export.base_files import find_weights, read_headers
from lora_core.export.compare import compare, refuse_beyond_noise
from lora_core.export.merge import Merged, merge, rows_to_compare
from lora_core.inference.opened import open_model
from lora_core.model.base import load_model_config
from tests.conftest import make_model
from tests.export.adapters import KINDS, UNTIED, random_adapter, save_base

IDS = torch.arange(24)[None]


def merged(adapter: Path, output: Path, **options: Any) -> tuple[Merged, list[str]]:
    said: list[str] = []
    with as_adapter(open_model(str(adapter))) as source:
        return merge(source, output, say=said.append, **options), said


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("bf16-base")
    save_base(folder, make_model(len(tokenizer)), tokenizer, torch.bfloat16)
    return folder


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind: str, base: Path, tmp_path: Path) -> None:
    adapted = random_adapter(load(base), tmp_path / "adapter", **KINDS[kind])
    done, _ = merged(tmp_path / "adapter", tmp_path / "merged", max_shard_size="50KB")
    assert done.num_files > 1
    result = load(tmp_path / "merged", "auto")
    assert result.dtype == torch.bfloat16
    assert result.config.tie_word_embeddings == (kind not in UNTIED)
    assert not list(tmp_path.glob(".merged*"))
    # Rounding to bfloat16 alone separates the two.
    beside = logits(adapted)
    difference = (logits(result.float()) - beside).square().mean().sqrt()
    with adapted.disable_adapter():
        effect = (logits(adapted) - beside).square().mean().sqrt()
    assert difference < 0.03 * effect
    assert done.comparison.difference.rms == pytest.approx(done.comparison.noise.rms, rel=0.15)


@pytest.mark.parametrize("kind", ["plain", "DoRA", "rsLoRA, patterns"])
def test_weights_are_those_that_peft_merges_rounded_once(kind: str, base: Path, tmp_path: Path) -> None:
    adapted = random_adapter(load(base), tmp_path / "adapter", **KINDS[kind])
    merged(tmp_path / "adapter", tmp_path / "merged")
    wanted = adapted.merge_and_unload().state_dict()
    for name, weight in load(tmp_path / "merged", "auto").state_dict().items():
        assert torch.equal(weight, wanted[name].to(torch.bfloat16)), name


def test_transposed_layers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """GPT-2's weights are (in, out)."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2))
    save_base(tmp_path / "base", model, tokenizer, torch.float32)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapted = random_adapter(load(tmp_path / "base"), tmp_path / "adapter", **settings)
    merged(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(adapted), rtol=1e-5, atol=1e-5)


def test_added_tokens(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = load(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = random_adapter(model, tmp_path / "adapter", **settings)
    tokenizer.save_pretrained(tmp_path / "adapter")
    done, _ = merged(tmp_path / "adapter", tmp_path / "merged")
    result = load(tmp_path / "merged")
    assert result.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert logits(result).shape == logits(adapted).shape
    assert (logits(result) - logits(adapted)).abs().max() < 3 * done.comparison.difference.largest


def test_a_merge_that_is_not_base_and_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    """The same adapter, at 1.2 times its scale: as a wrong alpha would have it."""
    random_adapter(load(base), tmp_path / "adapter", lora_alpha=10, **KINDS["plain"])
    shutil.copytree(tmp_path / "adapter", tmp_path / "scaled")
    written = json.loads((tmp_path / "scaled/adapter_config.json").read_text())
    (tmp_path / "scaled/adapter_config.json").write_text(json.dumps({**written, "lora_alpha": 12}))
    merged(tmp_path / "scaled", tmp_path / "merged")
    with as_adapter(open_model(str(tmp_path / "adapter"))) as source:
        batch = rows_to_compare(source, source.load_tokenizer(), None)
        config, files = load_model_config(source.config.model), find_weights(source.config.model)
    wrong = read_headers(sorted((tmp_path / "merged").glob("*.safetensors")))
    comparison = compare(config, files, tmp_path / "adapter", config, wrong, batch, torch.device("cpu"))
    assert not comparison.is_within_noise
    with pytest.raises(TrainingError, match=r"not base \+ adapter: logits .* differ by .* The limit is"):
        refuse_beyond_noise(comparison)


def test_an_adapter_that_rounding_hides_is_said(base: Path, tmp_path: Path) -> None:
    random_adapter(load(base), tmp_path / "adapter", size=1e-4, init_lora_weights=False, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0.001}))
    done, said = merged(tmp_path / "adapter", tmp_path / "merged")
    assert done.comparison.is_blurred
    assert re.search(r"moves the logits by \d+% of what the adapter does; fix: .*--dtype float32", said[-1])
    # In float32 next to nothing of it is rounded away.
    done, said = merged(tmp_path / "adapter", tmp_path / "wider", dtype=torch.float32)
    assert not done.comparison.is_blurred
    assert "warning" not in said[-1]
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "wider")
    assert {parameter.dtype for parameter in wider.parameters()} == {torch.float32}


def test_numbers_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    random_adapter(load(base), tmp_path / "adapter", size=float("nan"), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="cannot be merged: NaNs detected"):
        merged(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("base/config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized \\(gptq\\)"),
        ("adapter/adapter_config.json", {"init_lora_weights": "pissa"}, "init_lora_weights=pissa changed the base"),
        ("adapter/adapter_config.json", {"r": 8}, "does not fit the base model"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    file: str, changes: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    random_adapter(load(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=said):
        merged(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_run_with_its_tokenizer_stops_and_card(
    short_run: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(short_run), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "predicted peak memory: " in said
    assert "differ by" in said
    tokenizer = AutoTokenizer.from_pretrained(output)
    template = AutoTokenizer.from_pretrained(short_run / "adapter").chat_template
    assert tokenizer.chat_template == template
    stops = load(output).generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops if isinstance(stops, list) else [stops]) == ["<|im_end|>"]
    _, front_matter, body = (output / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front_matter)
    assert card["library_name"] == "transformers"
    assert "base_model" not in card  # a local folder
    assert "vllm serve PATH_OF_THIS_FOLDER" in body

    base, moved = "model.name_or_path", tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(tiny_model_dir, moved)
    assert main(["merge", str(short_run), "--output", str(output)]) == 2
    assert "is not empty; fix: another folder, or --overwrite" in capsys.readouterr().err
    assert main(["merge", str(short_run / "adapter"), "--output", str(output), "--overwrite", f"{base}={moved}"]) == 0
    assert main(["merge", str(short_run), "--output", str(tmp_path / "a"), f"{base}={tmp_path / 'gone'}"]) == 2
    assert f"fix: {base}=FOLDER" in capsys.readouterr().err
    for kept in (short_run, short_run.parent, short_run / "adapter", moved):
        assert main(["merge", str(short_run), "--output", str(kept), "--overwrite", f"{base}={moved}"]) == 2
        assert f"--output {kept}: holds " in capsys.readouterr().err
    assert main(["merge", str(short_run), "--output", str(tmp_path / "a"), "--max-shard-size", "many"]) == 2
    assert "--max-shard-size many" in capsys.readouterr().err
    assert main(["merge", str(short_run), "--output", str(tmp_path / "a"), "--rows", "no.jsonl"]) == 2
    assert "fix: --rows PATH" in capsys.readouterr().err
    assert main(["merge", str(output), "--output", str(tmp_path / "a")]) == 2
    assert "a model without an adapter" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_checkpoint_is_the_adapter_of_its_step(short_run: Path, tmp_path: Path) -> None:
    checkpoint = short_run / "checkpoints/step-000002"
    merged(checkpoint, tmp_path / "merged")
    trained = load_file(checkpoint / "adapter.safetensors")
    config = open_model(str(checkpoint)).config
    name = "model.layers.1.self_attn.q_proj"
    a, b = (trained[f"model.base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")
    base = load_file(Path(config.model.name_or_path) / "model.safetensors")[f"{name}.weight"]
    wanted = base + config.lora.alpha / config.lora.rank * (b @ a)
    torch.testing.assert_close(load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"], wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_checkpoint_of_a_start_that_changed_the_base_weights_is_refused(init: str, short_run: Path) -> None:
    """It fits the changed weights, which are in no file."""
    opened = open_model(str(short_run / "checkpoints/step-000002"), [f"lora.init_lora_weights={init}"])
    with (
        pytest.raises(ConfigError, match=rf"{init} changed the base model's weights .*fix: lora-core train --resume"),
        as_adapter(opened),
    ):
        pass


def test_a_quantized_run_is_merged_into_the_unquantized_base(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    config["train"]["bf16"] = True
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    _, said = merged(tmp_path / "run", tmp_path / "merged")
    assert any("trained on nf4 weights, merged into the unquantized ones" in line for line in said)
    assert load(tmp_path / "merged", "auto").dtype == torch.float32  # the base model's own


def test_without_a_run_shipped_rows_are_compared(base: Path, tmp_path: Path) -> None:
    random_adapter(load(base), tmp_path / "adapter", target_modules=["q_proj"])
    with as_adapter(open_model(str(tmp_path / "adapter"))) as source:
        batch = rows_to_compare(source, source.load_tokenizer(), None)
        assert len(batch["input_ids"]) == 4
        assert shipped_file("examples/eval.jsonl").is_file()
        with pytest.raises(DataError, match="fix: --rows PATH"):
            rows_to_compare(source, source.load_tokenizer(), str(tmp_path / "none.jsonl"))
