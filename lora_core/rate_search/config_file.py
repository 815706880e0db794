"""A learning rate put into a configuration file, everything else of it as it was."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError
from lora_core.runtime.run_folder import write_text

KEY = "learning_rate"


def with_rate(text: str, rate: float) -> str:
    """The YAML text with `train.learning_rate` set; comments, order and all other keys stay.

    A value that is there is replaced; a section without the key gets it as its first; without a section, one is added
    at the end.
    """
    value = json.dumps(rate)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None or not isinstance(root, yaml.MappingNode):
        return f"{text.rstrip()}\ntrain:\n  {KEY}: {value}\n".lstrip()
    top = {key.value: node for key, node in root.value}
    train = top.get("train")
    inside = {key.value: node for key, node in train.value} if isinstance(train, yaml.MappingNode) else {}
    there = inside.get(KEY, top.get(KEY))
    if there is not None:
        return text[: there.start_mark.index] + value + text[there.end_mark.index :]
    if not isinstance(train, yaml.MappingNode):
        section = f"train: {{{KEY}: {value}}}\n"
        if train is None:
            return f"{text.rstrip()}\n{section}"
        return text[: train.start_mark.index].rstrip() + f" {{{KEY}: {value}}}" + text[train.end_mark.index :]
    at = train.start_mark.index
    if train.flow_style:
        return f"{text[: at + 1]}{KEY}: {value}{', ' if train.value else ''}{text[at + 1 :]}"
    indent = " " * train.start_mark.column
    return f"{text[:at]}{KEY}: {value}\n{indent}{text[at:]}"


def check_target(cfg: str, path: Path, target: Path) -> None:
    """Whether the rate can be written there: to the configuration's own file, or to a new one.

    Args:
        cfg: as `--cfg` has it; `path` is the file that it means.

    Raises:
        ConfigError: another file is there, or the configuration's own is another tool's.
    """
    is_own = target.exists() and target.samefile(path)
    if target.exists() and not is_own:
        raise ConfigError(f"--write {target}: exists, and would be lost; fix: another name, or the file of --cfg {cfg}")
    if is_own and (path.suffix != ".yaml" or read_translation(cfg) is not None):
        raise ConfigError(f"--write {target}: is another tool's file; fix: --write ours.yaml, a new file")
    if not target.parent.is_dir():
        raise ConfigError(f"--write {target}: no folder {target.parent}; fix: make it first, or another name")


def write_rate(config_yaml: str, path: Path, target: Path, rate: float) -> None:
    """Put the rate into the configuration's own file, or write the whole configuration with it to a new one.

    Args:
        config_yaml: the whole configuration, for a new file.
        path: the configuration's own file.

    Raises:
        ConfigError: the text does not load with the new rate; the file is then as it was.
    """
    is_own = target.exists() and target.samefile(path)
    before = target.read_text(encoding="utf-8") if is_own else None
    write_text(target, with_rate(config_yaml if before is None else before, rate))
    try:
        written = load_config(target).train.learning_rate
    except ConfigError:
        written = None
    if written != rate:
        if before is None:
            target.unlink()
        else:
            write_text(target, before)
        raise ConfigError(
            f"--write {target}: its train.learning_rate cannot be set here; fix: set it to {rate:g} by hand"
        )
