"""Check: the mask is exact, on every row of the user's own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config.schema import DataConfig
from lora_core.data.counts import EncodedFile
from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.encoding.mask_reader import MaskReader, MaskReading
from lora_core.errors import DataError, counted
from lora_core.rows.messages import Conversation, parse_json_row, shape_of, up_to_reply
from lora_core.verification.table import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_masks(
    rows: str, source: str, data: EncodedFile, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None
) -> Check:
    """Every example, against its line in the file: its loss tokens are the replies, and all of each reply.

    Raises:
        DataError: the file has changed since it was encoded.
    """
    config = config or DataConfig()
    reader = MaskReader(tokenizer, config.train_on, config.mask_reasoning)
    encoder = ChatEncoder(tokenizer, config.train_on, config.mask_reasoning)
    cut = 0
    problems = []
    for row, line in _rows_with_lines(data.places.path, data):
        conversation = up_to_reply(parse_json_row(line, shape_of(config)), row["reply"])
        result, was_cut = _read_row(reader, encoder, conversation, row["input_ids"], row["loss_mask"])
        if result.problem is not None:
            problems.append(f"{data.places.listed([row['line']])}: {result.problem}")
            continue
        cut += was_cut
    exact = len(data.lengths) - len(problems) - cut
    measured = f"{exact:,} of {len(data.lengths):,} exact"
    if cut:
        measured += f", {cut:,} truncated to max_seq_length (exact up to there)"
    if data.counts.dropped:
        measured += f"; {counted(data.counts.dropped, 'row')} of the file dropped"
    if data.left_out:
        measured += f"; not shown to the model: {', '.join(data.left_out)}"
    problem = None
    if problems:
        more = f"; and {len(problems) - 5:,} more" if len(problems) > 5 else ""
        problem = f"{source}: {counted(len(problems), 'row')} failed: {'; '.join(problems[:5])}{more}"
    return Check.judged("mask", rows, "every row exact", measured, problem)


def _read_row(
    reader: MaskReader, encoder: ChatEncoder, conversation: Conversation, ids: list[int], mask: list[bool]
) -> tuple[MaskReading, bool]:
    """What the reader says, and whether the row was truncated; then it is read whole, and must be its beginning."""
    reading = reader.read(conversation, EncodedChat(ids, mask))
    if reading.problem is None:
        return reading, False
    whole = encoder.encode_batch([conversation])[0]
    if not isinstance(whole, EncodedChat) or len(whole.input_ids) <= len(ids):
        return reading, False
    if whole.input_ids[: len(ids)] != ids or [False, *whole.loss_mask[1 : len(ids)]] != mask:
        return reading, False
    return reader.read(conversation, whole), True


def _rows_with_lines(path: Path, data: EncodedFile) -> Iterator[tuple[dict[str, Any], str]]:
    """Each encoded row with the line that it came from; the file is read once, a line at a time."""
    rows: Iterator[dict[str, Any]] = iter(data.dataset)
    row = next(rows, None)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            while row is not None and number == row["line"]:
                yield row, raw.decode("utf-8-sig")
                row = next(rows, None)
    if row is not None:
        raise DataError(f"{path}: no longer has line {row['line']}: the file has changed; fix: start again")
