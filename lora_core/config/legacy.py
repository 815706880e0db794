"""The old format: one YAML file for all models, keyed by model id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_core.config.layers import Setting
from lora_core.config.schema import TrainConfig
from lora_core.config.synonyms import nearest_key
from lora_core.errors import ConfigError, problem_list
from lora_core.untrusted.text import quoted

_LEGACY_KEYS = {
    **{name: f"train.{name}" for name in TrainConfig.model_fields},
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "max_seq_length": "data.max_seq_length",
}


def is_legacy(settings: Mapping[str, Setting]) -> bool:
    return bool(settings) and all("/" in key for key in settings)


def models_of(settings: Mapping[str, Setting]) -> list[str]:
    """The model ids of such a file."""
    return list(dict.fromkeys(key.rpartition(".")[0] or key for key in settings))


def legacy_layer(
    path: Path, settings: Mapping[str, Setting], model: str | None, problems: list[str]
) -> dict[str, Setting]:
    models = models_of(settings)
    if model is None and len(models) == 1:
        model = models[0]
    if model not in models:
        asked = "no --model was given" if model is None else f"--model {model} is not among them"
        raise ConfigError(
            problem_list(
                f"{path} holds settings for {len(models)} models, and {asked}. Fix: one of",
                [f"--model {m}" for m in models],
            )
        )
    layer = {"model.name_or_path": Setting(model, str(path))}
    for key, setting in settings.items():
        owner, _, name = key.rpartition(".")
        if owner != model:
            continue
        if name in _LEGACY_KEYS:
            layer[_LEGACY_KEYS[name]] = setting
        else:
            problems.append(f"{setting.source}  {name} = {quoted(setting.value)}: unknown key; {nearest_key(name)}")
    return layer
