"""Whatever people bring as rows -> one JSONL, and the places of its rows in their files.

    a plain JSONL                            is read where it is, and nothing is written
    JSON, CSV, Parquet, Arrow, compressed    is written once as JSONL into the cache, in flat memory
    a folder, `*`, https://, owner/name      stands for files, or for a dataset of the Hugging Face hub

The written file's name is a hash of all that decides its content, so that a second start finds it.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_core.config.schema import TrainFile
from lora_core.configuration import shipped_file
from lora_core.errors import DataError, counted
from lora_core.sources.hub import LoadedDataset, load_rows
from lora_core.sources.kinds import COMPRESSED_ENDINGS, ENDINGS, Kind, damage_errors, kind_of
from lora_core.sources.places import NewRows, Part, Places, new_rows
from lora_core.sources.readers import Row, read_rows
from lora_core.untrusted.text import without_secrets

# owner/name, and if need be @revision and :split.
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.+%\[\]:-]+))?")
# Names of files with rows to train on, and with rows to measure on.
_SPLITS = [
    re.compile(rf"(?<![a-z])(?:{names})(?![a-z])") for names in ("train|training", "test|eval|val|valid[a-z]*|dev")
]
_BESIDE_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MOST_NOTES = 10
_DOWNLOAD_TIMEOUT_S = 60


@dataclass(frozen=True)
class _Source:
    """One file, or one loaded dataset, and how much is taken of it."""

    shown: str
    """What messages call it."""
    path: Path | None
    kind: Kind
    dataset: LoadedDataset | None = None
    weight: float = 1.0
    max_rows: int | None = None

    @property
    def is_taken_as_it_is(self) -> bool:
        return self.kind == Kind("JSONL") and self.path is not None and (self.weight, self.max_rows) == (1.0, None)

    def rows(self) -> Iterator[Row]:
        if self.dataset is not None:
            rows = self.dataset.rows()
        else:
            assert self.path is not None
            rows = read_rows(self.path, self.kind, self.shown)
        return islice(rows, self.max_rows)

    def identity(self) -> list[Any]:
        """All that decides which rows it gives, and how they are named."""
        content = self.dataset.version if self.dataset is not None else _hash_of(self.path)
        return [self.shown, content, str(self.kind), self.kind.delimiter, self.weight, self.max_rows]


def as_jsonl(
    given: str | Path | Sequence[str | TrainFile],
    cache_dir: str | Path,
    *,
    seed: int = 42,
    key: str = "data.train_file",
    streaming: bool = False,
) -> Places:
    """The JSONL with these rows: the user's own where it is one, else one that is written into `cache_dir`/rows.

    Args:
        given: what `data.train_file` or `data.train_files` may hold.
        seed: chooses the rows of a weight that is not an int.
        key: the setting that messages name; or the option `--file`; or FILE, where a file is named by itself.
        streaming: keep no copy of a dataset of the hub: its rows are read there as they are written.

    Raises:
        DataError: a file is missing, empty, damaged or of a kind that is not read; says what it is, and the fix.
    """
    folder = Path(cache_dir).expanduser() / "rows"
    files = [given] if isinstance(given, (str, Path)) else given
    try:
        sources = [source for file in files for source in _sources(file, folder, key, streaming)]
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise DataError(f"cannot be read: {error}", "data_file_missing") from error
    if len(sources) == 1 and sources[0].is_taken_as_it_is:
        assert sources[0].path is not None
        return Places.of_file(sources[0].path)
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))]
    identity = [code, seed, [source.identity() for source in sources]]
    name = f"rows-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"
    path, table = folder / f"{name}.jsonl", folder / f"{name}.places.json"
    return Places.load(table, path) or _write(sources, seed, path, table)


def _write(sources: Sequence[_Source], seed: int, path: Path, table: Path) -> Places:
    parts: list[Part] = []
    notes: list[str] = []
    try:
        with new_rows(path.parent, path.stem) as written:
            next_line = 1
            for index, source in enumerate(sources):
                num_rows = 0
                for repeat, chosen in enumerate(_passes(source, np.random.default_rng([seed, 0x50C, index]))):
                    parts.append(Part(next_line, source.shown, source.kind.unit, is_repeat=repeat > 0))
                    num_taken, num_lines = _copy(source.rows(), chosen, written)
                    num_rows += num_taken
                    next_line += num_lines
                if num_rows == 0:
                    raise DataError(f"{source.shown}: {_no_rows(source)}", "data_file_empty")
                notes.append(_note(source, num_rows))
            written.keep_as(path)
        if len(notes) > _MOST_NOTES:
            notes[_MOST_NOTES:] = [f"... and {counted(len(notes) - _MOST_NOTES, 'more file')}"]
        places = Places(path, tuple(parts), tuple(notes))
        places.save(table)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written: {error}; fix: data.cache_dir=FOLDER") from error
    return places


def _passes(source: _Source, generator: np.random.Generator) -> list[npt.NDArray[np.bool_] | None]:
    """Which rows each pass over the source takes; None is all of them."""
    whole = int(source.weight)
    passes: list[npt.NDArray[np.bool_] | None] = [None] * whole
    if source.weight > whole:
        num_rows = sum(1 for _ in source.rows())
        chosen = np.zeros(num_rows, dtype=np.bool_)
        chosen[generator.choice(num_rows, round((source.weight - whole) * num_rows), replace=False)] = True
        passes.append(chosen)
    return passes


def _copy(rows: Iterator[Row], chosen: npt.NDArray[np.bool_] | None, written: NewRows) -> tuple[int, int]:
    """Write each row in the line that has its number, blank lines between; (rows, lines) written."""
    num_taken = num_lines = 0
    for index, (number, row) in enumerate(rows):
        if chosen is None or chosen[index]:
            written.write(b"\n" * (number - num_lines - 1) + row + b"\n")
            num_taken += 1
            num_lines = number
    return num_taken, num_lines


def _note(source: _Source, num_rows: int) -> str:
    how = "read as it comes" if source.dataset is not None and source.dataset.is_streamed else f"read as {source.kind}"
    text = f"{source.shown}: {counted(num_rows, 'row')}, {how}"
    if source.max_rows is not None:
        text += f"; its first {source.max_rows:,}"
    return text + (f"; weight {source.weight:g}" if source.weight != 1 else "")


def _no_rows(source: _Source) -> str:
    if source.weight < 1:
        return f"a weight of {source.weight:g} leaves none of its rows; fix: a larger weight"
    return f"holds no rows; it was read as {source.kind}"


def _sources(file: str | Path | TrainFile, folder: Path, key: str, streaming: bool) -> Iterator[_Source]:
    options = file if isinstance(file, TrainFile) else TrainFile(path=str(file))
    for source in _files_of(options, folder, key, streaming):
        yield replace(source, weight=options.weight, max_rows=options.max_rows)


def _files_of(options: TrainFile, folder: Path, key: str, streaming: bool) -> Iterator[_Source]:
    text = options.path
    path = Path(text).expanduser()
    if options.split is not None and path.is_dir() and options.revision is None:
        yield _loaded(str(path), options.split, None, f"{text}:{options.split}", streaming)
        return
    is_address = re.match(r"https?://", text) is not None
    matched = _HUB_ID.fullmatch(text)
    is_here = is_address or path.exists() or glob.has_magic(text.partition(":")[0])  # a split may have brackets
    if matched is not None and not is_here and not path.name.lower().endswith((*ENDINGS, *COMPRESSED_ENDINGS)):
        split, revision = options.split or matched["split"] or "train", options.revision or matched["revision"]
        at = f"@{revision}" if revision else ""
        yield _loaded(matched["name"], split, revision, f"{matched['name']}{at}:{split}", streaming)
        return
    if options.split is not None or options.revision is not None:
        raise DataError(f"{text}: split and revision are of datasets on the hub; fix: leave them out for a file")
    if is_address:
        yield _of_kind(_download(text, folder), without_secrets(text))
    elif re.match(r"[a-z][a-z0-9+.-]+://", text):
        raise DataError(
            f"{text}: only https:// is read; fix: download it, and {_as_given(key, 'FILE')}", "data_file_missing"
        )
    elif path.is_file():
        yield _of_kind(path, str(path))
    elif path.is_dir() or (glob.has_magic(text) and not path.exists()):
        yield from (_of_kind(each, str(each)) for each in _files_in(path, key))
    elif path.exists():
        raise DataError(f"{text}: is not a regular file, and rows are read more than once; fix: write it to a file")
    else:
        problem = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise DataError(
            f"{text}: {problem} (working folder: {Path.cwd()}); fix: {_other_file(path, key)}", "data_file_missing"
        )


def _other_file(missing: Path, key: str) -> str:
    """The fix for a file that is not there: one of almost that name beside it, or the demo's, which the package has."""
    beside = [each.name for each in missing.parent.iterdir() if each.exists()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, beside, n=1, cutoff=0.8)
    other = missing.with_name(near[0]) if near else None
    if missing.parts[0] == "examples" and shipped_file(str(missing)).is_file():
        other = shipped_file(str(missing))
    fix = _as_given(key, "PATH" if other is None else shlex.quote(str(other)))
    return f"{fix}, or {key}=null for no eval set" if key == "data.eval_file" else fix


