"""What holds of an example of another tool, whatever the tool: it migrates with every key known, or says why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError
from lora_core.other_tools.translation import Translation


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def migrates(path: Path, expected: Mapping[str, Any]) -> Translation:
    """Every key is known, and these settings arrive: {section.key: value}."""
    translation = all_known(path)
    config = load_config(path).to_dict()
    assert {key: config[key.split(".")[0]][key.split(".")[1]] for key in expected} == expected
    return translation


def is_refused(path: Path, reason: str) -> None:
    """For this reason, a regular expression."""
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


def all_known(path: Path) -> Translation:
    """The file as it is read, without a key that is unknown."""
    translation = read_translation(path)
    assert translation is not None
    assert [reading.key for reading in translation.readings if reading.outcome == "unknown"] == []
    return translation
