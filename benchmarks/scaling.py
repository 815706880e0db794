"""Claim: a token costs the same with more rows, micro-batches or rank. Length and vocabulary raise its cost slowly.

    python benchmarks/scaling.py --rows FILE.jsonl [--rows-up-to 100000] [--two-ranks]

    rows            the file's rows, repeated with a number in each so that no two are the same, encoded in one process,
                    then an epoch planned; and the same in a second process, which finds the encoded rows
    length          2 layers of the demo's shape, vocabulary 8,192; 8,192 tokens a step, one row a micro-batch
    vocabulary      2 layers, 64 wide; one row of 4,096 tokens
    rank            2 layers of the demo's shape; one micro-batch of 4 rows of 512 tokens
    accumulation    2 layers of the demo's shape; micro-batches of 2 rows of 256 tokens
    two ranks       8 micro-batches like these in one process with all cores, and in two that share them

Weights and tokens are random, half of each row is loss tokens, bfloat16, LoRA as `configs/base.yaml` has it. Times: the
cases of one sweep take steps in turn, in one process, 5 times after a first that is not timed; on one core they are the
process's own CPU time. Memory: each case takes two steps in a process of its own, and what counts is the largest
resident set after the model was there.

Prints tables, writes scaling.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from lora_core.data.encoded import load_data
from lora_core.data.packing import collate_packed, step_rows, train_batching
from lora_core.model.base import load_tokenizer
from lora_core.preflight.plan import plan_for
from lora_core.runtime.devices import use_all_cores

ALTERNATIONS = 5
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model and an optimizer step."""

    label: str
    row_length: int = 256
    rows: int = 1
    """In a micro-batch."""
    accumulation: int = 1
    rank: int = 16
    vocab_size: int = 8192
    hidden_size: int = 576

    @property
    def tokens(self) -> int:
        return self.row_length * self.rows * self.accumulation


