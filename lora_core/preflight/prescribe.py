"""A configuration for a model, rows and a machine: each value with the reason and the number behind it.

`choose` is arithmetic over numbers; `fit` walks down a list of changes, cheapest first, until the memory fits.
What the rows should teach, and whether their replies are right, no arithmetic knows: `not_known`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.errors import ConfigError, DataError, counted
from lora_core.learning_rate import suggest_learning_rate
from lora_core.other_tools.translation import short
from lora_core.schedule import SchedulePlan, plan_schedule

# Rows below which so many epochs are usual.
_EPOCHS = ((500, 5), (5_000, 3), (50_000, 2))
_LEAST_STEPS, _MOST_STEPS = 40, 3_000
_USUAL_STEP, _LARGEST_STEP = 8, 128
_USUAL_LENGTH, _LENGTH_UNIT = 1024, 256
_RANKS = (16, 32, 64, 128, 256)
# "LoRA Without Regret", https://thinkingmachines.ai/blog/lora/: an adapter stores about 2 bits a parameter, and rows of
# instructions hold about 1 bit a token.
_TOKENS_PER_PARAMETER = 2
_FEWEST_TO_SPLIT, _MOST_EVAL_ROWS = 50, 500


@dataclass(frozen=True)
class PrescribeFacts:
    """What is known of a run before it is configured."""

    model: str
    train_file: str
    num_rows: int
    """That can be trained on, at whatever length."""
    loss_tokens: int
    longest: int
    """Tokens of the longest row, and `length_99` of the row that 99% are not longer than."""
    length_99: int
    num_processes: int
    device: str
    """cpu, cuda or mps."""
    model_type: str
    hidden_size: int
    max_positions: int | None
    linear_names: tuple[str, ...]
    """Of the model's layers that may have an adapter, without its head."""
    parameters_per_rank: int
    """Trainable parameters of an adapter of rank 1 on all of them."""
    eval_file: str | None = None


@dataclass(frozen=True)
class Choice:
    """One value of a configuration."""

    key: str
    value: Any
    reason: str

    @property
    def override(self) -> str:
        """As the command line takes it."""
        return f"{self.key}={short(self.value)}"


@dataclass(frozen=True)
class Prescription:
    """All choices, with the plan that they come to."""

    choices: tuple[Choice, ...]
    plan: SchedulePlan

    @property
    def overrides(self) -> list[str]:
        return [choice.override for choice in self.choices]

    def with_choices(self, changed: Sequence[Choice]) -> Prescription:
        """The same, with some values changed or added."""
        kept = [choice for choice in self.choices if choice.key not in {each.key for each in changed}]
        return replace(self, choices=(*kept, *changed))

    def to_yaml(self, title: str, remarks: Sequence[str]) -> str:
        """A configuration with a comment above each value."""
        lines = [part for line in (title, *remarks) for part in textwrap.wrap(f"# {line}", 110, subsequent_indent="# ")]
        sections = dict.fromkeys(choice.key.partition(".")[0] for choice in self.choices)
        for section in sections:
            lines += ["", f"{section}:"]
            for choice in self.choices:
                if choice.key.startswith(f"{section}."):
                    text = yaml.safe_dump(choice.value, default_flow_style=True, width=1000).split("\n")[0]
                    comment = textwrap.wrap(choice.reason, 110, initial_indent="  # ", subsequent_indent="  # ")
                    lines += [*comment, f"  {choice.key.partition('.')[2]}: {text}"]
        return "\n".join([*lines, ""])


def choose(facts: PrescribeFacts) -> Prescription:
    """The configuration for these facts, whatever the memory.

    Raises:
        DataError: there are fewer rows than processes.
    """
    rows, held = _eval_set(facts)
    if rows < facts.num_processes:
        raise DataError(
            f"{facts.train_file}: {counted(facts.num_rows, 'row')} for {facts.num_processes} processes, each of which "
            f"takes one at a time; fix: --num-processes {facts.num_rows}"
        )
    epochs, micro_batch, accumulation, steps = _steps(rows, facts.num_processes)
    rank = _rank(facts)
    alpha = 2 * rank[0].value
    planned = plan_schedule(
        rows,
        per_device_train_batch_size=micro_batch.value,
        gradient_accumulation_steps=accumulation.value,
        num_train_epochs=epochs.value,
        num_processes=facts.num_processes,
        warmup_ratio=0.1,
    )
    rate = suggest_learning_rate(
        model_type=facts.model_type, hidden_size=facts.hidden_size, alpha=alpha, rank=rank[0].value, total_steps=steps
    )
    choices = [
        Choice("model.name_or_path", facts.model, "as given"),
        *rank,
        _targets(facts),
        Choice("data.train_file", facts.train_file, "as given"),
        *held,
        *_length(facts),
        epochs,
        micro_batch,
        accumulation,
        Choice("train.learning_rate", rate.value, str(rate)),
        _warmup(planned),
        Choice("train.optim", *_optimizer(facts)),
        Choice("train.bf16", "auto", "bfloat16 where the device has instructions for it, else float32"),
        *_intervals(planned, bool(held)),
    ]
    return Prescription(tuple(choices), planned_with(planned, choices))


