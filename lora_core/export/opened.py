"""What a path names: a run folder, an adapter, a checkpoint of a run, or a whole model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config.load import load_config, with_overrides
from lora_core.config.schema import ModelConfig, RunConfig
from lora_core.errors import ConfigError
from lora_core.model.base import add_adapter, load_tokenizer
from lora_core.training.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Opened:
    """What a path named."""

    path: Path
    """As it was given, `~` resolved."""
    model: ModelConfig
    """The base model, or the whole model where the path names one."""
    adapter: Path | None
    """A folder in PEFT's format; None for a whole model."""
    tokenizer: Path | None
    """The folder with the tokenizer as trained with; None for the base model's own."""
    config: RunConfig | None
    """Of the run that trained it, where that is known."""
    run: Path | None
    """The run folder, where there is one."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template that was trained with, and the base model's stop tokens.

        Raises:
            ConfigError: it cannot be read.
        """
        data = self.config.data if self.config is not None else None
        base = load_tokenizer(self.model, data if self.tokenizer is None else None)
        if self.tokenizer is None:
            return base
        tokenizer = load_tokenizer(
            self.model.model_copy(update={"name_or_path": str(self.tokenizer), "revision": None})
        )
        tokenizer.stop_tokens = base.stop_tokens
        return tokenizer


@contextmanager
def opened(name: str | Path) -> Iterator[Opened]:
    """Find out what a path names. A checkpoint is written as an adapter into a folder that is there for the block.

    Raises:
        ConfigError: it is none of them, or a run without an adapter.
    """
    path = Path(name).expanduser()
    if (path / "state.json").is_file() and (path / "adapter.safetensors").is_file():
        with tempfile.TemporaryDirectory(prefix="lora_core_checkpoint_") as folder:
            yield _checkpoint(path, Path(folder) / "adapter")
    elif (path / "config.yaml").is_file():
        yield _run(path)
    elif (path / "adapter_config.json").is_file():
        yield _adapter(path)
    elif (path / "config.json").is_file():
        yield Opened(path, ModelConfig(name_or_path=str(path.absolute()), dtype="auto"), None, path, None, None)
    else:
        what = "holds no run, adapter, checkpoint or model" if path.is_dir() else "no such folder"
        raise ConfigError(f"{name}: {what}; fix: name the output_dir of a run, such as outputs/demo")


def _run(path: Path) -> Opened:
    config = load_config(path / "config.yaml")
    adapter = path / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        checkpoints = sorted((path / "checkpoints").glob("step-*"))
        fix = f"name its newest checkpoint, {checkpoints[-1]}" if checkpoints else "train first"
        raise ConfigError(f"{path}: the run has no adapter/, so it did not end; fix: {fix}")
    return Opened(path, config.model, adapter, _tokenizer_in(adapter), config, path)


def _adapter(path: Path) -> Opened:
    if (path.parent / "config.yaml").is_file() and path.name == "adapter":
        return replace(_run(path.parent), path=path)
    described = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base = described.get("base_model_name_or_path")
    if not base:
        raise ConfigError(
            f"{path}/adapter_config.json: names no base model; fix: set base_model_name_or_path there to a hub id or "
            "folder"
        )
    model = ModelConfig(name_or_path=str(base), revision=described.get("revision"), dtype="auto")
    return Opened(path, model, path, _tokenizer_in(path), None, None)


def _checkpoint(path: Path, target: Path) -> Opened:
    checkpoint = open_checkpoint(path)
    known = RunConfig().to_dict()
    saved: dict[str, Any] = checkpoint.state["config"]
    config = RunConfig.model_validate(
        {
            key: {**value, **saved[key]} if isinstance(value, dict) else saved.get(key, value)
            for key, value in known.items()
        }
    )
    write_checkpoint_as_adapter(config, path, target)
    run = path.parent.parent
    return Opened(path, config.model, target, None, config, run if (run / "config.yaml").is_file() else None)


def write_checkpoint_as_adapter(config: RunConfig, checkpoint: Path, target: Path) -> None:
    """A checkpoint's adapter in PEFT's format."""
    import torch
    from safetensors.torch import load_file

    from lora_core.memory.without_storage import base_without_storage, num_hidden_layers

    shapes = with_overrides(config, ["model.quantization=none"])
    with torch.device("meta"):
        base = base_without_storage(shapes, num_hidden_layers(shapes))
        adapted = add_adapter(base, config.lora, config.train.seed)
    state = {
        name.removeprefix("model."): tensor for name, tensor in load_file(checkpoint / "adapter.safetensors").items()
    }
    adapted.save_pretrained(str(target), state_dict=state, save_embedding_layers=False)


def _tokenizer_in(folder: Path) -> Path | None:
    return folder if (folder / "tokenizer_config.json").is_file() else None