SWEEPS = {
    "length": [Case(f"{n:,} tokens", row_length=n, accumulation=8192 // n) for n in (256, 512, 1024, 2048, 4096, 8192)],
    "vocabulary": [Case(f"{n:,}", row_length=4096, vocab_size=n, hidden_size=64) for n in (32_000, 49_152, 151_936)],
    "rank": [Case(str(n), row_length=512, rows=4, rank=n) for n in (4, 8, 16, 32, 64)],
    "accumulation": [Case(str(n), rows=2, accumulation=n) for n in (1, 2, 4, 8, 16)],
}


def training_of(case: Case) -> common.Training:
    config = common.base_config(f"lora.rank={case.rank}", "train.max_steps=1000", "train.optim=adamw_torch")
    accelerator = common.cpu_accelerator(config)
    shape = {"vocab_size": case.vocab_size}
    if case.hidden_size != 576:
        shape |= {"hidden_size": case.hidden_size, "intermediate_size": 2 * case.hidden_size}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return common.set_up(config, accelerator, common.random_llama(2, **shape), num_rows=1000)


def batches_of(case: Case, rank: int = 0, num_processes: int = 1) -> common.Batches:
    """This rank's micro-batches of the step."""
    torch.manual_seed(rank)
    mask = [position >= case.row_length // 2 for position in range(case.row_length)]

    def row() -> dict[str, Any]:
        return {"input_ids": torch.randint(case.vocab_size, (case.row_length,)), "loss_mask": mask}

    return [collate_packed([row() for _ in range(case.rows)]) for _ in range(case.accumulation // num_processes)]


def step_times(cases: Sequence[Case]) -> list[list[float]]:
    """Seconds of the steps of each case; the cases take turns."""
    steps = [partial(training_of(case).step, batches_of(case)) for case in cases]
    turns = [[common.seconds_of(step) for step in steps] for _ in range(ALTERNATIONS + 1)]
    return [list(seconds) for seconds in zip(*turns[1:], strict=True)]


def step_memory(case: Case) -> int:
    """Bytes that two steps take beyond what the process held before."""
    training, batches = training_of(case), batches_of(case)
    before = resident("VmRSS")
    forget_peak()
    for _ in range(2):
        training.step(batches)
    return resident("VmHWM") - before


def rank_time(case: Case) -> float:
    """Wall seconds of a step that all ranks of this launch share."""
    training = training_of(case)
    batches = batches_of(case, training.accelerator.process_index, training.accelerator.num_processes)
    training.step(batches)
    started = time.perf_counter()
    training.step(batches)
    return time.perf_counter() - started


def start_on(path: str, cache_dir: str) -> dict[str, float]:
    """What comes before the first step, for the rows of a file: encode them (or find them encoded), plan an epoch."""
    use_all_cores()
    data_settings = [f"data.train_file={path}", f"data.cache_dir={cache_dir}", "data.num_proc=1"]
    config = common.base_config(f"model.name_or_path={common.DEMO_MODEL}", *data_settings, "train.num_train_epochs=1")
    tokenizer = load_tokenizer(config.model)
    before = resident("VmRSS")
    forget_peak()
    started = common.now()
    data, _ = load_data(config, tokenizer)
    loaded_s = common.now() - started
    plan = plan_for(config, len(data.lengths), num_processes=1)
    batching = train_batching(config, pad_token_id=0)
    started = common.now()
    num_micro_batches = 0
    for step in range(plan.total_optimizer_steps):
        rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, config.train.seed, step)
        num_micro_batches += len(batching.cut(rows, data.lengths))
    return {
        "rows": len(data.lengths),
        "tokens": data.counts.tokens,
        "micro_batches": num_micro_batches,
        "load_s": loaded_s,
        "plan_s": common.now() - started,
        "peak_bytes": resident("VmHWM") - before,
        "file_pages_bytes": resident("RssFile"),
    }


def resident(what: str) -> int:
    """Bytes, from what Linux says of this process: VmRSS now, VmHWM at the most, RssFile of mapped files now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {what}; this benchmark needs Linux")


def forget_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


MEASUREMENTS: dict[str, Callable[[Any], Any]] = {
    "times": lambda cases: step_times([Case(**case) for case in cases]),
    "memory": lambda case: step_memory(Case(**case)),
    "ranks": lambda case: rank_time(Case(**case)),
    "rows": lambda paths: start_on(*paths),
}


def in_a_process(what: str, argument: Any, launcher: Sequence[str] = ()) -> Any:
    """One of `MEASUREMENTS`."""
    return common.last_line([sys.executable, *launcher, __file__, "--measure", what, json.dumps(argument)])


def measure_sweep(name: str) -> list[dict[str, Any]]:
    cases = [asdict(case) for case in SWEEPS[name]]
    measured = []
    for case, each in zip(cases, in_a_process("times", cases), strict=True):
        measured.append({**case, "step_s": each, "peak_bytes": in_a_process("memory", case)})
        print(f"{name} {case['label']}: {statistics.median(each):.2f} s a step", flush=True)
    return measured


def measure_rows(source: Path, up_to: int, scratch: Path) -> list[dict[str, Any]]:
    measured = []
    for number in (n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= up_to):
        path = scratch / f"rows-{number}.jsonl"
        common.write_rows(path, source, number)
        first, second = (in_a_process("rows", [str(path), str(scratch / "encoded")]) for _ in range(2))
        measured.append({"first": first, "second": second})
        print(f"rows {number:,}: encoded in {first['load_s']:.1f} s, found in {second['load_s']:.1f} s", flush=True)
        path.unlink()
    return measured


def measure_ranks() -> dict[str, list[float]]:
    """Seconds of a step in one process and in two, in turn."""
    case = asdict(Case("ranks", rows=2, accumulation=8))
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    seconds: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(ALTERNATIONS):
        seconds["one"].append(in_a_process("ranks", case))
        seconds["two"].append(in_a_process("ranks", case, two))
    return seconds


def rows_table(measured: Sequence[dict[str, Any]]) -> str:
    header = ["rows", "encoded, rows/s", "epoch planned, s", "peak above start, GiB", "second start, s"]
    return common.markdown(
        [*header, "its peak, GiB"],
        [
            [
                f"{first['rows']:,}",
                f"{first['rows'] / first['load_s']:,.0f}",
                f"{first['plan_s']:.2f}",
                f"{first['peak_bytes'] / common.GIB:.2f}",
                f"{second['load_s']:.2f}",
                f"{second['peak_bytes'] / common.GIB:.2f}",
            ]
            for first, second in (case.values() for case in measured)
        ],
    )


def sweep_table(name: str, measured: Sequence[dict[str, Any]]) -> str:
    """Against the first case, alternation by alternation."""
    a_token = [
        [seconds / case.tokens for seconds in each["step_s"]] for case, each in zip(SWEEPS[name], measured, strict=True)
    ]
    return common.markdown(
        [name, "time a token", "peak memory above the model, MiB"],
        [
            [case["label"], common.spread(common.ratios(each, a_token[0]), ".2f"), f"{case['peak_bytes'] / MIB:,.0f}"]
            for case, each in zip(measured, a_token, strict=True)
        ],
    )


def ranks_line(seconds: dict[str, list[float]] | None) -> str:
    if seconds is None:
        return "Two ranks: not measured (--two-ranks)."
    faster = common.spread(common.ratios(seconds["one"], seconds["two"]), ".2f")
    return f"Two ranks: {faster} times the speed of one, on all cores."


def main() -> None:
    parser = common.options_of(__doc__, "scaling.json", "--rows")
    parser.add_argument("--rows-up-to", type=int, default=100_000, metavar="N", help="largest number of rows")
    parser.add_argument("--two-ranks", action="store_true", help="also two ranks against one; needs two free cores")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "JSON"), help="one measurement, in this process")
    options = parser.parse_args()
    if options.measure:
        what, argument = options.measure
        result = MEASUREMENTS[what](json.loads(argument))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result), flush=True)
        return
    sweeps = {name: measure_sweep(name) for name in SWEEPS}
    ranks = measure_ranks() if options.two_ranks else None
    with tempfile.TemporaryDirectory(prefix="scaling-") as scratch:
        rows = measure_rows(options.rows, options.rows_up_to, Path(scratch))
    sweep_tables = [sweep_table(name, measured) for name, measured in sweeps.items()]
    table = "\n\n".join([rows_table(rows), *sweep_tables, ranks_line(ranks)])
    common.write(options.output, table, source=str(options.rows), rows=rows, sweeps=sweeps, ranks=ranks)


if __name__ == "__main__":
    main()
