"""Rows that a program has in memory, as the JSONL file that everything else reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.data.cache import cache_folder, naming_cache_folder
from lora_core.errors import DataError
from lora_core.sources.places import new_rows


def with_rows(
    config: RunConfig, rows: Iterable[Mapping[str, Any]] | None, eval_rows: Iterable[Mapping[str, Any]] | None
) -> RunConfig:
    """The configuration with these rows in place of `data.train_file` and `data.eval_file`; None leaves a file.

    Args:
        rows: dicts in any shape that a line of a file may have, or a `datasets.Dataset` of them.

    Raises:
        DataError: there are no rows, or one holds what JSON cannot.
        ConfigError: data.cache_dir cannot be written to, or the disk is full.
    """
    if rows is None and eval_rows is None:
        return config
    folder = cache_folder(config.data.cache_dir)
    files = {"train_file": (rows, "rows"), "eval_file": (eval_rows, "eval_rows")}
    with naming_cache_folder(folder):
        overrides = [
            f"data.{key}={json.dumps(str(_write(given, name, folder / 'rows')))}"
            for key, (given, name) in files.items()
            if given is not None
        ]
    return with_overrides(config, overrides)


def _write(rows: Iterable[Mapping[str, Any]], name: str, folder: Path) -> Path:
    """Write a line a row, to a file whose name is a hash of them: every process of a run gets the same."""
    number = 0
    with new_rows(folder, name) as written:
        for number, row in enumerate(rows, start=1):
            try:
                line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
                written.write(line.encode())
            except (TypeError, ValueError) as error:  # an object of some class, NaN, half a surrogate pair
                raise DataError(
                    f"{name}[{number - 1}]: cannot be written as JSON: {error}; fix: a dict of str, int, float, "
                    "bool, None, lists and dicts"
                ) from error
        if number == 0:
            raise DataError(f"{name} is empty; fix: pass at least one row")
        return written.keep_as(folder / f"{name}-{written.hash()}.jsonl")
