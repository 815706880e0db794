"""The folder of encoded rows (`data.cache_dir`): what is found there is whole, and it does not grow without end.

cache_dir/
  0123..ef/                     an entry: named by a hash of all that decides its content
    rows.arrow                  or rows_00000_of_00004.arrow, ... from four processes
    manifest.json               size and checksum of each file, the day of encoding; its mtime is the last use
  damaged-0123..ef-4d3c2b1a/    an entry whose files were not what its manifest says
  .new-0123..ef-5e4f3a2b/       being written; renamed once it is whole
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.errors import ConfigError, counted
from lora_core.untrusted.text import showable

if TYPE_CHECKING:
    from datasets import Dataset

_MIB = 2**20
# Up to here a file is hashed whole, which takes a second per GB or two and thus less than importing torch does.
_HASHED_WHOLE_BYTES = 256 * _MIB
_STRIDE_BYTES = 64 * _MIB
_ENTRY = re.compile(r"[0-9a-f]{32}|damaged-.+|[0-9a-f]{32}-\d+(_\d+_of_\d+)?\.arrow")  # the last: of earlier versions
# A folder that is being written changes all the time; one that has not for so long was left by a killed process.
_LEFT_BEHIND_S = 24 * 3600

_used_here: set[Path] = set()
"""Entries that this process has used: never removed by it."""


@dataclass(frozen=True)
class Entry:
    """Encoded rows on disk, whole."""

    files: list[Path]
    """Arrow files, in the order of the rows."""
    encoded_on: str
    """The local date, as 2025-07-31."""

    def open(self) -> Dataset:
        """The rows, memory-mapped."""
        from datasets import Dataset, concatenate_datasets

        parts = [Dataset.from_file(str(path)) for path in self.files]
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def cache_folder(cache_dir: str | Path) -> Path:
    """The folder's path, with `~` as the user's home.

    Raises:
        ConfigError: nobody knows where that is.
    """
    try:
        return Path(cache_dir).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"data.cache_dir={cache_dir}: the home folder is not known (HOME is not set); "
            "fix: data.cache_dir=ANOTHER_FOLDER"
        ) from error


@contextmanager
def naming_cache_folder(folder: Path) -> Iterator[None]:
    """While entered, a file that cannot be written or read there becomes a sentence that names the folder.

    Raises:
        ConfigError: the disk is full, the folder is read-only, a file is in its place, ...; or what processes need to
            talk to each other cannot be had.
    """
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        # Where the error names no file, its traceback says who asked: a semaphore is a file in /dev/shm on Linux.
        if any(Path(frame.filename).name == "synchronize.py" for frame in traceback.extract_tb(error.__traceback__)):
            raise ConfigError(
                f"/dev/shm: the processes that encode rows need room there for their semaphores: {said}; "
                "fix: data.num_proc=1, or a larger /dev/shm (docker run --shm-size=1g)"
            ) from error
        place = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        raise ConfigError(
            f"data.cache_dir={folder}: encoded rows cannot be kept there: {said}{place}; "
            "fix: data.cache_dir=ANOTHER_FOLDER",
            "cache_dir_unusable",
        ) from error


def take_entry(folder: Path, name: str) -> Entry | None:
    """An entry that is there and whole; one that is damaged is renamed, with a line that says so."""
    path = folder / name
    if not path.is_dir():
        return None
    try:
        entry, problem = _read_entry(path)
    except FileNotFoundError as error:  # also where another process is removing it
        entry, problem = None, f"{Path(str(error.filename)).name} is missing"
    if entry is not None:
        _note_use(path)
        return entry
    aside = folder / f"damaged-{name}-{uuid.uuid4().hex[:8]}"
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was first
        return None
    _say(f"{path}: encoded rows are damaged ({problem}); set aside as {aside.name}, and encoded anew")
    return None


def make_entry(folder: Path, name: str, fill: Callable[[Path], object], limit_gib: float) -> Entry:
    """Make an entry, and room for it.

    Args:
        fill: writes `*.arrow` files to the folder that it is given; their names are in the order of the rows.
        limit_gib: entries that were not used for longest are removed until all together are no larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".new-{name}-{uuid.uuid4().hex[:8]}"
    new.mkdir()
    try:
        fill(new)
        files = {path.name: _size_and_hash(path) for path in sorted(new.glob("*.arrow"))}
        manifest: dict[str, Any] = {"encoded_on": date.today().isoformat(), "files": files}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        entry = Entry([folder / name / file for file in files], manifest["encoded_on"])
        try:
            new.rename(folder / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process made the same entry meanwhile: it is taken, if it is whole.
            theirs = take_entry(folder, name)
            if theirs is None:
                new.rename(folder / name)
            else:
                entry = theirs
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone already if all went well
    _note_use(folder / name)
    _keep_below(folder, limit_gib)
    return entry


def _read_entry(path: Path) -> tuple[Entry | None, str]:
    """The entry, or None and what is wrong with it."""
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, Any] = dict(manifest["files"])
        encoded_on = str(manifest["encoded_on"])
    except (ValueError, KeyError, TypeError):
        return None, "manifest.json cannot be read"
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if not isinstance(expected, dict) or size != expected.get("bytes"):
            return None, f"{name} has {size:,} bytes and not those of its manifest"
        if _size_and_hash(path / name) != expected:
            return None, f"{name} has the size but not the checksum of its manifest"
    if not files:
        return None, "manifest.json names no files"
    return Entry([path / name for name in sorted(files)], encoded_on), ""


