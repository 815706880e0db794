"""What became of every row of a file: read = trained + eval + dropped, by reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lora_core.errors import DataError, counted, problem_list
from lora_core.sources.places import Places

if TYPE_CHECKING:
    from datasets import Dataset


Truncation = Literal["right", "drop", "error"]
# Columns that hold a value a token; the others hold what is known of a row.
_TOKENS = ["input_ids", "loss_mask", "loss_weights"]


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one file: read = kept + dropped_bad + dropped_unsupervised + dropped_too_long.

    Of the whole file, also where a share of it is the eval set: kept = trained + eval.
    """

    read: int
    kept: int
    dropped_bad: int
    """Could not be read or encoded (only with on_bad_row=skip)."""
    dropped_unsupervised: int
    """No loss token is left, for example because the answer comes after max_seq_length."""
    truncated: int
    """Rows that were truncated to max_seq_length; kept ones, and dropped ones without loss tokens."""
    truncated_tokens: int
    truncated_supervised_tokens: int
    tokens: int
    """In kept rows, after truncation."""
    supervised_tokens: int
    longest: int
    """Tokens of the longest row before truncation."""
    num_rows: int = 0
    """Rows of the file, where several examples are made of one (data.split_turns); then `read` counts examples."""
    dropped_too_long: int = 0
    """Longer than max_seq_length (only with truncation=drop)."""
    eval: int = 0
    """Kept rows that were split off as the eval set (data.eval_fraction)."""
    eval_tokens: int = 0
    """Of `tokens`, those in the eval set."""
    eval_supervised_tokens: int = 0

    @property
    def dropped(self) -> int:
        return self.dropped_bad + self.dropped_unsupervised + self.dropped_too_long

    def to_dict(self) -> dict[str, int]:
        """With `trained`, where a share of the file is the eval set."""
        return asdict(self) | ({"trained": self.kept - self.eval} if self.eval else {})

    def __str__(self) -> str:
        """`100 rows read = 45 trained + 5 eval + 50 dropped without loss tokens; 1,900 tokens (1,800 + 100), ...`."""
        text = f"{counted(self.read, 'row')} read"
        if self.num_rows:
            text = f"{counted(self.num_rows, 'row')} read, split into {counted(self.read, 'example')}"
        text += f" = {self.kept - self.eval:,} trained + {self.eval:,} eval" if self.eval else f", {self.kept:,} kept"
        comma = " + " if self.eval else ", "
        if self.dropped_bad:
            text += f"{comma}{self.dropped_bad:,} dropped as unreadable"
        if self.dropped_unsupervised:
            text += f"{comma}{self.dropped_unsupervised:,} dropped without loss tokens"
        if self.dropped_too_long:
            text += f"{comma}{self.dropped_too_long:,} dropped as longer than max_seq_length"
        tokens = _and_parts(self.tokens, self.eval_tokens)
        text += (
            f"; {tokens} tokens, {_and_parts(self.supervised_tokens, self.eval_supervised_tokens)} of them loss tokens"
        )
        if self.truncated:
            text += (
                f"; {counted(self.truncated, 'row')} truncated, losing {counted(self.truncated_tokens, 'token')} "
                f"({counted(self.truncated_supervised_tokens, 'loss token')})"
            )
        return text


def _and_parts(whole: int, in_eval: int) -> str:
    """`1,900 (1,800 + 100)`: those trained on and those of the eval set."""
    return f"{whole:,} ({whole - in_eval:,} + {in_eval:,})" if in_eval else f"{whole:,}"


