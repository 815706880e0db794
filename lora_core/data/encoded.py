"""Rows of a chat file -> an encoded dataset on disk, memory-mapped, with every row accounted for.

Only byte offsets of the lines are kept in memory (16 bytes a row). Rows are read, encoded in batches over several
processes, and written to Arrow files in a folder whose name is a hash of all that decides their content: the file's
bytes, the tokenizer, the template, the length limit and this code. A second start reads those (cache.py).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_core.config.schema import RunConfig
from lora_core.data import row_text
from lora_core.data.cache import cache_folder, make_entry, naming_cache_folder, take_entry
from lora_core.data.counts import EncodedFile, Truncation, account
from lora_core.data.split import hold_out
from lora_core.encoding.chat import ChatEncoder, EncodedChat
from lora_core.errors import ConfigError, DataError, RowError
from lora_core.rows.messages import Conversation, RowShape, TrainOn, one_for_each_reply, parse_json_row, shape_of
from lora_core.sources.files import as_jsonl
from lora_core.sources.places import Places
from lora_core.untrusted.limits import allowed_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Forking and joining worker processes costs more than encoding a few thousand rows, which one process does with the
# tokenizer's own threads.
_ROWS_WORTH_A_PROCESS = 2_500
# A row this long has some million tokens, of which max_seq_length are kept; tokenizing it takes 100 bytes each.
_MAX_ROW_BYTES = 10_000_000
# What decides how a row is encoded: where it has changed, rows that were encoded before are not taken.
_PACKAGE = Path(__file__).parent.parent
CODE = sorted([*(_PACKAGE / "rows").glob("*.py"), *(_PACKAGE / "encoding").glob("*.py")])
CODE += [_PACKAGE / "data/row_text.py", Path(__file__)]
# Keys of `data` that `encode_file` takes under the same name.
_SAME_NAMES = ["max_seq_length", "cache_dir", "on_bad_row", "num_proc", "cache_limit_gib"]
_SAME_NAMES += ["train_on", "truncation", "split_turns", "mask_reasoning"]


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedFile, EncodedFile | None]:
    """The training set, and the eval set if there is one."""
    train_data = encode_set(config, tokenizer, "train_file")
    if config.data.eval_file is not None:
        return train_data, encode_set(config, tokenizer, "eval_file")
    if config.data.eval_fraction > 0:
        return hold_out(train_data, config.data.eval_fraction, config.train.seed)
    return train_data, None


def encode_set(config: RunConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> EncodedFile:
    """All rows of `data.train_file` (or `data.train_files`), or of `data.eval_file`: `key` says which."""
    data = config.data
    given = data.eval_file if key == "eval_file" else data.train_files or data.train_file
    assert given is not None
    places = as_jsonl(given, data.cache_dir, seed=config.train.seed, key=f"data.{key}", streaming=data.streaming)
    source = given if isinstance(given, str) else data.train_source
    same = {name: getattr(data, name) for name in _SAME_NAMES}
    return encode_file(places, tokenizer, source=source, shape=shape_of(data), **same)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows. Any id will do: the attention mask hides it and the loss mask leaves it out."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def encode_file(
    path: str | Path | Places,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    cache_dir: str | Path,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    source: str | None = None,
    cache_limit_gib: float = 20.0,
    train_on: TrainOn = "all_assistant",
    truncation: Truncation = "right",
    split_turns: bool = False,
    mask_reasoning: bool = False,
    shape: RowShape | None = None,
) -> EncodedFile:
    """Encode the rows of a chat file, or take the result of an earlier call from `cache_dir`.

    Args:
        path: what `data.train_file` may hold, or what `as_jsonl` made of it.
        max_seq_length: longer rows are truncated to so many tokens, or as `truncation` says.
        on_bad_row: "error" or "skip".
        num_proc: worker processes; None is one per core when there are enough rows to pay for them.
        source: what messages call all of the rows; None is `path`.
        cache_limit_gib: once rows are encoded, those of earlier calls that were not used for longest are removed from
            `cache_dir` until it is below this size, with a line on standard error.
        train_on: which tokens are loss tokens, as `ChatEncoder` takes it.
        truncation: of longer rows: "right" keeps their beginning, "drop" drops and counts them, "error" stops.
        split_turns: make one example of each reply, with all before it.
        mask_reasoning: leave the reasoning of replies out of the loss tokens.
        shape: what the file calls its columns and roles.

    Raises:
        ConfigError: `cache_dir` cannot be written to, or the disk is full.
        DataError: the file is missing, empty, or of a kind that is not read; a row is bad (up to 20 problems are
            listed, as file:line, unless on_bad_row is "skip"); or no row is left to train on.
    """
    places = path if isinstance(path, Places) else as_jsonl(path, cache_dir)
    source = source or (str(path) if not isinstance(path, Places) else places.parts[0].source)
    path = places.path
    try:
        starts, sizes, lines = _line_table(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}", "data_file_missing") from error
    if num_proc is None:
        num_proc = min(allowed_cores(), max(1, len(starts) // _ROWS_WORTH_A_PROCESS))
    encoder, shape = ChatEncoder(tokenizer, train_on, mask_reasoning), shape or RowShape()
    fingerprint = _fingerprint(path, encoder, [max_seq_length, split_turns, dict(shape.columns), dict(shape.roles)])
    folder = cache_folder(cache_dir)

    def fill(new: Path) -> None:
        table = {"start": starts, "size": sizes, "line": lines}
        _encode_lines(places, table, encoder, shape, split_turns, max_seq_length, new, fingerprint, num_proc)

    with naming_cache_folder(folder):
        entry = take_entry(folder, fingerprint) or make_entry(folder, fingerprint, fill, cache_limit_gib)
        encoded = entry.open()
    problems = encoded.with_format("numpy")["problem"]
    counted_rows = account(source, places, encoded, np.asarray(problems[:]), on_bad_row, max_seq_length, truncation)
    return replace(counted_rows, encoded_on=entry.encoded_on)


def _line_table(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start, size in bytes and 1-based number of each line that is not blank."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file (working folder: {Path.cwd()}); fix: data.train_file=PATH",
            "data_file_missing",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; it must hold one JSON object per line", "data_file_empty")
    starts, sizes, numbers = [], [], []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, number = 0, 0
        while start < len(content):
            newline = content.find(b"\n", start)
            end = newline if newline >= 0 else len(content)
            number += 1
            # The whole line is looked at only where its start is blank.
            is_blank = end == start or (
                content[start : min(end, start + 64)].isspace() and content[start:end].isspace()
            )
            if not is_blank:
                starts.append(start)
                sizes.append(end - start)
                numbers.append(number)
            start = end + 1
    if not starts:
        raise DataError(f"{path}: every line is blank; the file must hold one JSON object per line", "data_file_empty")
    return np.array(starts), np.array(sizes), np.array(numbers)


def _fingerprint(path: Path, encoder: ChatEncoder, settings: list[Any]) -> str:
    """A hash of all that decides the encoded rows."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    tokenizer = encoder.tokenizer
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    parts += [encoder.forms.stop_tokens, encoder.train_on, encoder.mask_reasoning, *settings]
    digest.update(json.dumps(parts, default=str, sort_keys=True).encode())
    for module in CODE:
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]


