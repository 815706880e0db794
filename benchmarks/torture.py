"""Claim: killed, stopped, starved of disk or damaged at any instant, a run resumes to the same adapter, bit for bit.

    HF_HUB_OFFLINE=1 python -m benchmarks.torture
    HF_HUB_OFFLINE=1 python -m benchmarks.torture --quick

Run it in the repository root, on Linux; it took half an hour on a core that other work shared, the small end
(`--quick`) four minutes. It trains a random two-layer Qwen2 on 22 rows: 9 steps, a checkpoint after each, in four
settings (packed and padded, 8-bit and torch's AdamW, NF4, accumulation, always with dropout). A run that nothing
disturbs comes first; what was disturbed and resumed must leave the same adapter, byte by byte, and log the same
losses and gradient norms. Each run is a process of its own that executes `launch/train.py`, forked from one that has
imported everything, because a start costs some seconds of imports. Several ranks are started by torchrun.

The kill matrix (`--matrix` tries it alone): runs on 1, 2 and 4 ranks under DDP and FSDP2 are killed, and resumed on
as many ranks, to end with the same bits, and on others, to end as one rank does, up to rounding.

Prints a table and writes `benchmarks/torture.json`; exit code 1 if a bar was missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil
from safetensors.torch import load_file

from lora_core.checkpoints.checkpoint import find_checkpoint
from lora_core.errors import ConfigError
from lora_core.runtime.run_folder import write_json
from lora_core.watch.summary import versions
from tests.equivalence.one_rank import build_sharding_accelerator
from tests.tiny import ROOT, chat, make_tokenizer, save_tiny_model, write_jsonl

NUM_STEPS = 9
END_WITHIN_S = 120
"""A run that has not ended by then hangs; undisturbed it takes 2 s."""

COMMON = shlex.split(
    "--cfg demo train.num_train_epochs=3 train.learning_rate=1e-3 train.save_steps=1 train.num_sample_replies=0 "
    "lora.dropout=0.1 data.max_seq_length=64 preflight.allow=[disk_too_small]"  # where the disk is full on purpose
)
# Each makes 9 steps of 8 rows. bitsandbytes keeps 8-bit state for tensors of 4,096 numbers or more: rank 64 makes them.
SETTINGS = {
    "packed, 8-bit": "lora.rank=64 train.optim=paged_adamw_8bit",
    "padded, torch": "data.packing=false train.optim=adamw_torch "
    "train.per_device_train_batch_size=8 train.gradient_accumulation_steps=1",
    "NF4, 8-bit": "model.quantization=nf4 lora.rank=64 train.optim=paged_adamw_8bit",
    "packed, 4 micro-batches": "lora.rank=64 train.optim=paged_adamw_8bit train.max_tokens_per_device_batch=64",
}
TWO_RANKS = "two ranks", "lora.rank=64 train.gradient_accumulation_steps=2"

# What a run imports, in the process that all runs are forked from.
PRELOAD = [
    "bitsandbytes.optim.adamw",
    "datasets",
    "lora_core.commands.command_line",
    "lora_core.report.page",
    "lora_core.training.setup",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "matplotlib.style",
    "peft",
    "psutil",
    "pydantic.type_adapter",
    "tests.equivalence.one_rank",
    "tests.tiny",
    "torch.distributed.run",
    "transformers.integrations.bitsandbytes",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.optimization",
]


Sharding = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Run:
    """How a run is started, and what it leaves if nothing disturbs it."""

    name: str
    arguments: Sequence[str]
    ranks: int
    folder: Path
    """Of the undisturbed run; it keeps every checkpoint."""
    sharding: Sharding = "ddp"
    duration_s: float = 0.0
    save_s: float = 0.0
    """About one save."""


@dataclass(frozen=True)
class Started:
    """A run in a process of its own."""

    process: BaseProcess
    folder: Path
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> int | str:
        """The exit code, once it has ended (a signal's number, negative); in words, if it hung and was killed."""
        self.process.join(END_WITHIN_S)
        if self.process.exitcode is None:
            for process in session_of(self.process):
                process.kill()
            return f"hung: had not ended after {END_WITHIN_S} s"
        return self.process.exitcode


def start(run: Run, folder: Path, *more: str) -> Started:
    log = folder.with_name(f"{folder.name}.log")
    log.write_bytes(b"")
    arguments = [*run.arguments, f"output_dir={folder}", *more]
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOAD)
    process = forks.Process(target=command_line, args=(arguments, log, run.ranks, run.sharding))
    process.start()
    return Started(process, folder, log)


