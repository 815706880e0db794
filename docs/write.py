"""Writes what docs and configurations take from the code: python docs/write.py [--memory]

docs/preflight.md comes from the checks' docstrings; configs/base.yaml and configs/schema.json from the models in
lora_core/config/schema.py. With --memory, docs/memory.md is predicted anew from the configs of
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

HERE = Path(__file__).parent
HEADER = """# Memory

Predicted peak memory in GiB on each GPU, by `lora_core/memory/`: the loop's own step on tensors without storage, LoRA
and optimizer as shipped, every token a loss token, packed examples, no evaluation. Each cell: without / with
`train.gradient_checkpointing`. 0.75 GiB of each figure are for the CUDA context, which is assumed. FSDP figures are
worked out from the same counts. No figure here was measured on a GPU; on the CPU, predictions are tested to be within
15% of a measured step.

`lora-core preflight --cfg qwen7b --gpu-memory-gib 24` answers for your rows and settings.

| model | weights | batch x length | 1 GPU | DDP, 2 to 8 | FSDP, 2 | FSDP, 4 | FSDP, 8 |
|---|---|---|---|---|---|---|---|
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


def memory_page() -> str:
    """docs/memory.md."""
    from lora_core.commands.command_line import quiet_libraries
    from lora_core.config.load import load_config
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
    return HEADER + "".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="docs/memory.md too")
    arguments = parser.parse_args()
    write_text(HERE / "preflight.md", documentation())
    write_text(HERE.parent / "configs/base.yaml", base_yaml())
    write_text(HERE.parent / "configs/schema.json", json.dumps(json_schema(), indent=2) + "\n")
    if arguments.memory:
        write_text(HERE / "memory.md", memory_page())
