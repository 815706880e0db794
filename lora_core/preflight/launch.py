"""Which command line starts a run on several devices: DDP or FSDP, and the file for Accelerate, by predicted memory."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core.configuration import shipped_file, with_overrides
from lora_core.preflight.findings import Facts, gib
from lora_core.preflight.memory import cheapest_change, fsdp_changes, fsdp_file, micro_batch_limit_that_fits

# Stands for the first machine's own.
EXAMPLE_ADDRESS = "10.0.0.1"


@dataclass(frozen=True)
class Launch:
    """How to start a run."""

    config_file: str | None
    """The name in `configs/accelerate/`; None where no file is needed, or nothing fits."""
    command: str | None
    """For a shell, the same on each machine but for the machine's rank; None where nothing fits."""
    reason: str
    to_fill_in: str | None = None
    """What differs from machine to machine, or stands for something; None on one machine."""

    def __str__(self) -> str:
        text = f"start: {self.command or 'as configured, no way fits'}\n       why: {self.reason}"
        return text if self.to_fill_in is None else f"{text}\n       to fill in: {self.to_fill_in}"


def choose_launch(facts: Facts, words: Sequence[str]) -> Launch:
    """DDP wherever a copy of the model fits on each device, FSDP where only a share does.

    Args:
        facts: of a run on several devices.
        words: of `lora-core train`, such as `--cfg qwen7b data.train_file=chats.jsonl`.
    """
    environment = facts.environment
    starts = _on_cpus if environment.device.kind == "cpu" else _ddp
    if facts.memory is None:
        return starts(facts, words, "the memory of a step is not known; where a copy of the model fits, DDP is fastest")
    copy = facts.memory if environment.sharding == "ddp" else facts.predict_memory(facts.config, "ddp")
    of_copy = f"{gib(copy.total_bytes)} of {gib(copy.limit_bytes)} predicted"
    if copy.fits:
        why = f"a copy of the model fits on each device ({of_copy}), so that gradients alone are exchanged (DDP)"
        return starts(facts, words, why)
    limit = micro_batch_limit_that_fits(facts) if environment.sharding == "ddp" else None
    if limit is not None:
        unit = "tokens" if facts.config.data.packing else "rows"
        why = f"a copy of the model fits on each device with micro-batches of at most {limit} {unit}"
        return starts(facts, words, f"{why} (train.auto_batch_size), so that gradients alone are exchanged (DDP)")
    too_large = f"a copy of the model does not fit on each device ({of_copy})"
    changes = fsdp_changes(facts.config)
    if changes is None or environment.device.kind == "cpu":
        why = f"{too_large}, and with these settings it cannot be shared out (FSDP)"
        return Launch(None, None, why + _what_would_fit(facts))
    share = facts.predict_memory(with_overrides(facts.config, changes), "fsdp")
    if not share.fits:
        why = f"{too_large}, nor does a share of it (FSDP: {gib(share.total_bytes)})"
        return Launch(None, None, why + _what_would_fit(facts))
    file = fsdp_file(facts.config)
    command = _accelerate(file, facts, [*words, *changes])
    why = f"{too_large}, and a share of it does (FSDP: {gib(share.total_bytes)})"
    return Launch(file, command, why, _to_fill_in(facts, "--machine_rank", "--main_process_ip"))


def _what_would_fit(facts: Facts) -> str:
    """The fix of `memory_too_small`, where there is one."""
    assert facts.memory is not None
    if facts.memory.fits:
        return ""
    fix, _ = cheapest_change(facts)
    return "" if fix is None else f"; with {fix} it would fit"


def _to_fill_in(facts: Facts, rank_option: str, address_option: str) -> str | None:
    num_machines = facts.environment.num_machines
    if num_machines == 1:
        return None
    return (
        f"the same line on each machine, with its own {rank_option} (0 to {num_machines - 1}), and with the address of "
        f"the first for {address_option}, in place of {EXAMPLE_ADDRESS}"
    )


def _ddp(facts: Facts, words: Sequence[str], reason: str) -> Launch:
    file = "ddp.yaml" if facts.environment.num_machines == 1 else "multinode_ddp.yaml"
    to_fill_in = _to_fill_in(facts, "--machine_rank", "--main_process_ip")
    return Launch(file, _accelerate(file, facts, words), reason, to_fill_in)


def _accelerate(file: str, facts: Facts, words: Sequence[str]) -> str:
    """`accelerate launch`, with a file of this folder, as in a checkout, or of the package."""
    here = Path("configs/accelerate", file)
    path = here if here.is_file() else shipped_file("configs") / "accelerate" / file
    environment = facts.environment
    options = ["--config_file", str(path), "--num_processes", str(environment.num_processes)]
    if environment.num_machines > 1:
        options += ["--num_machines", str(environment.num_machines), "--machine_rank", "0"]
        options += ["--main_process_ip", EXAMPLE_ADDRESS, "--main_process_port", "29500"]
    return shlex.join(["accelerate", "launch", *options, "-m", "lora_core", "train", *words])


def _on_cpus(facts: Facts, words: Sequence[str], reason: str) -> Launch:
    environment = facts.environment
    options = ["--nproc_per_node", str(environment.num_processes // environment.num_machines)]
    if environment.num_machines > 1:
        options += ["--nnodes", str(environment.num_machines), "--node_rank", "0"]
        options += ["--master_addr", EXAMPLE_ADDRESS, "--master_port", "29500"]
    command = shlex.join(["torchrun", *options, "-m", "lora_core", "train", *words])
    return Launch(None, command, reason, _to_fill_in(facts, "--node_rank", "--master_addr"))
