"""Writes what docs and configurations take from the code: python docs/write.py [--memory]

docs/preflight.md comes from the checks' docstrings; docs/keys.md, configs/base.yaml and configs/schema.json from the
models in lora_core/config/schema.py. With --memory, the table of docs/memory.md is predicted anew from the configs of
the three Qwen2.5 models, which must be in the hub cache; some minutes.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from lora_core.config.keys import config_keys, json_schema
from lora_core.config.schema import RunConfig
from lora_core.preflight.catalogue import documentation
from lora_core.runtime.run_folder import write_text

ROOT = Path(__file__).resolve().parents[1]
MEMORY_HEADER = """# Memory

Predicted peak memory in GiB of each GPU: the loop's own step is run on tensors without storage (`lora_core/memory/`)
and what is alive is counted, by component. LoRA and optimizer as shipped, every token a loss token, packed examples,
no evaluation. Each cell: without / with `train.gradient_checkpointing`. 0.75 GiB of each figure are for the CUDA
context, which is assumed. FSDP figures are worked out from the same counts, with the adapter's gradients whole on each
GPU, as they are between the micro-batches of a step. In bf16 rank 0 reads the model on its CPU and sends each GPU its
share; in NF4 each GPU loads the whole model before it is shared out, and where that is the peak, checkpointing changes
nothing. **No figure here was measured on a GPU**; what one measured is in [benchmarks](benchmarks.md#on-a-gpu).
Written by `python docs/write.py --memory`.

`lora-core preflight --cfg qwen7b --gpu-memory-gib 24` answers for your rows and settings. A run that does not fit is
refused with the cheapest change that does.

On a CPU, predictions are tested to be within 15% of a measured step. Over the demo's 50 steps, in GiB
([figures](claims.md#memory-demo)):

| the demo | predicted | measured |
|---|---|---|
| as shipped | 1.81 | 1.79 |
| with gradient checkpointing | 1.2 | 1.3 |
| with NF4 | 1.59 | 1.91 (17% low: more of the heap is holes there than the half that is assumed) |

| model | weights | batch x length | 1 GPU | DDP, 2 to 8 | FSDP, 2 | FSDP, 4 | FSDP, 8 |
|---|---|---|---|---|---|---|---|
"""
KEYS_HEADER = """# Every key

For `key=value` on the command line and, without the dots, for sections of a YAML file ([configurations](configs.md)).
Written by `python docs/write.py` from `lora_core/config/schema.py`; `configs/base.yaml` holds the same defaults.

| key | type, default, meaning |
|---|---|
"""


BASE_YAML = """# yaml-language-server: $schema=schema.json
# Every key with its default, made by `python docs/write.py`. A file with `extends: base.yaml` sets only what differs.
"""


def base_yaml() -> str:
    """configs/base.yaml: each key with its default, its type and what it means."""
    meanings = config_keys()
    lines: list[str] = []
    for section, values in RunConfig().model_dump(mode="json").items():
        if isinstance(values, dict):
            lines += ["", f"{section}:"]
            lines += [f"  {_setting(key, value, meanings[f'{section}.{key}'])}" for key, value in values.items()]
        elif section != "output_dir":  # comes from the configuration's name
            lines += ["", _setting(section, values, meanings[section])]
    output_dir = meanings["output_dir"].rsplit(": ", 1)[-1]
    return BASE_YAML + "\n".join([*lines, "", f"# output_dir  {output_dir}", ""])


def _setting(key: str, value: Any, meaning: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
    if isinstance(value, float) and value != 0 and abs(value) < 1e-3:
        text = f"{value:e}".replace(".000000", "").replace("e-0", "e-")
    what, _, description = meaning.partition(": ")
    return f"{key}: {text}  # {what.split(', default ')[0]}: {description}"


def predicted_table() -> str:
    """The rows of docs/memory.md's table, predicted anew."""
    from lora_core.commands.command_line import quiet_libraries
    from lora_core.configuration import load_config
    from lora_core.memory.micro_batch import MicroBatch
    from lora_core.memory.plan import Sharding, predict_memory
    from lora_core.runtime.devices import DeviceMemory

    quiet_libraries()
    gpu = DeviceMemory("cuda", 80 * 2**30)
    spreads: list[tuple[int, Sharding]] = [(1, "ddp"), (8, "ddp"), (2, "fsdp"), (4, "fsdp"), (8, "fsdp")]
    rows = []
    for cfg, quantization, batch, length in itertools.product(
        ("qwen0.5b", "qwen1.5b", "qwen7b"), ("none", "nf4"), (1, 4), (1024, 4096)
    ):
        cells = []
        for num_processes, sharding in spreads:
            gib = []
            for checkpointing in ("false", "true"):
                overrides = [f"model.quantization={quantization}", f"train.gradient_checkpointing={checkpointing}"]
                config = load_config(cfg, overrides)
                micro_batch = MicroBatch((length,) * batch, batch * length - batch, packed=True)
                plan = predict_memory(config, micro_batch, gpu, num_processes, sharding)
                gib.append(f"{plan.total_bytes / 2**30:.1f}")
            cells.append(" / ".join(gib))
        weights = "bf16" if quantization == "none" else "NF4"
        name = config.model.name_or_path.removeprefix("Qwen/")
        rows.append(f"| {' | '.join([name, weights, f'{batch} x {length}', *cells])} |\n")
        print(rows[-1], end="", flush=True)
    return "".join(rows)


def written_table() -> str:
    """The rows of the table that docs/memory.md has now."""
    lines = (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("| Qwen"))


def files(memory_table: str) -> dict[str, str]:
    """Every file that is written from the code, by its path in the repository."""
    keys = [(key, text.replace("|", "\\|")) for key, text in config_keys().items()]
    return {
        "docs/preflight.md": documentation(),
        "docs/keys.md": KEYS_HEADER + "".join(f"| `{key}` | {text} |\n" for key, text in keys),
        "docs/memory.md": MEMORY_HEADER + memory_table,
        "configs/base.yaml": base_yaml(),
        "configs/schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="predict the table of docs/memory.md anew")
    arguments = parser.parse_args()
    for name, text in files(predicted_table() if arguments.memory else written_table()).items():
        write_text(ROOT / name, text)