def command_line(arguments: Sequence[str], log: Path, ranks: int, sharding: Sharding) -> None:
    """In the child: what `python launch/train.py ...` does, or torchrun. A session of its own, so that no process of
    it can be lost from sight."""
    if sharding == "fsdp2":  # which Accelerate turns on for GPUs only; the ranks are forked from here
        importlib.import_module("lora_core.training.setup").build_accelerator = build_sharding_accelerator  # type: ignore[attr-defined]
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # what started this process is none of the run's business
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(ROOT)
    if ranks == 1 and sharding == "ddp":
        sys.argv = ["launch/train.py", *arguments]
        runpy.run_path("launch/train.py", run_name="__main__")
    else:  # its workers are forked and run the script, in place of starting Python anew
        torchrun = ["--standalone", "--run-path", "--start-method", "fork", "--nproc-per-node", str(ranks)]
        sys.argv = ["torchrun", *torchrun, "launch/train.py", *arguments]
        runpy.run_module("torch.distributed.run", run_name="__main__")


def session_of(process: BaseProcess) -> list[psutil.Process]:
    """The processes of a run that are alive."""
    found = []
    for other in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
    return found


def make_inputs(work: Path) -> list[str]:
    """Model, tokenizer and rows, made once; returns the overrides that name them."""
    save_tiny_model(work / "model", make_tokenizer())
    rows = write_jsonl(work / "rows.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(22)])
    return [
        f"model.name_or_path={work / 'model'}",
        f"data.train_file={rows}",
        f"data.eval_file={rows}",
        f"data.cache_dir={work / 'cache'}",
    ]


def undisturbed(
    work: Path,
    inputs: Sequence[str],
    name: str,
    settings: str,
    ranks: int = 1,
    sharding: Sharding = "ddp",
    times: int = 2,
) -> Run:
    """Run once for the caches, and once for time and results."""
    folder = work / f"undisturbed-{name.replace(' ', '-')}"
    run = Run(name, [*COMMON, *shlex.split(settings), *inputs], ranks, folder, sharding)
    for _ in range(times):
        started_at = time.monotonic()
        started = start(run, run.folder, f"train.save_total_limit={NUM_STEPS}")
        if started.end() != 0:
            sys.exit(f"error: {name} failed undisturbed:\n{started.said}")
        run = replace(run, duration_s=time.monotonic() - started_at)
    first = run.folder / "checkpoints/step-000001"
    # From the first file's last byte to the folder's own name: the renaming changes the folder itself.
    return replace(run, save_s=first.stat().st_ctime - (first / "adapter.safetensors").stat().st_mtime)


@dataclass(frozen=True)
class Instant:
    """So long after the start, or after a step was logged, or after its save began."""

    after: Literal["start", "step", "save"]
    step: int
    delay_s: float

    def wait(self, started: Started) -> bool:
        """Until then. False if the run has ended before."""
        while not self._has_come(started.folder):
            if not started.process.is_alive():
                return False
            time.sleep(0.001)
        started.process.join(self.delay_s)
        return started.process.is_alive()

    def _has_come(self, folder: Path) -> bool:
        if self.after == "save":
            return any((folder / "checkpoints").glob(f"*step-{self.step:06d}*"))
        return self.after == "start" or (bool(metrics(folder)) and logged_steps(folder) >= self.step)

    def __str__(self) -> str:
        event = "the start" if self.after == "start" else f"{self.after} {self.step}"
        return f"{self.delay_s * 1000:.1f} ms after {event}"


def draw_instant(draw: random.Random, run: Run, index: int) -> Instant:
    """By turns anywhere in the run, and inside a save."""
    if index % 2 == 0:
        return Instant("start", 0, draw.uniform(0, run.duration_s))
    return Instant("save", draw.randint(1, NUM_STEPS - 1), draw.uniform(0, 1.5 * run.save_s))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The events that are written in full."""
    events = []
    with suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
    return events


def logged_steps(folder: Path) -> int:
    return max((event["step"] for event in metrics(folder) if event["event"] == "train"), default=0)


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders of writes that were cut off."""
    return sorted(path.name for path in [*folder.glob(".*"), *folder.glob("checkpoints/.*")])


def hit(folder: Path) -> str:
    """What a kill met."""
    if any(folder.glob("checkpoints/.step-*")):
        return "a save"
    if any(folder.glob(".*")):
        return "the writing of another file"
    steps = logged_steps(folder)
    return "before the first step" if steps == 0 else "after the last" if steps == NUM_STEPS else "between saves"


def newest_whole(folder: Path) -> int | None:
    """Its step; None if the run holds no whole checkpoint."""
    try:
        return find_checkpoint(folder, None, lambda _: None, may_rename=False).step
    except ConfigError:
        return None


def taken_for_whole(run: Run, folder: Path) -> list[str]:
    """Checkpoints that `--resume PATH` would take, and whose tensors are not those of the undisturbed run."""

    def tensors(checkpoint: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}

    wrong = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        with suppress(ConfigError):
            find_checkpoint(folder, path, lambda _: None, may_rename=False)
            undisturbed = run.folder / "checkpoints" / path.name
            # There is none of step 0: a signal in the first step alone leaves one.
            if undisturbed.is_dir() and tensors(path) != tensors(undisturbed):
                wrong.append(path.name)
    return wrong


def same_as_undisturbed(run: Run, folder: Path) -> str | None:
    """What differs from the undisturbed run; None if nothing does."""
    adapter, theirs = (each / "adapter/adapter_model.safetensors" for each in (folder, run.folder))
    if adapter.read_bytes() != theirs.read_bytes():
        return "the adapter differs"
    keys = ("event", "step", "loss", "grad_norm")
    losses, their_losses = (
        [[event.get(key) for key in keys] for event in metrics(each)] for each in (folder, run.folder)
    )
    return None if losses == their_losses else "logged losses differ"


def equal_up_to_rounding(run: Run, folder: Path) -> str | None:
    """What differs from the undisturbed run by more than 1e-5 of its size; None if nothing does."""
    ours, theirs = (load_file(each / "adapter/adapter_model.safetensors") for each in (folder, run.folder))
    greatest = max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)
    losses, their_losses = (
        [event["loss"] for event in metrics(each) if event["event"] in ("train", "eval")]
        for each in (folder, run.folder)
    )
    if len(losses) != len(their_losses):
        return f"{len(losses)} losses were logged, not {len(their_losses)}"
    greatest = max(greatest, *(abs(one - other) / other for one, other in zip(losses, their_losses, strict=True)))
    return f"adapter or losses differ by {greatest:.1e} of their size" if greatest > 1e-5 else None


