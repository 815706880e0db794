"""What a run on many devices comes to, worked out before a process is started.

Tokens of each rank, what ranks send each other, the size of a checkpoint, and on how many devices the rows are of use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_core.config.schema import TrainConfig
from lora_core.data.packing import Batching, step_rows, train_batching
from lora_core.errors import counted
from lora_core.preflight.findings import Facts
from lora_core.preflight.launch import Launch, choose_launch
from lora_core.preflight.plan import plan_for
from lora_core.preflight.schedule import ENOUGH_STEPS
from lora_core.schedule import SchedulePlan, largest_micro_batch

# Steps of the first epoch that are divided among all ranks; more tell nothing new.
_STEPS_LOOKED_AT = 1_000


@dataclass(frozen=True)
class Balance:
    """How evenly the tokens of an epoch lie on the ranks."""

    least_tokens: int
    """Of the rank with the fewest, over the steps that were looked at; then of the average and of the fullest."""
    mean_tokens: float
    most_tokens: int
    waiting: float
    """Share of the time of an average rank that it waits for the fullest of its step, if time goes by tokens."""
    fillers: int
    """Micro-batches, of all ranks, without a row of their own: they compute nothing that counts."""
    micro_batches: int
    steps: int
    """That were looked at: the first epoch's, or its first thousand."""

    def __str__(self) -> str:
        where = "an epoch" if self.steps < _STEPS_LOOKED_AT else f"{self.steps:,} steps"
        text = (
            f"tokens of a rank in {where}: {self.least_tokens:,} to {self.most_tokens:,}, on average "
            f"{self.mean_tokens:,.0f}; it waits {self.waiting:.1%} of each step for the fullest"
        )
        if self.fillers:
            text += f"; {self.fillers:,} of {counted(self.micro_batches, 'micro-batch', 'micro-batches')} have no row"
        return text


@dataclass(frozen=True)
class RanksPlan:
    """A run on `num_processes` devices."""

    num_processes: int
    num_machines: int
    balance: Balance
    gradient_bytes: int | None
    """Of the adapter, in float32: what the ranks sum up once an optimizer step. None where memory is not known."""
    gathered_bytes: int | None
    """Of the frozen weights, which FSDP gathers on each device twice a micro-batch; None without FSDP."""
    checkpoint_bytes: int | None
    most_processes: int
    """That still have enough steps, with as many examples in each process's share of a step as configured."""
    most_processes_at_one: int
    """The same with one example in each share."""
    examples_of_one: int
    """In an optimizer step of one process; on so many, or a divisor, the same step can be shared out evenly."""
    steps_of_one: int
    """Optimizer steps of the run on one process."""
    same_steps: str | None
    """The overrides with which so many processes take the steps of one; None where they cannot be shared evenly."""
    launch: Launch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        machines = counted(self.num_machines, "machine")
        lines = [
            f"ranks: {self.num_processes:,} on {machines}, {self.num_processes // self.num_machines} on each",
            f"       {self.balance}",
        ]
        if self.gradient_bytes is not None:
            # A ring: Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002.
            sent = 2 * self.gradient_bytes * (self.num_processes - 1) / self.num_processes
            exchange = f"{_mib(self.gradient_bytes)} of gradients a step, for which each sends {_mib(sent)} in a ring"
            if self.gathered_bytes is not None:
                exchange += f"; FSDP gathers {_mib(self.gathered_bytes)} of frozen weights twice a micro-batch"
            lines.append(f"       exchanged: {exchange}")
        if self.checkpoint_bytes is not None:
            lines.append(f"       a checkpoint: {_mib(self.checkpoint_bytes)}")
        lines.append(f"       {self._useful()}")
        lines.append(f"       {self._same_steps()}")
        lines.append(f"       {self.launch}")
        return "\n".join(lines)

    def _same_steps(self) -> str:
        one = (
            f"the steps of one process ({counted(self.steps_of_one, 'step')} of "
            f"{counted(self.examples_of_one, 'example')})"
        )
        if self.same_steps is not None:
            return f"same: with {self.same_steps} it takes {one}"
        even = [str(n) for n in range(1, self.examples_of_one + 1) if self.examples_of_one % n == 0]
        return f"same: {one} can be shared out evenly by {', '.join(even)}, and not by {self.num_processes:,}"

    def _useful(self) -> str:
        if self.most_processes_at_one == 0:
            return f"useful: on no number of devices do these rows have enough steps ({ENOUGH_STEPS})"
        configured = f"{self.most_processes:,} as configured" if self.most_processes else "none as configured"
        return (
            f"useful: up to {configured}, {self.most_processes_at_one:,} with one example each in a step; more have "
            f"fewer than {ENOUGH_STEPS} steps, or steps of more than a quarter of the rows"
        )


