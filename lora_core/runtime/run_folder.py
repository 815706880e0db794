"""What a run leaves on disk: files appear whole or not at all, and nothing of an earlier run or secret is in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.untrusted.text import values_without_secrets, without_secrets


def check_run_folder(output_dir: str | Path, overwrite: bool) -> Path:
    """The run folder's path, if a run may have it. Changes nothing.

    Raises:
        ConfigError: it holds an earlier run that may not be replaced, or other files, or cannot be made.
    """
    folder = Path(output_dir).expanduser()
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"output_dir={output_dir}: {parent} is a file; fix: output_dir=ANOTHER_FOLDER")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output_dir={output_dir}: {parent} is not writable; fix: output_dir=ANOTHER_FOLDER")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"output_dir={output_dir}: contains files that are no run of lora_core; fix: output_dir=ANOTHER_FOLDER"
            )
        if not overwrite:
            raise ConfigError(
                f"output_dir={output_dir}: contains an earlier run; fix: output_dir=ANOTHER_FOLDER to keep it, or "
                "overwrite_output_dir=true to replace it"
            )
    return folder


def check_output(output: Path, overwrite: bool, *needed: Path) -> None:
    """Refuse a folder to write to that holds something, unless it may be replaced. Changes nothing.

    Args:
        overwrite: replace a merged model or an export. Anything else, such as a run, is kept all the same.
        needed: folders that are read meanwhile; the output may hold none of them.

    Raises:
        ConfigError: it is taken, or cannot be made.
    """
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"--output {output}: {parent} is a file; fix: another name")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {output}: {parent} is not writable; fix: another folder")
    for path in needed:
        if path.resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"--output {output}: holds {path}, which is read for it; fix: another folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not any((output / name).is_file() for name in ("config.json", "Modelfile")):
        raise ConfigError(f"--output {output}: holds files that are no merged model and no export; fix: another folder")
    if not overwrite:
        raise ConfigError(
            f"--output {output}: is not empty; fix: another folder, or --overwrite to replace what is there"
        )


def clear_run_folder(folder: Path) -> None:
    """Make the folder, or empty it of an earlier run. Call `check_run_folder` first."""
    folder.mkdir(parents=True, exist_ok=True)
    # config.yaml last: it is what the folder is known by, should this be killed half-way.
    for entry in sorted(folder.iterdir(), key=lambda path: path.name == "config.yaml"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part. Secrets are left out."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    # Half a surrogate pair, for example from a command line that is not UTF-8, is no reason to lose the file.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(without_secrets(text))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(values_without_secrets(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; once it is full and on disk it takes the name `path`, and its place."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        _fsync(temporary)
        old = path.with_name(f".{path.name}.old.{uuid.uuid4().hex}")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)  # there is none most of the time
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of interrupted writes, for example by SIGKILL."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut_metrics(path: Path, last_step: int) -> None:
    """Drop the events after a step, and an incomplete line: a run resumes from there."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("step", last_step + 1) <= last_step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class MetricsFile:
    """`metrics.jsonl`: one JSON object an event, flushed as it comes, no secrets. Only the main process writes."""

    def __init__(self, path: Path, is_main: bool) -> None:
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace") if is_main else None

    def write(self, event: str, **values: Any) -> None:
        if self._file is not None:
            line = values_without_secrets({"event": event, **values})
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