def _as_given(key: str, value: str) -> str:
    """How a file is named: by a setting, an option, or by itself."""
    return {"FILE": value, "--file": f"--file {value}"}.get(key, f"{key}={value}")


def _loaded(name: str, split: str, revision: str | None, shown: str, streaming: bool) -> _Source:
    return _Source(shown, None, Kind("Arrow"), load_rows(name, split, revision, shown, streaming))


def _of_kind(path: Path, shown: str) -> _Source:
    try:
        return _Source(shown, path, kind_of(path, shown))
    except damage_errors() as error:
        finding_id = "data_file_missing" if getattr(error, "errno", None) else "data_kind_unknown"  # or it is damaged
        fix = "" if getattr(error, "errno", None) else "; fix: download or copy the file anew"
        raise DataError(f"{shown}: cannot be read: {error}{fix}", finding_id) from error


def _files_in(path: Path, key: str) -> list[Path]:
    """The data files of a folder, or of a pattern, in the order of their names; each once, links or not."""
    if path.is_dir():
        found = [each for each in path.iterdir() if not each.name.startswith((".", "_"))]
        files = [each for each in found if each.is_file() and _is_data_file(each.name)]
        others = ", ".join(sorted(each.name for each in found)[:5]) or "nothing"
        problem = f"no data file in this folder ({', '.join(ENDINGS)}, also compressed); there is: {others}"
    else:
        files = [Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file()]  # noqa: PTH207
        problem = f"no file matches this pattern (working folder: {Path.cwd()})"
    if not files:
        raise DataError(f"{path}: {problem}; fix: {_below(path, key)}", "data_file_missing")
    files = list({each.resolve(): each for each in sorted(files, reverse=True)}.values())[::-1]
    _refuse_several_splits(path, files, key)
    return files


