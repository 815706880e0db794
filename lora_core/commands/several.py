"""`lora-core train --models A,B,C`: one configuration, several base models, the smallest first."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lora_core.commands.command_line import heavy_imports, quiet_libraries
from lora_core.configuration import is_keyed_by_model, load_config
from lora_core.errors import ConfigError, RunStopped, TrainingError, counted
from lora_core.runtime.console import Console
from lora_core.runtime.launcher import refuse_several

if TYPE_CHECKING:
    from lora_core.memory.plan import MemoryPlan

# A child that a signal stopped: with a checkpoint, or at once.
_STOPPED = (75, 130)


@dataclass(frozen=True)
class Candidate:
    """A model, and the run that it would have."""

    name: str
    folder: Path
    arguments: list[str]
    """Of `lora-core train`, for this model alone."""
    num_parameters: int
    memory: MemoryPlan | None
    too_large: str | None
    """Why it does not fit."""


def train_several(arguments: Namespace, names: Sequence[str], console: Console) -> None:
    """Look at every model first, then train one after the other, each in a process of its own.

    A model that does not fit by the memory prediction is left out, and said so. A run that fails does not keep the
    others from starting.

    Raises:
        PreflightError, ConfigError, DataError: before any run: a check found an error that is not about memory.
        RunStopped: a signal stopped a run; `--resume` continues there.
        TrainingError: at the end: a run failed, or no model fits.
    """
    refuse_several("--models")
    with heavy_imports():
        quiet_libraries()
        candidates = sorted(_look_at(arguments, names, console), key=lambda candidate: candidate.num_parameters)
    fitting = [candidate for candidate in candidates if candidate.too_large is None]
    for candidate in candidates:
        what = f"skipped: {candidate.too_large}" if candidate.too_large else str(candidate.memory)
        console.say(
            f"{candidate.name}: {candidate.num_parameters / 1e6:,.0f} M parameters; {what}",
            "always" if candidate.too_large else "detail",
        )
    if not fitting:
        raise TrainingError(f"none of {counted(len(candidates), 'model')} fits; fix: model.quantization=nf4")
    failed = [candidate.name for candidate in fitting if not _train(candidate, arguments, console)]
    _compare([candidate.folder for candidate in fitting], console)
    if failed:
        raise TrainingError(f"{len(failed)} of {counted(len(fitting), 'run')} failed: {', '.join(failed)}; see above")


# A model with one of these findings is skipped.
_TOO_LARGE = ("memory_too_small", "disk_too_small")


def _look_at(arguments: Namespace, names: Sequence[str], console: Console) -> Iterator[Candidate]:
    from lora_core.memory.without_storage import num_hidden_layers, num_parameters
    from lora_core.preflight.preflight import look_at_run, refuse_errors, refused_errors, run_checks

    keyed = is_keyed_by_model(arguments.cfg)
    folders = _folders(arguments, names)
    for name in names:
        overrides = [*arguments.overrides, f"output_dir={json.dumps(str(folders[name]))}"]
        overrides += [] if keyed else [f"model.name_or_path={json.dumps(name)}"]
        console.say(f"looking at {name} ...")
        config = load_config(arguments.cfg, overrides, name if keyed else None)
        facts = look_at_run(config, 1)
        if arguments.resume:  # the run that is there is the one to resume
            facts = replace(facts, environment=replace(facts.environment, output_dir_problem=None))
        findings = run_checks(facts)
        refused = refused_errors(findings, config.preflight.allow)
        too_large = next((finding.message for finding in refused if finding.id in _TOO_LARGE), None)
        refuse_errors([finding for finding in findings if finding.id not in _TOO_LARGE], config.preflight.allow)
        own = ["--cfg", arguments.cfg, *(["--model", name] if keyed else []), *overrides]
        parameters = num_parameters(config, num_hidden_layers(config))
        yield Candidate(name, folders[name], own, parameters, facts.memory, too_large)


def _folders(arguments: Namespace, names: Sequence[str]) -> dict[str, Path]:
    """A folder for each model, in the output_dir that is asked for."""
    asked = [text.partition("=")[2] for text in arguments.overrides if text.startswith("output_dir=")]
    parent = Path(asked[-1] if asked else f"outputs/{Path(arguments.cfg).stem}").expanduser()
    folders = {name: parent / Path(name.rstrip("/")).name for name in names}
    if len(set(folders.values())) < len(names):
        raise ConfigError(f"--models {','.join(names)}: two have the same last name; fix: one at a time")
    return folders


def _train(candidate: Candidate, arguments: Namespace, console: Console) -> bool:
    """Run one; returns whether it ended well. With `--resume`, one that has finished is not run again."""
    resume: list[str] = []
    if arguments.resume:
        if (candidate.folder / "summary.json").is_file():
            console.say(f"{candidate.name}: finished before, in {candidate.folder}")
            return True
        resume = ["--resume", "auto"]
    shown = [option for option in ("--quiet", "--json-lines") if getattr(arguments, option[2:].replace("-", "_"))]
    command = [sys.executable, "-m", "lora_core", "train", *candidate.arguments, *shown, *resume]
    console.say(f"training {candidate.name} in {candidate.folder} ...")
    process = subprocess.Popen(command, stdout=console.stream)
    with _passing_signals_on(process):
        code = process.wait()
    if code in _STOPPED or code < 0:
        raise RunStopped(f"{candidate.name}: stopped (exit code {code}); fix: the same command with --resume")
    if code:
        console.say(f"warning: {candidate.name}: failed (exit code {code})", "always")
    return code == 0


@contextmanager
def _passing_signals_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While entered, SIGTERM and SIGUSR1 go to the child, and Ctrl-C, which the terminal sends to both, only there."""

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    handlers: dict[int, Callable[[int, FrameType | None], None] | signal.Handlers] = {
        signal.SIGTERM: pass_on,
        signal.SIGINT: signal.SIG_IGN,
    }
    if hasattr(signal, "SIGUSR1"):  # Windows has none
        handlers[signal.SIGUSR1] = pass_on
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _compare(folders: Sequence[Path], console: Console) -> None:
    """A table of the runs, and a page where there are several."""
    from lora_core.report.folders import describe_run, table
    from lora_core.report.page import compare_reports
    from lora_core.report.read import read_run

    runs = [read_run(folder) for folder in folders if (folder / "config.yaml").is_file()]
    if not runs:
        return
    console.say("\n" + table([describe_run(run) for run in runs]), "always")
    if len(runs) > 1:
        page = compare_reports([run.folder for run in runs], runs[0].folder.parent / "report.html")
        console.say(f"comparison: {page}", "always")
