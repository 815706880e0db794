"""What a data file is, told by its first bytes; what is none is refused by its name, with a fix that can be pasted.

No fix writes to a file that exists, and all paths in commands are quoted for the shell.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from lora_core.errors import DataError
from lora_core.sources import not_rows
from lora_core.sources.json_object import TURN_KEYS, NotRead, one_object
from lora_core.sources.json_stream import MAX_VALUE_CHARACTERS, JsonProblem, JsonStream
from lora_core.sources.not_rows import new_path, shell_path

Name = Literal[
    "JSONL",
    "a JSON list",
    "a JSON object",
    "JSON objects",
    "JSON objects on one line",
    "CSV",
    "TSV",
    "Parquet",
    "Arrow",
    "Arrow stream",
]
# Names of files that a folder's rows are in, before and after the ending of a compression.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
_COMPRESSIONS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"\xfd7zXZ": "xz", b"BZh": "bz2"}
_TOOLS = {"gz": "gzip", "zst": "zstd", "xz": "xz", "bz2": "bzip2"}
_HEAD_BYTES = 1 << 16
_COLUMNS = {
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "response",
    "question",
    "answer",
}
_CHATS = {"messages", "conversations"}


@dataclass(frozen=True)
class Kind:
    """What a file is, and how its rows are found in it."""

    name: Name
    compression: str | None = None
    """gz, zst, xz or bz2."""
    key: str = ""
    """Of a JSON object: where its rows are."""
    beside: str = ""
    """Of a JSON object: its other keys, which are not read."""
    delimiter: str = ""
    """Of CSV and TSV: what separates cells."""

    @property
    def unit(self) -> Literal["line", "row"]:
        """What places in it count."""
        return "line" if self.name in ("JSONL", "JSON objects") else "row"

    def __str__(self) -> str:
        beside = f"; not read: {self.beside}" if self.beside else ""
        text = f"{self.name} (its key {self.key!r}{beside})" if self.key else str(self.name)
        return f"{text}, {self.compression}" if self.compression else text


def kind_of(path: Path, shown: str) -> Kind:
    """Look into a file.

    Args:
        shown: what messages call it.

    Raises:
        DataError: it holds no rows that can be read: says what it is, and the fix.
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read, or is damaged.
    """
    with path.open("rb") as file:
        raw_head = file.read(_HEAD_BYTES)
    if not raw_head:
        raise DataError(
            f"{shown}: the file is empty; it must hold rows, such as one JSON object per line", "data_file_empty"
        )
    compression = next((name for magic, name in _COMPRESSIONS.items() if raw_head.startswith(magic)), None)
    head = raw_head
    if compression is not None:
        with open_file(path, compression, shown) as file:
            head = file.read(_HEAD_BYTES)
    binary = _binary_kind(head, compression)
    if binary is not None:
        if compression is not None:
            target = new_path(path, "." + binary.split()[0].lower())
            raise DataError(
                f"{shown}: {binary} inside {compression}, which cannot be read in parts; fix: "
                f"{_TOOLS[compression]} -dc {shell_path(path)} > {shell_path(target)}, and name that file",
                "data_kind_unknown",
            )
        return Kind(binary)
    refusal = not_rows.refusal(head, path)
    if refusal is not None:
        raise DataError(f"{shown}: {refusal}", "data_kind_unknown")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if text.startswith(b"["):
        with open_file(path, compression, shown) as file:
            first, second = _first_lines(file)
        return Kind("JSONL" if second and _is_chat(first) and _is_chat(second) else "a JSON list", compression)
    if text.startswith(b"{"):
        return _json_kind(path, compression, shown)
    table = _table_kind(text, path, compression)
    if table is None and ".jsonl" not in path.name.lower() and not _may_have_rows(text):
        raise DataError(f"{shown}: {not_rows.of_text(head, path)}", "data_kind_unknown")
    return table or Kind("JSONL", compression)


def open_file(path: Path, compression: str | None, shown: str) -> BinaryIO:
    """The file's bytes, decompressed while they are read.

    Raises:
        DataError: it is zst, and nothing that reads that is installed.
    """
    if compression == "gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == "bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == "xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression == "zst":
        return _open_zst(path, shown)
    return path.open("rb")


def damage_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged or compressed file may raise."""
    errors: list[type[Exception]] = [OSError, EOFError, zlib.error, lzma.LZMAError]
    for name in ("compression.zstd", "zstandard"):
        try:
            errors.append(importlib.import_module(name).ZstdError)
        except ModuleNotFoundError:
            continue
    return tuple(errors)


def _open_zst(path: Path, shown: str) -> BinaryIO:
    for name in ("compression.zstd", "zstandard"):  # Python 3.14's own; the package
        try:
            opener: Callable[..., BinaryIO] = importlib.import_module(name).open
        except ModuleNotFoundError:
            continue
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, opener(path, "rb"))))
    raise DataError(
        f"{shown}: compressed with zstd, which needs a package; fix: pip install zstandard", "data_kind_unknown"
    )


def _binary_kind(head: bytes, compression: str | None) -> Literal["Parquet", "Arrow", "Arrow stream"] | None:
    if head.startswith(b"PAR1"):
        return "Parquet"
    if head.startswith(b"ARROW1"):
        return "Arrow"
    # A stream has no magic number: a mark, the size of its schema, and that.
    return "Arrow stream" if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8 else None