@dataclass(frozen=True)
class Case:
    """One run that was disturbed, and what became of it."""

    run: str
    disturbed: str
    hit: str
    exit_code: int | str
    resumed_from: int | None
    """Step of the checkpoint that it resumed from; None: there was none, and the run was started anew."""
    left_in_the_end: list[str]
    """Temporary files, after the resumed run."""
    damaged_taken: list[str]
    problem: str | None
    """What missed the bar."""
    ended_after_s: float
    """How long its processes lived after the disturbance was over; of two ranks, torchrun and the other rank."""

    def __str__(self) -> str:
        resumed = "started anew" if self.resumed_from is None else f"resumed from step {self.resumed_from}"
        taken = f"; damaged taken for whole: {', '.join(self.damaged_taken)}" if self.damaged_taken else ""
        missed = f"; {self.problem}" if self.problem else ""
        return f"{self.run}: {self.disturbed}: hit {self.hit}; exit code {self.exit_code}; {resumed}{taken}{missed}"


Verdict = Callable[[Started, int | str], str | None]
"""(a run that has ended, its exit code) -> what missed the bar."""


def examine(run: Run, started: Started, disturbed: str, verdict: Verdict, resumed_as: Run | None = None) -> Case:
    """Let it end, look at what was left, resume it, and compare.

    Args:
        resumed_as: on another number of ranks: a run that it ends as up to rounding.
    """
    disturbed_at, folder = time.monotonic(), started.folder
    exit_code = started.end()
    case = Case(
        run=run.name,
        disturbed=disturbed,
        hit=hit(folder),
        exit_code=exit_code,
        resumed_from=newest_whole(folder),
        left_in_the_end=[],
        damaged_taken=taken_for_whole(run, folder) if resumed_as is None else [],
        problem=verdict(started, exit_code),
        ended_after_s=time.monotonic() - disturbed_at,
    )
    resumed = start(resumed_as or run, folder, *([] if case.resumed_from is None else ["--resume"]))
    code = resumed.end()
    compare = same_as_undisturbed if resumed_as is None else equal_up_to_rounding
    after = (
        compare(resumed_as or run, folder) if code == 0 else f"resumed, it ended with {code}: {resumed.said[-2000:]}"
    )
    return replace(case, left_in_the_end=leftovers(folder), problem=case.problem or after)


