"""What became of every row of a file: read = kept + dropped, by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_core.errors import DataError, counted, problem_list

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one file: read = kept + dropped_bad + dropped_unsupervised."""

    read: int
    kept: int
    dropped_bad: int
    """Could not be read or encoded (only with on_bad_row=skip)."""
    dropped_unsupervised: int
    """Nothing to learn from is left, such as when the answer lies past max_seq_length."""
    truncated: int
    """Rows that were cut at max_seq_length; among the kept ones and the unsupervised ones."""
    truncated_tokens: int
    truncated_supervised_tokens: int
    tokens: int
    """In kept rows, after cutting."""
    supervised_tokens: int
    longest: int
    """Tokens of the longest row before cutting."""

    @property
    def dropped(self) -> int:
        return self.dropped_bad + self.dropped_unsupervised

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{counted(self.read, 'row')} read, {self.kept:,} kept"
        if self.dropped_bad:
            text += f", {self.dropped_bad:,} dropped as unreadable"
        if self.dropped_unsupervised:
            text += f", {self.dropped_unsupervised:,} dropped with nothing supervised"
        text += f"; {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        if self.truncated:
            text += (
                f"; {counted(self.truncated, 'row')} cut at the right, losing {self.truncated_tokens:,} tokens "
                f"({self.truncated_supervised_tokens:,} supervised)"
            )
        return text


@dataclass(frozen=True)
class RowFacts:
    """What is known of every row that was read, kept or not: arrays of (num_rows_read,)."""

    line: npt.NDArray[np.int64]
    """1-based line in the file."""
    length: npt.NDArray[np.int64]
    """Tokens before cutting; 0 for an unreadable row."""
    is_bad: npt.NDArray[np.bool_]
    is_unsupervised: npt.NDArray[np.bool_]
    lost_supervised: npt.NDArray[np.int64]
    """Supervised tokens past max_seq_length."""
    has_empty_reply: npt.NDArray[np.bool_]
    """An assistant turn without text and without tool calls."""
    holds_special_text: npt.NDArray[np.bool_]
    cut_at_border: npt.NDArray[np.bool_]
    has_doubled_bos: npt.NDArray[np.bool_]
    exact_key: npt.NDArray[np.int64]
    """Hash of the row's tokens before cutting."""
    text_key: npt.NDArray[np.int64]
    """Hash of the row's words: case, white space and punctuation left out."""

    def lines(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        """The line numbers of the chosen rows."""
        return [int(line) for line in self.line[chosen]]

    def select(self, rows: npt.NDArray[Any]) -> RowFacts:
        return RowFacts(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class EncodedFile:
    """The kept rows of a file, encoded."""

    dataset: Dataset
    """Columns input_ids (list of int32), loss_mask (list of bool), line (1-based line in the file)."""
    lengths: npt.NDArray[np.int64]
    """(num_rows,) tokens of each row."""
    counts: RowCounts
    rows: RowFacts
    """Of all rows that were read."""


def account(
    path: Path, encoded: Dataset, problems: npt.NDArray[Any], on_bad_row: str, max_seq_length: int
) -> EncodedFile:
    columns = encoded.with_format("numpy")

    def column(name: str) -> npt.NDArray[Any]:
        return np.asarray(columns[name][:])

    bad = problems != ""
    supervised, truncated = column("num_supervised"), column("truncated_tokens")
    rows = RowFacts(
        line=column("line"),
        length=list_lengths(encoded) + truncated,
        is_bad=bad,
        is_unsupervised=~bad & (supervised == 0),
        lost_supervised=column("truncated_supervised"),
        has_empty_reply=column("has_empty_reply"),
        holds_special_text=column("holds_special_text"),
        cut_at_border=column("cut_at_border"),
        has_doubled_bos=column("has_doubled_bos"),
        exact_key=column("exact_key"),
        text_key=column("text_key"),
    )
    if bad.any() and on_bad_row == "error":
        listed = [f"{path}:{line}: {problem}" for line, problem in zip(rows.line[bad], problems[bad], strict=True)]
        title = f"{path}: {counted(len(listed), 'row')} of {len(bad):,} cannot be used:"
        raise DataError(
            problem_list(title, listed) + "\nFix them, or drop and count them with data.on_bad_row=skip",
            "rows_unreadable",
        )
    kept = ~bad & ~rows.is_unsupervised
    dataset = encoded.select(np.flatnonzero(kept)) if not kept.all() else encoded
    lengths = list_lengths(dataset)
    counts = RowCounts(
        read=len(bad),
        kept=int(kept.sum()),
        dropped_bad=int(bad.sum()),
        dropped_unsupervised=int(rows.is_unsupervised.sum()),
        truncated=int((truncated > 0).sum()),
        truncated_tokens=int(truncated.sum()),
        truncated_supervised_tokens=int(rows.lost_supervised.sum()),
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised[kept].sum()),
        longest=int(rows.length.max()),
    )
    if counts.kept == 0:
        raise DataError(
            f"{path}: no row is left to train on ({counts}); max_seq_length is {max_seq_length}"
            + ("; fix: a larger data.max_seq_length" if counts.truncated_supervised_tokens else ""),
            "no_rows_left",
        )
    return EncodedFile(dataset.select_columns(["input_ids", "loss_mask", "line"]), lengths, counts, rows)


def list_lengths(dataset: Dataset) -> npt.NDArray[np.int64]:
    """(num_rows,) tokens of each row, read from Arrow's list offsets without touching the tokens."""
    import pyarrow.compute as pc

    lengths: Iterable[Any] = (
        pc.list_value_length(batch.column("input_ids"))
        for batch in dataset.with_format("arrow").iter(batch_size=10_000)
    )
    return np.concatenate(
        [np.asarray(chunk.to_numpy(), dtype=np.int64) for chunk in lengths] or [np.zeros(0, np.int64)]
    )
