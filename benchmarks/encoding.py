"""Encoding against TRL's preparation: rows/s from a chat JSONL to rows that can be trained on.

    python benchmarks/encoding.py [--rows FILE.jsonl] [--number 20000] [--alternations 5]

The same conversations as messages (those of the file, repeated with a number in each so that no two are the same), the
demo's tokenizer, supervised answers only, 1,024 tokens at most, nothing encoded before. In turn, wall time:
lora_core's `encode_file`, and TRL's `load_dataset` and preparation; each as it comes, and then lora_core with one
process and TRL with one a core. (As they come, lora_core takes one a core for so many rows, and TRL takes one.)
Ours does more in that time: it finds the mask without `{% generation %}` in the template, checks it, and accounts for
every row. (TRL is given a template that has it.)

TRL is installed from benchmarks/requirements.txt into an environment of its own. Prints a table, writes encoding.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import DEMO_MODEL, HERE, ROOT, base_config, ratios, spread, write
from scaling import write_rows
from vs_trl import peer_environment

from lora_core.data.encoded import encode_file
from lora_core.data.messages import parse_json_row
from lora_core.model.base import load_tokenizer
from lora_core.untrusted.limits import allowed_cores

BAR = 3
SET_UPS = OURS, TRL, OURS_ALONE, TRL_CORES = (
    "lora_core as it comes",
    "TRL as it comes",
    "lora_core, one process",
    "TRL, one process a core",
)


def as_messages(path: Path, rows: Path) -> None:
    """The rows in the one shape that both read."""
    with path.open("w", encoding="utf-8") as file:
        for line in rows.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                messages = [dict(message) for message in parse_json_row(line).messages]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def encode_ours(rows: Path, scratch: Path, num_proc: int | None) -> float:
    """Seconds; None is as it comes."""
    tokenizer = load_tokenizer(base_config(f"model.name_or_path={DEMO_MODEL}").model)
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        started = time.perf_counter()
        encode_file(rows, tokenizer, max_seq_length=1024, cache_dir=cache, num_proc=num_proc)
        return time.perf_counter() - started


def prepare_trl(rows: Path, python: Path, num_proc: int | None) -> float:
    """Seconds; None is as it comes."""
    template = HERE / "peers" / "smollm2_training.jinja"
    model = str(Path(DEMO_MODEL).expanduser())
    script = str(HERE / "peers" / "trl_prepare.py")
    command = [str(python), script, model, str(template), str(rows), str(num_proc or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "examples" / "train.jsonl", help="rows in any shape")
    parser.add_argument("--number", type=int, default=20_000, help="rows to encode")
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--peer-venv", type=Path, default=ROOT / "outputs" / "benchmarks" / "trl-venv")
    parser.add_argument("--output", type=Path, default=HERE / "encoding.json")
    options = parser.parse_args()
    python = peer_environment(options.peer_venv)
    times: dict[str, list[float]] = {name: [] for name in SET_UPS}
    with tempfile.TemporaryDirectory(prefix="encoding-") as scratch:
        one_shape, rows = Path(scratch) / "messages.jsonl", Path(scratch) / "rows.jsonl"
        as_messages(one_shape, options.rows)
        write_rows(rows, one_shape, options.number)
        for _ in range(options.alternations):
            times[OURS].append(encode_ours(rows, Path(scratch), None))
            times[TRL].append(prepare_trl(rows, python, None))
            times[OURS_ALONE].append(encode_ours(rows, Path(scratch), 1))
            times[TRL_CORES].append(prepare_trl(rows, python, allowed_cores()))
            print(", ".join(f"{name} {each[-1]:.1f} s" for name, each in times.items()), flush=True)
    table = "\n".join(
        [
            f"| {options.number:,} rows, {allowed_cores()} cores | rows/s | lora_core as it comes, times as fast |",
            "|---|---|---|",
            *(
                f"| {name} | {spread([options.number / s for s in each], ',.0f')} "
                f"| {spread(ratios(each, times[OURS]), '.2f')} |"
                for name, each in times.items()
            ),
        ]
    )
    met = "met" if statistics.median(ratios(times[TRL], times[OURS])) >= BAR else "NOT met"
    table += f"\n\nBar: {BAR} times TRL as it comes: {met}."
    write(options.output, table, rows=options.number, seconds=times)


if __name__ == "__main__":
    main()
