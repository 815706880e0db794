"""Every figure that a page quotes has a line in docs/claims.md.

A figure is a number with a unit, a decimal fraction, a power of ten, `N of M`, or any number in a table's column whose
heading names a unit. `Code`, names of versions and targets of links hold none. Each figure of a section must be in a
claim that the section links to (`claims.md#ID`): in the claim's list, or in the log that the claim names, which is a
page of docs or the `table` of a JSON file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import PAGES, sections

_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
_UNIT = r"(?:%|(?:GiB|MiB|GB|MB|KB|bytes|tokens/s|rows/s|ms|s|minutes?|hours?|times)(?![\w/]))"
_START = r"(?<![\w.,])"
_FIGURE = re.compile(
    rf"{_START}(?:({_NUMBER})\s?{_UNIT}|(\d[\d,]*(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+))(?!\w)|(\d+ of \d+)\b)"
)
_VERSION = re.compile(r"\b(?:Python|TRL|torch|Qwen|Apache-)\s?\d[\w.-]*|version \d[\d.]*")
_CLAIM = re.compile(r'^\| <a id="([\w-]+)"></a>([\w-]+) \|(.*)\|(.*)\|(.*)\|(.*)\|(.*)\|$', re.MULTILINE)
# Claims.md has one line for all figures of each of these.
GENERATED = {"preflight.md", "memory.md", "keys.md"}


def figures(text: str) -> set[str]:
    """The figures of a text, as it writes them, units left out."""
    text = re.sub(r"`[^`]*`|<[^>]*>|\]\([^)]*\)", " ", text)
    text = _VERSION.sub(" ", text)
    found = {next(filter(None, match.groups())) for match in _FIGURE.finditer(text)}
    units: list[bool] = []
    for line in text.splitlines():
        cells = line.split("|")[1:-1]
        if not cells:
            units = []
        elif not units:
            units = [re.search(rf"(?<!\w){_UNIT}", cell) is not None for cell in cells]
        else:
            for cell, has_unit in zip(cells, units, strict=True):
                found |= set(re.findall(rf"{_START}{_NUMBER}(?!\w)", cell)) if has_unit else set()
    return found


def numbers(text: str) -> set[str]:
    return set(re.findall(_NUMBER, text)) | set(re.findall(r"\d+ of \d+\b", text))


def claims() -> dict[str, set[str]]:
    """What each claim covers."""
    covered: dict[str, set[str]] = {}
    for anchor, name, listed, command, commit, hardware, log in _CLAIM.findall(
        (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    ):
        assert anchor == name, f"the anchor of {name} is {anchor}"
        assert name not in covered, f"{name} is there twice"
        assert re.fullmatch(r"[0-9a-f]{7}|any", commit.strip()), f"{name}: no commit"
        assert command.strip(), f"{name}: no command"
        assert hardware.strip(), f"{name}: no hardware"
        covered[name] = numbers(listed)
        file = re.fullmatch(r"`([\w./]+)`", log.strip())
        if file is None:
            continue
        content = (ROOT / file[1]).read_text(encoding="utf-8")
        if file[1].endswith(".json"):
            covered[name] |= numbers(json.loads(content).get("table", ""))
        elif file[1].endswith(".md"):
            covered[name] |= numbers(content)
    return covered


def linked_claims(text: str) -> set[str]:
    """The claims that a text links to, from any page."""
    return set(re.findall(r"\]\((?:docs/)?(?:claims\.md)?#([\w-]+)\)", text)) & set(claims())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_has_a_claim(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name in GENERATED:
        assert "`python docs/write.py" in text, f"{page.name} does not say that it is generated"
        return
    known = claims()
    for heading, body in sections(text):
        if page.name == "claims.md" and heading == "Claims":
            continue  # the list itself
        covered = {figure for name in linked_claims(body) for figure in known[name]}
        missing = figures(body) - covered
        assert not missing, f"{page.name}, {heading}: {sorted(missing)} in no claim that the section links to"


def test_every_claim_is_there_and_is_quoted() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    linked = {name for page in pages for name in re.findall(r"claims\.md#([\w-]+)", page)}
    assert linked <= set(claims())
    assert set(claims()) == {name for page in pages for name in linked_claims(page)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.7 times in 0.43 of it", {"6.7", "0.43"}),
        ("loss 3.42 -> 2.36 (-31.0%)", {"3.42", "2.36", "31.0"}),
        ("18 s, 78 of 78, 1e-05, 1,200 tokens/s", {"18", "78 of 78", "1e-05", "1,200"}),
        ("Qwen2.5-0.5B, 7B, TRL 1.16, `3.5 s`, 8 steps, [a](b-0.5.md)", set()),
        ("| a | peak, GiB |\n|---|---|\n| 5 | 12 (3 to 4) |", {"12", "3", "4"}),
    ],
)
def test_what_a_figure_is(text: str, expected: set[str]) -> None:
    assert figures(text) == expected