@dataclass(frozen=True)
class RowFacts:
    """What is known of every row that was read, kept or not: arrays of (num_rows_read,)."""

    line: npt.NDArray[np.int64]
    """1-based line in the JSONL that is read; `EncodedFile.places` knows the user's."""
    length: npt.NDArray[np.int64]
    """Tokens before truncation; 0 for an unreadable row."""
    is_bad: npt.NDArray[np.bool_]
    is_unsupervised: npt.NDArray[np.bool_]
    num_supervised: npt.NDArray[np.int64]
    """Loss tokens, after truncation."""
    lost_supervised: npt.NDArray[np.int64]
    """Loss tokens past max_seq_length."""
    has_empty_reply: npt.NDArray[np.bool_]
    """An assistant turn without text and without tool calls."""
    holds_special_text: npt.NDArray[np.bool_]
    cut_at_border: npt.NDArray[np.bool_]
    has_doubled_bos: npt.NDArray[np.bool_]
    has_system_turn: npt.NDArray[np.bool_]
    """Of its own; False for an unreadable row."""
    has_placeholder: npt.NDArray[np.bool_]
    """In a reply: {{name}}, [INSERT NAME]."""
    repeats_prompt: npt.NDArray[np.bool_]
    """A reply begins with the whole turn before it."""
    ends_unanswered: npt.NDArray[np.bool_]
    """The last turn is the user's."""
    changes_script: npt.NDArray[np.bool_]
    """A reply is in other letters than the turn before it."""
    has_tools: npt.NDArray[np.bool_]
    lists_tools_twice: npt.NDArray[np.bool_]
    """In a system text too."""
    wraps_answers: npt.NDArray[np.bool_]
    """A tool's answer stands in <tool_response>."""
    is_normalized: npt.NDArray[np.bool_]
    """The tokenizer changes letters of it before it encodes them."""
    sketch: npt.NDArray[np.int64]
    """(num_rows_read, 8) the smallest hashes of the row's sequences of words; 0 where it has fewer."""
    reply_start: npt.NDArray[np.int64]
    """Hash of the first four words of the first reply; 0 where it has fewer."""
    exact_key: npt.NDArray[np.int64]
    """Hash of the row's tokens before truncation."""
    text_key: npt.NDArray[np.int64]
    """Hash of the row's words: case, white space and punctuation left out."""
    is_repeat: npt.NDArray[np.bool_]
    """The row of an earlier line, taken once more because its file has a weight."""

    def lines(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        """The line numbers of the chosen rows."""
        return [int(line) for line in self.line[chosen]]


@dataclass(frozen=True)
class EncodedFile:
    """The kept rows of a file, encoded, or a part of them (data.eval_fraction)."""

    dataset: Dataset
    """Columns input_ids (list of int32), loss_mask (list of bool), loss_weights (list of float, empty where all are 1),
    line (1-based line in the JSONL that is read), reply (index of the message that alone is trained; -1 for all)."""
    lengths: npt.NDArray[np.int64]
    """(num_rows,) tokens of each row."""
    counts: RowCounts
    """Of the whole file."""
    rows: RowFacts
    """Of all rows that were read from the file, whichever became of them."""
    places: Places
    """The JSONL that is read, and where its rows are in the user's files."""
    indices: npt.NDArray[np.int64]
    """(num_rows,) where in `rows` each row of `dataset` is."""
    left_out: Mapping[str, list[int]] = field(default_factory=dict)
    """What the rows hold and no token says: a key of a row or of its parts -> the lines of the rows."""
    encoded_on: str = ""
    """The date on which the rows were encoded, as 2025-07-31."""

    @property
    def num_supervised(self) -> int:
        """Loss tokens in `dataset`."""
        return int(self.rows.num_supervised[self.indices].sum())

    @property
    def is_part(self) -> bool:
        """Whether some kept rows of the file are not here, but in the other set."""
        return len(self.indices) < self.counts.kept


def account(
    source: str,
    places: Places,
    encoded: Dataset,
    problems: npt.NDArray[Any],
    on_bad_row: str,
    max_seq_length: int,
    truncation: Truncation = "right",
) -> EncodedFile:
    """Sort the rows into those that are kept and those that are dropped, by reason.

    Raises:
        DataError: a row cannot be used, or is longer than may be, and the configuration says to stop; none is left.
    """
    # All at once: `datasets` copies the table's schema for every read.
    names = [name for name in encoded.column_names if name not in {*_TOKENS, "left_out", "problem"}]
    column = encoded.select_columns(names).with_format("numpy")[:]
    bad = problems != ""
    supervised, truncated = column["num_supervised"], column["truncated_tokens"]
    rows = RowFacts(
        line=column["line"],
        length=list_lengths(encoded) + truncated,
        is_bad=bad,
        is_unsupervised=~bad & (supervised == 0),
        num_supervised=supervised,
        lost_supervised=column["truncated_supervised"],
        has_empty_reply=column["has_empty_reply"],
        holds_special_text=column["holds_special_text"],
        cut_at_border=column["cut_at_border"],
        has_doubled_bos=column["has_doubled_bos"],
        has_system_turn=column["has_system_turn"],
        has_placeholder=column["has_placeholder"],
        repeats_prompt=column["repeats_prompt"],
        ends_unanswered=column["ends_unanswered"],
        changes_script=column["changes_script"],
        has_tools=column["has_tools"],
        lists_tools_twice=column["lists_tools_twice"],
        wraps_answers=column["wraps_answers"],
        is_normalized=column["is_normalized"],
        sketch=column["sketch"],
        reply_start=column["reply_start"],
        exact_key=column["exact_key"],
        text_key=column["text_key"],
        is_repeat=places.repeats(column["line"]),
    )
    if bad.any() and on_bad_row == "error":
        title = f"{source}: {int(bad.sum()):,} of {counted(len(bad), 'row')} cannot be used:"
        listed = _one_line_for_each_problem(places, rows.lines(bad), problems[bad])
        raise DataError(
            problem_list(title, listed) + "\nFix them, or drop and count them with data.on_bad_row=skip",
            "rows_unreadable",
        )
    is_long = ~bad & (truncated > 0)
    if is_long.any() and truncation == "error":
        raise DataError(
            f"{source}: {counted(int(is_long.sum()), 'row')} longer than data.max_seq_length={max_seq_length} "
            f"({places.listed(rows.lines(is_long))}); fix: data.max_seq_length={int(rows.length.max())}, or "
            "data.truncation=drop",
            "rows_truncated",
        )
    too_long = is_long & (truncation == "drop")
    rows = replace(rows, is_unsupervised=rows.is_unsupervised & ~too_long)
    truncated = np.where(too_long, 0, truncated)
    kept = ~bad & ~rows.is_unsupervised & ~too_long
    dataset = encoded.select(np.flatnonzero(kept)) if not kept.all() else encoded
    lengths = list_lengths(dataset)
    counts = RowCounts(
        read=len(bad),
        num_rows=0 if (column["reply"] < 0).all() else len(np.unique(rows.line)),
        kept=int(kept.sum()),
        dropped_bad=int(bad.sum()),
        dropped_unsupervised=int(rows.is_unsupervised.sum()),
        truncated=int((truncated > 0).sum()),
        truncated_tokens=int(truncated.sum()),
        truncated_supervised_tokens=int(rows.lost_supervised[~too_long].sum()),
        dropped_too_long=int(too_long.sum()),
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised[kept].sum()),
        longest=int(rows.length.max()),
    )
    if counts.kept == 0:
        raise DataError(
            f"{source}: no row is left to train on ({counts}); max_seq_length is {max_seq_length}"
            + ("; fix: a larger data.max_seq_length" if counts.truncated_supervised_tokens else ""),
            "no_rows_left",
        )
    columns_kept = dataset.select_columns([*_TOKENS, "line", "reply"])
    left_out = _lines_by_key(encoded, rows.line)
    return EncodedFile(columns_kept, lengths, counts, rows, places, np.flatnonzero(kept), left_out)


