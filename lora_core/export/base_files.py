"""A model's safetensors files, read a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_core.config.schema import ModelConfig
from lora_core.model.base import cannot_load, resolve_name

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Where each tensor of a model is. Nothing is kept in memory."""

    files: dict[str, Path]
    """By the tensor's name."""
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """A copy, so that the file is not kept in memory by it."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor

    def num_bytes(self, name: str) -> int:
        return self.shapes[name].numel() * self.dtypes[name].itemsize


def find_weights(model: ModelConfig) -> WeightFiles:
    """The safetensors of a local folder, or of the hub's cache, which they are downloaded to.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    from transformers.utils.hub import cached_file

    name = resolve_name(model)
    try:
        index = find_file(model, _INDEX)
        if index is None:
            paths = [Path(str(cached_file(name, "model.safetensors", revision=model.revision)))]
        else:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [Path(str(cached_file(name, shard, revision=model.revision))) for shard in shards]
        return read_headers(paths)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise cannot_load("safetensors", name, error) from error


def find_file(model: ModelConfig, file: str) -> Path | None:
    """One of the model's files, by its name; None where it has none."""
    from transformers.utils.hub import cached_file

    name = resolve_name(model)
    found = cached_file(name, file, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def read_headers(paths: list[Path]) -> WeightFiles:
    """Names, shapes and types of all tensors in some files."""
    found = WeightFiles({}, {}, {})
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                view = file.get_slice(name)
                found.files[name] = path
                found.shapes[name] = torch.Size(view.get_shape())
                found.dtypes[name] = _DTYPES[view.get_dtype()]
    return found


# As the header of a safetensors file names them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
