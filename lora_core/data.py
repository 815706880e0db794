"""A chat JSONL -> an encoded dataset on disk, memory-mapped, with every row accounted for.

Only byte offsets of the lines are held in memory (16 bytes a row). Rows are read, encoded in batches over several
processes, and written to an Arrow file whose name is a hash of all that decides its content: the file's bytes, the
tokenizer, the template, the length limit and this code. A second start reads that file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lora_core import chat, messages
from lora_core.chat import ChatEncoder, EncodedChat
from lora_core.config import RunConfig
from lora_core.errors import ConfigError, DataError, RowError, counted, problem_list
from lora_core.limits import allowed_cores
from lora_core.messages import Conversation, parse_json_row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Forking and joining worker processes costs more than encoding a few thousand rows, which one process does with the
# tokenizer's own threads.
_ROWS_WORTH_A_PROCESS = 2_500
# A row this long has some million tokens, of which max_seq_length are kept; tokenizing it takes 100 bytes each.
_MAX_ROW_BYTES = 10_000_000


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


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedFile, EncodedFile | None]:
    """Training rows, and held-out rows if there are any."""

    def encode(path: str) -> EncodedFile:
        return encode_file(
            path,
            tokenizer,
            max_seq_length=config.data.max_seq_length,
            cache_dir=config.data.cache_dir,
            on_bad_row=config.data.on_bad_row,
            num_proc=config.data.num_proc,
        )

    train_data = encode(config.data.train_file)
    if config.data.eval_file is not None:
        return train_data, encode(config.data.eval_file)
    if config.data.eval_fraction > 0:
        return hold_out(train_data, config.data.eval_fraction, config.train.seed)
    return train_data, None


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short rows. Any id will do: the attention mask hides it and the loss mask leaves it out."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def encode_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    cache_dir: str | Path,
    on_bad_row: str = "error",
    num_proc: int | None = None,
) -> EncodedFile:
    """Encode a chat JSONL, or take the result of an earlier call from `cache_dir`.

    Args:
        max_seq_length: tokens; longer rows are cut on the right.
        on_bad_row: "error" or "skip".
        num_proc: worker processes; None is one per core when there are enough rows to pay for them.

    Raises:
        DataError: the file is missing, empty or not JSONL; a row is bad (up to 20 are listed, as file:line, unless
            on_bad_row is "skip"); or no row is left to train on.
    """
    path = Path(path)
    try:
        starts, sizes, lines = _line_table(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}", "data_file_missing") from error
    if num_proc is None:
        num_proc = min(allowed_cores(), max(1, len(starts) // _ROWS_WORTH_A_PROCESS))
    encoder = ChatEncoder(tokenizer)
    fingerprint = _fingerprint(path, tokenizer, max_seq_length)
    encoded = _encode_lines(
        path,
        starts,
        sizes,
        lines,
        encoder,
        max_seq_length,
        Path(cache_dir).expanduser(),
        fingerprint,
        num_proc,
    )
    problems = encoded.with_format("numpy")["problem"]
    return _account(path, encoded, np.asarray(problems[:]), on_bad_row, max_seq_length)


def _line_table(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start, size in bytes and 1-based number of each line that is not blank."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file (looked from {Path.cwd()}); fix: data.train_file=PATH or data.eval_file=PATH",
            "data_file_missing",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; it must hold one JSON object a line", "data_file_empty")
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
        if starts and content[starts[0] : starts[0] + 64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise DataError(
                f'{path}: holds a JSON array; one JSON object a line is needed; fix: python -c "import json; '
                f"[print(json.dumps(row)) for row in json.load(open('{path}'))]\" > {path.stem}.jsonl",
                "data_not_jsonl",
            )
    if not starts:
        raise DataError(f"{path}: every line is blank; the file must hold one JSON object a line", "data_file_empty")
    return np.array(starts), np.array(sizes), np.array(numbers)


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> str:
    """A hash of all that decides the encoded rows."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    backend = tokenizer.backend_tokenizer.to_str()
    parts = [backend, tokenizer.chat_template, tokenizer.special_tokens_map, max_seq_length]
    digest.update(json.dumps(parts, default=str, sort_keys=True).encode())
    for module in (chat, messages):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:32]


