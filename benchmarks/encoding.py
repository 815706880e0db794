"""Claim: a chat JSONL becomes rows that can be trained on three times as fast as with TRL's preparation.

    python benchmarks/encoding.py [--rows FILE.jsonl] [--number 20000] [--alternations 5]

The same conversations as messages (those of the file, repeated with a number in each so that no two are the same), the
demo's tokenizer, loss on the answers only, 1,024 tokens at most, nothing encoded before. In turn, wall time:
lora_core's `encode_file`, and TRL's `load_dataset` and preparation; each as it comes, and then lora_core with one
process and TRL with one a core. (As they come, lora_core takes one a core for so many rows, and TRL takes one.)
Ours does more in that time: it finds the mask without `{% generation %}` in the template, checks it, and accounts for
every row. (TRL is given a template that has it.)

TRL is installed from benchmarks/requirements.txt into an environment of its own. Prints a table, writes encoding.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import common

from lora_core.data.encoded import encode_file
from lora_core.model.base import load_tokenizer
from lora_core.untrusted.limits import allowed_cores

BAR = 3


def ours(rows: Path, num_proc: int | None) -> float:
    """Seconds; None is as it comes."""
    tokenizer = load_tokenizer(common.base_config(f"model.name_or_path={common.DEMO_MODEL}").model)
    with tempfile.TemporaryDirectory(dir=rows.parent) as cache:
        started = time.perf_counter()
        encode_file(rows, tokenizer, max_seq_length=1024, cache_dir=cache, num_proc=num_proc)
        return time.perf_counter() - started


def trl(rows: Path, num_proc: int | None, python: Path) -> float:
    """Seconds, of `peers/trl_prepare.py`."""
    model, template = Path(common.DEMO_MODEL).expanduser(), common.HERE / "peers" / "smollm2_training.jinja"
    command = [python, common.HERE / "peers" / "trl_prepare.py", model, template, rows, str(num_proc or "")]
    return float(common.last_line(command))


def main() -> None:
    parser = common.options_of(__doc__, "encoding.json", "--rows", "--alternations", "--peer-venv")
    parser.add_argument("--number", type=int, default=20_000, help="rows to encode")
    options = parser.parse_args()
    python = common.peer_python(options.peer_venv)
    with tempfile.TemporaryDirectory(prefix="encoding-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        common.write_rows(rows, options.rows, options.number)
        set_ups = {
            "lora_core as it comes": lambda: ours(rows, None),
            "TRL as it comes": lambda: trl(rows, None, python),
            "lora_core, one process": lambda: ours(rows, 1),
            "TRL, one process a core": lambda: trl(rows, allowed_cores(), python),
        }
        times: dict[str, list[float]] = {name: [] for name in set_ups}
        for _ in range(options.alternations):
            for name, encode in set_ups.items():
                times[name].append(encode())
            print(", ".join(f"{name} {each[-1]:.1f} s" for name, each in times.items()), flush=True)
    as_it_comes = times["lora_core as it comes"]
    table = common.markdown(
        [f"{options.number:,} rows, {allowed_cores()} cores", "rows/s", "lora_core as it comes, times as fast"],
        [
            [
                name,
                common.spread([options.number / s for s in each], ",.0f"),
                common.spread(common.ratios(each, as_it_comes), ".2f"),
            ]
            for name, each in times.items()
        ],
    )
    is_met = statistics.median(common.ratios(times["TRL as it comes"], as_it_comes)) >= BAR
    table += f"\n\nBar: {BAR} times TRL as it comes: {common.met(is_met)}."
    common.write(options.output, table, rows=options.number, seconds=times)


if __name__ == "__main__":
    main()
