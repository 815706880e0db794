"""A dataset of the Hugging Face hub, or a folder whose splits `datasets` knows: loaded, or read as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.errors import DataError
from lora_core.sources.readers import Row, dataset_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class LoadedDataset:
    """Rows that `datasets` reads."""

    dataset: Dataset | IterableDataset
    shown: str
    """What messages call it."""
    version: str
    """Another one where the rows are others."""
    is_streamed: bool

    def rows(self) -> Iterator[Row]:
        """Every row.

        Raises:
            DataError: it can be read no further; a row holds what JSON cannot.
        """
        try:
            yield from dataset_rows(self.dataset, self.shown)
        except _errors() as error:
            raise DataError(f"{self.shown}: cannot be read any further: {_reason(error)}; try again") from error


def load_rows(name: str, split: str, revision: str | None, shown: str, streaming: bool) -> LoadedDataset:
    """The split of a dataset on the hub, or of a folder. No code of it is run.

    Args:
        streaming: read rows from there as they are needed, and keep no copy of its files.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    import datasets

    try:
        if streaming:
            stream = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
            return LoadedDataset(stream, shown, _version(name, revision), True)
        dataset = datasets.load_dataset(name, split=split, revision=revision)
    except _errors() as error:
        raise DataError(
            f"{shown}: no such file or folder here (working folder: {Path.cwd()}), and as a dataset of the hub it "
            f"cannot be loaded: {_reason(error)}",
            "data_file_missing",
        ) from error
    return LoadedDataset(dataset, shown, str(dataset._fingerprint), False)


def _version(name: str, revision: str | None) -> str:
    """The commit on the hub, or what a folder's files are."""
    if Path(name).is_dir():
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        return str([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, revision=revision).sha)


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises where a dataset is not there, is not one, or the network fails."""
    import datasets

    return (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
