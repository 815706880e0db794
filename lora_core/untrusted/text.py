"""Text that may be shown or kept: secrets left out, control characters escaped.

Rows, templates, model repositories and command lines hold text that nobody has looked at. Before it reaches a terminal,
an error or a file of the run folder it goes through here.
"""

from __future__ import annotations

import html
import json
import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import quote

SECRET = "[secret]"
_SECRET_NAME = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
# A shorter value is likely a word that stands in other texts too.
_SHORTEST_SECRET = 8
_TOKEN_SHAPES = (
    r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",  # OpenAI and others
    r"\bgh[opsur]_[A-Za-z0-9]{16,}",  # GitHub
    r"\bgithub_pat_[A-Za-z0-9_]{20,}",
    r"(?<=://)[^\s/@'\":]+:[^\s/@'\"]+(?=@)",  # https://user:password@host
)


def without_secrets(text: str) -> str:
    """`[secret]` in place of what must not be shown: values of environment variables whose names end in TOKEN, KEY,
    SECRET or PASSWORD (of 8 characters or more), and what has the shape of a token."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return _secrets(frozenset(value for value in values if len(value) >= _SHORTEST_SECRET)).sub(SECRET, text)


@lru_cache(maxsize=8)
def _secrets(values: frozenset[str]) -> re.Pattern[str]:
    # As they stand, and as JSON, HTML and URLs write them.
    forms = {form for value in values for form in (value, json.dumps(value)[1:-1], html.escape(value), quote(value))}
    return re.compile("|".join([*map(re.escape, sorted(forms, key=len, reverse=True)), *_TOKEN_SHAPES]))


def values_without_secrets(value: Any) -> Any:
    """`without_secrets` on every text in nested dicts, lists and tuples; keys are left alone."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: values_without_secrets(item) for key, item in value.items()}
    return [values_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value


def printable(text: str) -> str:
    """One line, control characters shown as escapes: untrusted text must not steer the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def showable(text: str) -> str:
    """For a terminal: no secrets, and no control characters but the line breaks."""
    return "\n".join(map(printable, without_secrets(text).split("\n")))


def quoted(value: Any, limit: int = 80) -> str:
    """`repr`, cut after so many characters: a wrong value may be megabytes long."""
    if isinstance(value, str):
        value = value[: limit + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit + 2 else f"{text[:limit]}..."
