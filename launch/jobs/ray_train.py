"""Ray Train: a worker a GPU on a Ray cluster, started again and resumed after a worker or a machine was lost.

From a folder with launch/ in it, with lora_core and ray[train] installed on the cluster's machines:

    ray job submit --working-dir . -- python launch/jobs/ray_train.py --cfg qwen7b data.train_file=/runs/chats.jsonl

Rows and output_dir are on a disk that all machines share, here /runs. Change what stands first.
"""

from __future__ import annotations

import argparse

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lora_core import load_config, train

SHARED_FOLDER = "/runs"
NUM_WORKERS = 16
USE_GPU = True
CPUS_PER_WORKER = 8
MAX_FAILURES = 3


def train_worker(run: dict[str, list[str]]) -> None:
    """In each worker, which Ray has made a rank of a process group. The first start finds nothing to resume."""
    train(load_config(run["cfg"][0], run["overrides"]), "auto")


def main() -> None:
    """Parse the command line, and have Ray start the workers."""
    parser = argparse.ArgumentParser(description="Fine-tune on a Ray cluster.")
    parser.add_argument("--cfg", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"cfg": [arguments.cfg], "overrides": arguments.overrides},
        # gloo beside NCCL, for what ranks tell each other.
        torch_config=TorchConfig(backend="cuda:nccl,cpu:gloo" if USE_GPU else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=NUM_WORKERS, use_gpu=USE_GPU, resources_per_worker={"CPU": CPUS_PER_WORKER}
        ),
        run_config=RunConfig(
            name="lora-core", storage_path=SHARED_FOLDER, failure_config=FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
