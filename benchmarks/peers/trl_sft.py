"""One run of TRL's SFTTrainer, for `vs_trl.py`: `python trl_sft.py SETTINGS.json`, in TRL's own environment.

Writes the adapter to `output_dir` and, for every optimizer step, seconds, real tokens, loss and gradient norm to
`result_file`. A step is timed from `on_step_begin` to `on_step_end`: the batches are in memory by then and logging is
left out, which is in TRL's favour. Real tokens are TRL's own count: the sum of the attention mask, or the length of
the flat row when packed.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepClock(TrainerCallback):
    """Seconds, real tokens, loss and gradient norm of every optimizer step."""

    def __init__(self) -> None:
        self.measured: dict[str, list[float]] = {"step_s": [], "step_tokens": [], "losses": [], "grad_norms": []}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the last log is a summary of the run
            return
        self.measured["step_s"].append(self._seconds)
        self.measured["step_tokens"].append(float(logs["num_tokens"]) - sum(self.measured["step_tokens"]))
        self.measured["losses"].append(float(logs["loss"]))
        self.measured["grad_norms"].append(float(logs["grad_norm"]))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.chat_template = Path(settings["chat_template"]).read_text(encoding="utf-8")
    clock = StepClock()
    trainer = SFTTrainer(
        # Loaded here and not by name, so that the adapter starts from the same random numbers as lora_core's.
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16),
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=settings["rows"], split="train"),
        args=SFTConfig(
            assistant_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused where there is no GPU
            disable_tqdm=True,
            **settings["sft_config"],
        ),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **settings["lora_config"]),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(settings["sft_config"]["output_dir"])
    result = {
        **clock.measured,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "accelerate", "torch")},
    }
    Path(settings["result_file"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
