"""The pages that are tested: README.md and docs/*.md, in sections and code blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    place: str
    """Page and line, as `docs/api.md:8`."""
    language: str
    text: str


def code_blocks() -> list[Block]:
    """Every fenced block of every page."""
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            blocks.append(Block(f"{page.relative_to(ROOT)}:{line}", match[1], match[2]))
    return blocks


def sections(text: str) -> list[tuple[str, str]]:
    """`(heading, text below it)` of a page, code blocks left out."""
    parts = re.split(r"^#+ (.*)$", _FENCE.sub("", text), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))
