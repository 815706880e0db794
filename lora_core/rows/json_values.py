"""JSON from outside, read strictly, and the few checks that every text of a row goes through."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora_core.errors import RowError
from lora_core.untrusted.text import quoted

# Tools and arguments may be nested this deep. Schemas need ten levels; templates and Arrow walk them by recursion.
_MAX_DEPTH = 50


def read_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and duplicate keys are refused.

    Raises:
        ValueError: says what is wrong.
        RecursionError: nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number, object_pairs_hook=_unique_keys)


def read_json_values(text: str) -> list[Any]:
    """Strict JSON values one after another, with white space between.

    Raises:
        ValueError, RecursionError: as `read_json`.
    """
    decoder = json.JSONDecoder(
        parse_constant=_refuse_constant, parse_float=_finite_number, object_pairs_hook=_unique_keys
    )
    values, rest = [], text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip()
    return values


def from_json(value: Any, what: str) -> Any:
    """The value; read first if it is a string: from JSON, or as Python and pandas print it into a cell of CSV.

    Raises:
        RowError: a string that is neither; `what` says what it should have been.
    """
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except (ValueError, RecursionError) as error:
        printed = _as_python_prints(value)
        if printed is not None:
            return printed
        reason = json_reason(error) if isinstance(error, ValueError) else error
        raise RowError(f"{what} is not valid JSON: {reason}") from error


def _as_python_prints(text: str) -> Any:
    """The list or object that `print` wrote; None for any other text, and where two readings are possible.

    NumPy, and so pandas, prints no commas: between objects on lines of their own they are put back, since no string
    that Python prints has a line break. Strings without a comma between would become one, and are not read.
    """
    with_commas = re.sub(r"\}\s*\n\s*\{", "}, {", text.strip())
    try:
        tree = ast.parse(with_commas, mode="eval")
        value = ast.literal_eval(tree)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(with_commas).readline)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    objects = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    has_key_twice = any(len(ast.literal_eval(node)) < len(node.keys) for node in objects)
    is_joined = (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)
    is_read = isinstance(value, (list, dict)) and not has_key_twice and not is_joined
    return json.loads(json.dumps(value)) if is_read and _has_json_form(value) else None  # tuples are lists there


def _has_json_form(value: Any) -> bool:
    """Whether JSON can hold all of what Python printed: no sets, no bytes, no keys of other types."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _has_json_form(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_has_json_form, value))
    return value is None or isinstance(value, (str, bool, int, float))


def json_reason(error: ValueError) -> str:
    """What is wrong with a JSON text, at which of its characters, and the fix where it is a usual mistake."""
    if not isinstance(error, json.JSONDecodeError):
        is_long_number = "integer string conversion" in str(error)
        return (
            "a number of thousands of digits; fix: put it in quotes, or leave it out" if is_long_number else str(error)
        )
    found = error.doc[error.pos : error.pos + 1]
    fix = ""
    if error.msg == "Extra data":
        fix = "; fix: one object a line, and no commas between" if found in ("{", ",") else ""
    elif found in ("'", "T", "F") or (error.doc[error.pos : error.pos + 4] == "None"):
        fix = "; this is how Python prints a value; fix: write it with json.dumps"
    elif error.msg.startswith("Invalid control character"):
        fix = "; fix: \\n or \\t in its place"
    return f"{error.msg.removesuffix(' at')} (at character {error.pos + 1}){fix}"


def as_number(value: Any) -> Any:
    """The number that a text holds; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def checked_text(value: Any, what: str) -> str:
    """The value, if it is a string of valid Unicode.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be a string, not {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{what} holds half of a surrogate pair at character {error.start}: not valid Unicode"
        ) from error
    return value


def check_plain(value: Any, what: str, depth: int = 1) -> None:
    """Refuse what templates, tokenizers and JSON cannot take, at any depth of a nested value.

    Raises:
        RowError: names what it is.
    """
    if depth > _MAX_DEPTH:
        raise RowError(f"{what}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        checked_text(value, what)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            checked_text(key, f"{what}: a key")
            check_plain(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, what, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{what}: {value} is not a number in JSON")
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise RowError(f"{what} must hold JSON values only, not {kind(value)}")


def is_empty(value: Any) -> bool:
    """Nothing is said by it: null, an empty string, list or object."""
    return value is None or value == "" or value == [] or value == {}


_NO_TEXT = frozenset({"", "nan", "NaN", "None", "null", "NULL", "<NA>", "<noinput>"})
"""How pandas, Python and others write into a cell that there is no text in it."""
_NO_VALUE = _NO_TEXT | {"none", "[]", "{}"}
"""The same for a value: as a text, the others may be what a question is about."""


def says_nothing(value: Any) -> bool:
    """Nothing is said by it, or by what stands in its cell."""
    return is_empty(value) or (isinstance(value, str) and value.strip() in _NO_VALUE)


def is_missing(value: Any) -> bool:
    """A text that only says that there is none."""
    return isinstance(value, str) and value.strip() in _NO_TEXT


def fix_for_text(value: Any) -> str:
    """How a value that must be a text is written as one."""
    if isinstance(value, bool):
        return '; fix: in quotes what the model has to say, such as "yes"'
    if isinstance(value, (int, float)):
        return "; fix: numbers in quotes"
    return "; fix: the text itself, such as json.dumps makes of it" if isinstance(value, (list, Mapping)) else ""


def strings(value: Any) -> Iterable[str]:
    """Every string in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def key_names(value: Mapping[str, Any]) -> str:
    """The first ten keys of an object, for a message."""
    more = f" and {len(value) - 10:,} more" if len(value) > 10 else ""
    return (", ".join(quoted(key) for key in list(value)[:10]) or "(none)") + more


def kind(value: Any) -> str:
    """`a list`, `null`: what a value is, for a message."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a bool",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; fix: null in its place")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{quoted(text)} is too large for a float")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {quoted(twice)} in one object")
    return row