def planned_with(plan: SchedulePlan, choices: Sequence[Choice]) -> SchedulePlan:
    """The plan, with the choices' warmup and rate."""
    values = {choice.key: choice.value for choice in choices}
    steps = values.get(
        "train.warmup_steps", math.ceil(plan.total_optimizer_steps * values.get("train.warmup_ratio", 0))
    )
    return replace(plan, warmup_steps=steps, learning_rate=values["train.learning_rate"])


def _eval_set(facts: PrescribeFacts) -> tuple[int, list[Choice]]:
    """Rows that are left to train on; the eval set, if there is one."""
    if facts.eval_file is not None:
        return facts.num_rows, [Choice("data.eval_file", facts.eval_file, "as given")]
    if facts.num_rows < max(_FEWEST_TO_SPLIT, 2 * facts.num_processes):
        return facts.num_rows, []
    share = min(0.1, float(f"{_MOST_EVAL_ROWS / facts.num_rows:.1g}"))
    number = round(share * facts.num_rows)
    reason = f"{number:,} of {facts.num_rows:,} rows, without which nobody can tell learning from memorising"
    return facts.num_rows - number, [Choice("data.eval_fraction", share, reason)]


def _steps(rows: int, num_processes: int) -> tuple[Choice, Choice, Choice, int]:
    """Epochs, batch size and accumulation for enough steps and not too many; and the steps that they come to."""
    usual = epochs = next((number for below, number in _EPOCHS if rows < below), 1)
    per_device = 1
    while 2 * per_device * num_processes <= _USUAL_STEP:
        per_device *= 2

    def total(size: int) -> int:
        return math.ceil(rows / (size * num_processes)) * epochs

    while per_device > 1 and (total(per_device) < _LEAST_STEPS or 4 * per_device * num_processes > rows):
        per_device //= 2
    while total(per_device) > _MOST_STEPS and 2 * per_device * num_processes <= _LARGEST_STEP:
        per_device *= 2
    if total(per_device) < _LEAST_STEPS:
        epochs = math.ceil(_LEAST_STEPS / math.ceil(rows / (per_device * num_processes)))
    batch_size = min(2, per_device)
    steps = total(per_device)
    why_epochs = f"usual for {counted(rows, 'training row')}"
    if epochs != usual:
        why_epochs = f"more than the usual {usual}, for {steps} steps from {counted(rows, 'row')}; more rows are better"
    return (
        Choice("train.num_train_epochs", epochs, why_epochs),
        Choice("train.per_device_train_batch_size", batch_size, "only the sum over a step counts for what is learned"),
        Choice(
            "train.gradient_accumulation_steps",
            per_device // batch_size,
            f"{per_device * num_processes} rows a step: {steps:,} optimizer steps, where {_LEAST_STEPS} are few and "
            f"{_MOST_STEPS:,} are many",
        ),
        steps,
    )


def _rank(facts: PrescribeFacts) -> list[Choice]:
    needed = facts.loss_tokens / _TOKENS_PER_PARAMETER
    rank = next((rank for rank in _RANKS if rank * facts.parameters_per_rank >= needed), _RANKS[-1])
    parameters = rank * facts.parameters_per_rank
    return [
        Choice(
            "lora.rank",
            rank,
            f"{parameters:,} trainable parameters have room for {_TOKENS_PER_PARAMETER * parameters:,} loss tokens "
            f"(2 bits a parameter, 1 a token), and the rows have {facts.loss_tokens:,}",
        ),
        Choice("lora.alpha", 2 * rank, "the update is scaled by alpha / rank, usually 2"),
    ]


