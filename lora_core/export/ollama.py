"""A folder for llama.cpp and Ollama: the GGUF file with its Modelfile, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_core.config.schema import ModelConfig
from lora_core.encoding.prompts import tokens_to_stop_at
from lora_core.export.as_adapter import Adapter
from lora_core.export.gguf import stop_ids, write_adapter_gguf, write_gguf
from lora_core.export.modelfile import modelfile
from lora_core.model.base import load_tokenizer
from lora_core.runtime.run_folder import whole_folder, write_text


def export_model(folder: Path, output: Path, kind: str, say: Callable[[str], None]) -> Path:
    """A whole model; returns the GGUF file.

    Raises:
        ConfigError, LoraCoreError: as `write_gguf`.
    """
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder.absolute()), dtype="auto"))
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(stop_ids(folder))]
    name = f"model-{kind}.gguf"
    with whole_folder(output) as temporary:
        write_gguf(folder, temporary / name, kind, say)
        write_text(temporary / "Modelfile", modelfile(tokenizer, f"./{name}", stops))
    return output / name


def export_adapter(source: Adapter, output: Path, kind: str, say: Callable[[str], None]) -> Path:
    """An adapter alone; its Modelfile names the base model, which Ollama must have.

    Raises:
        ConfigError: as `write_adapter_gguf`.
    """
    tokenizer = source.load_tokenizer()
    stops = tokens_to_stop_at(tokenizer) if tokenizer.chat_template is not None else [str(tokenizer.eos_token)]
    name = f"adapter-{kind}.gguf"
    with whole_folder(output) as temporary:
        write_adapter_gguf(source, temporary / name, kind, say)
        text = modelfile(tokenizer, "./base.gguf", stops, f"./{name}")
        write_text(temporary / "Modelfile", text)
    say("Modelfile: put a GGUF file of the base model beside it, as base.gguf, or name one after FROM")
    return output / name
