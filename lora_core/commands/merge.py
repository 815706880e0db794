"""`lora-core merge`: base model and adapter as one model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command, add_base_overrides, heavy_imports, quiet_libraries
from lora_core.untrusted.text import showable


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, an adapter folder or a checkpoint of a run")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE", help="of a safetensors file; 2GB unless said"
    )
    parser.add_argument(
        "--dtype",
        choices=["base", "float32", "bfloat16", "float16"],
        default="base",
        help="of the weights; base is what the base model's files have, and rounds the adapter's update to it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    parser.add_argument(
        "--rows", metavar="FILE", help="rows to compare logits on; default: the run's eval set, or its training rows"
    )
    add_base_overrides(parser)


def _run(arguments: Namespace) -> None:
    with heavy_imports():
        quiet_libraries()
        import torch

        from lora_core.export.as_adapter import as_adapter
        from lora_core.export.merge import merge
        from lora_core.inference.opened import open_model

    with as_adapter(open_model(arguments.run, arguments.overrides)) as source:
        done = merge(
            source,
            arguments.output.expanduser(),
            max_shard_size=arguments.max_shard_size,
            dtype=None if arguments.dtype == "base" else getattr(torch, arguments.dtype),
            overwrite=arguments.overwrite,
            rows=arguments.rows,
            say=lambda line: print(showable(line), flush=True),
        )
    print(
        showable(
            f"wrote {done.folder}: {done.num_bytes / 2**30:.2f} GiB; peak memory {done.peak_bytes / 2**30:.2f} GiB "
            f"(predicted {done.predicted_bytes / 2**30:.2f})"
        )
    )


COMMAND = Command("base model and adapter as one model: lora-core merge RUN --output DIR", _add_arguments, _run)
