"""TRL's preparation of a file, for `encoding.py`, in its own environment:
`python trl_prepare.py MODEL TEMPLATE ROWS PROCESSES`.

Prints the seconds from the file to rows that SFTTrainer can train on: `load_dataset`, and what the trainer does to the
rows in its `__init__` (no packing). Loading the model is not counted. PROCESSES is empty for what it comes with, one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


class TimedTrainer(SFTTrainer):
    """Notes how long the preparation took."""

    prepare_s = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.prepare_s += time.perf_counter() - started
        return prepared


def main() -> None:
    model, template, rows, processes = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        started = time.perf_counter()
        dataset = load_dataset("json", data_files=rows, split="train", cache_dir=folder)
        load_s = time.perf_counter() - started
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            processing_class=tokenizer,
            train_dataset=dataset,
            args=SFTConfig(
                output_dir=folder,
                assistant_only_loss=True,
                max_length=1024,
                bf16=True,
                use_cpu=True,
                report_to="none",
                dataset_num_proc=int(processes) if processes else None,
            ),
        )
        assert len(trainer.train_dataset) == len(dataset)
        print(load_s + trainer.prepare_s)


if __name__ == "__main__":
    main()
