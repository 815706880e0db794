"""Files of other tools: which tool a file is of, with which other file it belongs, and what it says in our words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.config.keys import SECTIONS
from lora_core.config.layers import Setting, read_layers
from lora_core.config.legacy import is_legacy, legacy_layer, models_of
from lora_core.config.synonyms import sectionless
from lora_core.errors import ConfigError, counted
from lora_core.other_tools.axolotl import AXOLOTL
from lora_core.other_tools.llama_factory import LLAMA_FACTORY
from lora_core.other_tools.not_offered import NOT_OFFERED
from lora_core.other_tools.scripts import Script, Unresolved, read_script
from lora_core.other_tools.trainer_keys import (
    PEFT_DEFAULTS,
    SFT_COMMAND,
    SFT_CONFIG,
    SFT_DEFAULTS,
    SFT_RULES,
    TRANSFORMERS_DEFAULTS,
    UNSLOTH_DEFAULTS,
    sft_remarks,
)
from lora_core.other_tools.translation import Reading, Tool, Translation, Values, short, translate

# Keys that only this tool has.
_SIGNS: list[tuple[Tool, frozenset[str]]] = [
    (AXOLOTL, frozenset({"base_model", "sequence_len", "micro_batch_size", "val_set_size", "sample_packing"})),
    (
        LLAMA_FACTORY,
        frozenset({"finetuning_type", "stage", "cutoff_len", "dataset_dir", "lora_target", "template", "val_size"}),
    ),
]
_MOST_SCRIPTS = 50


def tool_of(settings: Mapping[str, Setting]) -> Tool | None:
    """The tool whose file this is; None for a file of ours, or of nobody's."""
    names = {key.split(".")[0] for key in settings}
    if not names or names & {*SECTIONS, "extends"} or is_legacy(settings) or all(map(sectionless, names)):
        return None
    for tool, signs in _SIGNS:
        if names & signs:
            return tool
    known = {key for rule in SFT_RULES for key in rule.keys} | set(NOT_OFFERED)
    if not names & known:
        return None
    return SFT_COMMAND if {"model_name_or_path", "use_peft", "dataset_name", "datasets"} & names else SFT_CONFIG


def translate_script(path: Path, model: str | None, shipped: Path) -> Translation:
    """A script, together with a file of settings keyed by model id that it reads or that is beside it.

    Args:
        model: whose settings are meant; None is what the script itself names.
        shipped: the folder of the shipped configurations.

    Raises:
        ConfigError: it is no Python, does not train, or `model` is not in the file of settings.
    """
    script = read_script(path)
    if not script.trains:
        raise ConfigError(
            f"{path}: no call of SFTConfig or TrainingArguments is in it, so there is nothing to read; fix: the script "
            "that has it, or a YAML file"
        )
    keyed = _keyed_file(script, shipped)
    if keyed is None and model is not None:
        raise ConfigError(
            f"--model {model}: {path} has no file of settings keyed by model id beside it; "
            f"fix: model.name_or_path={model}"
        )
    asks = model is not None or set(script.unresolved) & set(script.attributes)
    if keyed is not None and asks:
        return translate_together(script, *keyed, model)
    remarks = [f"with {keyed[0].name} beside it: --model ID takes the settings of one of its models"] if keyed else []
    return _translate_resolved(script, script.settings, str(path), remarks)


def script_beside(path: Path) -> tuple[Script | None, list[str]]:
    """The script that trains with the settings of a keyed file: the only one beside it that passes such settings on.

    Returns:
        The script, and the names of several where none is the only one.
    """
    found = []
    for candidate in sorted(path.parent.glob("*.py"))[:_MOST_SCRIPTS]:
        try:
            script = read_script(candidate)
        except ConfigError:  # a file that is no Python cannot be the script
            continue
        if script.trains and script.attributes:
            found.append(script)
    return (found[0] if len(found) == 1 else None), [script.path.name for script in found]


