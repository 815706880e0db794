"""An adapter that training starts from: found, compared with the configuration, and put on the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_core.config.schema import LoraConfig, ModelConfig
from lora_core.errors import ConfigError, problem_list

if TYPE_CHECKING:
    from peft import PeftModel

# What PEFT calls the keys of `lora` that decide what an adapter's tensors mean.
_PEFT_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "target_modules": "target_modules",
}


@dataclass(frozen=True)
class StartingAdapter:
    """Where `model.adapter` leads: an adapter as PEFT saves it, or a checkpoint of a run."""

    weights: Path
    """A safetensors file: PEFT's adapter_model.safetensors, or a checkpoint's adapter.safetensors."""
    settings: dict[str, Any]
    """Its values of the keys of `lora`."""
    base_model: str | None
    """As it names the model that it was trained on."""

    @property
    def is_checkpoint(self) -> bool:
        return self.weights.name == "adapter.safetensors"


def find_starting_adapter(config: ModelConfig) -> StartingAdapter | None:
    """What `model.adapter` names: a run folder, a folder with an adapter, or a checkpoint. None where it is null.

    Raises:
        ConfigError: there is no adapter, or one of another kind than LoRA.
    """
    if config.adapter is None:
        return None
    folder = Path(config.adapter).expanduser()
    if (folder / "state.json").is_file() and (folder / "adapter.safetensors").is_file():
        return _checkpoint(folder)
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            return _peft_folder(place)
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    what = "no such folder" if not folder.is_dir() else "holds no adapter_config.json and is no checkpoint"
    fix = f"model.adapter={checkpoints[-1]}" if checkpoints else "model.adapter=FOLDER, such as outputs/demo/adapter"
    raise ConfigError(f"model.adapter={config.adapter}: {what}; fix: {fix}", "adapter_unreadable")


def _peft_folder(folder: Path) -> StartingAdapter:
    values = _read_json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    problem = None
    if not weights.is_file():
        problem = "holds no adapter_model.safetensors; fix: save it with PEFT's safe_serialization=True"
    elif values.get("peft_type") != "LORA":
        problem = f"is an adapter of the kind {values.get('peft_type')}; fix: an adapter of LoRA"
    elif values.get("bias", "none") != "none" or values.get("lora_bias") or values.get("target_parameters"):
        problem = "trains biases or parameters beside its matrices, which lora_core does not; fix: model.adapter=null"
    elif str(values.get("init_lora_weights", True)).startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        problem = (
            f"belongs to base weights that {values['init_lora_weights']} changed; fix: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if problem is not None:
        raise ConfigError(f"model.adapter={folder}: {problem}", "adapter_unreadable")
    defaults: dict[str, Any] = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    settings = {key: values.get(name, defaults.get(key)) for key, name in _PEFT_NAMES.items()}
    base_model = values.get("base_model_name_or_path")
    return StartingAdapter(weights, settings, None if base_model is None else str(base_model))


def _checkpoint(folder: Path) -> StartingAdapter:
    config = _read_json(folder / "state.json")["config"]
    lora = {**LoraConfig().model_dump(mode="json"), **config["lora"]}
    if str(lora["init_lora_weights"]).startswith(("pissa", "olora")):
        raise ConfigError(
            f"model.adapter={folder}: the checkpoint belongs to base weights that {lora['init_lora_weights']} changed; "
            f"fix: model.adapter={folder.parent.parent / 'adapter'}",
            "adapter_unreadable",
        )
    if str(config["train"]["optim"]).startswith("schedule_free"):
        raise ConfigError(
            f"model.adapter={folder}: a checkpoint of {config['train']['optim']} holds weights between steps and not "
            f"their average; fix: model.adapter={folder.parent.parent / 'adapter'}",
            "adapter_unreadable",
        )
    settings = {key: lora[key] for key in _PEFT_NAMES}
    return StartingAdapter(folder / "adapter.safetensors", settings, str(config["model"]["name_or_path"]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.adapter={path.parent}: {path.name} cannot be read: {error}; fix: another folder",
            "adapter_unreadable",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"model.adapter={path.parent}: {path.name} must hold an object; fix: another folder", "adapter_unreadable"
        )
    return values


def differing_settings(start: StartingAdapter, lora: LoraConfig) -> list[tuple[str, Any, Any, str]]:
    """(key, its value in the adapter, its value in `lora`, the override that takes the adapter's), where they differ.

    Target modules are compared where both are lists of names; else `put_on` sees what differs.
    """
    differing = []
    for key, theirs in start.settings.items():
        ours = getattr(lora, key)
        if key == "target_modules":
            if isinstance(theirs, str) or isinstance(ours, str):
                continue
            # PEFT may have written whole names for `all-linear`.
            if any("." in name for name in [*theirs, *ours]) or set(theirs) == set(ours):
                continue
            theirs, ours = sorted(theirs), sorted(ours)
        elif theirs == ours:
            continue
        text = f"[{','.join(theirs)}]" if isinstance(theirs, list) else json.dumps(theirs)
        if isinstance(theirs, dict):
            text = "{" + ", ".join(f"{name}: {value}" for name, value in theirs.items()) + "}"
        override = f"lora.{key}={text}"
        differing.append((key, theirs, ours, f"'{override}'" if " " in override else override))
    return differing


@torch.no_grad()
def put_on(start: StartingAdapter, model: PeftModel) -> None:
    """Copy the adapter's tensors into the model's own adapter.

    Raises:
        ConfigError: the file cannot be read, or holds other tensors than the configured adapter.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        tensors = load_file(start.weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.adapter={start.weights.parent}: {start.weights.name} cannot be read: {error}; fix: another folder",
            "adapter_unreadable",
        ) from error
    if start.is_checkpoint:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    else:
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_same_tensors(start, tensors, own)
    if start.is_checkpoint:
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    else:
        set_peft_model_state_dict(model, tensors)


@torch.no_grad()
def check_reload(model: PeftModel) -> None:
    """Check that PEFT finds all of the adapter again once it is saved, by giving the model its own.

    PEFT looks for some layers by the names of another version of the model's family, and only warns, after the run.

    Raises:
        ConfigError: it does not; the rest of the adapter would be another model.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    result = set_peft_model_state_dict(model, get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in result.missing_keys if ".lora_A." in name}
    if not missing:
        return
    targets = model.peft_config["default"].target_modules
    kept = [name for name in targets if name.rsplit(".", 1)[-1] not in missing] if not isinstance(targets, str) else []
    fix = f"lora.target_modules=[{','.join(sorted(kept))}]" if kept else "another model.name_or_path"
    raise ConfigError(
        "lora.target_modules: PEFT would not load all of the saved adapter: it does not find "
        f"{', '.join(sorted(missing))} again; fix: {fix}"
    )


def _check_same_tensors(start: StartingAdapter, theirs: dict[str, Tensor], ours: dict[str, Any]) -> None:
    problems = [
        *(f"{name}: only in the adapter" for name in sorted(theirs.keys() - ours.keys())),
        *(f"{name}: only in the configuration" for name in sorted(ours.keys() - theirs.keys())),
        *(
            f"{name}: shape {tuple(theirs[name].shape)} in the adapter, {tuple(ours[name].shape)} here"
            for name in sorted(theirs.keys() & ours.keys())
            if theirs[name].shape != ours[name].shape
        ),
    ]
    if problems:
        targets = start.settings["target_modules"]
        fix = targets if isinstance(targets, str) else f"[{','.join(sorted(targets))}]"
        raise ConfigError(
            problem_list(
                f"model.adapter={start.weights.parent}: its tensors are not those of `lora` on this model "
                f"({len(problems)} differ):",
                problems[:5],
            )
            + f"\nFix: the model it was trained on ({start.base_model}), and lora.target_modules={fix}"
        )
