"""The rows of a data file, one JSON text each, in flat memory: batches of some hundred at a time."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_core.errors import DataError
from lora_core.sources.json_stream import JsonStream, on_one_line
from lora_core.sources.kinds import Kind, damage_errors, open_file
from lora_core.sources.not_rows import new_path, shell_path
from lora_core.untrusted.text import quoted

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_BATCH_ROWS = 500
# A longer line of a compressed file is no row: it is not read as a whole.
_MAX_LINE_BYTES = 100_000_000
_MAX_CELL_CHARACTERS = 10_000_000

Row = tuple[int, bytes]
"""1-based line or row in the user's file, and the row's JSON without line breaks."""


def read_rows(path: Path, kind: Kind, shown: str) -> Iterator[Row]:
    """Every row of a file; lines of JSONL are passed on as they are, broken ones too.

    Args:
        shown: what messages call the file.

    Raises:
        DataError: the file cannot be read as what it is; names the line or row.
    """
    import pyarrow as pa

    try:
        if kind.name == "Parquet":
            yield from _parquet(path, shown)
        elif kind.name in ("Arrow", "Arrow stream"):
            yield from _arrow(path, kind, shown)
        else:
            with open_file(path, kind.compression, shown) as file:
                yield from _text_rows(file, kind, shown)
    except (*damage_errors(), pa.ArrowException, KeyError) as error:  # KeyError: an Arrow map with a key twice
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{shown}: cannot be read as {kind}: {reason[:300]}; fix: download or copy the file anew"
        ) from error


def dataset_rows(dataset: Dataset | IterableDataset, shown: str) -> Iterator[Row]:
    """Every row of a loaded dataset."""
    number = 0
    for batch in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            number += 1
            yield number, _as_json(row, f"{shown}:row {number}")


def _text_rows(file: BinaryIO, kind: Kind, shown: str) -> Iterator[Row]:
    if kind.name == "JSONL":
        yield from _lines(file, shown)
    elif kind.name == "JSON objects":
        yield from _objects(JsonStream(file, shown))
    elif kind.name == "JSON objects on one line":
        stream, number = JsonStream(file, shown), 0
        while stream.peek():
            number += 1
            yield number, _object(stream)
    elif kind.name == "a JSON list":
        stream = JsonStream(file, shown)
        yield from ((number, on_one_line(text)) for number, (_, text) in enumerate(stream.items(), start=1))
        if stream.peek():
            raise stream.problem("there is more after the list's end; fix: one list, or one JSON object per line")
    elif kind.name == "a JSON object":
        yield from _under_key(JsonStream(file, shown), kind.key)
    else:
        yield from _table(file, kind, shown)


def _lines(file: BinaryIO, shown: str) -> Iterator[Row]:
    number = 0
    while raw := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(raw) == _MAX_LINE_BYTES:
            raise DataError(f"{shown}:{number}: the line has {_MAX_LINE_BYTES:,} bytes or more; fix: split the row")
        if not raw.isspace():
            yield number, raw.rstrip(b"\r\n")


def _objects(stream: JsonStream) -> Iterator[Row]:
    last = 0
    while following := stream.peek():
        line = stream.line
        if line == last and following == "{":
            raise stream.problem("a second object in this line; fix: begin each object in a line of its own")
        yield line, _object(stream)
        last = line


def _object(stream: JsonStream) -> bytes:
    following = stream.peek()
    if following != "{":
        raise stream.problem(f"needs an object here, not {following!r}; fix: objects alone, no commas between")
    return on_one_line(stream.value())


def _under_key(stream: JsonStream, wanted: str) -> Iterator[Row]:
    stream.take("{")
    while True:
        key = json.loads(stream.value())
        stream.take(":")
        if key == wanted:
            yield from ((number, on_one_line(text)) for number, (_, text) in enumerate(stream.items(), start=1))
            return
        stream.value()
        stream.take(",")


def _table(file: BinaryIO, kind: Kind, shown: str) -> Iterator[Row]:
    """Cells stay text: what looks like a number or a date in a chat is one."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=kind.delimiter, strict=True)
    number = 0
    try:
        with _long_cells():
            # Excel writes spaces after commas; pandas gives its index no name.
            names = next(rows, [])
            names = next(rows, []) if names == ["sep=", ""] else names  # Excel's first line says what separates cells
            header = [name.strip() or f"column {place}" for place, name in enumerate(names, start=1)]
            _check_header(header, shown)
            for cells in rows:
                if not cells:  # a blank line
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{shown}:row {number}: has {len(cells)} cells, and the header {len(header)} (line "
                        f"{rows.line_num}); fix: put cells with {kind.delimiter!r} or line breaks in double quotes",
                        "data_not_table",
                    )
                yield number, json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False).encode()
    except csv.Error as error:
        raise DataError(
            f"{shown}:row {number + 1}: not valid {kind.name}: {error} (line {rows.line_num}); fix: a cell that holds "
            'double quotes stands in double quotes, and has each of them twice: "say ""hi"""',
            "data_not_table",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown}: not UTF-8 after row {number}; fix: save the file as CSV UTF-8 ({error.reason})", "data_not_table"
        ) from error


def _check_header(header: list[str], shown: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{shown}: the header names {quoted(twice[0])} more than once; fix: give each column its own name"
        )


@contextmanager
def _long_cells() -> Iterator[None]:
    """`csv` refuses cells of more than 131,072 characters; a chat may be one."""
    before = csv.field_size_limit(_MAX_CELL_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        _check_header(list(file.schema_arrow.names), shown)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, _as_json(row, f"{shown}:row {number}", path)


def _arrow(path: Path, kind: Kind, shown: str) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    with pa.memory_map(str(path)) as mapped:
        if kind.name == "Arrow":
            reader = pa.ipc.open_file(mapped)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(mapped)
            batches = iter(reader)
        _check_header(list(reader.schema.names), shown)
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(start, _BATCH_ROWS).to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield number, _as_json(row, f"{shown}:row {number}")


def _as_json(row: Mapping[str, Any], place: str, parquet: Path | None = None) -> bytes:
    """Without the columns that are null in this row: Arrow fills in what a row does not have."""
    parts = []
    for name, value in row.items():
        if value is None:
            continue
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
            parts.append(f"{json.dumps(name, ensure_ascii=False)}: {text}".encode())
        except (TypeError, ValueError, RecursionError) as error:
            what = "a number that is not finite" if _is_not_finite(value) else str(error)
            command = "" if parquet is None else f": {_without_column(parquet, name)}"
            raise DataError(
                f"{place}: the column {quoted(name)} holds {what}; fix: leave that column out of the file{command}"
            ) from error
    return b"{" + b", ".join(parts) + b"}"


def _without_column(path: Path, name: str) -> str:
    """The command that writes a Parquet file without a column."""
    target = shell_path(new_path(path, ".rows.parquet"))
    python = (
        "import sys, pyarrow.parquet as pq; "
        "pq.write_table(pq.read_table(sys.argv[1]).drop_columns(sys.argv[2]), sys.argv[3])"
    )
    return f'python -c "{python}" {shell_path(path)} {shlex.quote(name)} {target}, and name that file'


def _plain(value: Any) -> str:
    """What JSON has no type for, as text."""
    if isinstance(value, (datetime.date, datetime.time)):  # datetimes, and pandas' of nanoseconds, are dates
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__}, which JSON cannot hold")


def _is_not_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_not_finite, value.values()))
    if isinstance(value, list):
        return any(map(_is_not_finite, value))
    return isinstance(value, float) and not math.isfinite(value)
