"""Every key in words: for `--help`, docs and errors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml
from pydantic import BaseModel

from lora_core.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PreflightConfig,
    RunConfig,
    Section,
    TrainConfig,
)

SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "preflight": PreflightConfig,
}


@lru_cache(maxsize=1)
def config_keys() -> dict[str, str]:
    """Every dotted key with what it allows, its default and its meaning, in order."""
    keys = {}
    sections: dict[str, type[BaseModel]] = {**SECTIONS, "": RunConfig}
    for section, fields in sections.items():
        schema = fields.model_json_schema()["properties"]
        for name, field in fields.model_fields.items():
            if not section and name in SECTIONS:
                continue
            default = yaml.safe_dump(field.get_default(), default_flow_style=True, width=1000).split("\n")[0]
            keys[f"{section}.{name}" if section else name] = (
                f"{_allowed(schema[name])}, default {default}: {field.description}"
            )
    return keys


@lru_cache(maxsize=1)
def dict_keys() -> frozenset[str]:
    """The keys whose value is a dict; every other mapping in a file is a section."""
    return frozenset(key for key, text in config_keys().items() if text.startswith("a dict,"))


_KINDS = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "null"}


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words: `a float in (0, 1]`, `an int >= 1 or null`, `one of a|b`, `a list of str`."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {'|'.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "object":
        return "a dict"
    if schema["type"] == "array":
        items = schema["items"].get("anyOf", [schema["items"]])
        return f"a list of {' or '.join(_KINDS[item['type']] if 'type' in item else 'mapping' for item in items)}"
    kind = _KINDS[schema["type"]]
    with_article = kind if kind == "null" else f"{'an' if kind == 'int' else 'a'} {kind}"
    return f"{with_article} {_interval(schema)}".strip()


def _interval(schema: Mapping[str, Any]) -> str:
    """The limits of a number: `>= 1` with one end, `in (0, 1]` with two."""
    limits = [
        (sign, bracket, schema[key])
        for key, sign, bracket in (
            ("minimum", ">=", "["),
            ("exclusiveMinimum", ">", "("),
            ("maximum", "<=", "]"),
            ("exclusiveMaximum", "<", ")"),
        )
        if key in schema
    ]
    if len(limits) == 2:
        (_, opening, low), (_, closing, high) = limits
        return f"in {opening}{low:g}, {high:g}{closing}"
    return "".join(f"{sign} {limit:g}" for sign, _, limit in limits)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors that complete and check YAML: `configs/schema.json`."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lora_core configuration"
    extends = {"type": "string", "description": "a file beside this one, or a shipped configuration, such as qwen7b"}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return schema
