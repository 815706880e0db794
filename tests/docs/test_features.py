"""docs/features.md: each feature has a way to get it and a test, or the reason why it is not offered."""

from __future__ import annotations

import re

import pytest

from lora_core.config.keys import config_keys
from tests.conftest import ROOT

LINES = (ROOT / "docs/features.md").read_text(encoding="utf-8").splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_feature_is_tested_or_said_not_to_be_offered(row: list[str]) -> None:
    feature, here, tested = row
    assert feature
    if here.startswith("not offered: "):
        assert not tested
        return
    paths = re.findall(r"`(tests/[\w/.]+)`", tested)
    assert paths or tested.startswith("by hand"), row
    assert all("\ndef test_" in (ROOT / path).read_text(encoding="utf-8") for path in paths)


def test_the_keys_that_are_named_exist() -> None:
    named = re.findall(r"`((?:model|lora|data|train)\.\w+)", "\n".join(LINES))
    assert named
    assert set(named) <= set(config_keys())
