"""Short runs that are killed, stopped, starved of disk and damaged, each gone on with and compared bit for bit.

    HF_HUB_OFFLINE=1 python -m benchmarks.torture
    HF_HUB_OFFLINE=1 python -m benchmarks.torture --quick

Run it in the repository root, on Linux; it took half an hour on a core that other work shared, the small end
(`--quick`) four minutes. It trains a random two-layer Qwen2 on 22 rows: 9 steps, a checkpoint after each, in four
settings (packed and padded, 8-bit and torch's AdamW, NF4, accumulation, always with dropout). A run that nothing
disturbs comes first; what was disturbed and gone on with must leave the same adapter, byte by byte, and log the same
losses and gradient norms. Each run is a process of its own that executes `launch/train.py`, forked from one that has
imported everything, because a start costs some seconds of imports. Two ranks are started by torchrun.

Prints a table and writes `benchmarks/torture.json`; exit code 1 if a bar was missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import psutil

from lora_core.errors import ConfigError
from lora_core.runtime.run_folder import write_json
from lora_core.training.checkpoint import find_checkpoint
from lora_core.training.summary import versions
from tests.tiny import ROOT, chat, make_tokenizer, save_tiny_model, write_jsonl

NUM_STEPS = 9
END_WITHIN_S = 120
"""A run that has not ended by then hangs; undisturbed it takes 2 s."""

COMMON = [
    "--cfg",
    "demo",
    "train.num_train_epochs=3",
    "train.learning_rate=1e-3",
    "train.save_steps=1",
    "train.num_sample_replies=0",
    "lora.dropout=0.1",
    "data.max_seq_length=64",
    "preflight.allow=[disk_too_small]",  # where the disk is full on purpose
]
# Each makes 9 steps of 8 rows. bitsandbytes keeps 8-bit state for tensors of 4,096 numbers or more: rank 64 makes them.
SETTINGS = {
    "packed, 8-bit": ["lora.rank=64", "train.optim=paged_adamw_8bit"],
    "padded, torch": [
        "data.packing=false",
        "train.optim=adamw_torch",
        "train.per_device_train_batch_size=8",
        "train.gradient_accumulation_steps=1",
    ],
    "NF4, 8-bit": ["model.quantization=nf4", "lora.rank=64", "train.optim=paged_adamw_8bit"],
    "packed, 4 micro-batches": ["lora.rank=64", "train.optim=paged_adamw_8bit", "train.max_tokens_per_device_batch=64"],
}
TWO_RANKS = {"two ranks": ["lora.rank=64", "train.gradient_accumulation_steps=2"]}

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
    "tests.tiny",
    "torch.distributed.run",
    "transformers.integrations.bitsandbytes",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.optimization",
]


# ---------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """How a run is started, and what it leaves if nothing disturbs it."""

    name: str
    arguments: Sequence[str]
    ranks: int
    folder: Path
    """Of the undisturbed run; it keeps every checkpoint."""
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
    process = forks.Process(target=command_line, args=(arguments, log, run.ranks))
    process.start()
    return Started(process, folder, log)


def command_line(arguments: Sequence[str], log: Path, ranks: int) -> None:
    """In the child: what `python launch/train.py ...` does, or torchrun. A session of its own, so that no process of
    it can be lost from sight."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # what started this process is none of the run's business
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(ROOT)
    if ranks == 1:
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


def undisturbed(work: Path, inputs: Sequence[str], name: str, settings: Sequence[str], ranks: int = 1) -> Run:
    """Run once for the caches, and once for time and results."""
    run = Run(name, [*COMMON, *settings, *inputs], ranks, work / f"undisturbed-{name.replace(' ', '-')}")
    for _ in range(2):
        started_at = time.monotonic()
        started = start(run, run.folder, f"train.save_total_limit={NUM_STEPS}")
        if started.end() != 0:
            sys.exit(f"error: {name} failed undisturbed:\n{started.said}")
        run = replace(run, duration_s=time.monotonic() - started_at)
    first = run.folder / "checkpoints/step-000001"
    # From the first file's last byte to the folder's own name: the renaming changes the folder itself.
    return replace(run, save_s=first.stat().st_ctime - (first / "adapter.safetensors").stat().st_mtime)


# ---------------------------------------------------------------------------------------------------------------
# Instants


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


def draw_instant(run: Run, index: int, draw: random.Random) -> Instant:
    """By turns anywhere in the run, and inside a save."""
    if index % 2 == 0:
        return Instant("start", 0, draw.uniform(0, run.duration_s))
    return Instant("save", draw.randint(1, NUM_STEPS - 1), draw.uniform(0, 1.5 * run.save_s))