def plan_ranks(facts: Facts, words: Sequence[str]) -> RanksPlan:
    """Of a run as it was looked at; reads lengths of rows, and starts nothing.

    Args:
        words: of `lora-core train`, for the command line that starts it.
    """
    train, memory, plan = facts.config.train, facts.memory, facts.plan
    gathered = None
    if memory is not None and memory.sharding == "fsdp":
        gathered = facts.predict_memory(facts.config, "ddp").components["weights"]
    on_each = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return RanksPlan(
        num_processes=plan.num_processes,
        num_machines=facts.environment.num_machines,
        balance=balance(train_batching(facts.config, 0), facts.train_data.lengths, plan, train.seed),
        gradient_bytes=None if memory is None else memory.adapter_file_bytes,
        gathered_bytes=gathered,
        checkpoint_bytes=None if memory is None else memory.checkpoint_bytes,
        most_processes=most_processes(plan.num_rows, on_each, train),
        most_processes_at_one=most_processes(plan.num_rows, 1, train),
        examples_of_one=on_each,
        steps_of_one=plan_for(facts.config, plan.num_rows, 1).total_optimizer_steps,
        same_steps=steps_of_one_process(train, plan.num_processes),
        launch=choose_launch(facts, words),
    )


def steps_of_one_process(train: TrainConfig, num_processes: int) -> str | None:
    """The overrides with which a step of so many processes has the examples of one process's; None if none has."""
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    on_each, left = divmod(batch * accumulation, num_processes)
    if left:
        return None
    smaller = largest_micro_batch(on_each, batch)
    settings = {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": on_each // smaller}
    changed = [f"train.{name}={value}" for name, value in settings.items() if value != getattr(train, name)]
    return " ".join(changed)


def balance(batching: Batching, lengths: npt.NDArray[np.int64], plan: SchedulePlan, seed: int) -> Balance:
    """Cut the first epoch's steps for all ranks, as the run will, and count.

    Args:
        lengths: (num_rows,) tokens of each row.
    """
    steps = min(plan.optimizer_steps_per_epoch, plan.total_optimizer_steps, _STEPS_LOOKED_AT)
    tokens = np.zeros(plan.num_processes, dtype=np.int64)
    fullest = fillers = micro_batches = 0
    for step in range(steps):
        rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, seed, step)
        shares = batching.shares(rows, lengths, plan.num_processes)
        of_ranks = np.array([lengths[share].sum() for share in shares]).reshape(-1, plan.num_processes).sum(axis=0)
        tokens += of_ranks
        fullest += int(of_ranks.max())
        fillers += sum(len(share) == 0 for share in shares)
        micro_batches += len(shares)
    return Balance(
        least_tokens=int(tokens.min()),
        mean_tokens=float(tokens.mean()),
        most_tokens=int(tokens.max()),
        waiting=1 - float(tokens.mean()) / fullest,
        fillers=fillers,
        micro_batches=micro_batches,
        steps=steps,
    )


def most_processes(num_rows: int, examples_on_each: int, train: TrainConfig) -> int:
    """The largest number of processes whose plan has enough steps (`few_steps`, `batch_large_for_rows`); 0 if none has.

    Args:
        examples_on_each: what each process takes in an optimizer step.
    """
    # An epoch of k steps or more: ceil(num_rows / step) >= k, so step <= (num_rows - 1) / (k - 1).
    steps_an_epoch = 1 if train.max_steps else math.ceil(ENOUGH_STEPS / train.num_train_epochs)
    largest_step = num_rows // 4
    if steps_an_epoch > 1:
        largest_step = min(largest_step, (num_rows - 1) // (steps_an_epoch - 1))
    if train.max_steps and train.max_steps < ENOUGH_STEPS:
        return 0
    return largest_step // examples_on_each


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
