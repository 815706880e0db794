"""Ranks that were started for different runs are refused, all of them, in a sentence that says what differs."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest

from tests.forked import python

# Each of two ranks is given its own, and says what it was told.
RANKS = textwrap.dedent("""
    import json, multiprocessing, os, sys
    import torch.distributed as dist
    from lora_core.configuration import load_config
    from lora_core.errors import LoraCoreError
    from lora_core.training.alike import (
        check_order_of_ranks,
        check_same_base,
        check_same_rows,
        check_same_settings,
    )
    from tests.equivalence.forked_ranks import free_port
    from tests.tiny import make_model

    def told(check, *arguments):
        try:
            check(*arguments)
        except LoraCoreError as error:
            return str(error)

    def rank_main(rank, port, pipe):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo")
        config = load_config("demo")
        own = [f"output_dir=run-{rank}", f"data.train_file=rows-{rank}.jsonl", f"model.name_or_path=model-{rank}"]
        elsewhere = load_config("demo", [*own, f"data.cache_dir=cache-{rank}", f"data.num_proc={rank + 1}"])
        other = load_config("demo", ["train.learning_rate=5e-3", "lora.rank=4"]) if rank else config
        frozen = [make_model(100, seed=seed).requires_grad_(False) for seed in (0, rank)]
        in_order = told(check_order_of_ranks)
        os.environ["LOCAL_RANK"] = str(2 * rank)
        pipe.send((rank, {
            "in order": in_order,
            "order": told(check_order_of_ranks),
            "elsewhere": told(check_same_settings, elsewhere, "run/checkpoints/step-000001" if rank else "newest"),
            "settings": told(check_same_settings, other, None),
            "resume": told(check_same_settings, config, "newest" if rank else None),
            "same rows": told(check_same_rows, "a hash", 10, f"rows-{rank}.jsonl"),
            "rows": told(check_same_rows, f"hash {rank}", 10 + rank, f"rows-{rank}.jsonl"),
            "same base": told(check_same_base, frozen[0]),
            "base": told(check_same_base, frozen[1]),
            "adapter": told(check_same_base, frozen[1].requires_grad_(True)),
        }))
        dist.destroy_process_group()

    forks = multiprocessing.get_context("fork")
    read, written = forks.Pipe(duplex=False)
    port = free_port()
    for rank in range(2):
        forks.Process(target=rank_main, args=(rank, port, written), daemon=True).start()
    print(json.dumps([seen for _, seen in sorted((read.recv() for _ in range(2) if read.poll(60)))]))
""")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """By check, what both ranks were told."""
    done = python("-c", RANKS)
    first, second = json.loads(done.stdout)
    assert first == second
    told: dict[str, Any] = first
    return told


def test_ranks_are_numbered_machine_by_machine(told: dict[str, Any]) -> None:
    assert told["in order"] is None
    assert "RANK=1 has LOCAL_RANK=2, and the rank before it is not the one before it on its machine" in told["order"]


def test_what_is_only_elsewhere_on_another_machine_is_taken(told: dict[str, Any]) -> None:
    assert {name: told[name] for name in ("elsewhere", "same rows", "same base")} == dict.fromkeys(
        ("elsewhere", "same rows", "same base")
    )


def test_other_settings_are_named_with_both_values(told: dict[str, Any]) -> None:
    assert told["settings"].splitlines() == [
        "the ranks of this run were started with other settings:",
        "  lora.rank: 16 in rank 0, 4 in rank 1",
        "  train.learning_rate: 0.0005 in rank 0, 0.005 in rank 1",
        "Fix: the same command line, configuration and version of lora_core on every machine",
    ]
    assert "  --resume: None in rank 0, 'newest' in rank 1\n" in told["resume"]


def test_other_rows_and_another_base_model_are_refused(told: dict[str, Any]) -> None:
    assert told["rows"].startswith("rows-1.jsonl: rank 1 has other rows than rank 0, or another tokenizer")
    assert "11 examples there, 10 in rank 0 (rows-0.jsonl)" in told["rows"]
    assert told["base"].startswith("model.name_or_path: rank 1 has loaded other weights than rank 0; fix: the same")


def test_what_trains_may_begin_otherwise(told: dict[str, Any]) -> None:
    assert told["adapter"] is None  # DDP sends rank 0's