def _lines_by_key(encoded: Dataset, lines: npt.NDArray[np.int64]) -> dict[str, list[int]]:
    """The column left_out, lists of keys as JSON, by key: few different lists, whatever the number of rows."""
    column = encoded.data.column("left_out").combine_chunks().dictionary_encode()
    codes = np.asarray(column.indices)
    by_key: dict[str, list[int]] = {}
    for code, keys in enumerate(column.dictionary.to_pylist()):
        for key in json.loads(keys) if keys else []:
            by_key.setdefault(key, []).extend(lines[codes == code].tolist())
    return {key: sorted(by_key[key]) for key in sorted(by_key)}


def _one_line_for_each_problem(places: Places, lines: Sequence[int], problems: Sequence[str]) -> list[str]:
    """`rows.jsonl:4: PROBLEM`; for a problem of several rows their number and lines, at its first line."""
    lines_by_problem: dict[str, list[int]] = {}
    for line, problem in zip(lines, problems, strict=True):
        lines_by_problem.setdefault(problem, []).append(line)
    listed = []
    for problem, having in lines_by_problem.items():
        said = places.with_file(problem, having[0])
        said = said if len(having) == 1 else f"{len(having):,} rows: {said} ({places.listed(having)})"
        listed.append(f"{places.place(having[0])}: {said}")
    return listed


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
