"""One name for one thing: the words that docs/glossary.md retires are nowhere in messages, comments and docs."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

GLOSSARY = ROOT / "docs/glossary.md"
# CHANGELOG.md is history, and the glossary itself names the retired words.
PATHS = sorted(
    {
        *(ROOT / "lora_core").rglob("*.py"),
        *(ROOT / "lora_core").rglob("*.jinja"),
        *(ROOT / "launch").rglob("*.py"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    }
    - {GLOSSARY}
)


def retired_phrases() -> list[str]:
    """The last column of the glossary's table."""
    rows = [line.split("|") for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [phrase for row in rows[1:] for phrase in map(str.strip, row[3].split(",")) if phrase]


_ANY = "|".join(re.escape(phrase).replace("\\ ", r"\s+") for phrase in retired_phrases())
# Not inside a word, an identifier or a path, and not in quotes, where it is a name, such as 'conversations'.
RETIRED = re.compile(rf"(?<![\w'\"/.-])(?:{_ANY})(?![\w'\"/]|\.\w)", re.IGNORECASE)


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each string literal, without what f-strings fill in, and of each block of comments."""
    inside = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted":
            yield node.lineno, "".join(part.value for part in node.args[1:] if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            # A string that is a single word is a key or a name.
            yield node.lineno, node.value if " " in node.value else ""
    start, text, last = 0, "", -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield start, text
                start, text = token.start[0], ""
            text, last = f"{text}{token.string.lstrip('# ')}\n", token.start[0]
    yield start, text


def retired_in(text: str) -> Iterator[re.Match[str]]:
    return RETIRED.finditer(re.sub(r"`[^`\n]*`", lambda code: " " * len(code.group()), text))  # code is no prose


def retired_words(path: Path) -> list[str]:
    """`file:line: word` of each."""
    source = path.read_text(encoding="utf-8")
    found = []
    for line, text in prose_of_python(source) if path.suffix == ".py" else [(1, source)]:
        for match in retired_in(text):
            place = line + text.count("\n", 0, match.start())
            found.append(f"{path.relative_to(ROOT)}:{place}: {' '.join(match.group().split())}")
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_word(path: Path) -> None:
    assert retired_words(path) == []


def test_retired_words_are_found_in_strings_docstrings_and_comments_with_their_lines() -> None:
    source = (
        '"""One line.\n\nThe held-out\nloss.\n"""\n'
        "# is said\n# again\n"
        "conversation = f'{supervised} a whole '\\\n    f'number'\n"
        "row['conversations'], 'num_supervised', 'to `mend` it', counted(2, 'conversation')\n"
    )
    found = {match.group(): line for line, text in prose_of_python(source) for match in retired_in(text)}
    assert found == {"held-out": 1, "said\nagain": 6, "whole number": 8, "conversation": 10}
