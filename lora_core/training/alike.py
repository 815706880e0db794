"""All ranks have to train or measure the same, wherever each was started: the same settings, rows and weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core._version import __version__
from lora_core.checkpoints.resume import flat_keys
from lora_core.config.schema import RunConfig
from lora_core.errors import ConfigError, DataError
from lora_core.runtime.ranks import gather_from_ranks

# Where something is, or how much room it may take, may differ from machine to machine; what it holds is looked at.
_OF_A_MACHINE = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "data.train_file",
        "data.train_files",
        "data.eval_file",
        "data.chat_template",
        "data.cache_dir",
        "data.cache_limit_gib",
        "data.num_proc",
        "model.name_or_path",
        "model.adapter",
    }
)
# Of each frozen tensor, so many values are looked at.
_VALUES = 64


def check_order_of_ranks() -> None:
    """Call it in every rank first: the ranks of a machine wait for its first one, which they find by counting back.

    Raises:
        ConfigError: in every rank: those of a machine do not follow one another, as with `srun --distribution=cyclic`.
    """
    local_ranks = gather_from_ranks(int(os.environ.get("LOCAL_RANK", "0")))
    for rank, local_rank in enumerate(local_ranks):
        if local_rank > 0 and (rank == 0 or local_ranks[rank - 1] != local_rank - 1):
            raise ConfigError(
                f"RANK={rank} has LOCAL_RANK={local_rank}, and the rank before it is not the one before it on its "
                "machine; fix: number the ranks machine by machine, as torchrun and srun --distribution=block do",
                "ranks_differ",
            )


def check_same_settings(config: RunConfig, resume: str | Path | None) -> None:
    """Call it in every rank, before they do anything together: each would wait for what the others never do.

    Args:
        config: as it was asked for.
        resume: as `train` takes it.

    Raises:
        ConfigError: in every rank: one was started with other settings than rank 0, or by another lora_core.
    """
    settings = {key: value for key, value in flat_keys(config.to_dict()).items() if key not in _OF_A_MACHINE}
    asked = resume if resume in (None, "auto") else "newest"  # a path is looked for by rank 0 alone
    of_ranks = gather_from_ranks({**settings, "--resume": asked, "lora_core": __version__})
    for rank, theirs in enumerate(of_ranks):
        first = of_ranks[0]
        differing = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
        if differing:
            lines = [f"  {key}: {first.get(key)!r} in rank 0, {theirs.get(key)!r} in rank {rank}" for key in differing]
            raise ConfigError(
                "\n".join(["the ranks of this run were started with other settings:", *lines])
                + "\nFix: the same command line, configuration and version of lora_core on every machine",
                "ranks_differ",
            )


def check_same_rows(data_hash: str, num_examples: int, source: str) -> None:
    """Call it in every rank once the rows are encoded.

    Args:
        data_hash: as `resume.data_hash` gives it.
        num_examples: to train on, or to measure.
        source: what the rows are called.

    Raises:
        DataError: in every rank: one has other rows than rank 0, or encodes them in another way.
    """
    of_ranks = gather_from_ranks((data_hash, num_examples, source))
    for rank, (theirs, number, name) in enumerate(of_ranks):
        if theirs != of_ranks[0][0]:
            raise DataError(
                f"{name}: rank {rank} has other rows than rank 0, or another tokenizer or chat template: {number:,} "
                f"examples there, {of_ranks[0][1]:,} in rank 0 ({of_ranks[0][2]}), or others in the eval "
                "set; fix: the same files on every machine",
                "ranks_differ",
            )


def check_same_base(model: nn.Module) -> None:
    """Call it in every rank once the model is loaded.

    Raises:
        ConfigError: in every rank: one has loaded other frozen weights than rank 0.
    """
    of_ranks = gather_from_ranks(_identity(model))
    differing = [rank for rank, theirs in enumerate(of_ranks) if theirs != of_ranks[0]]
    if differing:
        raise ConfigError(
            f"model.name_or_path: rank {differing[0]} has loaded other weights than rank 0; fix: the same files on "
            "every machine, or model.revision=COMMIT",
            "ranks_differ",
        )


def _identity(model: nn.Module) -> str:
    """A hash of all names, shapes and types, and of the first values of what is frozen, not quantized and here."""
    digest = hashlib.sha256()
    tensors: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.requires_grad and tensor.is_floating_point() and not tensor.is_meta:
            digest.update(tensor.detach().flatten()[:_VALUES].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
