"""`lora-core launch-files`: what launchers read, in a folder of one's own, where there is no checkout."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command
from lora_core.configuration import shipped_file
from lora_core.errors import ConfigError, counted, problem_list
from lora_core.untrusted.text import showable


def write_launch_files(folder: Path) -> tuple[list[Path], int]:
    """Copy `configs/accelerate/` and `launch/` into a folder.

    Returns:
        The files that were written, and how many were there already.

    Raises:
        ConfigError: a file of such a name holds something else (nothing is written then), or the folder cannot be
            written.
    """
    try:
        files = {folder / name: source for name, source in _shipped().items()}
        there = [path for path in files if path.exists()]
        changed = [path for path in there if not path.is_file() or path.read_bytes() != files[path].read_bytes()]
        if changed:
            problems = [f"{path}: exists, and holds something else" for path in changed]
            title = f"Nothing was written to {folder}, as {counted(len(changed), 'file')} would be lost:"
            raise ConfigError(f"{problem_list(title, problems)}\nFix: lora-core launch-files {_free_name(folder)}")
        new = [path for path in files if path not in there]
        for path in new:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[path], path)
    except OSError as error:
        raise ConfigError(f"launch-files {folder}: {error.strerror}: {error.filename}; fix: another folder") from error
    return new, len(there)


def _shipped() -> dict[str, Path]:
    """Each file by the name that it has in a checkout."""
    return {
        f"{folder}/{file.relative_to(shipped_file(folder)).as_posix()}": file
        for folder, pattern in (("configs/accelerate", "*.yaml"), ("launch", "*.py"), ("launch", "jobs/*"))
        for file in sorted(shipped_file(folder).glob(pattern))
        if file.is_file()
    }


def _free_name(folder: Path) -> Path:
    return next(path for number in range(1, 1000) if not (path := folder / f"launch-files-{number}").exists())


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: this folder")


def _run(arguments: Namespace) -> None:
    folder = arguments.folder.expanduser()
    new, num_there = write_launch_files(folder)
    for path in new:
        print(showable(f"wrote {path}"))
    if num_there:
        print(f"{counted(num_there, 'file')} {'is' if num_there == 1 else 'are'} there already, the same")


COMMAND = Command(
    "write configs/accelerate/ and launch/ here, for several devices: lora-core launch-files [FOLDER]",
    _add_arguments,
    _run,
)