def _encode_lines(
    path: Path,
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    lines: npt.NDArray[np.int64],
    encoder: ChatEncoder,
    max_seq_length: int,
    cache_dir: Path,
    fingerprint: str,
    num_proc: int,
) -> Dataset:
    from datasets import Dataset, Features, Value
    from datasets import List as ListOf

    cache_dir.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict({"start": starts, "size": sizes, "line": lines})
    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "loss_mask": ListOf(Value("bool")),
            "line": Value("int64"),
            "problem": Value("string"),
            "num_supervised": Value("int64"),
            "truncated_tokens": Value("int64"),
            "truncated_supervised": Value("int64"),
            "has_empty_reply": Value("bool"),
            "holds_special_text": Value("bool"),
            "cut_at_border": Value("bool"),
            "has_doubled_bos": Value("bool"),
            "exact_key": Value("int64"),
            "text_key": Value("int64"),
        }
    )
    try:
        with nullcontext() if num_proc == 1 else _no_tokenizer_threads():
            return table.map(
                _encode_batch,
                batched=True,
                batch_size=500,
                num_proc=num_proc if num_proc > 1 else None,
                remove_columns=["start", "size"],
                features=features,
                fn_kwargs={"path": str(path), "encoder": encoder, "max_seq_length": max_seq_length},
                cache_file_name=str(cache_dir / f"{fingerprint}-{num_proc}.arrow"),
                new_fingerprint=f"{fingerprint}-{num_proc}",
                desc="Encoding rows",
            )
    except RuntimeError as error:
        if "subprocesses has abruptly died" not in str(error):
            raise
        raise DataError(
            f"{path}: one of {num_proc} processes that encode rows was killed: for its memory, or for a chat template "
            "that does not end; fix: data.num_proc=1, or another data.chat_template"
        ) from error


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """For processes that are forked here: the tokenizer's threads do not live on in them, and would be waited for.

    datasets says so too when it forks, but leaves it said to the tokenizers of this process after them.
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
    batch: dict[str, list[int]], path: str, encoder: ChatEncoder, max_seq_length: int
) -> dict[str, list[Any]]:
    parsed: list[Conversation | RowError] = []
    with Path(path).open("rb") as file:
        for start, size in zip(batch["start"], batch["size"], strict=True):
            if size > _MAX_ROW_BYTES:
                parsed.append(
                    RowError(f"the line has {size:,} bytes, more than {_MAX_ROW_BYTES:,}; fix: split the row")
                )
                continue
            file.seek(start)
            parsed.append(_parse_line(file.read(size)))
    try:
        encoded = iter(encoder.encode_batch([item for item in parsed if isinstance(item, Conversation)]))
    except ConfigError as error:
        lines = f"{batch['line'][0]} to {batch['line'][-1]}"
        raise ConfigError(f"{path}, in lines {lines}: {error}", error.finding_id) from error
    rows = [
        _row_columns(item, item if isinstance(item, RowError) else next(encoded), encoder, max_seq_length)
        for item in parsed
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return columns | {"line": batch["line"]}


def _row_columns(
    parsed: Conversation | RowError, encoded: EncodedChat | RowError, encoder: ChatEncoder, max_seq_length: int
) -> dict[str, Any]:
    if isinstance(encoded, RowError) or isinstance(parsed, RowError):
        ids: list[int] = []
        mask: list[bool] = []
        encoded_or_not = EncodedChat([], [])
    else:
        # The first token has nothing before it to be predicted from, so it is never supervised.
        ids, mask = encoded.input_ids, [False, *encoded.loss_mask[1:]]
        encoded_or_not = encoded
    bos = encoder.tokenizer.bos_token_id
    return {
        "input_ids": ids[:max_seq_length],
        "loss_mask": mask[:max_seq_length],
        "problem": str(encoded) if isinstance(encoded, RowError) else "",
        "num_supervised": sum(mask[:max_seq_length]),
        "truncated_tokens": len(ids[max_seq_length:]),
        "truncated_supervised": sum(mask[max_seq_length:]),
        "has_empty_reply": isinstance(parsed, Conversation) and _has_empty_reply(parsed),
        "holds_special_text": encoded_or_not.holds_special_text,
        "cut_at_border": encoded_or_not.cut_at_border,
        "has_doubled_bos": bos is not None and ids[:2] == [bos, bos],
        "exact_key": _key(np.array(ids, dtype=np.int32).tobytes()),
        "text_key": _key(_words(parsed).encode()) if isinstance(parsed, Conversation) else 0,
    }


def _has_empty_reply(conversation: Conversation) -> bool:
    return any(
        message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message
        for message in conversation.messages
    )


def _words(conversation: Conversation) -> str:
    """A conversation with case, white space and punctuation left out: what two copies of a row have in common."""
    turns = (f"{message['role']} {message['content']}" for message in conversation.messages)
    return " ".join(re.findall(r"\w+", " ".join(turns).casefold()))


def _key(content: bytes) -> int:
    """A 64-bit hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _parse_line(raw: bytes) -> Conversation | RowError:
    try:
        return parse_json_row(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start} of the line; fix: save the file as UTF-8")
    except RowError as error:
        return error


