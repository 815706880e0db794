"""From the command to the first optimizer step, and what takes how long.

    python benchmarks/startup.py [--alternations 5] [key=value ...]

The demo (78 rows, SmolLM2-135M) without held-out rows, so that no evaluation comes before the first step; the rows are
encoded and all files are in the disk's cache, because a first run that is not counted has read them. Each run is a
process of its own, with all cores, wall time from before it is started. It does what launch/train.py does, but imports
torch and what transformers needs to load a model first, so that the rest can be told from it, and times the steps of
`train` by name until the first optimizer step is done. `accelerate launch`, which itself imports torch before it starts
the training, is timed on a script that does nothing.

Prints a table, writes startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BAR_S = 3.0

IMPORTS, OUR_IMPORTS, STEP, REST = (
    "importing torch and transformers",
    "importing peft, accelerate, bitsandbytes, datasets and lora_core",
    "the first optimizer step",
    "the rest",
)
# Names in lora_core.training.setup -> what they do.
PHASES = {
    "build_accelerator": "device and process group",
    "load_tokenizer": "tokenizer",
    "load_data": "rows, found encoded",
    "look_around": "looking at memory and disk",
    "gather_facts": "plan, and memory predicted",
    "run_checks": "preflight's checks",
    "data_hash": "hash of the rows, for checkpoints",
    "load_base_model": "model",
    "add_adapter": "adapter",
    "build_optimizer": "optimizer",
    "train_step": STEP,
}


def child(started: float, overrides: list[str]) -> None:
    """Train until the first step is done, and print {what: seconds}. `started`: of the parent's clock."""
    seconds: dict[str, float] = {"starting Python": time.time() - started}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = time.time()
            result = function(*args, **kwargs)
            seconds[name] = time.time() - before
            if name == STEP:
                end(seconds)
            return result

        return wrapped

    def end(seconds: dict[str, float]) -> None:
        whole = time.time() - started
        print(json.dumps({**seconds, REST: whole - sum(seconds.values()), "whole": whole}), flush=True)
        os._exit(0)

    from lora_core.commands.command_line import heavy_imports
    from lora_core.config.load import load_config

    with heavy_imports():
        timed(IMPORTS, import_torch_and_transformers)()
        timed(OUR_IMPORTS, import_training)()
    training = sys.modules["lora_core.training.setup"]
    for name, what in PHASES.items():
        setattr(training, name, timed(what, getattr(training, name)))
    training.train(load_config("demo", overrides))  # type: ignore[attr-defined]


def import_torch_and_transformers() -> None:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401


def import_training() -> None:
    from lora_core.commands.command_line import quiet_libraries

    quiet_libraries()
    import lora_core.training.setup  # noqa: F401


def run(overrides: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(time.time()), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def launcher_s(scratch: Path) -> float:
    """Seconds that `accelerate launch` takes by itself."""
    script = scratch / "nothing.py"
    script.write_text("", encoding="utf-8")
    accelerate = str(Path(sys.executable).parent / "accelerate")
    started = time.time()
    subprocess.run(
        [accelerate, "launch", "--config_file", str(HERE.parent / "accelerate_config.yaml"), str(script)],
        capture_output=True,
        check=True,
    )
    return time.time() - started


def table(runs: list[dict[str, float]], launcher: list[float]) -> str:
    from common import spread

    def row(what: str, values: list[float], bold: str = "") -> str:
        return f"| {bold}{what}{bold} | {bold}{spread(values, '.2f')}{bold} |"

    names = [name for name in runs[0] if name != "whole"]
    beyond = [each["whole"] - each[IMPORTS] for each in runs]
    before_step = [each["whole"] - each[IMPORTS] - each[STEP] for each in runs]
    met = {True: "met", False: "NOT met"}
    return "\n".join(
        [
            "| from the command to the end of the first step | s |",
            "|---|---|",
            *(row(name, [each[name] for each in runs]) for name in names),
            row("all of it", [each["whole"] for each in runs]),
            row(
                f"beyond importing torch and transformers, to the step's start (bar {BAR_S:g}: "
                f"{met[statistics.median(before_step) < BAR_S]})",
                before_step,
                "**",
            ),
            row(f"the same, to its end (bar {BAR_S:g}: {met[statistics.median(beyond) < BAR_S]})", beyond, "**"),
            row("`accelerate launch` itself, before all this", launcher),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "startup.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of what configs/demo.yaml says")
    options = parser.parse_args()
    from common import write

    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        overrides = ["data.eval_file=null", "train.save_steps=1000", f"output_dir={folder}/run"]
        overrides += [f"data.cache_dir={folder}/rows", *options.overrides]
        run(overrides)
        runs, launcher = [], []
        for _ in range(options.alternations):
            runs.append(run(overrides))
            launcher.append(launcher_s(Path(folder)))
            print(f"{runs[-1]['whole']:.1f} s, accelerate launch {launcher[-1]:.1f} s", flush=True)
    write(options.output, table(runs, launcher), runs=runs, launcher_s=launcher)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