def collect(
    name: str,
    runs: Sequence[Run],
    count: int,
    work: Path,
    choose: Callable[[Run, int], Instant],
    disturb: Callable[[Run, Started, Instant], Case | None],
    fresh_every: int = 0,
) -> list[Case]:
    """Start runs and disturb each at its instant, until so many were met; one that had ended by then does not count.

    Args:
        fresh_every: every so many, a run has no encoded rows yet.
    """
    cases: list[Case] = []
    while len(cases) < count:
        index, folder = len(cases), work / f"{name}-{len(cases):03d}"
        run = runs[index % len(runs)]
        instant = choose(run, index)
        fresh = bool(fresh_every) and index % fresh_every == 0
        started = start(run, folder, *([f"data.cache_dir={folder}-cache"] if fresh else []))
        case = disturb(run, started, instant) if instant.wait(started) else None
        started.end()
        cases += [] if case is None else [case]
        shutil.rmtree(folder, ignore_errors=True)
    return cases


def kill_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """SIGKILL at `count` instants inside a run, by turns anywhere and inside a save. Some have no encoded rows yet."""

    def disturb(run: Run, started: Started, instant: Instant) -> Case:
        started.process.kill()
        return examine(run, started, str(instant), lambda *_: None)

    twice = [run for run in runs for _ in range(2)]
    return collect("kill", twice, count, work, partial(draw_instant, draw), disturb, fresh_every=4)


def rank_cases(run: Run, count: int, draw: random.Random, work: Path) -> list[Case]:
    """SIGKILL to one of two ranks; torchrun must end, and nothing of it may stay."""

    def disturb(run: Run, started: Started, instant: Instant) -> Case | None:
        ranks = sorted(psutil.Process(started.process.pid).children(), key=lambda child: child.pid)
        if len(ranks) != run.ranks:  # not yet, or no longer, at the ends of the run
            return None
        rank = draw.randrange(run.ranks)
        ranks[rank].kill()
        return examine(run, started, f"rank {rank}, {instant}", still_there)

    return collect("rank", [run], count, work, partial(draw_instant, draw), disturb)