def _encode_lines(
    places: Places,
    table: dict[str, npt.NDArray[np.int64]],
    encoder: ChatEncoder,
    shape: RowShape,
    split_turns: bool,
    max_seq_length: int,
    folder: Path,
    fingerprint: str,
    num_proc: int,
) -> None:
    """Write `rows*.arrow` to the folder."""
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "loss_mask": ListOf(Value("bool")),
            "loss_weights": ListOf(Value("float32")),
            "line": Value("int64"),
            "reply": Value("int64"),
            "problem": Value("string"),
            "num_supervised": Value("int64"),
            "truncated_tokens": Value("int64"),
            "truncated_supervised": Value("int64"),
            "has_empty_reply": Value("bool"),
            "holds_special_text": Value("bool"),
            "cut_at_border": Value("bool"),
            "has_doubled_bos": Value("bool"),
            "has_system_turn": Value("bool"),
            "has_placeholder": Value("bool"),
            "repeats_prompt": Value("bool"),
            "ends_unanswered": Value("bool"),
            **dict.fromkeys(("changes_script", "has_tools", "lists_tools_twice", "wraps_answers"), Value("bool")),
            "is_normalized": Value("bool"),
            "sketch": ListOf(Value("int64"), length=row_text.SKETCH),
            "reply_start": Value("int64"),
            "left_out": Value("string"),
            "exact_key": Value("int64"),
            "text_key": Value("int64"),
        }
    )
    try:
        with nullcontext() if num_proc == 1 else _no_tokenizer_threads():
            Dataset.from_dict(table).map(
                _encode_batch,
                batched=True,
                batch_size=500,
                num_proc=num_proc if num_proc > 1 else None,
                remove_columns=["start", "size", "line"],
                features=features,
                fn_kwargs={
                    "places": places,
                    "encoder": encoder,
                    "shape": shape,
                    "split_turns": split_turns,
                    "max_seq_length": max_seq_length,
                },
                cache_file_name=str(folder / "rows.arrow"),
                new_fingerprint=fingerprint,
                desc="Encoding rows",
            )
    except RuntimeError as error:
        if "subprocesses has abruptly died" not in str(error):
            raise
        raise DataError(
            f"{places.parts[0].source}: one of {num_proc} processes that encode rows was killed: it ran out of memory, "
            "or its chat template did not end; fix: data.num_proc=1, or another data.chat_template"
        ) from error


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """For processes that are forked here: the tokenizer's threads do not exist in them, and would be waited for.

    datasets sets the same when it forks, but leaves it set for this process afterwards.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _encode_batch(
    batch: dict[str, list[int]],
    places: Places,
    encoder: ChatEncoder,
    shape: RowShape,
    split_turns: bool,
    max_seq_length: int,
) -> dict[str, list[Any]]:
    parsed: list[Conversation | RowError] = []
    try:
        with places.path.open("rb") as file:
            for start, size in zip(batch["start"], batch["size"], strict=True):
                if size > _MAX_ROW_BYTES:
                    parsed.append(
                        RowError(f"the line has {size:,} bytes, more than {_MAX_ROW_BYTES:,}; fix: split the row")
                    )
                    continue
                file.seek(start)
                parsed.append(_parse_line(file.read(size), shape))
    except OSError as error:
        raise DataError(f"{places.path}: cannot be read any more: {error}", "data_file_missing") from error
    examples = [
        (line, reply, item)
        for line, row in zip(batch["line"], parsed, strict=True)
        for reply, item in _examples(row, split_turns, encoder)
    ]
    try:
        encoded = iter(encoder.encode_batch([item for _, _, item in examples if isinstance(item, Conversation)]))
    except ConfigError as error:
        lines = places.between(batch["line"][0], batch["line"][-1])
        raise ConfigError(f"{lines}: {error}", error.finding_id) from error
    rows = [
        {"line": line, "reply": reply}
        | _row_columns(item, item if isinstance(item, RowError) else next(encoded), encoder, max_seq_length)
        for line, reply, item in examples
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _examples(
    row: Conversation | RowError, split_turns: bool, encoder: ChatEncoder
) -> list[tuple[int, Conversation | RowError]]:
    """(index of the reply that it is for, example) for each example that is made of a row; -1 for all replies."""
    if isinstance(row, RowError) or not split_turns:
        return [(-1, row)]
    return [*one_for_each_reply(row, encoder.train_on)]


def _row_columns(
    parsed: Conversation | RowError, encoded: EncodedChat | RowError, encoder: ChatEncoder, max_seq_length: int
) -> dict[str, Any]:
    if isinstance(encoded, RowError) or isinstance(parsed, RowError):
        ids: list[int] = []
        mask: list[bool] = []
        encoded_or_not = EncodedChat([], [])
    else:
        # The first token has nothing before it to be predicted from, so it is never a loss token.
        ids, mask = encoded.input_ids, [False, *encoded.loss_mask[1:]]
        encoded_or_not = encoded
    bos = encoder.tokenizer.bos_token_id
    normalizer = encoder.tokenizer.backend_tokenizer.normalizer
    return {
        "input_ids": ids[:max_seq_length],
        "loss_mask": mask[:max_seq_length],
        "loss_weights": encoded_or_not.loss_weights[:max_seq_length],
        "problem": str(encoded) if isinstance(encoded, RowError) else "",
        "num_supervised": sum(mask[:max_seq_length]),
        "truncated_tokens": len(ids[max_seq_length:]),
        "truncated_supervised": sum(mask[max_seq_length:]),
        "holds_special_text": encoded_or_not.holds_special_text,
        "cut_at_border": encoded_or_not.cut_at_border,
        "has_doubled_bos": bos is not None and ids[:2] == [bos, bos],
        **row_text.signs(parsed if isinstance(parsed, Conversation) else None),
        "is_normalized": isinstance(parsed, Conversation) and row_text.is_changed_by(normalizer, parsed),
        "left_out": _left_out(parsed, encoded_or_not),
        "exact_key": row_text.key(np.array(ids, dtype=np.int32).tobytes()),
        "sketch": row_text.sketch(parsed if isinstance(parsed, Conversation) else Conversation([])),
        "text_key": row_text.key(row_text.words(parsed).encode()) if isinstance(parsed, Conversation) else 0,
    }


def _left_out(parsed: Conversation | RowError, encoded: EncodedChat) -> str:
    """Keys that no token says anything of, as a JSON list; empty if there are none."""
    if isinstance(parsed, RowError):
        return ""
    keys = sorted({*parsed.unused_keys, *encoded.not_shown})
    return json.dumps(keys, ensure_ascii=False) if keys else ""


def _parse_line(raw: bytes, shape: RowShape) -> Conversation | RowError:
    try:
        return parse_json_row(raw.decode("utf-8-sig"), shape)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start} of the line; fix: save the file as UTF-8")
    except RowError as error:
        return error
