"""Where a row stands in the user's own file, whatever file is read in its place; and the files that are.

All rows are read from one JSONL. It is the user's own where that is one plain JSONL. Otherwise `sources` writes it, and
its lines mirror those of the user's files: row N of a Parquet file is N lines after that file's first, and so is line N
of a pretty-printed one, with blank lines between. So a short table of parts turns each line into its place:

    line of the JSONL    1 ... 40        41 ... 47          48 ... 54
    part                 chats.csv       more.jsonl.gz      more.jsonl.gz, once more (a weight of 2)
    place of line 42                     more.jsonl.gz:2
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from lora_core.errors import lines_of

_MOST_SHOWN = 10


@dataclass(frozen=True)
class Part:
    """Lines of the JSONL that come from one file."""

    first_line: int
    """1-based, in the JSONL."""
    source: str
    """The user's file, as messages name it."""
    unit: Literal["line", "row"]
    """What its places count: lines, or rows where the format has no lines."""
    is_repeat: bool = False
    """These rows are taken once more, for their weight."""


@dataclass(frozen=True)
class Places:
    """The JSONL that is read, and the places of its rows in the user's files."""

    path: Path
    parts: tuple[Part, ...]
    """Ordered by first_line, which is 1 in the first."""
    notes: tuple[str, ...] = ()
    """What was read and how, a line each; none for one plain JSONL."""

    @classmethod
    def of_file(cls, path: Path) -> Places:
        """Of one plain JSONL: each line is its own place."""
        return cls(path, (Part(1, str(path), "line"),))

    def place(self, line: int) -> str:
        """`rows.jsonl:4`, `rows.parquet:row 4`.

        Args:
            line: 1-based, in the JSONL.
        """
        part, number = self._find(line)
        return f"{part.source}:{number}" if part.unit == "line" else f"{part.source}:row {number}"

    def with_file(self, problem: str, line: int) -> str:
        """A problem of this line, with its commands for the file that the line is from, where that is a file here."""
        source = self._find(line)[0].source
        if not Path(source).is_file():
            return problem
        name = shlex.quote(source)
        return problem.replace(" convert FILE ", f" convert {name} ").replace(" < FILE ", f" < {name} ")

    def mark(self, line: int) -> int | str:
        """The line itself where there is one file of lines; else its place."""
        return line if self._is_one_file_of_lines() else self.place(line)

    def listed(self, lines: Sequence[int]) -> str:
        """`line 4`, `rows 4, 71`; with several files `a.jsonl line 4; b.csv rows 2, 3`. Past 10 only how many more."""
        if len(self.parts) == 1:
            return lines_of(lines, self.parts[0].unit)
        found = [self._find(line) for line in lines[:_MOST_SHOWN]]
        shown = "; ".join(
            f"{part.source} {lines_of([number for _, number in group], part.unit)}"
            for part, group in groupby(found, key=lambda pair: pair[0])
        )
        return shown + (f"; ... and {len(lines) - _MOST_SHOWN:,} more" if len(lines) > _MOST_SHOWN else "")

    def between(self, first: int, last: int) -> str:
        """`rows.jsonl, in lines 4 to 71`."""
        if self._is_one_file_of_lines():
            return f"{self.parts[0].source}, in lines {first} to {last}"
        return f"{self.place(first)} to {self.place(last)}"

    def repeats(self, lines: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these lines hold a row that is taken once more for its weight: the same shape."""
        part = np.searchsorted([part.first_line for part in self.parts], lines, side="right") - 1
        return np.array([part.is_repeat for part in self.parts])[part]

    def save(self, path: Path) -> None:
        """As JSON, for `load`. The file is whole or absent."""
        size = self.path.stat().st_size
        values = {"size": size, "parts": [asdict(part) for part in self.parts], "notes": self.notes}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, table: Path, path: Path) -> Places | None:
        """What `save` wrote; None if there is none, or it is not of this JSONL."""
        try:
            values = json.loads(table.read_text(encoding="utf-8"))
            if path.stat().st_size != values["size"]:
                return None
            return cls(path, tuple(Part(**part) for part in values["parts"]), tuple(values["notes"]))
        except (OSError, ValueError, KeyError, TypeError):  # written anew; a folder that cannot be used is named then
            return None

    def _find(self, line: int) -> tuple[Part, int]:
        part = self.parts[bisect_right(self.parts, line, key=lambda part: part.first_line) - 1]
        return part, line - part.first_line + 1

    def _is_one_file_of_lines(self) -> bool:
        return len(self.parts) == 1 and self.parts[0].unit == "line"


class NewRows:
    """A JSONL that is being written, under a temporary name."""

    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._file = temporary.open("wb")
        self._digest = hashlib.sha256()

    def write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._digest.update(lines)

    def hash(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()[:32]

    def keep_as(self, path: Path) -> Path:
        """It is whole: give it its name."""
        self._file.close()
        return self._temporary.replace(path)

    def discard(self) -> None:
        """Remove it, unless it has its name."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def new_rows(folder: Path, name: str) -> Iterator[NewRows]:
    """A JSONL to write in `folder`; nothing is left of it unless `keep_as` was called."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = NewRows(folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield rows
    finally:
        rows.discard()
