"""`lora-core export`: a GGUF file and a Modelfile, for llama.cpp and Ollama."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from lora_core.commands.command_line import Command, add_base_overrides, heavy_imports, quiet_libraries
from lora_core.errors import ConfigError
from lora_core.untrusted.text import showable

_TYPES = ("f16", "bf16", "f32", "q8_0")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, an adapter, a checkpoint, or a folder that merge wrote")
    parser.add_argument("--gguf", action="store_true", required=True, help="the format; there is one")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder for GGUF and Modelfile")
    parser.add_argument("--type", choices=_TYPES, default="f16", help="of the matrices; f16 unless said")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter alone, for a GGUF of the base model")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    parser.add_argument("--rows", metavar="FILE", help="rows to compare logits on before merging, as for merge")
    add_base_overrides(parser)


def _say(line: str) -> None:
    print(showable(line), flush=True)


def _run(arguments: Namespace) -> None:
    with heavy_imports():
        quiet_libraries()
        import torch

        from lora_core.export.as_adapter import as_adapter, model_folder
        from lora_core.export.gguf import check_family, find_converter
        from lora_core.export.merge import merge
        from lora_core.export.ollama import export_adapter, export_model
        from lora_core.inference.opened import open_model
        from lora_core.model.base import load_model_config
        from lora_core.runtime.run_folder import check_output

    output = arguments.output.expanduser()
    opened = open_model(arguments.run, arguments.overrides)
    check_output(output, arguments.overwrite, opened.weights or model_folder(opened))
    if opened.kind == "model":
        folder = model_folder(opened)
        if arguments.adapter_only:
            raise ConfigError(f"--adapter-only: {arguments.run} is a model without an adapter; fix: name a run")
        written = export_model(folder, output, arguments.type, _say)
    else:
        with as_adapter(opened) as source, tempfile.TemporaryDirectory(prefix="lora_core_merged_") as name:
            if arguments.adapter_only:
                written = export_adapter(source, output, arguments.type, _say)
            else:
                if find_converter() is None:
                    check_family(load_model_config(source.config.model))  # before the merge, which may take long
                # In float32, so that the update is rounded once, to the type of the GGUF file.
                merge(source, Path(name) / "merged", dtype=torch.float32, rows=arguments.rows, say=_say)
                written = export_model(Path(name) / "merged", output, arguments.type, _say)
    _say(f"wrote {written}: {written.stat().st_size / 2**20:.1f} MiB, and {output / 'Modelfile'}")


COMMAND = Command("GGUF and Modelfile: lora-core export RUN --gguf --output DIR [--type q8_0]", _add_arguments, _run)
