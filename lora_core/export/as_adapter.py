"""What was opened, as a folder in PEFT's format; and what else is known of the run that it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.errors import ConfigError
from lora_core.inference.opened import Opened
from lora_core.model.base import load_saved_tokenizer, load_tokenizer
from lora_core.report.read import read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Adapter:
    """An adapter to merge or to publish."""

    folder: Path
    """In PEFT's format."""
    config: RunConfig
    """Of its run; for an adapter alone the defaults, with its base model."""
    run: Path | None
    """The run folder, where there is one."""
    tokenizer_dir: Path | None
    has_config: bool
    """Whether `config` is that of the training."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """With the chat template of the training, and the base model's stop tokens.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.tokenizer_dir is not None:
            return load_saved_tokenizer(self.tokenizer_dir, self.config.model)
        return load_tokenizer(self.config.model, self.config.data if self.has_config else None)

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json; empty where there is none."""
        return read_run(self.run).summary if self.run is not None else {}


@contextmanager
def as_adapter(opened: Opened) -> Iterator[Adapter]:
    """What was opened, as an adapter; a checkpoint is written as one into a folder that is there for the block.

    Raises:
        ConfigError: it is a model without an adapter, or not on this machine.
    """
    if opened.weights is None:
        model_folder(opened)
        raise ConfigError(f"{opened.given}: a model without an adapter; fix: name a run, an adapter or a checkpoint")
    run = _run_of(opened)
    is_known = opened.kind == "checkpoint" or run is not None
    if opened.kind == "adapter":
        yield Adapter(opened.weights, opened.config, run, opened.tokenizer_dir, is_known)
        return
    with tempfile.TemporaryDirectory(prefix="lora_core_checkpoint_") as name:
        folder = Path(name) / "adapter"
        _write_checkpoint(opened.config, opened.weights, folder)
        yield Adapter(folder, opened.config, run, None, is_known)


def model_folder(opened: Opened) -> Path:
    """The folder of a model without an adapter.

    Raises:
        ConfigError: it is not on this machine.
    """
    folder = Path(opened.given).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{opened.given}: no such folder (working folder: {Path.cwd()}); fix: a run, such as outputs/demo, or a "
            "folder that lora-core merge wrote"
        )
    return folder


def _run_of(opened: Opened) -> Path | None:
    assert opened.weights is not None
    weights = opened.weights.absolute()
    run = weights.parent if opened.kind == "adapter" else weights.parent.parent
    is_inside = weights.name == "adapter" or weights.parent.name == "checkpoints"
    return run if is_inside and (run / "config.yaml").is_file() else None


def _write_checkpoint(config: RunConfig, checkpoint: Path, target: Path) -> None:
    """A checkpoint's adapter in PEFT's format."""
    import torch
    from safetensors.torch import load_file

    from lora_core.memory.without_storage import base_without_storage, num_hidden_layers
    from lora_core.model.base import add_adapter

    if config.lora.changes_base_weights:
        raise ConfigError(
            f"{checkpoint}: lora.init_lora_weights={config.lora.init_lora_weights} changed the base model's weights at "
            "the start, and a checkpoint fits those alone; fix: lora-core train --resume to the end, and take adapter/"
        )
    shapes = with_overrides(config, ["model.quantization=none"])
    with torch.device("meta"):
        base = base_without_storage(shapes, num_hidden_layers(shapes))
        adapted = add_adapter(base, config.lora, config.train.seed)
    tensors = load_file(checkpoint / "adapter.safetensors")
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    adapted.save_pretrained(str(target), state_dict=state, save_embedding_layers=False)