def translate_together(script: Script, path: Path, settings: Mapping[str, Setting], model: str | None) -> Translation:
    """A script with one model's settings of a keyed file, which win where the script passes them on.

    Raises:
        ConfigError: `model` is None and there are several, or it is not among them.
    """
    problems: list[str] = []
    layer = legacy_layer(path, settings, model, problems)
    of_model = layer["model.name_or_path"].value
    by_name = {key.rpartition(".")[2]: s for key, s in settings.items() if key.rpartition(".")[0] == of_model}
    given = dict(script.settings)
    used = set()
    for key, attribute in script.attributes.items():
        if attribute in by_name:
            given[key] = by_name[attribute]
            used.add(attribute)
    given["model_name_or_path"] = layer["model.name_or_path"]
    translation = _translate_resolved(script, given, f"{script.path} with {path}", [f"settings of {of_model}"])
    unused = [
        Reading(name, s.value, s.source, "not offered", f"{script.path.name} does not read it")
        for name, s in by_name.items()
        if name not in used
    ]
    return replace(translation, readings=[*translation.readings, *unused])


def _keyed_file(script: Script, shipped: Path) -> tuple[Path, dict[str, Setting]] | None:
    """The file keyed by model id that the script names, or training_args.yaml beside it."""
    for name in dict.fromkeys([*script.named_files, "training_args.yaml"]):
        path = script.path.parent / name
        if path.is_file():
            problems: list[str] = []
            settings = read_layers(path, problems, shipped)[-1]
            if is_legacy(settings):
                return path, settings
    return None


def _translate_resolved(script: Script, given: Mapping[str, Setting], name: str, remarks: Iterable[str]) -> Translation:
    """Constants are translated; what stands for none is listed with its source, as not taken over."""
    resolved = {key: setting for key, setting in given.items() if not isinstance(setting.value, Unresolved)}
    translation = translate(name, _tool_of_script(script, given), resolved, [*remarks])
    unresolved = [
        Reading(key, setting.value.text, setting.source, "not offered", "no constant of the script; set it yourself")
        for key, setting in given.items()
        if isinstance(setting.value, Unresolved)
    ]
    return replace(translation, readings=[*translation.readings, *unresolved])


def _tool_of_script(script: Script, given: Mapping[str, Setting]) -> Tool:
    """The defaults of what the script calls."""
    calls = script.calls
    is_unsloth = "FastLanguageModel" in calls
    trainer = SFT_DEFAULTS if "SFTConfig" in calls or "SFTTrainer" in calls else TRANSFORMERS_DEFAULTS
    if is_unsloth and "TrainingArguments" in calls:
        trainer = TRANSFORMERS_DEFAULTS
    defaults: dict[str, Any] = trainer | (UNSLOTH_DEFAULTS if is_unsloth else PEFT_DEFAULTS)
    unresolved = {key for key, setting in given.items() if isinstance(setting.value, Unresolved)}
    defaults = {key: value for key, value in defaults.items() if key not in unresolved}
    name = "Unsloth" if is_unsloth else "TRL 1.16" if "SFTTrainer" in calls or "SFTConfig" in calls else "transformers"
    return Tool(f"{name}, PEFT and transformers", SFT_RULES, defaults, NOT_OFFERED, _refusals_of(calls), sft_remarks)


def _refusals_of(calls: frozenset[str]) -> Any:
    def refusals(values: Values) -> Iterable[str]:
        if not calls & {"LoraConfig", "get_peft_model"}:
            yield "no LoraConfig is in it: that is full fine-tuning, and adapters are trained here"

    return refusals


def translation_of(
    path: Path, layers: list[dict[str, Setting]], model: str | None, problems: list[str]
) -> Translation | None:
    """A file of another tool in our words; None for a file of ours.

    Args:
        layers: as `read_layers` returns them.

    Raises:
        ConfigError: as `translate_script`.
    """
    if is_legacy(layers[-1]):
        script, several = script_beside(path)
        if script is not None:
            return translate_together(script, path, layers[-1], model)
        of_model = legacy_layer(path, layers[-1], model, problems)
        others = (
            f"; {counted(len(several), 'script')} beside it could be meant ({', '.join(several)}): "
            "--cfg SCRIPT takes one"
            if several
            else "; a script beside it that passes them on would be read with it"
        )
        remarks = [f"alone, keyed by model id ({counted(len(models_of(layers[-1])), 'model')}){others}"]
        readings = [
            Reading(key.rpartition(".")[2], s.value, s.source, "taken", f"{key}={short(s.value)}")
            for key, s in of_model.items()
        ]
        return Translation(str(path), "settings keyed by model id", of_model, readings, [], remarks)
    tool = tool_of(layers[-1]) if len(layers) == 1 else None
    return None if tool is None else translate(str(path), tool, layers[-1])
