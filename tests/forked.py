"""Python commands in processes of their own, forked from one that has imported the libraries: importing them takes ten
seconds of a CPU each time.

What a library reads from the environment at its import has the value that it had in the test's own process. Ranks are
new processes: in a fork, gloo's thread has been seen to crash.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Nothing here computes: torch's threads for backward would not live on in a fork.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "lora_core.commands.main",
        "lora_core.training.setup",
        "lora_core.training.finish",
        "lora_core.preflight.preflight",
        "datasets",
        "matplotlib.figure",
        "peft",
        "transformers.models.qwen2.modeling_qwen2",
        "tests.forked",
    ]
)


class Forked:
    """`python ARGUMENTS...`, started: a script with its arguments, `-m` and a module, or `-c` and code with theirs."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        """
        Args:
            environment: what it has besides the variables of this process.
            max_file_bytes: no file that it writes may grow larger, which stands for a full disk.
        """
        self._arguments = arguments
        pipes = [_FORKS.Pipe(duplex=False) for _ in range(2)]
        variables = {**os.environ, **(environment or {})}
        ends = [written for _, written in pipes]
        self.process = _FORKS.Process(target=_run, args=(arguments, cwd, variables, max_file_bytes, *ends))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        for end in ends:
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(read.fileno()), encoding="utf-8") for read, _ in pipes)

    def wait(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """What it has printed from here on, and its exit code, at its end."""
        printed = {"stdout": "", "stderr": ""}

        def read(name: str) -> None:
            printed[name] = getattr(self, name).read()

        # Not waited for past the timeout: what the process has started may hold the pipes open.
        readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in printed]
        for reader in readers:
            reader.start()
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self._arguments} ran for more than {timeout_s} s")
        for reader in readers:
            reader.join(timeout_s)
        assert not any(reader.is_alive() for reader in readers), (
            f"{self._arguments} left a process that holds its pipes"
        )
        self.stdout.close()
        self.stderr.close()
        return subprocess.CompletedProcess([*self._arguments], self.process.exitcode, **printed)


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...`; the settings are those of `Forked`."""
    return Forked(*arguments, **settings).wait()


def on_ranks(
    processes: int, *arguments: str, local_ranks: Sequence[int] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run it as so many ranks, with the environment that torchrun gives each; returns what became of each.

    Args:
        local_ranks: of each its number on its machine; default: all are on one.
    """
    return [rank.wait() for rank in start_ranks(processes, *arguments, local_ranks=local_ranks)]


class Rank:
    """`python ARGUMENTS...` as one of several ranks, started as a new process."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        variables = {**os.environ, **environment}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=variables, **pipes)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        self.stdout = self.process.stdout

    def wait(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """What it has printed from here on, and its exit code, at its end."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, stdout, stderr)


def start_ranks(processes: int, *arguments: str, local_ranks: Sequence[int] | None = None) -> list[Rank]:
    """The ranks of `on_ranks`, started."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    everywhere |= {"WORLD_SIZE": str(processes)} | ({} if local_ranks else {"LOCAL_WORLD_SIZE": str(processes)})
    return [
        Rank(arguments, {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(local_rank)})
        for rank, local_rank in enumerate(local_ranks or range(processes))
    ]


def _run(
    arguments: Sequence[str],
    cwd: Path,
    variables: Mapping[str, str],
    max_file_bytes: int | None,
    stdout: Connection,
    stderr: Connection,
) -> None:
    """In the forked process."""
    for number, pipe in ((1, stdout), (2, stderr)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")
