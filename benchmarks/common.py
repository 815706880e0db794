"""What the benchmarks share: a training that can take single steps, random models, ratios with their spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from lora_core.commands.command_line import heavy_imports, quiet_libraries  # noqa: E402

with heavy_imports():  # as the commands do
    quiet_libraries()
    import torch
    from accelerate import Accelerator

    from lora_core.config.load import load_config
    from lora_core.config.schema import RunConfig
    from lora_core.model.attention import use_segment_attention
    from lora_core.model.base import add_adapter
    from lora_core.model.loss import CausalLMLoss
    from lora_core.model.optimizer import build_optimizer, build_scheduler
    from lora_core.preflight.preflight import plan_for
    from lora_core.runtime.devices import build_accelerator
    from lora_core.schedule import SchedulePlan
    from lora_core.training.step import StepResult, train_step

DEMO_MODEL = "~/.cache/lora_core/models/SmolLM2-135M-Instruct"
GIB = 2**30


@dataclass(frozen=True)
class Training:
    """All that an optimizer step needs, as `lora_core.training.setup.train` sets it up."""

    config: RunConfig
    plan: SchedulePlan
    accelerator: Accelerator
    model: Any
    """`CausalLMLoss`, prepared."""
    optimizer: Any
    scheduler: Any

    def step(self, batches: Sequence[dict[str, Any]]) -> StepResult:
        limit = self.config.train.max_grad_norm
        return train_step(self.accelerator, self.model, self.optimizer, self.scheduler, batches, limit)


def base_config(*overrides: str) -> RunConfig:
    """`configs/base.yaml` with `key=value` settings."""
    return load_config(ROOT / "configs" / "base.yaml", overrides)


def set_up(config: RunConfig, accelerator: Accelerator, base: Any, num_rows: int) -> Training:
    """Put the adapter on a base model and prepare it for steps."""
    adapted = add_adapter(base, config.lora, config.train.seed, config.train.gradient_checkpointing)
    plan = plan_for(config, num_rows, accelerator.num_processes)
    optimizer = build_optimizer(adapted, config.train, accelerator.device)
    scheduler = build_scheduler(optimizer, plan)
    model, optimizer = accelerator.prepare(CausalLMLoss(adapted), optimizer)
    model.train()
    return Training(config, plan, accelerator, model, optimizer, scheduler)


def cpu_accelerator(config: RunConfig) -> Accelerator:
    """As the loop builds it, with its threads, allocator settings and caches.

    Raises:
        SystemExit: there is a GPU; these benchmarks time the CPU.
    """
    if torch.accelerator.is_available():
        raise SystemExit("this benchmark times the CPU; fix: CUDA_VISIBLE_DEVICES=''")
    return build_accelerator(config)


def random_llama(num_layers: int, **shape: Any) -> Any:
    """A frozen Llama, random bfloat16 weights, attending over packed segments; of the demo's shape unless said."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    demo: dict[str, Any] = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=num_layers, tie_word_embeddings=True, use_cache=False, **(demo | shape))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    use_segment_attention(model)
    return model.requires_grad_(False)


def now() -> float:
    """Seconds, to take differences of: this process's CPU time where it has one thread, so that what other programs do
    to a shared machine does not count; wall time where it has more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def spread(values: Sequence[float], form: str) -> str:
    """`0.62 (0.60 to 0.64)`: the median and the range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Pair by pair: what was measured side by side is divided by each other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def where_and_when() -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def write(path: Path, table: str, **results: Any) -> None:
    """Print the table, and write it with all that was measured."""
    content = {**where_and_when(), "table": table, **results}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten: {path}")
