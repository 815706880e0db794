"""What `RUN|ADAPTER|CHECKPOINT|MODEL` names on a command line, and the model in it, loaded.

    outputs/demo                            a run: its adapter, or its newest checkpoint as long as it has none
    outputs/demo/adapter                    an adapter, with the run's settings where the run's folder is around it
    outputs/demo/checkpoints/step-000040    a checkpoint: the settings are in it
    merged/, owner/name                     a model alone

Settings decide the base model, how it was quantized and in what precision it trained.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import Accelerator
from pydantic import ValidationError
from safetensors import SafetensorError

from lora_core.checkpoints.adapter_folder import load_adapter
from lora_core.checkpoints.checkpoint import read_checkpoint, restore_adapter
from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config, with_overrides
from lora_core.errors import ConfigError
from lora_core.model.base import add_adapter, load_base_model, load_saved_tokenizer, load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.preflight.model_facts import with_packing
from lora_core.runtime.devices import build_accelerator, with_precision
from lora_core.runtime.faults import naming_lack_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_KEYS = ("data.chat_template", "data.fold_system")


@dataclass(frozen=True)
class Opened:
    """What a path or a name is. Nothing is loaded yet."""

    given: str
    """As the user wrote it."""
    kind: Literal["adapter", "checkpoint", "model"]
    config: RunConfig
    """The run's; for a model or an adapter alone the defaults, with this base model."""
    weights: Path | None
    """The folder of the adapter or checkpoint; None for a model alone."""
    tokenizer_dir: Path | None
    """Where the tokenizer was saved with the chat template of its training; None where the base model's is used."""

    def __str__(self) -> str:
        if self.weights is None:
            return f"model {self.config.model.name_or_path}"
        return f"{self.kind} {self.weights} on {self.config.model.name_or_path}"


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be asked and measured, in evaluation mode."""

    opened: Opened
    config: RunConfig
    """With the precision decided for this device."""
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    model: Any
    """A transformers model, inside PEFT's where there is an adapter."""


def open_model(given: str, overrides: Sequence[str] = (), config: RunConfig | None = None) -> Opened:
    """Find out what a path or a name is, and the settings that belong to it.

    Args:
        given: a run folder, an adapter folder, a checkpoint folder, a model folder, or a model's hub id.
        overrides: `key=value`, in place of those settings.
        config: settings in place of those that are found; a model alone becomes their base model.

    Raises:
        ConfigError: it is none of these, or its settings cannot be read.
    """
    folder = Path(given).expanduser()
    own_template = config is not None or any(override.startswith(_TEMPLATE_KEYS) for override in overrides)
    if _is_run(folder):
        weights = _weights_of_run(folder)
        found = load_config(folder / "config.yaml")
    elif (folder / "adapter_config.json").is_file():
        weights = folder
        found = _config_of_adapter(folder)
    elif (folder / "manifest.json").is_file() and (folder / "state.json").is_file():
        weights = folder
        found = _config_of_checkpoint(folder)
    else:
        _check_name(given, folder)
        name = f"model.name_or_path={json.dumps(given, ensure_ascii=False)}"
        return Opened(given, "model", with_overrides(config or _defaults(), [name, *overrides]), None, None)
    is_adapter = (weights / "adapter_config.json").is_file()
    has_tokenizer = (weights / "tokenizer_config.json").is_file() and not own_template
    return Opened(
        given=given,
        kind="adapter" if is_adapter else "checkpoint",
        config=with_overrides(config or found, overrides),
        weights=weights,
        tokenizer_dir=weights if has_tokenizer else None,
    )


def open_base(config: RunConfig) -> Opened:
    """The base model of these settings, without an adapter."""
    return Opened(config.model.name_or_path, "model", config, None, None)


def load_opened(opened: Opened) -> LoadedModel:
    """The model on this process's device, quantized as its settings say.

    Raises:
        ConfigError: base model, adapter or checkpoint cannot be loaded, or do not fit together.
        RankFault: there was no memory left.
    """
    config, _ = with_precision(opened.config)
    config = with_packing(config)
    accelerator = build_accelerator(config)
    if opened.tokenizer_dir is not None:
        tokenizer = load_saved_tokenizer(opened.tokenizer_dir, config.model)
    else:
        tokenizer = load_tokenizer(config.model, config.data)
    model: Any
    with naming_lack_of_memory(accelerator):
        if opened.weights is None:
            model = load_base_model(config.model, accelerator.device, bool(config.data.packing))
        else:
            model = _load_trained(opened, opened.weights, config, accelerator)
    return LoadedModel(opened, config, accelerator, tokenizer, model.eval())


def _load_trained(opened: Opened, weights: Path, config: RunConfig, accelerator: Accelerator) -> Any:
    try:
        if opened.kind == "adapter":
            return load_adapter(config, weights, accelerator.device)
        checkpoint = read_checkpoint(weights)
        base = load_base_model(config.model, accelerator.device, bool(config.data.packing))
        model = add_adapter(base, config.lora, config.train.seed)
        restore_adapter(checkpoint, CausalLMLoss(model))  # whose names a checkpoint has
        return model
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{weights}: the {opened.kind} cannot be loaded onto {config.model.name_or_path}: {reason}; fix: "
            "model.name_or_path=NAME, with the model that it was trained on"
        ) from error


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()


def _weights_of_run(folder: Path) -> Path:
    if (folder / "adapter/adapter_config.json").is_file():
        return folder / "adapter"
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if not checkpoints:
        raise ConfigError(
            f"{folder}: the run has no adapter/ and no checkpoint yet; fix: let it train up to train.save_steps"
        )
    return checkpoints[-1]


def _config_of_adapter(folder: Path) -> RunConfig:
    run = folder.absolute().parent
    if folder.absolute().name == "adapter" and _is_run(run):
        return load_config(run / "config.yaml")
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}/adapter_config.json: cannot be read as an adapter's: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{folder}/adapter_config.json: base_model_name_or_path is {base!r}, so its base model is not known; fix: "
            "put the model's name there"
        )
    return with_overrides(_defaults(), [f"model.name_or_path={json.dumps(base, ensure_ascii=False)}"])


def _config_of_checkpoint(folder: Path) -> RunConfig:
    try:
        return RunConfig.model_validate(read_checkpoint(folder).state["config"])
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{folder}: its settings cannot be used: {reason}; fix: the version of lora_core that wrote it"
        ) from error


def _check_name(given: str, folder: Path) -> None:
    """Refuse a folder that holds nothing to load, and a path that is none."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{given}: is no run, adapter, checkpoint or model (no config.yaml, adapter_config.json, manifest.json or "
            "config.json in it); fix: a folder such as outputs/demo"
        )
    if folder.is_file():
        raise ConfigError(f"{given}: is a file; fix: a folder such as outputs/demo, or a model's hub id")
    runs = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
    if not folder.is_dir() and runs and folder.parent.name:
        near = difflib.get_close_matches(folder.name, runs, n=1, cutoff=0)[0]
        raise ConfigError(f"{given}: no such run; {folder.parent} holds {len(runs)}; fix: {folder.parent / near}")
    if not folder.is_dir() and (given.startswith(("/", "~", ".")) or given.count("/") > 1):
        raise ConfigError(f"{given}: no such folder (working folder: {Path.cwd()}); fix: a folder, or a model's hub id")


def _defaults() -> RunConfig:
    return with_overrides(RunConfig(), ["train.bf16=auto"])