def still_there(started: Started, exit_code: int | str) -> str | None:
    if isinstance(exit_code, str):
        return exit_code
    _, orphans = psutil.wait_procs(session_of(started.process), timeout=10)
    for process in orphans:
        process.kill()
    return f"orphans: {[process.pid for process in orphans]}" if orphans else None


SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2")
RANKS = (1, 2, 4)
RESUMED_ON = {1: 2, 2: 4, 4: 1}


@dataclass(frozen=True)
class Cell:
    """One cell of the kill matrix."""

    sharding: Sharding
    ranks: int
    resumed_on: int
    cases: Sequence[Case]


def kill_matrix(work: Path, inputs: Sequence[str], count: int, ranks: Sequence[int], draw: random.Random) -> list[Cell]:
    """SIGKILL to all processes of a run at `count` random instants a cell, resumed on as many ranks and on others.

    On as many ranks it must end with the same bits, with dropout; on others as one rank does up to rounding, without,
    and in float32: other ranks cut a step into other micro-batches, whose rounding in bfloat16 is a hundredth.
    """
    for_rounding = ["lora.dropout=0", "train.bf16=false", "model.dtype=float32"]  # the last of two values holds

    def run_on(number: int, sharding: Sharding, *more: str) -> Run:
        name = " ".join([sharding, str(number), *more])
        settings = ["train.optim=adamw_torch", f"train.gradient_accumulation_steps={4 // number}", *more]
        return undisturbed(work, inputs, name, shlex.join(settings), number, sharding, times=1)

    reference, cells = run_on(1, "ddp", *for_rounding), []
    for number in ranks:
        for sharding in SHARDINGS:
            say(f"kill matrix: {sharding}, {number} ranks")
            run = run_on(number, sharding)
            same = matrix_cases(run, None, count, draw, work)
            cells.append(Cell(sharding, number, number, same))
            settings = [*run.arguments, *for_rounding]
            on_others = replace(reference, arguments=settings, ranks=RESUMED_ON[number], sharding=sharding)
            others = matrix_cases(replace(run, arguments=settings), on_others, count, draw, work)
            cells.append(Cell(sharding, number, on_others.ranks, others))
    return cells


def matrix_cases(run: Run, resumed_as: Run | None, count: int, draw: random.Random, work: Path) -> list[Case]:
    def choose(run: Run, index: int) -> Instant:
        # Once a checkpoint is whole: what is started anew on other ranks has other steps.
        if index % 2 == 0:
            return Instant("step", draw.randint(2, NUM_STEPS - 2), draw.uniform(0, run.duration_s / 2 / NUM_STEPS))
        return Instant("save", draw.randint(3, NUM_STEPS - 1), draw.uniform(0, 1.5 * run.save_s))

    def disturb(run: Run, started: Started, instant: Instant) -> Case:
        os.killpg(started.process.pid or 0, signal.SIGKILL)  # torchrun and all ranks, as when a machine goes
        return examine(run, started, str(instant), still_there, resumed_as)

    return collect("matrix", [run], count, work, choose, disturb)


def row_of_cell(cell: Cell) -> Row:
    ranks = f"{cell.ranks} rank{'s' if cell.ranks > 1 else ''}"
    is_same = cell.resumed_on == cell.ranks
    what = f"{cell.sharding.upper()}, {ranks}, resumed on {cell.resumed_on}, killed {len(cell.cases)} times"
    held = sum(case.problem is None for case in cell.cases)
    measured = f"{held} of {len(cell.cases)}; {hits_of(cell.cases)}"
    return Row(what, "the same bits" if is_same else "equal up to rounding", measured, cell.cases)