def _json_kind(path: Path, compression: str | None, shown: str) -> Kind:
    """Of a text that begins with an object: lines, one object that holds the rows, or objects over several lines."""
    with open_file(path, compression, shown) as file:
        first, second = _first_lines(file)
    alone = _is_object(first)
    if not alone and _begins_with_objects(first):
        return Kind("JSON objects on one line", compression)
    if len(first) <= MAX_VALUE_CHARACTERS and (second if alone else not second):
        return Kind(
            "JSONL", compression
        )  # more lines follow a whole one; or a single line, broken, and reported as such
    try:
        with open_file(path, compression, shown) as file:
            stream = JsonStream(file, shown)
            found = one_object(stream)
            more_follows = stream.peek() != ""
    except JsonProblem:
        if _is_object(second) or len(first) > MAX_VALUE_CHARACTERS:
            return Kind("JSONL", compression)  # of which the first line is broken; each line is reported by itself
        if _is_printed(first) and compression is None:
            raise DataError(f"{shown}: {not_rows.of_printed_objects(path)}", "data_kind_unknown") from None
        raise
    if not more_follows:
        refusal = found.refusal()
        if refusal is not None:
            raise DataError(
                f"{shown}: {refusal.what}; fix: {_as_lines(path, compression, refusal)}", "data_kind_unknown"
            )
        if found.keys:
            return Kind("a JSON object", compression, key=found.keys[0], beside=found.beside)
    return Kind("JSONL" if alone else "JSON objects", compression)


def _as_lines(path: Path, compression: str | None, found: NotRead) -> str:
    """The command that writes the rows of one object as JSONL."""
    load = f"import json, sys; c = json.load(sys.stdin.buffer); [print(json.dumps(row)) for row in {found.rows}]"
    python = f'python -c "{load}"' + (f" {shlex.quote(found.argument)}" if found.argument else "")
    source, target = shell_path(path), shell_path(new_path(path, ".rows.jsonl"))
    if compression is not None:
        return f"{_TOOLS[compression]} -dc {source} | {python} > {target}, and name that file"
    return f"{python} < {source} > {target}, and name that file"


def _first_lines(file: BinaryIO) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, as far as a row may be long."""
    found: list[bytes] = []
    while len(found) < 2 and (line := file.readline(MAX_VALUE_CHARACTERS + 1)):
        if not line.removeprefix(b"\xef\xbb\xbf").isspace():
            found.append(line)
    return (*found, b"", b"")[0], (*found, b"", b"")[1]


def _json_of(line: bytes) -> Any:
    """The value of a whole line; None if it is none."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_int=str)
    except (ValueError, RecursionError):
        return None


def _is_object(line: bytes) -> bool:
    return isinstance(_json_of(line), dict)


def _is_printed(line: bytes) -> bool:
    """Whether the line is an object as Python prints it."""
    try:
        return isinstance(ast.literal_eval(line.decode("utf-8-sig").strip()), dict)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False


def _is_chat(line: bytes) -> bool:
    """Whether it is a whole list of turns, of pairs or of texts, without a key for it."""
    turns = _json_of(line)
    return isinstance(turns, list) and all(
        isinstance(turn, (str, list)) or (isinstance(turn, dict) and len(TURN_KEYS & set(turn)) >= 2) for turn in turns
    )


def _begins_with_objects(line: bytes) -> bool:
    """Whether two whole objects stand at the start of the line, with nothing but white space between."""
    try:
        text = line.decode("utf-8-sig").strip(" \t\r\n")
        decoder = json.JSONDecoder(parse_int=str)
        _, end = decoder.raw_decode(text)
        rest = text[end:].lstrip(" \t\r\n")
        return rest.startswith("{") and isinstance(decoder.raw_decode(rest)[0], dict)
    except (ValueError, RecursionError):
        return False


def _table_kind(text: bytes, path: Path, compression: str | None) -> Kind | None:
    """CSV or TSV: the file's name says so, or its first line names columns that rows have."""
    name = path.name.lower()
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    header = re.split(rb"[\r\n]", text, maxsplit=1)[0].decode("utf-8", errors="replace")
    separators = {",": "CSV", ";": "CSV", "\t": "TSV", "|": "CSV"}
    columns = {separator: next(csv.reader([header], delimiter=separator), []) for separator in separators}
    separator = max(separators, key=lambda each: len(columns[each]))
    if name.endswith(".tsv"):
        return Kind("TSV", compression, delimiter="\t")
    if name.endswith(".csv"):
        return Kind("CSV", compression, delimiter=separator)
    cells = {cell.strip() for cell in columns[separator]}
    if (cells & _CHATS and len(cells) > 1) or len(cells & _COLUMNS) > 1:
        return Kind(cast(Name, separators[separator]), compression, delimiter=separator)
    return None


def _may_have_rows(text: bytes) -> bool:
    """Whether one of the first lines is JSON or begins as an object; the others are reported line by line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][:5]
    return not lines or any(line.startswith((b"{", b"[")) or _json_of(line) is not None for line in lines)
