"""What is written as GGUF loads again by transformers, with the same tokens, and answers the same greedily."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_core.commands.main import main
from lora_core.errors import ConfigError, LoraCoreError
from lora_core.export.as_adapter import as_adapter
from lora_core.export.gguf import write_adapter_gguf, write_gguf
from lora_core.export.gguf_tokenizer import pre_tokenizer
from lora_core.export.modelfile import find_format
from lora_core.inference.opened import open_model
from tests.conftest import make_model
from tests.export.adapters import KINDS, random_adapter, save_base

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def small(family: str, vocab_size: int) -> Any:
    torch.manual_seed(0)
    ends = {"vocab_size": vocab_size, "eos_token_id": vocab_size - 5, "bos_token_id": None}  # <|im_end|>
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**ends, tie_word_embeddings=True, **SMALL))
    if family == "qwen3":
        # transformers reads no head_dim from the file: it is 128 in every Qwen3.
        return Qwen3ForCausalLM(Qwen3Config(**ends, head_dim=128, tie_word_embeddings=False, **SMALL))
    return make_model(vocab_size)


def from_gguf(path: Path) -> tuple[Any, Any]:
    settings = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **settings)
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def reply(model: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(the prompt's tokens, the greedy reply's)."""
    messages = [{"role": "user", "content": "Where is card 3285, and who's there?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    return ids["input_ids"][0].tolist(), output[0].tolist()


@pytest.mark.parametrize(("family", "kind"), [("llama", "f16"), ("qwen2", "f32"), ("qwen3", "bf16"), ("llama", "q8_0")])
def test_it_answers_the_same(family: str, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_base(tmp_path / "model", small(family, len(tokenizer)), tokenizer, torch.bfloat16)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
    loaded, its_tokenizer = from_gguf(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    if kind != "q8_0":  # bfloat16 values, which are float16's too where they are not tiny
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=1e-7)
    assert reply(loaded, its_tokenizer) == reply(model, AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert its_tokenizer.chat_template == tokenizer.chat_template
    assert its_tokenizer.eos_token == tokenizer.eos_token


def test_an_adapter_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """llama.cpp adds alpha / rank * B A to its own weights, which for q and k have their rows in another order."""
    save_base(tmp_path / "base", small("llama", len(tokenizer)), tokenizer, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = random_adapter(base, tmp_path / "adapter", **KINDS["rsLoRA, patterns"])
    with as_adapter(open_model(str(tmp_path / "adapter"))) as source:
        write_adapter_gguf(source, tmp_path / "adapter.gguf")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for name in ("base", "merged"):
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f32")

    def tensors(name: str) -> dict[str, torch.Tensor]:
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}

    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    adapter, before, after = tensors("adapter"), tensors("base"), tensors("merged")
    layers = [name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")]
    assert len(layers) == 14
    for layer in layers:
        a, b = adapter[f"{layer}.lora_a"], adapter[f"{layer}.lora_b"]
        torch.testing.assert_close(before[layer] + alpha / b.shape[-1] * (b @ a), after[layer])


def test_a_run_as_a_folder_for_ollama(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    output = tmp_path / "out"
    arguments = ["export", str(short_run), "--gguf", "--output", str(output)]
    assert main([*arguments, "--type", "q8_0"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    lines = (output / "Modelfile").read_text()
    assert lines.startswith('FROM ./model-q8_0.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n')
    assert lines.endswith('PARAMETER stop "<|im_end|>"\n')
    assert main(arguments) == 2
    assert "is not empty; fix: another folder, or --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--adapter-only", "--type", "f32"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["Modelfile", "adapter-f32.gguf"]
    assert "ADAPTER ./adapter-f32.gguf" in (output / "Modelfile").read_text()


def test_llama_cpp_converts_where_it_is_installed(
    short_run: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import json, sys; open(sys.argv[3], 'w').write(json.dumps(sys.argv[1:]))")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    target = tmp_path / "a.gguf"
    write_gguf(tiny_model_dir, target, "q8_0")
    assert json.loads(target.read_text()) == [str(tiny_model_dir), "--outfile", str(target), "--outtype", "q8_0"]
    script.write_text("import sys; sys.exit('cannot do that')")
    with pytest.raises(LoraCoreError, match=r"convert_hf_to_gguf.py failed \(1\): cannot do that; fix: run it by hand"):
        write_gguf(tiny_model_dir, target, "q8_0")
    script.unlink()
    with pytest.raises(ConfigError, match=r"holds no convert_hf_to_gguf\.py"):
        write_gguf(tiny_model_dir, target, "q8_0")
    monkeypatch.delenv("LLAMA_CPP")
    script.write_text("raise SystemExit(1)")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(LoraCoreError, match="failed"):
        write_gguf(tiny_model_dir, target, "q8_0")


def test_what_llama_cpp_would_read_otherwise_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    model = small("llama", len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 1e6
    save_base(tmp_path / "large", model, tokenizer, torch.float32)
    with pytest.raises(ConfigError, match="more than float16 can; fix: --type bf16"):
        write_gguf(tmp_path / "large", tmp_path / "a.gguf", "f16")
    config = json.loads((tmp_path / "large/config.json").read_text())
    for changes, said in (
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type linear"),
        ({"model_type": "gemma"}, "gemma: is converted by llama.cpp alone"),
    ):
        shutil.copytree(tmp_path / "large", tmp_path / said)
        (tmp_path / said / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError, match=said):
            write_gguf(tmp_path / said, tmp_path / "a.gguf", "f32")
    with pytest.raises(ConfigError, match="no name here for how its tokenizer splits"):
        pre_tokenizer({"type": "Whitespace"}, "a model")
    base = small("qwen2", len(tokenizer))
    save_base(tmp_path / "base", base, tokenizer, torch.float32)
    random_adapter(base, tmp_path / "adapter", **KINDS["DoRA"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with (
        as_adapter(open_model(str(tmp_path / "adapter"))) as source,
        pytest.raises(ConfigError, match="no adapter with use_dora"),
    ):
        write_adapter_gguf(source, tmp_path / "b.gguf")


def test_ways_to_split_text_that_llama_cpp_has_names_for() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True}
    assert pre_tokenizer(byte_level, "") == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer({"type": "Sequence", "pretokenizers": [digits, byte_level]}, "") == "smollm"
    for digits_at_once, name in (("", "qwen2"), ("{1,3}", "llama-bpe")):
        regex = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            + digits_at_once
            + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps = [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]
        assert pre_tokenizer({"type": "Sequence", "pretokenizers": steps}, "") == name


def test_chat_formats_are_told_by_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    import copy

    found = find_format(tokenizer)
    assert found is not None
    assert found[0].start == "<|im_start|>ROLE\n"
    assert found[1] is None
    with_system = copy.deepcopy(tokenizer)
    with_system.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + str(tokenizer.chat_template)
    )
    found = find_format(with_system)
    assert found is not None
    assert found[1] == "Be kind."
    with_system.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert find_format(with_system) is None
