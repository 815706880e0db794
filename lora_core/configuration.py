"""`RunConfig`: every setting of a run, where it came from, and what is wrong with it.

Settings come in layers: the defaults below, then the YAML that `--cfg` names (with the files it `extends`), then
`key=value` from the command line. Later layers win. A key that is unknown or ill-typed is refused, with the file
and line, what is allowed, and the nearest key that exists; all problems are reported together.
"""

from __future__ import annotations

import difflib
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_core.config.keys import SECTIONS, config_keys
from lora_core.config.layers import Setting, merge, parse_overrides, read_layers
from lora_core.config.legacy import is_legacy
from lora_core.config.schema import RunConfig
from lora_core.config.synonyms import nearest_key, sectionless
from lora_core.errors import ConfigError, counted, problem_list
from lora_core.other_tools.reader import translate_script, translation_of
from lora_core.other_tools.translation import Translation
from lora_core.untrusted.text import quoted

# A file of these is given in place of a configuration by mistake. Not .json, which TRL's saved settings are in.
_SUFFIXES_OF_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


def _check(settings: Mapping[str, Setting], problems: list[str]) -> RunConfig | None:
    """Build the config, or add one line per wrong key to `problems`."""
    keys = config_keys()
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if key in SECTIONS and setting.value is None:
            continue  # an empty section
        if key not in keys:
            what = "a section, which holds keys" if key in SECTIONS else "unknown key"
            problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: {what}; {nearest_key(key)}")
            continue
        if _holds_control_characters(setting.value):
            problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: holds a control character")
            continue
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = setting.value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        for key, details in {_error_key(details["loc"], keys): details for details in error.errors()}.items():
            message = details["msg"].removeprefix("Value error, ")
            if key in keys:
                setting = settings[key]
                wrong = message if details["type"] == "value_error" else f"must be {keys[key]}"
                if details["type"] == "list_type" and isinstance(setting.value, str):
                    wrong += f"; fix: {key}=[{setting.value}]"
                problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: {wrong}")
            else:  # a check over a whole section, or over several
                prefix = f"{key}." if key else ""
                named = [n for n in settings if n.startswith(prefix) and n.removeprefix(prefix) in message]
                sources = dict.fromkeys(settings[name].source for name in named)
                problems.append(f"{', '.join(sources)}  {key}{': ' if key else ''}{message}")
        return None