# ---------------------------------------------------------------------------------------------------------------
# What a run has left


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The events that are written in full."""
    events = []
    with suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
    return events


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(event["event"], event.get("step"), event.get("loss"), event.get("grad_norm")) for event in metrics(folder)]


def logged_steps(folder: Path) -> int:
    return max((event["step"] for event in metrics(folder) if event["event"] == "train"), default=0)


def tensors(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}


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
    wrong = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        with suppress(ConfigError):
            find_checkpoint(folder, path, lambda _: None, may_rename=False)
            if tensors(path) != tensors(run.folder / "checkpoints" / path.name):
                wrong.append(path.name)
    return wrong


def same_as_undisturbed(run: Run, folder: Path) -> str | None:
    """What differs from the undisturbed run; None if nothing does."""
    if adapter(folder) != adapter(run.folder):
        return "the adapter differs"
    return None if losses(folder) == losses(run.folder) else "logged losses differ"


# ---------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """One run that was disturbed, and what became of it."""

    run: str
    disturbed: str
    hit: str
    exit_code: int | str
    resumed_from: int | None
    """Step of the checkpoint that was gone on with; None: there was none, and the run was started anew."""
    leftovers: list[str]
    """After the disturbance."""
    left_in_the_end: list[str]
    """After the resumed run."""
    damaged_taken: list[str]
    problem: str | None
    """What missed the bar."""
    ended_after_s: float | None = None
    """How long torchrun and the other rank went on."""

    def __str__(self) -> str:
        went_on = "anew" if self.resumed_from is None else f"from step {self.resumed_from}"
        taken = f"; damaged taken for whole: {', '.join(self.damaged_taken)}" if self.damaged_taken else ""
        missed = f"; {self.problem}" if self.problem else ""
        became = f"exit code {self.exit_code}; went on {went_on}"
        return f"{self.run}: {self.disturbed}: hit {self.hit}; {became}{taken}{missed}"


def examine(run: Run, started: Started, disturbed: str, exit_code: int | str, problem: str | None) -> Case:
    """Look at what was left, go on with it, and compare."""
    folder = started.folder
    case = Case(
        run=run.name,
        disturbed=disturbed,
        hit=hit(folder),
        exit_code=exit_code,
        resumed_from=newest_whole(folder),
        leftovers=leftovers(folder),
        left_in_the_end=[],
        damaged_taken=taken_for_whole(run, folder),
        problem=problem,
    )
    resumed = start(run, folder, *([] if case.resumed_from is None else ["--resume"]))
    code = resumed.end()
    after = same_as_undisturbed(run, folder) if code == 0 else f"resumed, it ended with {code}: {resumed.said[-2000:]}"
    return replace(case, left_in_the_end=leftovers(folder), problem=problem or after)


def kill_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """SIGKILL at `count` instants inside a run. Every fourth run has no encoded rows yet."""
    cases: list[Case] = []
    while len(cases) < count:
        run = runs[len(cases) // 2 % len(runs)]
        folder = work / f"kill-{len(cases):03d}"
        instant = draw_instant(run, len(cases), draw)
        more = [f"data.cache_dir={folder}-cache"] if len(cases) % 4 == 0 else []
        started = start(run, folder, *more)
        if instant.wait(started):
            started.process.kill()
            cases.append(examine(run, started, str(instant), started.end(), None))
        started.end()  # one that was done before the instant does not count
        shutil.rmtree(folder)
    return cases


def rank_cases(run: Run, count: int, draw: random.Random, work: Path) -> list[Case]:
    """SIGKILL to one of two ranks; torchrun must end, and nothing of it may stay."""
    cases: list[Case] = []
    while len(cases) < count:
        folder = work / f"rank-{len(cases):03d}"
        instant = draw_instant(run, len(cases), draw)
        started = start(run, folder)
        if instant.wait(started):
            ranks = psutil.Process(started.process.pid).children()
            if len(ranks) == run.ranks:  # not yet, and no longer, at the ends of the run
                rank = draw.randrange(run.ranks)
                sorted(ranks, key=lambda child: child.pid)[rank].kill()
                killed_at = time.monotonic()
                exit_code = started.end()
                ended_after_s = time.monotonic() - killed_at
                problem = still_there(started, exit_code)
                case = examine(run, started, f"rank {rank}, {instant}", exit_code, problem)
                cases.append(replace(case, ended_after_s=ended_after_s))
        started.end()
        shutil.rmtree(folder, ignore_errors=True)
    return cases


def still_there(started: Started, exit_code: int | str) -> str | None:
    if isinstance(exit_code, str):
        return exit_code
    _, orphans = psutil.wait_procs(session_of(started.process), timeout=10)
    for process in orphans:
        process.kill()
    return f"orphans: {[process.pid for process in orphans]}" if orphans else None


def stop_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> tuple[list[Case], Counter[str]]:
    """SIGTERM at `count` instants inside the loop; and how many came before it and after it, which do not count."""
    cases: list[Case] = []
    outside: Counter[str] = Counter()
    while len(cases) < count:
        run = runs[len(cases) % len(runs)]
        folder = work / f"stop-{len(cases):03d}"
        instant = Instant("step", draw.randint(0, NUM_STEPS - 1), draw.uniform(0, run.duration_s / 2 / NUM_STEPS))
        started = start(run, folder)
        if instant.wait(started):
            os.kill(started.process.pid or 0, signal.SIGTERM)
            exit_code, steps = started.end(), logged_steps(folder)
            if exit_code == -signal.SIGTERM and steps in (0, NUM_STEPS):
                outside["before the loop" if steps == 0 else "after it"] += 1
            elif exit_code == 0 and same_as_undisturbed(run, folder) is None:
                outside["in the last step"] += 1
            else:
                cases.append(examine(run, started, str(instant), exit_code, badly_stopped(started, exit_code)))
        started.end()
        shutil.rmtree(folder)
    return cases, outside


def badly_stopped(started: Started, exit_code: int | str) -> str | None:
    steps, saved = logged_steps(started.folder), newest_whole(started.folder)
    if exit_code != 75:
        return f"exit code {exit_code}, not 75: {started.said[-2000:]}"
    return None if saved == steps else f"{steps} steps were taken, the newest checkpoint is of step {saved}"


# ---------------------------------------------------------------------------------------------------------------
# Disk full


def limit_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """No file may grow past a limit, from some step on: the next save ends in the midst of a file."""
    cases: list[Case] = []
    while len(cases) < count:
        run = runs[len(cases) % len(runs)]
        folder = work / f"limit-{len(cases):03d}"
        largest = max(file.stat().st_size for file in (run.folder / "checkpoints/step-000001").iterdir())
        limit = draw.randrange(16_384, largest)  # metrics.jsonl and the log are smaller
        step = draw.randint(1, NUM_STEPS - 3)
        started = start(run, folder)
        if Instant("step", step + 1, 0).wait(started):
            resource.prlimit(started.process.pid or 0, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            exit_code = started.end()
            disturbed = f"no file over {limit:,} bytes, from step {step + 1} on"
            cases.append(examine(run, started, disturbed, exit_code, badly_starved(started, exit_code, step)))
        started.end()
        shutil.rmtree(folder)
    return cases


def full_disk_cases(runs: Sequence[Run], count: int, draw: random.Random, work: Path) -> list[Case]:
    """A small file system of its own, which the second save fills: in each of its files, by turns."""
    cases = []
    for index in range(count):
        run = runs[index % len(runs)]
        point, before = draw_page(run, index, draw)
        disk = work / f"disk-{index:03d}"
        with small_disk(disk, before * PAGE):
            started = start(run, disk / "run")
            exit_code = started.end()
            problem = badly_starved(started, exit_code, least_step=1)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)  # room was made
            cases.append(examine(run, started, f"full at {point}", exit_code, problem))
    return cases


PAGE = resource.getpagesize()


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


# ---------------------------------------------------------------------------------------------------------------
# Damage


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
    """A checkpoint's files, damaged one at a time; the checkpoint before it is whole."""
    folder = work / "damage"
    for step in (NUM_STEPS - 2, NUM_STEPS - 1):
        shutil.copytree(run.folder / f"checkpoints/step-{step:06d}", folder / f"checkpoints/step-{step:06d}")
    checkpoint = folder / f"checkpoints/step-{NUM_STEPS - 1:06d}"
    cases = [try_damage(checkpoint, damage, draw) for damage in draw_damages(checkpoint, count, draw)]
    shutil.rmtree(folder)
    return cases


