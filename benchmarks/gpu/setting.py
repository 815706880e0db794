"""What the checks share: where files go, the shapes of models, random models and rows, processes with a time limit."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil  # comes with Accelerate
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GIB = 2**30
# Qwen2.5's.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
DRY_RUN_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
LORA_RANK = {"0.5b": 16, "7b": 8}  # as the shipped configurations have it; alpha is twice as much


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and where their files go."""

    dry_run: bool
    """Tiny shapes on the CPU."""
    output: Path
    """Logs of commands, and the kernels of each step."""
    scratch: Path
    """Models, rows and runs."""
    failures: list[str] = field(default_factory=list)
    """What went wrong in this part, which its exit status tells."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    def shape(self, model: str, **changes: Any) -> dict[str, Any]:
        """The arguments of a `Qwen2Config`."""
        return {**SHAPES[model], **changes, **(DRY_RUN_SHAPE if self.dry_run else {})}

    def model_folder(self, model: str) -> Path:
        return self.scratch / model

    @property
    def rows(self) -> Path:
        return self.scratch / "rows.jsonl"

    def fail(self, what: str) -> None:
        print(f"FAILED: {what}")
        self.failures.append(what)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One measurement of several: where it fails, that is printed and remembered, and the next one is made."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is, the other measurements are wanted all the more
            traceback.print_exc()
            self.fail(f"{what}: {type(error).__name__}: {error}")

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Until the device has done it."""
        self.synchronize()
        started = time.perf_counter()
        function()
        self.synchronize()
        return (time.perf_counter() - started) * 1e3

    def memory(self) -> str:
        """What the GPU's allocator has given out, and has taken from the driver for that."""
        if self.device.type == "cpu":
            return "no GPU's memory to look at"
        now, peak, reserved = (
            size() / GIB
            for size in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        return f"allocated {now:.2f} GiB, at most {peak:.2f}, reserved at most {reserved:.2f}"

    def free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def spread(values: Sequence[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---------------------------------------------------------------------------------------------------------------
# Models and rows


def set_up_process() -> None:
    """Set torch up for this device as a run does, with its choice of attention kernels."""
    from lora_core.configuration import load_config
    from lora_core.runtime.devices import build_accelerator

    build_accelerator(load_config(ROOT / "configs" / "base.yaml"))


def random_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Qwen2 of random weights that is made on the device."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(max_position_embeddings=32_768, rope_parameters=rotary, rms_norm_eps=1e-6, **shape)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make(setting: Setting, model: str) -> None:
    """Random weights of the real shape with a small tokenizer, as a folder; and rows."""
    from tests.tiny import make_tokenizer

    folder = setting.model_folder(model)
    random_model(setting.shape(model), setting.device).save_pretrained(folder, max_shard_size="4GB")
    make_tokenizer().save_pretrained(folder)
    write_rows(setting.rows, 24 if setting.dry_run else 400)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / GIB:.2f} GiB; {setting.rows}")


def write_rows(path: Path, number: int) -> None:
    """Chats in the words of the example rows, whose answers are about as long, and differ as much, as Alpaca's."""
    chats = (ROOT / "examples" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for chat in chats for turn in json.loads(chat)["messages"] for word in turn["content"].split()]
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            length = min(100, max(4, round(rng.lognormvariate(2.6, 0.8))))
            question = " ".join([str(index), *rng.choices(words, k=8)])
            answer = " ".join(rng.choices(words, k=length))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# Processes


def run_limited(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, output: IO[str] | None = None
) -> int | None:
    """Run a command -> its exit status, or None where it took too long and was stopped, with all that it started.

    Args:
        environment: in addition to this process's.
        output: for both of its streams, in place of this process's.
    """
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=output, stderr=output)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started: a launcher's ranks, left alone, would go on holding the GPU."""
    parent = psutil.Process(process.pid)
    family = [*parent.children(recursive=True), parent]
    for member in family:
        with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            member.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()
