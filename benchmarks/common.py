"""What the benchmarks share: their options, processes and rows, a training that takes single steps, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    from lora_core.config.schema import RunConfig
    from lora_core.configuration import load_config
    from lora_core.data.counts import EncodedFile
    from lora_core.data.packing import Batching, step_rows
    from lora_core.model.attention import use_segment_attention
    from lora_core.model.base import add_adapter
    from lora_core.model.loss import CausalLMLoss
    from lora_core.model.optimizer import build_optimizer, build_scheduler
    from lora_core.preflight.plan import plan_for
    from lora_core.rows.messages import parse_json_row
    from lora_core.runtime.devices import build_accelerator
    from lora_core.schedule import SchedulePlan
    from lora_core.training.step import StepResult, train_step

DEMO_MODEL = "~/.cache/lora_core/models/SmolLM2-135M-Instruct"
GIB = 2**30
Batches = list[dict[str, Any]]
"""One optimizer step's micro-batches."""


# ---------------------------------------------------------------------------------------------------------------
# Options, processes, rows


OPTIONS: dict[str, dict[str, Any]] = {
    "--rows": {"type": Path, "default": ROOT / "examples" / "train.jsonl", "help": "rows in any shape"},
    "--alternations": {"type": int, "default": 5, "help": "times that everything is measured, in turn"},
    "--peer-venv": {"type": Path, "default": ROOT / "outputs" / "benchmarks" / "trl-venv", "help": "made if need be"},
    "overrides": {"nargs": "*", "metavar": "key=value", "help": "in place of what the configuration says"},
}


def options_of(doc: str | None, output: str, *names: str) -> argparse.ArgumentParser:
    """`--output` and options by name, with the benchmark's docstring as its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / output)
    for name in names:
        parser.add_argument(name, **OPTIONS[name])
    return parser


def last_line(command: Sequence[str | Path]) -> Any:
    """Run a command to its end; the JSON on the last line that it prints.

    Raises:
        SystemExit: it failed; says how.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peer_python(folder: Path) -> Path:
    """TRL's own Python, of an environment that is made and filled if it is not there."""
    python = folder.absolute() / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {HERE / 'requirements.txt'} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")]
        subprocess.run(pip, check=True)
        (folder / "installed").touch()
    return python


def write_rows(path: Path, source: Path, number: int) -> None:
    """So many rows as messages, each a real one with its number after its first text, so that no two are the same."""
    lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = [[dict(message) for message in parse_json_row(line).messages] for line in lines]
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            first, *rest = rows[index % len(rows)]
            numbered = {**first, "content": f"{first['content']} ({index})"}
            file.write(json.dumps({"messages": [numbered, *rest]}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Steps


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

    def step(self, batches: Batches) -> StepResult:
        limit = self.config.train.max_grad_norm
        return train_step(self.accelerator, self.model, self.optimizer, self.scheduler, batches, limit)

    def batches(self, data: EncodedFile, batching: Batching, step: int) -> Batches:
        """Chosen, cut and read as the loop does it."""
        rows = step_rows(self.plan.num_rows, self.plan.rows_per_optimizer_step, self.config.train.seed, step)
        return [batching.tensors(data.dataset, cut) for cut in batching.cut(rows, data.lengths)]


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


# ---------------------------------------------------------------------------------------------------------------
# Time


def now() -> float:
    """Seconds, to take differences of: this process's CPU time where it has one thread, so that what other programs do
    to a shared machine does not count; wall time where it has more."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(function: Callable[[], Any]) -> float:
    started = now()
    function()
    return now() - started


# ---------------------------------------------------------------------------------------------------------------
# Tables


def spread(values: Sequence[float], form: str) -> str:
    """`0.62 (0.60 to 0.64)`: the median and the range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Pair by pair: what was measured side by side is divided by each other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def met(is_met: bool) -> str:
    return "met" if is_met else "NOT met"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, as GitHub shows it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def write(path: Path, table: str, **results: Any) -> None:
    """Print the table, and write it with all that was measured, where and when."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    content: Mapping[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "table": table,
        **results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten: {path}")