def draw_damages(checkpoint: Path, count: int, draw: random.Random) -> list[Damage]:
    """Each file in equally many ranges; in each range some bytes are changed, and the file is cut. At least `count`."""
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
    return damages


def try_damage(checkpoint: Path, damage: Damage, draw: random.Random) -> Damage:
    """Spoil the file, see what `find_checkpoint` says, and put the file back."""
    file = checkpoint / damage.file
    content = file.read_bytes()
    spoilt = bytearray(content)
    if damage.way == "cut":
        del spoilt[damage.first :]
    else:
        for index in range(damage.first, damage.first + damage.length):
            spoilt[index] ^= draw.randint(1, 255)
    file.write_bytes(spoilt)
    problem = undetected(checkpoint, damage.file)
    file.write_bytes(content)
    return replace(damage, problem=problem)


def undetected(checkpoint: Path, name: str) -> str | None:
    folder = checkpoint.parent.parent
    try:
        find_checkpoint(folder, checkpoint, lambda _: None, may_rename=False)
        return "taken for whole"
    except ConfigError as error:
        if name not in str(error):
            return f"not named: {error}"
    taken = find_checkpoint(folder, None, lambda _: None, may_rename=False).path
    return None if taken.name == f"step-{NUM_STEPS - 2:06d}" else f"{taken} was taken in its place"