def stop_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> tuple[list[Case], Counter[str]]:
    """SIGTERM at `count` instants inside the loop; and how many came before it and after it, which do not count."""
    outside: Counter[str] = Counter()

    def choose(run: Run, index: int) -> Instant:
        return Instant("step", draw.randint(0, NUM_STEPS - 1), draw.uniform(0, run.duration_s / 2 / NUM_STEPS))

    def disturb(run: Run, started: Started, instant: Instant) -> Case | None:
        os.kill(started.process.pid or 0, signal.SIGTERM)
        exit_code, steps = started.end(), logged_steps(started.folder)
        if exit_code == -signal.SIGTERM and steps in (0, NUM_STEPS):
            outside["before the loop" if steps == 0 else "after it"] += 1
        elif exit_code == 0 and same_as_undisturbed(run, started.folder) is None:
            outside["in the last step"] += 1
        else:
            return examine(run, started, str(instant), badly_stopped)
        return None

    return collect("stop", runs, count, work, choose, disturb), outside


def badly_stopped(started: Started, exit_code: int | str) -> str | None:
    steps, saved = logged_steps(started.folder), newest_whole(started.folder)
    if exit_code != 75:
        return f"exit code {exit_code}, not 75: {started.said[-2000:]}"
    return None if saved == steps else f"{steps} steps were taken, the newest checkpoint is of step {saved}"


