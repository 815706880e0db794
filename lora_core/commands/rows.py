"""`lora-core rows`: rows as the model sees them, with the loss tokens in colour."""

from __future__ import annotations

import itertools
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_core.commands.command_line import (
    Command,
    add_config_arguments,
    heavy_imports,
    load_config_of,
    quiet_libraries,
)
from lora_core.config.schema import RunConfig
from lora_core.errors import DataError, RowError, counted
from lora_core.untrusted.text import printable, showable

if TYPE_CHECKING:
    from lora_core.encoding.chat import ChatEncoder
    from lora_core.sources.places import Places


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="rows, as data.train_file takes them")
    add_config_arguments(parser, default="base")
    parser.add_argument(
        "--line", type=int, metavar="N", help="the row at this line (or of this number); else the first"
    )
    parser.add_argument("--num-rows", type=int, default=3, metavar="N", help="how many; 3 unless said, 1 with --line")


def _run(arguments: Namespace) -> None:
    train_file = f"data.train_file={json.dumps(arguments.file, ensure_ascii=False)}"
    config = load_config_of(arguments, train_file)
    with heavy_imports():
        quiet_libraries()
        from lora_core.encoding.chat import ChatEncoder
        from lora_core.model.base import load_tokenizer
        from lora_core.sources.files import as_jsonl

    encoder = ChatEncoder(load_tokenizer(config.model, config.data), config.data.train_on, config.data.mask_reasoning)
    places = as_jsonl(config.data.train_file, config.data.cache_dir, key="FILE", streaming=config.data.streaming)
    number = 1 if arguments.line is not None else max(1, arguments.num_rows)
    shown = list(itertools.islice(_rows(places, arguments.line), number))
    if not shown:
        at_line = (
            f" at line {arguments.line}; fix: leave out --line" if arguments.line is not None else "; blank lines only"
        )
        raise DataError(f"{arguments.file}: has no row{at_line}")
    for line, text in shown:
        print("\n".join(_describe(encoder, config, text, places, line)), end="\n\n")


def _rows(places: Places, wanted: int | None) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; only the wanted one, if there is one."""
    with places.path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip() and wanted in (None, line):
                yield line, raw.decode("utf-8-sig", errors="replace")


def _describe(encoder: ChatEncoder, config: RunConfig, text: str, places: Places, line: int) -> list[str]:
    """The row for the terminal: place and counts, what is not shown, and its text."""
    from lora_core.rows.messages import parse_json_row, shape_of

    place = places.place(line)
    try:
        conversation = parse_json_row(text, shape_of(config.data))
        encoded = encoder.encode_batch([conversation])[0]
        if isinstance(encoded, RowError):
            raise encoded
    except RowError as error:
        return [showable(f"{place}: {places.with_file(str(error), line)}")]
    limit = config.data.max_seq_length
    tokens = counted(len(encoded.input_ids), "token")
    counts = f"{place}: {tokens}, {counted(sum(encoded.loss_mask), 'loss token')}"
    if len(encoded.input_ids) > limit:
        counts += f"; longer than data.max_seq_length={limit}"
    left_out = [*conversation.unused_keys, *encoded.not_shown]
    lines = [showable(counts)]
    if left_out:
        lines.append(showable(f"not shown to the model: {', '.join(left_out)}"))
    return [*lines, _coloured(encoder.tokenizer, encoded.input_ids, encoded.loss_mask)]


def _coloured(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    """Loss tokens green, or between [[ and ]] where the output is no terminal."""
    from lora_core.encoding.chat import text_spans

    is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\x1b[32;1m", "\x1b[0m") if is_terminal else ("[[", "]]")
    pieces = []
    for decoded, is_loss in text_spans(tokenizer, ids, mask):
        # Control characters in training text must not reach the terminal.
        text = "\n".join(map(printable, decoded.split("\n")))
        pieces.append(f"{before}{text}{after}" if is_loss else text)
    return "".join(pieces)


COMMAND = Command("rows of a file as the model sees them: loss tokens in colour", _add_arguments, _run)
