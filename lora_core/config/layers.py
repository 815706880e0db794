"""Settings from YAML files and the command line, each with the place where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_core.config.keys import dict_keys
from lora_core.config.schema import DEFAULT_TRAIN_FILE
from lora_core.errors import ConfigError
from lora_core.untrusted.text import quoted


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str  # "configs/demo.yaml:7" or "command line"


# A configuration has some hundred lines; PyYAML reads a megabyte in about five seconds.
_MAX_CONFIG_BYTES = 1_000_000


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML's own rules read `5e-5` as a string because it has no dot.

    No aliases: ten lines of them can mean more values than fit in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "an alias (*name); write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """No setting is larger than 64 bits, and Python refuses to write out a number of thousands of digits."""
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 2**63:
            raise yaml.MarkedYAMLError(None, None, "an int of more than 64 bits", node.start_mark)
        return value


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_yaml_int)
# What PyYAML raises for values that are none, such as 2024-99-99 or !!bool maybe, besides its own errors.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _flatten(
    node: yaml.Node, file: str, loader: _YamlLoader, prefix: str, problems: list[str]
) -> Iterator[tuple[str, Setting]]:
    """Leaves of a YAML mapping as (dotted key, setting). Duplicate keys are problems, where PyYAML keeps the last."""
    assert isinstance(node, yaml.MappingNode)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        place = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{place}  a key must be a plain string")
            continue
        key = f"{prefix}{key_node.value}"
        if key in seen:
            problems.append(f"{place}  {key}: set twice in this file; keep one")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            inside = _flatten(value_node, file, loader, f"{key}.", problems)
            if key not in dict_keys():
                yield from inside
                continue
            list(inside)  # for its problems
        yield key, Setting(loader.construct_object(value_node, deep=True), place)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Setting]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: a configuration has at most {_MAX_CONFIG_BYTES:,} characters; is it another file?")
    loader = None
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold `key: value` lines, not a {node.tag.split(':')[-1]}")
        return dict(_flatten(node, str(path), loader, "", problems))
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_layers(
    path: Path, problems: list[str], shipped: Path, below: tuple[Path, ...] = ()
) -> list[dict[str, Setting]]:
    """The file's settings, after those of the file that it `extends`: one beside it, or a shipped configuration.

    Args:
        shipped: the folder of the shipped configurations.
        below: the files that extend this one.
    """
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(map(str, below))}")
    settings = _read_yaml(path, problems)
    parent = settings.pop("extends", None)
    if parent is None:
        return [settings]
    if not isinstance(parent.value, str):
        raise ConfigError(
            f"{parent.source}  extends = {quoted(parent.value)}: must be the name of a file beside this one, "
            "or of a shipped configuration, such as qwen7b"
        )
    parent_path = path.parent / parent.value
    # A configuration may come from somebody else: it must not name a file outside its own folder, not by a link either.
    if not parent_path.resolve().is_relative_to(path.parent.resolve()):
        raise ConfigError(
            f"{parent.source}  extends = {quoted(parent.value)}: must be in the folder of this file; fix: copy it there"
        )
    if not parent_path.is_file():
        parent_path = shipped / f"{parent.value.removesuffix('.yaml')}.yaml"
    if not parent_path.is_file():
        names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
        raise ConfigError(
            f"{parent.source}  extends = {quoted(parent.value)}: there is no such file beside this one, and no such "
            f"shipped configuration (there are: {names})"
        )
    return [*read_layers(parent_path, problems, shipped, (*below, path.resolve())), settings]


def parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, Setting]:
    layer: dict[str, Setting] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            spaces = ", without spaces around =" if "=" in overrides else ""
            problems.append(
                f"command line  {quoted(override)}: must be key=value{spaces}, such as train.num_train_epochs=3"
            )
            continue
        try:
            value = yaml.load(text, Loader=_YamlLoader)  # a SafeLoader: plain data only
        except _YAML_ERRORS:
            # Python keeps bytes that the locale's encoding lacks as halves of surrogate pairs.
            is_foreign = any("\udc80" <= character <= "\udcff" for character in text)
            why = "in this locale it is not UTF-8; fix: PYTHONUTF8=1 before the command" if is_foreign else ""
            problems.append(f"command line  {quoted(override)}: {why or 'the value is not valid YAML; quote it'}")
            continue
        if isinstance(value, dict) and key not in dict_keys():
            problems.append(f"command line  {quoted(override)}: set one key at a time, such as {key}.NAME=VALUE")
            continue
        if isinstance(value, dict) and any(":" in str(name) and item is None for name, item in value.items()):
            problems.append(f"command line  {quoted(override)}: needs a space after each colon, as in {{a: b}}")
            continue
        layer[key] = Setting(value, "command line")
    return layer


# A key that is set -> the one that it replaces, and what that becomes.
_EITHER_OR: dict[str, tuple[str, Any]] = {
    "train.warmup_steps": ("train.warmup_ratio", None),
    "train.warmup_ratio": ("train.warmup_steps", None),
    "train.fp16": ("train.bf16", False),
    "train.bf16": ("train.fp16", False),
    "data.train_files": ("data.train_file", DEFAULT_TRAIN_FILE),
    "data.train_file": ("data.train_files", []),
}


def _is_set(value: Any) -> bool:
    """Not null, false or an empty list; 0 is a number like any other."""
    return value is not None and value is not False and value != []


def merge(layers: Sequence[Mapping[str, Setting]]) -> dict[str, Setting]:
    """Later layers win. Either kind of warmup, precision or training files replaces the other from earlier layers."""
    merged: dict[str, Setting] = {"train.warmup_ratio": Setting(0.1, "default")}
    for layer in layers:
        for key, (other, unset) in _EITHER_OR.items():
            if key in layer and _is_set(layer[key].value) and other not in layer:
                merged[other] = Setting(unset, layer[key].source)
        merged.update(layer)
    return merged