def _account(
    path: Path, encoded: Dataset, problems: npt.NDArray[Any], on_bad_row: str, max_seq_length: int
) -> EncodedFile:
    columns = encoded.with_format("numpy")

    def column(name: str) -> npt.NDArray[Any]:
        return np.asarray(columns[name][:])

    bad = problems != ""
    supervised, truncated = column("num_supervised"), column("truncated_tokens")
    rows = RowFacts(
        line=column("line"),
        length=_list_lengths(encoded) + truncated,
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
    lengths = _list_lengths(dataset)
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


def _list_lengths(dataset: Dataset) -> npt.NDArray[np.int64]:
    """(num_rows,) tokens of each row, read from Arrow's list offsets without touching the tokens."""
    import pyarrow.compute as pc

    lengths: Iterable[Any] = (
        pc.list_value_length(batch.column("input_ids"))
        for batch in dataset.with_format("arrow").iter(batch_size=10_000)
    )
    return np.concatenate(
        [np.asarray(chunk.to_numpy(), dtype=np.int64) for chunk in lengths] or [np.zeros(0, np.int64)]
    )


def hold_out(encoded: EncodedFile, fraction: float, seed: int) -> tuple[EncodedFile, EncodedFile]:
    """Split off a seeded share of the rows: (train, held out). At least one row goes to each side.

    Raises:
        DataError: there are fewer than two rows.
    """
    num_rows = len(encoded.lengths)
    if num_rows < 2:
        raise DataError(
            f"data.eval_fraction={fraction} needs at least 2 rows, there is {num_rows}; fix: data.eval_fraction=0"
        )
    num_held_out = min(num_rows - 1, max(1, round(num_rows * fraction)))
    order = np.random.default_rng([seed, 0xE7A1]).permutation(num_rows)
    held_out, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return _subset(encoded, train), _subset(encoded, held_out)


def _subset(encoded: EncodedFile, rows: npt.NDArray[np.int64]) -> EncodedFile:
    dataset = encoded.dataset.select(rows)
    lengths = encoded.lengths[rows]
    supervised = sum(sum(mask) for mask in dataset["loss_mask"])
    kept = np.flatnonzero(~encoded.rows.is_bad & ~encoded.rows.is_unsupervised)
    facts = encoded.rows.select(kept[rows])
    # The whole file's reading is accounted for by its own counts; these are the part's.
    counts = RowCounts(
        read=len(rows),
        kept=len(rows),
        dropped_bad=0,
        dropped_unsupervised=0,
        truncated=int((facts.length > lengths).sum()),
        truncated_tokens=int((facts.length - lengths).sum()),
        truncated_supervised_tokens=int(facts.lost_supervised.sum()),
        tokens=int(lengths.sum()),
        supervised_tokens=supervised,
        longest=int(facts.length.max()),
    )
    return EncodedFile(dataset, lengths, counts, facts)