# ---------------------------------------------------------------------------------------------------------------
# Table


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
    parts = [f"{same} of {len(cases)} bit-identical", f"{taken} damaged taken for whole"]
    if anew:
        parts.append(f"killed before the first checkpoint and started anew: {anew}")
    return ", ".join(parts)


def hits_of(cases: Sequence[Case]) -> str:
    counts = Counter(case.hit for case in cases)
    left = sum(bool(case.left_in_the_end) for case in cases)
    hits = ", ".join(f"{name} {number}" for name, number in counts.most_common())
    return f"hit: {hits}; temporary files left in the end: {left}"


def exits_of(cases: Sequence[Case]) -> str:
    counts = Counter(str(case.exit_code) for case in cases)
    return "exit code " + ", ".join(f"{code} ({number})" for code, number in counts.most_common())


def damage_row(damages: Sequence[Damage]) -> Row:
    found = sum(damage.problem is None for damage in damages)
    files = len({damage.file for damage in damages})
    return Row(
        f"checkpoint damaged: {len(damages)} byte ranges of its {files} files flipped or cut",
        "all detected by name",
        f"{found} of {len(damages)}, and the checkpoint before taken",
        damages,
    )


def table(rows: Sequence[Row]) -> str:
    lines = ["| case | bar | measured | |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.case} | {row.bar} | {row.measured} | {'missed' if row.missed else 'held'} |")
    return "\n".join(lines)


def torture(work: Path, quick: bool, seed: int) -> list[Row]:
    draw = random.Random(seed)
    many, some, damages = (8, 2, 40) if quick else (100, 20, 200)
    inputs = make_inputs(work)
    say("undisturbed runs")
    runs = [undisturbed(work, inputs, name, settings) for name, settings in SETTINGS.items()]
    rows = []

    say(f"SIGKILL, {many} times")
    kills = kill_cases(runs, many, draw, work)
    bar = f"{many} bit-identical, 0 damaged taken for whole"
    rows.append(Row(f"SIGKILL at {many} instants", bar, f"{summary_of(kills)}; {hits_of(kills)}", kills))

    say(f"SIGTERM, {some} times")
    stops, outside = stop_cases(runs, some, draw, work)
    bar = f"{some} checkpoints, exit code 75, bit-identical"
    apart = "".join(f"; {number} more came {when}" for when, number in outside.items())
    rows.append(Row(f"SIGTERM at {some} instants", bar, f"{exits_of(stops)}, {summary_of(stops)}{apart}", stops))

    say(f"disk full, {some} times")
    bar = f"checkpoint before whole {some} of {some}, exit code 1"
    limits = limit_cases(runs, some, draw, work)
    rows.append(Row(f"files limited in size, {some}", bar, f"{exits_of(limits)}, {summary_of(limits)}", limits))
    if may_mount(work):
        disks = full_disk_cases(runs, some, draw, work)
        rows.append(Row(f"disk full at {some} pages of a save", bar, f"{exits_of(disks)}, {summary_of(disks)}", disks))
    else:
        say("disk full on a file system of its own: left out, a tmpfs may not be mounted")

    say(f"damage, {damages} times")
    rows.append(damage_row(damage_cases(runs[0], damages, draw, work)))

    say(f"one rank of two killed, {some} times")
    [(name, settings)] = TWO_RANKS.items()
    ranks = rank_cases(undisturbed(work, inputs, name, settings, ranks=2), some, draw, work)
    bar = f"{some} bit-identical, the others end, no orphan"
    slowest = max(case.ended_after_s or 0 for case in ranks)
    measured = f"{summary_of(ranks)}, all ended within {slowest:.1f} s; {hits_of(ranks)}"
    rows.append(Row(f"SIGKILL to one rank of two, {some}", bar, measured, ranks))
    return rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small end of everything, some four minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and places")
    arguments = parser.parse_args()
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora_core_torture_") as work:
        rows = torture(Path(work), arguments.quick, arguments.seed)
    wall_time_s = time.monotonic() - started_at
    print(f"\n{table(rows)}\n\n{wall_time_s:.0f} s")
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
    write_json(ROOT / "benchmarks/torture.json", result)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
