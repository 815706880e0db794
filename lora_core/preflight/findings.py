"""A finding, and what the checks look at to make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_core.memory.plan import MemoryPlan
    from lora_core.preflight.model_facts import ModelFacts
    from lora_core.runtime.devices import Environment


Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    id: str
    """What `preflight.allow` takes."""
    severity: Severity
    """error: the run would not learn, or not run; warning: it would learn less than it could; note: worth knowing."""
    message: str
    value: Any
    """What is."""
    limit: Any
    """Where it would be all right."""
    fix: str | None
    """The overrides that fix it, as the command line takes them, such as `train.warmup_steps=5`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}" + (f"; fix: {self.fix}" if self.fix else "") + f"  [{self.id}]"


@dataclass(frozen=True)
class Facts:
    """What the checks look at."""

    config: RunConfig
    plan: SchedulePlan
    train_data: EncodedFile
    eval_data: EncodedFile | None
    tokenizer: PreTrainedTokenizerBase
    model: ModelFacts
    environment: Environment
    predict_memory: Callable[..., MemoryPlan]
    """(configuration, sharding or the run's own) -> the plan for this run's rows, device and processes."""
    memory: MemoryPlan | None
    """Of this run; None where the adapter cannot be put on the model, or the step cannot be simulated."""
    memory_problem: str | None = None
    """Why the step cannot be simulated."""
    rate_line: str | None = None
    """How `train.learning_rate=auto` became a number; None where it was one."""


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def length_that_keeps(data: EncodedFile, share: float) -> int:
    """The smallest max_seq_length that leaves so large a share of the readable rows whole."""
    return int(np.quantile(data.rows.length[~data.rows.is_bad], share, method="higher"))