def _targets(facts: PrescribeFacts) -> Choice:
    if set(ALL_SEVEN_PROJECTIONS) <= set(facts.linear_names):
        return Choice("lora.target_modules", ALL_SEVEN_PROJECTIONS, "all linear layers learn more than q and v alone")
    return Choice("lora.target_modules", "all-linear", f"this model's layers: {', '.join(facts.linear_names)}")


def _length(facts: PrescribeFacts) -> list[Choice]:
    limit = facts.max_positions or max(facts.longest, _USUAL_LENGTH)
    if facts.longest > limit:
        return [
            Choice("data.max_seq_length", limit, "the longest input that the model was made for"),
            Choice("data.truncation", "drop", f"the longest row has {facts.longest:,} tokens, and would lose its end"),
        ]
    length = max(_USUAL_LENGTH, math.ceil(facts.longest / _LENGTH_UNIT) * _LENGTH_UNIT)
    reason = f"the longest row has {facts.longest:,} tokens, and 99% have at most {facts.length_99:,}"
    return [Choice("data.max_seq_length", min(length, limit), f"{reason}; shorter rows cost nothing, packed")]


def _warmup(plan: SchedulePlan) -> Choice:
    if plan.total_optimizer_steps > 1000:
        return Choice("train.warmup_steps", 100, f"of {plan.total_optimizer_steps:,} steps; more costs learning")
    return Choice("train.warmup_ratio", 0.1, f"{plan.warmup_steps} of {plan.total_optimizer_steps} steps")


def _optimizer(facts: PrescribeFacts) -> tuple[str, str]:
    if facts.device != "cuda":
        return "adamw_torch", f"8 bits cost time on {facts.device}, and the state of an adapter is small"
    return "paged_adamw_8bit", "6 bytes less per trainable parameter, in pages that may leave the GPU"


def _intervals(plan: SchedulePlan, has_eval: bool) -> list[Choice]:
    steps = plan.total_optimizer_steps
    tenth = max(1, steps // 10)
    epochs = steps // plan.optimizer_steps_per_epoch
    logging = 1 if steps <= 300 else 10
    interval, said = (None, "once an epoch") if epochs >= 3 else (tenth, "ten times over the run")
    choices = [
        Choice("train.logging_steps", logging, f"{steps // logging:,} log lines"),
        Choice("train.save_steps", interval, f"{said}; the newest two are kept"),
    ]
    if has_eval:
        choices.append(Choice("train.eval_steps", interval, said))
        choices.append(Choice("train.keep_adapter", "best", "of the lowest eval loss: more epochs then cost time only"))
    return choices


def memory_changes(facts: PrescribeFacts) -> list[list[Choice]]:
    """What makes a run smaller, the cheapest first; each is added to those before it."""
    return [
        [],
        [Choice("train.gradient_checkpointing", True, "more time, the same result: without it memory is short")],
        [
            Choice("train.max_tokens_per_device_batch", facts.longest, "the longest row; same steps, same gradient"),
            Choice("train.per_device_eval_batch_size", 1, "evaluation in small batches, the same eval loss"),
        ],
        [Choice("model.quantization", "nf4", "weights in 4 bits: nothing cheaper fits")],
        [
            Choice("data.max_seq_length", facts.length_99, "keeps 99% of the rows: nothing cheaper fits"),
            Choice("data.truncation", "drop", "a truncated row would lose the end of its reply"),
            Choice("train.max_tokens_per_device_batch", facts.length_99, "the longest row that is left"),
        ],
    ]


def fit(
    prescription: Prescription, changes: Sequence[Sequence[Choice]], fits: Callable[[Prescription], bool]
) -> Prescription:
    """The first of the changes, each with those before it, with which the run fits.

    Raises:
        ConfigError: none does.
    """
    for change in changes:
        prescription = prescription.with_choices(change)
        if fits(prescription):
            return prescription
    raise ConfigError(
        "not even checkpointing, the smallest micro-batches, NF4 and dropping the longest 1% of the rows fit the "
        "memory; fix: a smaller model, or more memory (--gpu-memory-gib)"
    )


def not_known(facts: PrescribeFacts) -> list[str]:
    """What the prescription was made without knowing."""
    lines = [
        "whether the replies are right, or what they should teach: read some with `lora-core rows`",
        "how fast the device is, and so how long it takes",
        "which rate is best for these rows: the formula is of other rows; lora-core find-lr tries some",
    ]
    if facts.num_rows < _FEWEST_TO_SPLIT and facts.eval_file is None:
        lines.append(f"eval loss: {facts.num_rows} rows are too few to take some away; --eval-data FILE")
    return lines
