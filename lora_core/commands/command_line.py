"""What the commands share: one command line, quiet libraries, errors as sentences, exit codes."""

from __future__ import annotations

import argparse
import difflib
import errno
import gc
import itertools
import logging
import math
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from lora_core.config.keys import config_keys
from lora_core.config.schema import RunConfig
from lora_core.config.synonyms import SAME, sectionless
from lora_core.configuration import load_config, read_translation
from lora_core.errors import ConfigError, LoraCoreError, RankFault
from lora_core.runtime.launcher import end_accelerate_launch, speaks_for_machine
from lora_core.untrusted.text import showable

# The disk, not the program: full, over a quota, read-only, a file too large, broken.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code.

    0 done, 1 a fault while running, 2 a configuration or data error, 3 a check failed (verify), 75 stopped by
    a signal with a checkpoint written, 130 interrupted at once.
    """
    sys.excepthook = _print_fault
    try:
        command()
    except LoraCoreError as error:
        # Every rank finds the same mistake, and one of each machine says so: a file may be missing on one alone.
        # A fault is said where it is found.
        alone = "" if error.only_rank is None else f"rank {error.only_rank}: "
        if speaks_for_machine() or alone or isinstance(error, RankFault):
            print(f"\nerror: {alone}{error}", file=sys.stderr, flush=True)
        end_accelerate_launch()
        return error.exit_code
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"\nerror: {showable(str(error))}; fix: free disk space, or output_dir=ANOTHER_FOLDER", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _print_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of lora_core itself: the traceback as Python prints it, which may quote anything."""
    print(showable("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr)


@dataclass(frozen=True)
class Command:
    """One subcommand of `lora-core`."""

    summary: str
    """One line for `lora-core --help`; the first line of the command's own help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Raises `LoraCoreError` for what the user or the data did wrong."""


class Parser(argparse.ArgumentParser):
    """argparse's, with untrusted text made safe to print."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2; the message quotes the command line."""
        # argparse counts a list that may be empty among what is missing.
        super().error(showable(message.replace("required: RUN, key=value", "required: RUN")))

    def refuse_unknown_options(self, given: Sequence[str]) -> None:
        """Exit with 2 and name an option that there is not: argparse names one that is missing in its place."""
        options = [option for action in self._actions for option in action.option_strings]
        for word in itertools.takewhile(lambda word: word != "--", given):
            name = word.partition("=")[0]
            is_option = name.startswith("-") and re.fullmatch(r"-+[A-Za-z][\w.-]*", name) is not None
            if is_option and not any(option.startswith(name) for option in options):
                self.error(f"no such option: {name}; {_instead(name, word, options)}")


def _instead(name: str, word: str, options: Sequence[str]) -> str:
    """What was meant by an option that there is not: another one, or a key of the configuration."""
    key = name.lstrip("-").replace("-", "_")
    known = sectionless(key) or SAME.get(key) or (key if key in config_keys() else None)
    if known is not None:
        return f"fix: {known}={shlex.quote(value) if (value := word.partition('=')[2]) else 'VALUE'}"
    near = difflib.get_close_matches(f"--{key}", options, n=1, cutoff=0.7)
    return f"fix: {near[0]}" if near else "keys of a configuration are given as key=value, without dashes"


def add_config_arguments(
    parser: argparse.ArgumentParser, default: str | None = None, *other_names: str, is_required: bool = True
) -> None:
    """`--cfg NAME [--model ID] [key=value ...]`, with every key in the help.

    Args:
        default: the configuration where `--cfg` is not given; None is to ask for it.
        other_names: what `--cfg` may also be called.
        is_required: without a default, whether to refuse a command line without `--cfg`.
    """
    parser.add_argument(
        "--cfg",
        *other_names,
        required=is_required and default is None,
        default=default,
        metavar="NAME",
        help="a shipped configuration, such as qwen7b, or a file: YAML, or another tool's (see docs/configs.md)",
    )
    parser.add_argument("--model", metavar="ID", help="which model of an old training_args.yaml, keyed by model id")
    add_overrides(parser, "train.num_train_epochs=3")


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """`[key=value ...]`, with every key in the help."""
    keys = "\n".join(f"  {key}\n      {text}" for key, text in config_keys().items())
    parser.epilog = f"keys, for key=value and for the YAML file:\n{keys}"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"override any key: {example}")


def add_base_overrides(parser: argparse.ArgumentParser) -> None:
    """`[key=value ...]` of a command that reads a run's settings and has few of its own."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="in place of a setting of the run: model.name_or_path=FOLDER where the base model has moved",
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """`--num-processes` and `--gpu-memory-gib`; see `check_machine`."""
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="devices of the run to plan for")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="GIB", help="plan for a GPU of this size, not for here")


def check_machine(arguments: argparse.Namespace) -> None:
    """Refuse what no machine has.

    Raises:
        ConfigError: there are no processes, or the GPU has no memory.
    """
    if arguments.num_processes < 1:
        raise ConfigError(f"--num-processes {arguments.num_processes}: must be at least 1; fix: --num-processes 1")
    memory = arguments.gpu_memory_gib
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--gpu-memory-gib {memory:g}: must be above 0; fix: --gpu-memory-gib 24")


def new_file(option: str, given: str | None) -> Path | None:
    """The file that an option names, for a command to write.

    Raises:
        ConfigError: it exists, or its folder does not.
    """
    if given is None:
        return None
    path = Path(given).expanduser()
    if path.exists():
        raise ConfigError(f"{option} {path}: exists, and would be lost; fix: another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: no folder {path.parent}; fix: make it first, or another name")
    return path


def load_config_of(arguments: argparse.Namespace, *more: str, quiet: bool = False) -> RunConfig:
    """The configuration that `add_config_arguments` asked for; says what became of another tool's file.

    Args:
        more: further overrides.
        quiet: say nothing.

    Raises:
        ConfigError: as `load_config`.
    """
    translation = read_translation(arguments.cfg, arguments.model)
    if translation is not None and not quiet:
        say_first(showable(f"{translation}\n"))
    return load_config(arguments.cfg, [*arguments.overrides, *more], arguments.model)


def say_first(line: str) -> None:
    """Say, once for all processes of a run, what is about to take some seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch and the like in this block with the garbage collector off, which never looks at what they made.

    Half a million objects come with them and stay. Walking them again and again is a fifth of the imports' time, and
    two thirds of the time that loading a tokenizer takes after them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Keep off the console what a user can do nothing about: loading bars, deprecations inside libraries, hints.

    For commands; importing lora_core changes none of this.
    """
    # Forty lines of addresses above the sentence that names a lost rank. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # torch's autograd thread is the first to use the GPU's context, and says so.
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