def _size_and_hash(path: Path) -> dict[str, Any]:
    """Size, and a SHA-256 of the content.

    Hashing 1 GiB took 2.3 s where this was written, each time and on each rank. So of a file above 256 MiB only the
    first and the last MiB and one of every 64 are hashed: files that were cut short, or not written in places, are
    found; one changed bit may not be.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE_BYTES:
            while chunk := file.read(_MIB):
                digest.update(chunk)
        else:
            for start in (*range(0, size - _MIB, _STRIDE_BYTES), size - _MIB):
                file.seek(start)
                digest.update(file.read(_MIB))
    return {"bytes": size, "sha256": digest.hexdigest()}


def _note_use(path: Path) -> None:
    _used_here.add(path.resolve())
    try:
        os.utime(path / "manifest.json")
    except OSError as error:
        # A folder that others share read-only: who may write there decides what is removed.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _keep_below(folder: Path, limit_gib: float) -> None:
    """Remove entries until the folder is below its limit, those first that were not used for longest."""
    entries = []
    for path in folder.iterdir():
        try:
            changed, size = _last_change(path), _num_bytes(path)
        except FileNotFoundError:  # another process removed it
            continue
        if path.name.startswith(".new-") and time.time() - changed > _LEFT_BEHIND_S:
            shutil.rmtree(path)
        elif _ENTRY.fullmatch(path.name):
            entries.append((changed, size, path))
    total = sum(size for _, size, _ in entries)
    removed, freed = 0, 0
    for _, size, path in sorted(entries):
        if total - freed <= limit_gib * 2**30:
            break
        if path.resolve() not in _used_here and _remove(path):
            removed, freed = removed + 1, freed + size
    if removed:
        what = counted(removed, "set") + " of encoded rows"
        _say(
            f"data.cache_dir={folder}: removed {what} not used for longest ({freed / 2**30:.3g} GiB), to stay below "
            f"data.cache_limit_gib={limit_gib:g}"
        )


def _remove(path: Path) -> bool:
    """Whether it is gone by this process: by another name first, so that nobody finds a half of it."""
    try:
        gone = path.rename(path.with_name(f".new-removed-{uuid.uuid4().hex[:8]}"))
    except FileNotFoundError:  # another process removed it
        return False
    except PermissionError as error:
        _say(f"{path}: cannot be removed to stay below data.cache_limit_gib: {error.strerror}")
        return False
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return True


def _last_change(path: Path) -> float:
    """When an entry was last used, or anything in its folder last written."""
    manifest = path / "manifest.json"
    if manifest.is_file():
        return manifest.stat().st_mtime
    return max(each.stat().st_mtime for each in (path, *path.glob("*")))


def _num_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.glob("*")) if each.is_file())


def _say(line: str) -> None:
    """On standard error: standard output may be a command's JSON."""
    print(showable(line), file=sys.stderr, flush=True)
