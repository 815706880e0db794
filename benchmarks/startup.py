"""Claim: three seconds from the command to the first optimizer step, beyond importing torch and transformers.

    python benchmarks/startup.py [--alternations 5] [key=value ...]

The demo (78 rows, SmolLM2-135M) without an eval set, so that no evaluation comes before the first step; the rows are
encoded and all files are in the disk's cache, because a first run that is not counted has read them. Each run is a
process of its own, with all cores, wall time from before it is started. It does what launch/train.py does, but imports
torch and what transformers needs to load a model first, so that the rest can be told from it, and times the steps of
`train` by name until the first optimizer step is done. `accelerate launch`, which itself imports torch before it starts
the training, is timed on a script that does nothing.

Prints a table, writes startup.json.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent.parent
BAR_S = 3.0

IMPORTS = "importing torch and transformers"
OUR_IMPORTS = "importing peft, accelerate, bitsandbytes, datasets and lora_core"
STEP = "the first optimizer step"
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
}


def child(started: float, overrides: list[str]) -> None:
    """Train until the first step is done, and print {what: seconds}. `started`: of the parent's clock."""
    from lora_core.commands.command_line import heavy_imports
    from lora_core.configuration import load_config

    seconds: dict[str, float] = {"starting Python": time.time() - started}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = time.time()
            result = function(*args, **kwargs)
            seconds[name] = time.time() - before
            return result

        return wrapped

    with heavy_imports():
        timed(IMPORTS, import_torch_and_transformers)()
        timed(OUR_IMPORTS, import_training)()
    from lora_core.training import loop, setup

    for name, what in PHASES.items():
        setattr(setup, name, timed(what, getattr(setup, name)))
    take_step = timed(STEP, loop.train_step)

    def take_one_step_and_end(*args: Any) -> None:
        take_step(*args)
        whole = time.time() - started
        print(json.dumps({**seconds, "the rest": whole - sum(seconds.values()), "whole": whole}), flush=True)
        os._exit(0)

    loop.train_step = take_one_step_and_end  # type: ignore[assignment]
    setup.train(load_config("demo", overrides))


def import_torch_and_transformers() -> None:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401


def import_training() -> None:
    from lora_core.commands.command_line import quiet_libraries

    quiet_libraries()
    import lora_core.training.setup  # noqa: F401


def launcher_s(script: Path) -> float:
    """Seconds that `accelerate launch` takes by itself."""
    accelerate = Path(sys.executable).parent / "accelerate"
    command = [accelerate, "launch", "--config_file", ROOT / "accelerate_config.yaml", script]
    started = time.time()
    subprocess.run(command, capture_output=True, check=True)
    return time.time() - started


def main() -> None:
    # Only here: it imports torch, which the child does at a time of its own.
    from common import last_line, markdown, met, options_of, spread, write

    options = options_of(__doc__, "startup.json", "--alternations", "overrides").parse_args()

    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        overrides = ["data.eval_file=null", "train.save_steps=1000", f"output_dir={folder}/run"]
        overrides += [f"data.cache_dir={folder}/rows", *options.overrides]

        def run() -> dict[str, float]:
            seconds: dict[str, float] = last_line([sys.executable, __file__, "--child", str(time.time()), *overrides])
            return seconds

        run()
        nothing = Path(folder) / "nothing.py"
        nothing.touch()
        runs, launcher = [], []
        for _ in range(options.alternations):
            runs.append(run())
            launcher.append(launcher_s(nothing))
            print(f"{runs[-1]['whole']:.1f} s, accelerate launch {launcher[-1]:.1f} s", flush=True)

    beyond = [each["whole"] - each[IMPORTS] for each in runs]
    before_step = [each["whole"] - each[IMPORTS] - each[STEP] for each in runs]
    bars = [f"(bar {BAR_S:g}: {met(statistics.median(each) < BAR_S)})" for each in (before_step, beyond)]
    rows = [(name, [each[name] for each in runs]) for name in runs[0] if name != "whole"]
    rows += [
        ("all of it", [each["whole"] for each in runs]),
        (f"beyond importing torch and transformers, to the step's start {bars[0]}", before_step),
        (f"the same, to its end {bars[1]}", beyond),
        ("`accelerate launch` itself, before all this", launcher),
    ]
    header = ["from the command to the end of the first step", "s"]
    table = markdown(header, [[what, spread(seconds, ".2f")] for what, seconds in rows])
    write(options.output, table, runs=runs, launcher_s=launcher)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