def _below(path: Path, key: str) -> str:
    """The fix for a folder whose rows are in folders below."""
    if (path / "train").is_dir():
        return _as_given(key, shlex.quote(str(path / "train")))
    endings = [ending for ending in ENDINGS if path.is_dir() and next(path.glob(f"**/*{ending}"), None) is not None]
    if endings and (path / "README.md").is_file() and key == "data.train_file":  # it may name the files of each split
        return shlex.quote(f"data.train_files=[{{path: {path}, split: train}}]")
    return _as_given(key, shlex.quote(f"{path}/**/*{endings[0]}") if endings else "PATH")


def _refuse_several_splits(path: Path, files: Sequence[Path], key: str) -> None:
    """Rows for training and rows to measure on, together: `train-00000-of-00001.parquet` and `test-...`."""
    said = {each: [names.search(each.stem.lower()) is not None for names in _SPLITS] for each in files}
    trained, measured = ([each for each in files if said[each] == only] for only in ([True, False], [False, True]))
    if trained and measured:
        wanted, names = (measured, _SPLITS[1]) if key == "data.eval_file" else (trained, _SPLITS[0])
        word = names.findall(wanted[0].stem.lower())[0]
        pattern = wanted[0].name if len(wanted) == 1 else f"*{word}*{wanted[0].suffix}"
        raise DataError(
            f"{path}: holds rows of several splits ({trained[0].name}, {measured[0].name}), and all would be read as "
            f"one; fix: {_as_given(key, shlex.quote(str(wanted[0].with_name(pattern))))}, or for all of them "
            "data.train_files=[FILE, FILE]",
            "data_kind_unknown",
        )


def _is_data_file(name: str) -> bool:
    stem = name.lower()
    for ending in COMPRESSED_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem.endswith(ENDINGS) and name not in _BESIDE_ROWS


def _download(address: str, folder: Path) -> Path:
    """Into the cache, unless the file that the address has now is there. (fsspec reads addresses with aiohttp, which
    `datasets` does not bring.)"""
    shown = without_secrets(address)
    try:
        with urllib.request.urlopen(address, timeout=_DOWNLOAD_TIMEOUT_S) as answer:
            version = [answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]
            path = folder / f"download-{hashlib.sha256(json.dumps([address, version]).encode()).hexdigest()[:32]}"
            if path.is_file() and (version[0] or version[1]):
                return path
            with new_rows(folder, path.name) as written:
                num_bytes = 0
                while chunk := answer.read(1 << 20):
                    written.write(chunk)
                    num_bytes += len(chunk)
                if version[2] is not None and num_bytes != int(version[2]):
                    raise DataError(
                        f"{shown}: the download ended at {num_bytes:,} of {int(version[2]):,} bytes; try again"
                    )
                return written.keep_as(path)
    except (OSError, ValueError) as error:  # urllib's own errors are OSErrors; a port that is no number is a ValueError
        raise DataError(
            f"{shown}: cannot be downloaded: {error}; fix: download it by hand, and name that file"
        ) from error


def _hash_of(path: Path | None) -> str:
    assert path is not None
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}", "data_file_missing") from error
    return digest.hexdigest()