def limit_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """No file may grow past a limit, from some step on: the next save ends in the midst of a file."""

    def choose(run: Run, index: int) -> Instant:
        return Instant("step", draw.randint(2, NUM_STEPS - 2), 0)

    def disturb(run: Run, started: Started, instant: Instant) -> Case:
        largest = max(file.stat().st_size for file in (run.folder / "checkpoints/step-000001").iterdir())
        limit = draw.randrange(16_384, largest)  # metrics.jsonl and the log are smaller
        resource.prlimit(started.process.pid or 0, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        disturbed = f"no file over {limit:,} bytes, from step {instant.step} on"
        return examine(run, started, disturbed, partial(badly_starved, least_step=instant.step - 1))

    return collect("limit", runs, count, work, choose, disturb)


PAGE = resource.getpagesize()


def full_disk_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """A small file system of its own, which the second save fills: in each of its files, by turns."""
    cases = []
    for index in range(count):
        run = runs[index % len(runs)]
        point, before = draw_page(run, index, draw)
        disk = work / f"disk-{index:03d}"

        def starved_then_room(started: Started, exit_code: int | str, disk: Path = disk) -> str | None:
            problem = badly_starved(started, exit_code, least_step=1)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            return problem

        with small_disk(disk, before * PAGE):
            cases.append(examine(run, start(run, disk / "run"), f"full at {point}", starved_then_room))
    return cases


def pages(files: Sequence[Path]) -> int:
    return sum(-(-file.stat().st_size // PAGE) for file in files)


def draw_page(run: Run, index: int, draw: random.Random) -> tuple[str, int]:
    """(where the second save ends, in words; pages of a disk on which it ends there)."""
    names = ["adapter.safetensors", "optimizer.safetensors", "rng-00000.safetensors", "state.json", "manifest.json"]
    files = [run.folder / "checkpoints/step-000001" / name for name in names]  # in the order in which they are written
    chosen = files[index // 4 % len(files)]
    page = draw.randrange(pages([chosen]))
    around = [run.folder / name for name in ("config.yaml", "preflight.json", "rows.json")]
    log, events = 2, 1
    full = pages(around) + log + events + pages(files) + pages(files[: files.index(chosen)]) + page
    return f"page {page} of {chosen.name}", full


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def may_mount(work: Path) -> bool:
    try:
        with small_disk(work / "may-mount", PAGE):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def badly_starved(started: Started, exit_code: int | str, least_step: int) -> str | None:
    saved = newest_whole(started.folder)
    if exit_code != 1 or "Traceback" in started.said or "could not be written" not in started.said:
        return f"exit code {exit_code}, and not a sentence on what could not be written: {started.said[-2000:]}"
    return None if saved and saved >= least_step else f"step {least_step} was saved, the newest whole one is {saved}"


@dataclass(frozen=True)
class Damage:
    """One way to spoil one file of a checkpoint."""

    file: str
    way: Literal["flipped", "cut"]
    first: int
    """The first byte that is not as it was."""
    length: int
    problem: str | None = None

    def __str__(self) -> str:
        missed = f"; {self.problem}" if self.problem else ""
        return f"{self.file}: {self.length} bytes from {self.first} on {self.way}{missed}"


def damage_cases(run: Run, count: int, draw: random.Random, work: Path) -> list[Damage]:
    """A checkpoint's files, damaged one at a time; the checkpoint before it is whole.

    Each file in equally many ranges; in each range some bytes are changed, and the file is cut. At least `count`.
    """
    folder = work / "damage"
    for step in (NUM_STEPS - 2, NUM_STEPS - 1):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(run.folder / name, folder / name)
    checkpoint = folder / f"checkpoints/step-{NUM_STEPS - 1:06d}"
    files = sorted(checkpoint.iterdir())
    num_ranges = -(-count // (2 * len(files)))
    damages = []
    for file in files:
        size = file.stat().st_size
        edges = [size * index // num_ranges for index in range(num_ranges + 1)]
        for low, high in pairwise(edges):
            first = draw.randrange(low, high)
            damages.append(Damage(file.name, "flipped", first, draw.randint(1, high - first)))
            cut = size - 1 if high == size else first  # the last byte alone, too
            damages.append(Damage(file.name, "cut", cut, size - cut))
    cases = [try_damage(checkpoint, damage, draw) for damage in damages]
    shutil.rmtree(folder)
    return cases


def try_damage(checkpoint: Path, damage: Damage, draw: random.Random) -> Damage:
    """Spoil the file, see what `find_checkpoint` says, and put the file back."""
    file = checkpoint / damage.file
    content = file.read_bytes()
    spoilt = bytearray(content[: damage.first] if damage.way == "cut" else content)
    if damage.way == "flipped":
        for index in range(damage.first, damage.first + damage.length):
            spoilt[index] ^= draw.randint(1, 255)
    file.write_bytes(spoilt)
    folder = checkpoint.parent.parent
    try:
        find_checkpoint(folder, checkpoint, lambda _: None, may_rename=False)
        problem = "taken for whole"
    except ConfigError as error:
        taken = newest_whole(folder)
        problem = None if taken == NUM_STEPS - 2 else f"step {taken} was taken in its place"
        if damage.file not in str(error):
            problem = f"not named: {error}"
    file.write_bytes(content)
    return replace(damage, problem=problem)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    bar: str
    measured: str
    cases: Sequence[Case | Damage]

    @property
    def missed(self) -> list[Case | Damage]:
        return [case for case in self.cases if case.problem or (isinstance(case, Case) and case.damaged_taken)]


def summary_of(cases: Sequence[Case]) -> str:
    """What all cases but the damaged files have in common."""
    same = sum(case.problem is None for case in cases)
    taken = sum(len(case.damaged_taken) for case in cases)
    anew = sum(case.resumed_from is None for case in cases)
    text = f"{same} of {len(cases)} bit-identical, {taken} damaged taken for whole"
    return text + (f", killed before the first checkpoint and started anew: {anew}" if anew else "")


def hits_of(cases: Sequence[Case]) -> str:
    hits = ", ".join(f"{name} {number}" for name, number in Counter(case.hit for case in cases).most_common())
    return f"hit: {hits}; temporary files left in the end: {sum(bool(case.left_in_the_end) for case in cases)}"


def exits_of(cases: Sequence[Case]) -> str:
    counts = Counter(str(case.exit_code) for case in cases).most_common()
    return "exit code " + ", ".join(f"{code} ({number})" for code, number in counts)


def torture(work: Path, quick: bool, seed: int) -> Iterator[Row]:
    draw = random.Random(seed)
    many, some, damages = (8, 2, 40) if quick else (100, 20, 200)
    inputs = make_inputs(work)
    say("undisturbed runs")
    runs = [undisturbed(work, inputs, name, settings) for name, settings in SETTINGS.items()]

    say(f"SIGKILL, {many} times")
    cases = kill_cases(runs, many, draw, work)
    bar = f"{many} bit-identical, 0 damaged taken for whole"
    yield Row(f"SIGKILL at {many} instants", bar, f"{summary_of(cases)}; {hits_of(cases)}", cases)

    say(f"SIGTERM, {some} times")
    cases, outside = stop_cases(runs, some, draw, work)
    apart = "".join(f"; {number} more came {when}" for when, number in outside.items())
    bar = f"{some} checkpoints, exit code 75, bit-identical"
    yield Row(f"SIGTERM at {some} instants", bar, f"{exits_of(cases)}, {summary_of(cases)}{apart}", cases)

    say(f"disk full, {some} times")
    bar = f"checkpoint before whole {some} of {some}, exit code 1"
    cases = limit_cases(runs, some, draw, work)
    yield Row(f"files limited in size, {some}", bar, f"{exits_of(cases)}, {summary_of(cases)}", cases)
    if may_mount(work):
        cases = full_disk_cases(runs, some, draw, work)
        yield Row(f"disk full at {some} pages of a save", bar, f"{exits_of(cases)}, {summary_of(cases)}", cases)
    else:
        say("disk full on a file system of its own: left out, a tmpfs may not be mounted")

    say(f"damage, {damages} times")
    damaged = damage_cases(runs[0], damages, draw, work)
    found, files = sum(damage.problem is None for damage in damaged), len({damage.file for damage in damaged})
    what = f"checkpoint damaged: {len(damaged)} byte ranges of its {files} files flipped or cut"
    yield Row(what, "all detected by name", f"{found} of {len(damaged)}, and the checkpoint before taken", damaged)

    say(f"one rank of two killed, {some} times")
    cases = rank_cases(undisturbed(work, inputs, *TWO_RANKS, ranks=2), some, draw, work)
    slowest = f"all ended within {max(case.ended_after_s for case in cases):.1f} s"
    bar = f"{some} bit-identical, the others end, no orphan"
    measured = f"{summary_of(cases)}, {slowest}; {hits_of(cases)}"
    yield Row(f"SIGKILL to one rank of two, {some}", bar, measured, cases)
    yield from matrix_rows(work, inputs, quick, draw)


def matrix_rows(work: Path, inputs: Sequence[str], quick: bool, draw: random.Random) -> Iterator[Row]:
    """All of the kill matrix; the small end is one kill a cell, on two ranks."""
    for cell in kill_matrix(work, inputs, 1 if quick else 2, [2] if quick else RANKS, draw):
        yield row_of_cell(cell)


def matrix_alone(work: Path, quick: bool, seed: int) -> Iterator[Row]:
    return matrix_rows(work, make_inputs(work), quick, random.Random(seed))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small end of everything, some four minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and places")
    parser.add_argument("--matrix", action="store_true", help="the kill matrix alone, {1, 2, 4 ranks} x {DDP, FSDP2}")
    arguments = parser.parse_args()
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora_core_torture_") as work:
        tried = matrix_alone if arguments.matrix else torture
        rows = list(tried(Path(work), arguments.quick, arguments.seed))
    wall_time_s = time.monotonic() - started_at
    print("\n| case | bar | measured | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.case} | {row.bar} | {row.measured} | {'failed' if row.missed else 'passed'} |")
    print(f"\n{wall_time_s:.0f} s")
    missed = [(row.case, case) for row in rows for case in row.missed]
    for name, case in missed:
        print(f"\nmissed: {name}: {case}")
    result = {
        "date": f"{date.today()}",
        "quick": arguments.quick,
        "seed": arguments.seed,
        "cores": len(os.sched_getaffinity(0)),
        "wall_time_s": round(wall_time_s, 1),
        "versions": versions(),
        "rows": [{**vars(row), "cases": [str(case) for case in row.cases], "held": not row.missed} for row in rows],
    }
    write_json(ROOT / f"benchmarks/{'kill_matrix' if arguments.matrix else 'torture'}.json", result)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