def _holds_control_characters(value: Any) -> bool:
    """In a str, also in lists and mappings; half a surrogate pair counts too. No path, name or word has any."""
    if isinstance(value, (list, dict)):
        return any(map(_holds_control_characters, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _error_key(location: tuple[int | str, ...], keys: Mapping[str, str]) -> str:
    """The config key of a pydantic error; what follows it tells union members and list positions apart.

    An error over several sections has no location, and the key is empty.
    """
    if not location:
        return ""
    if str(location[0]) in keys:
        return str(location[0])
    return ".".join(str(part) for part in location[:2])


def find_config(name: str) -> Path:
    """The file that `--cfg NAME` means: a path, a name in `configs/` of this folder, or a shipped configuration.

    Raises:
        ConfigError: there is no such file, and the configs that there are are named; or it is something else.
    """
    as_path = Path(name).expanduser()
    if as_path.is_file():
        if as_path.suffix in _SUFFIXES_OF_ROWS:
            fix = f"--cfg base {shlex.quote(f'data.train_file={name}')}"
            raise ConfigError(f"--cfg {name}: holds rows and no configuration; fix: {fix}")
        return as_path
    folders = [Path("configs"), shipped_file("configs")]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if (as_path / "config.yaml").is_file():
        raise ConfigError(f"--cfg {name}: is a run's folder; fix: --cfg {shlex.quote(str(as_path / 'config.yaml'))}")
    if (as_path / "config.json").is_file():
        fix = f"--cfg base {shlex.quote(f'model.name_or_path={name}')}"
        raise ConfigError(f"--cfg {name}: is a model's folder; fix: {fix}")
    for folder in folders:
        if (folder / "accelerate" / f"{name}.yaml").is_file():
            raise _for_accelerate(name, folder / "accelerate" / f"{name}.yaml")
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    close = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"--cfg {name}: no such file, and no configuration of that name (there are: {', '.join(names) or 'none'})"
        + (f"; nearest: --cfg {close[0]}" if close else "")
    )


def _for_accelerate(name: str, path: Path) -> ConfigError:
    fix = f"accelerate launch --config_file {shlex.quote(str(path))} -m lora_core train --cfg qwen7b"
    return ConfigError(f"--cfg {name}: is a file for accelerate launch, and holds no run's settings; fix: {fix}")


def shipped_file(name: str) -> Path:
    """A file or folder that comes with the package: `configs`, `examples` or `launch`.

    In a checkout these are the folders at its top, which `lora_core/configs` and the like link to. A wheel holds
    copies. (Without links, as in a checkout on Windows, the folders at the top are taken themselves.)
    """
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.parent.is_dir() and inside.exists() else package.parent / name


def is_keyed_by_model(cfg: str | Path) -> bool:
    """Whether a configuration is an old `training_args.yaml`, with settings for several models.

    Raises:
        ConfigError: there is no such file.
    """
    path = find_config(str(cfg))
    return path.suffix != ".py" and is_legacy(read_layers(path, [], shipped_file("configs"))[-1])


def load_config(cfg: str | Path, overrides: Sequence[str] = (), model: str | None = None) -> RunConfig:
    """Read a configuration.

    Args:
        cfg: a path, or a name in `configs/` such as `qwen7b`; the path may be of another tool's file (`foreign.py`).
        overrides: `key=value` strings, the value in YAML, such as `train.num_train_epochs=3`.
        model: which model's settings to take from a `training_args.yaml` whose top-level keys are model ids.

    Raises:
        ConfigError: lists every unknown or ill-typed key with its file, line and value.
    """
    path = find_config(str(cfg))
    problems: list[str] = []
    layers, translation = _read(path, model, problems)
    name = path.stem
    if translation is not None:
        if translation.refusals:
            raise ConfigError(problem_list(f"{path} cannot be run here:", [*translation.refusals]))
        layers = [*layers[:-1], dict(translation.settings)]
        if "model.name_or_path" in translation.settings:
            name = str(translation.settings["model.name_or_path"].value).rstrip("/").split("/")[-1]
    elif model is not None:
        problems.append(
            f"command line  --model {model}: only for a file keyed by model id; fix: model.name_or_path={model}"
        )
    layers = [_with_sections(layer) for layer in (*layers, parse_overrides(overrides, problems))]
    settings = merge([{"output_dir": Setting(f"outputs/{name}", "default")}, *layers])
    config = _check(settings, problems)
    if problems or config is None:
        raise ConfigError(problem_list(f"The configuration has {counted(len(problems), 'problem')}:", problems))
    return config


def read_translation(cfg: str | Path, model: str | None = None) -> Translation | None:
    """What became of each key of another tool's file; None for a file of ours.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    problems: list[str] = []
    return _read(find_config(str(cfg)), model, problems)[1]


def _read(path: Path, model: str | None, problems: list[str]) -> tuple[list[dict[str, Setting]], Translation | None]:
    """The layers of a file; of another tool's also what they become here."""
    shipped = shipped_file("configs")
    if path.suffix == ".py":
        return [], translate_script(path, model, shipped)
    layers = read_layers(path, problems, shipped)
    if any("distributed_type" in layer for layer in layers):
        raise _for_accelerate(str(path), path)
    return layers, translation_of(path, layers, model, problems)


def _with_sections(layer: Mapping[str, Setting]) -> dict[str, Setting]:
    """`learning_rate` is `train.learning_rate`: a section may be left out where only one has such a key."""
    return {sectionless(key) or key: setting for key, setting in layer.items()}


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with some keys changed; `overrides` as in `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    problems: list[str] = []
    settings = {
        f"{section}.{name}" if section else name: Setting(value, "configuration")
        for section in ("", *SECTIONS)
        for name, value in (config if not section else getattr(config, section)).__dict__.items()
        if name not in SECTIONS
    }
    changed = _check(merge([settings, parse_overrides(overrides, problems)]), problems)
    if problems or changed is None:
        raise ConfigError(problem_list(f"The configuration has {counted(len(problems), 'problem')}:", problems))
    return changed
