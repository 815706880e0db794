"""Claim: threads that wait passively cost little on an idle machine, and save most of the time on a busy one.

    python benchmarks/busy_machine.py [--alternations 5]

Times a chain of a training step's operations (products, softmax, elementwise, in float32) on two threads, in a process
of its own for each way to wait, in turn; alone, and beside as many processes that only compute as there are cores. What
`lora-core` sets is OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WAYS = {
    "as torch comes": {},
    "passive (as lora-core sets it)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHAIN = """
import os, time
import torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
torch.manual_seed(0)
x, up, down = torch.randn(512, 576), torch.randn(576, 1536), torch.randn(1536, 576)
def chain():
    y = x
    for _ in range(30):
        y = torch.nn.functional.silu(y @ up) @ down
        y = torch.softmax(y / 100, -1) + x
    return y
chain()
started = time.monotonic()
chain()
print(time.monotonic() - started)
"""
BURN = "while True: pass"


def seconds(environment: dict[str, str]) -> float:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    clean.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", CHAIN], env={**clean, **environment}, capture_output=True, text=True)
    return float(done.stdout)


def measure(alternations: int, burners: int) -> dict[str, list[float]]:
    """{way: seconds of each run}, beside so many processes that only compute."""
    others = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(burners)]
    try:
        runs: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(alternations):
            for way, environment in WAYS.items():
                runs[way].append(seconds(environment))
        return runs
    finally:
        for other in others:
            other.kill()


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "busy_machine.json")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    idle, busy = measure(arguments.alternations, 0), measure(arguments.alternations, cores)
    rows = [f"| {way} | {cell(idle[way])} | {cell(busy[way])} |" for way in WAYS]
    table = "\n".join([f"| {cores} cores | alone, s | beside {cores} busy processes, s |", "|---|---|---|", *rows])
    print(table)
    arguments.output.write_text(json.dumps({"table": table, "idle_s": idle, "busy_s": busy}, indent=1) + "\n")


if __name__ == "__main__":
    main()
