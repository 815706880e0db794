"""`lora-core push`: an adapter, or the merged model, onto the Hugging Face hub."""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_core.commands.command_line import Command, heavy_imports, quiet_libraries
from lora_core.untrusted.text import showable

if TYPE_CHECKING:
    from lora_core.export.as_adapter import Adapter
    from lora_core.export.hub import Files


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run, an adapter, a checkpoint, or a folder that merge wrote")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; made if there is none")
    parser.add_argument("--public", action="store_true", help="for everyone to see; private unless said")
    parser.add_argument("--merged", action="store_true", help="merge first, and push the merged model")
    parser.add_argument("--no-report", action="store_true", help="leave report.html out, which shows some rows")
    parser.add_argument("--base-model", metavar="ID", help="the base model's hub id, where the run names a folder")


def _say(line: str) -> None:
    print(showable(line), flush=True)


def _run(arguments: Namespace) -> None:
    with heavy_imports():
        quiet_libraries()
        from lora_core.export.as_adapter import as_adapter, model_folder
        from lora_core.export.hub import adapter_files, model_files, push
        from lora_core.inference.opened import open_model

    opened = open_model(arguments.run)
    message = "Pushed by lora_core"
    if opened.kind == "model":
        address = push(model_files(model_folder(opened)), arguments.repo, arguments.public, message, _say)
    else:
        with as_adapter(opened) as source, tempfile.TemporaryDirectory(prefix="lora_core_merged_") as folder:
            if arguments.merged:
                files = _merged_files(source, Path(folder) / "merged", arguments)
            else:
                files = adapter_files(source, arguments.base_model, not arguments.no_report, _say)
            address = push(files, arguments.repo, arguments.public, message, _say)
    _say(f"pushed: {address}")


def _merged_files(source: Adapter, folder: Path, arguments: Namespace) -> Files:
    """Merged into `folder`, with the run's report."""
    from lora_core.export.hub import Files, checked_base, model_files, report_of
    from lora_core.export.merge import merge

    merge(source, folder, base_model=checked_base(arguments.base_model), say=_say)
    report = {} if arguments.no_report else report_of(source.run, _say)
    return Files(model_files(folder).contents | report)


COMMAND = Command("adapter or merged model onto the hub: lora-core push RUN REPO [--merged]", _add_arguments, _run)
