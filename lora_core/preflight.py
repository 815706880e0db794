"""Checks before the first step: would this run learn anything? All findings at once, each with value, limit and fix.

`train` runs them and refuses on an error, unless the error's id stands in `preflight.allow`; `launch/preflight.py` runs
them alone. A check is one function, in `CHECKS`; its first docstring line says what it looks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lora_core.config import ALL_SEVEN_PROJECTIONS, RunConfig, load_config
from lora_core.data import EncodedFile, load_data, shared_lines
from lora_core.errors import ConfigError, PreflightError, counted
from lora_core.schedule import SchedulePlan, plan_schedule

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    id: str
    """What `preflight.allow` takes."""
    severity: Severity
    """error: the run would not learn; warning: it would learn less than it could; note: worth knowing."""
    message: str
    value: Any
    """What is."""
    limit: Any
    """Where it would be all right."""
    fix: str | None
    """The override that mends it, such as `train.warmup_steps=5`."""

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


def check_warmup_past_end(facts: Facts) -> Iterator[Finding]:
    """Warmup is as long as the run or longer, so the learning rate never gets to what was asked for."""
    plan = facts.plan
    if plan.warmup_steps >= plan.total_optimizer_steps:
        healthy = plan.total_optimizer_steps // 10
        lost = 1 - plan.learning_rate_integral() / plan.with_warmup(healthy).learning_rate_integral()
        yield Finding(
            "warmup_past_end",
            "error",
            "the model would learn next to nothing: the run has "
            f"{counted(plan.total_optimizer_steps, 'optimizer step')}, warmup takes {plan.warmup_steps}, and the "
            f"learning rate would only reach {plan.peak_learning_rate:.3g}, {plan.peak_fraction:.1%} of the "
            f"{plan.learning_rate:g} asked for ({lost:.0%} of all learning lost)",
            plan.warmup_steps,
            healthy,
            f"train.warmup_steps={healthy}",
        )


def check_warmup_long(facts: Facts) -> Iterator[Finding]:
    """Warmup takes more than 30% of the run."""
    plan = facts.plan
    limit = math.floor(0.3 * plan.total_optimizer_steps)
    # One step of warmup is the least there is, and the default of a very short run.
    if max(limit, 1) < plan.warmup_steps < plan.total_optimizer_steps:
        share = plan.warmup_steps / plan.total_optimizer_steps
        yield Finding(
            "warmup_long",
            "warning",
            f"warmup takes {plan.warmup_steps} of {plan.total_optimizer_steps} optimizer steps ({share:.0%}); "
            "10% is usual",
            plan.warmup_steps,
            limit,
            f"train.warmup_steps={math.ceil(0.1 * plan.total_optimizer_steps)}",
        )


def check_few_steps(facts: Facts) -> Iterator[Finding]:
    """The run has fewer than 30 optimizer steps, too few for an adapter to move far."""
    plan = facts.plan
    if plan.total_optimizer_steps < 30:
        by_epochs = f"train.num_train_epochs={math.ceil(30 / plan.optimizer_steps_per_epoch)}"
        yield Finding(
            "few_steps",
            "warning",
            f"the run has only {counted(plan.total_optimizer_steps, 'optimizer step')}; adapters want 30 or more",
            plan.total_optimizer_steps,
            30,
            "train.max_steps=30" if facts.config.train.max_steps else by_epochs,
        )


def check_batch_larger_than_data(facts: Facts) -> Iterator[Finding]:
    """One optimizer step would take more rows than there are, so every epoch is one step."""
    plan, train = facts.plan, facts.config.train
    if plan.rows_per_optimizer_step > plan.num_rows:
        # A quarter of the rows a step: four steps an epoch, if accumulation alone can bring that about.
        accumulation = max(1, plan.num_rows // (train.per_device_train_batch_size * plan.num_processes) // 4)
        fix = f"train.gradient_accumulation_steps={accumulation}"
        if accumulation == train.gradient_accumulation_steps:
            fix = "train.per_device_train_batch_size=1"
        yield Finding(
            "batch_larger_than_data",
            "warning",
            f"an optimizer step takes up to {plan.rows_per_optimizer_step} conversations, but there are only "
            f"{plan.num_rows}: every epoch is a single step",
            plan.rows_per_optimizer_step,
            plan.num_rows,
            fix,
        )


def check_small_last_step(facts: Facts) -> Iterator[Finding]:
    """The last optimizer step of each epoch holds under a quarter of the rows that the others hold."""
    plan = facts.plan
    if plan.optimizer_steps_per_epoch > 1 and plan.last_step_rows * 4 < plan.rows_per_optimizer_step:
        yield Finding(
            "small_last_step",
            "note",
            f"the last optimizer step of each epoch holds {counted(plan.last_step_rows, 'conversation')}, the others "
            f"{plan.rows_per_optimizer_step}; its gradient is noisier and counts as much",
            plan.last_step_rows,
            math.ceil(plan.rows_per_optimizer_step / 4),
            None,
        )


def check_intervals_past_end(facts: Facts) -> Iterator[Finding]:
    """Logging, evaluation or checkpoints would first come after the end of the run."""
    total = facts.plan.total_optimizer_steps
    for name in ("logging_steps", "eval_steps", "save_steps"):
        interval = getattr(facts.config.train, name)
        if interval is not None and interval > total:
            yield Finding(
                f"{name}_past_end",
                "warning",
                f"train.{name}={interval}, but the run has {counted(total, 'optimizer step')}: it would come once, at "
                "the end, or never",
                interval,
                total,
                f"train.{name}={max(1, total // 10)}",
            )


def check_targets(facts: Facts) -> Iterator[Finding]:
    """The adapter sits on the attention's q and v only, which learns less than all linear layers do."""
    targets = facts.config.lora.target_modules
    if isinstance(targets, list) and set(targets) <= {"q_proj", "v_proj"}:
        yield Finding(
            "targets_q_v_only",
            "warning",
            f"LoRA on {', '.join(targets)} only; adapters on all linear layers learn more from the same rows",
            targets,
            ALL_SEVEN_PROJECTIONS,
            f"lora.target_modules=[{','.join(ALL_SEVEN_PROJECTIONS)}]",
        )


def check_alpha(facts: Facts) -> Iterator[Finding]:
    """alpha / rank, the scale of the update, is outside 0.5 to 4."""
    lora = facts.config.lora
    scale = lora.alpha / lora.rank
    if not lora.use_rslora and not 0.5 <= scale <= 4:
        yield Finding(
            "alpha_unusual",
            "warning",
            f"lora.alpha={lora.alpha} with lora.rank={lora.rank} scales the update by {scale:g}; 1 or 2 is usual",
            scale,
            [0.5, 4],
            f"lora.alpha={2 * lora.rank}",
        )


def check_learning_rate(facts: Facts) -> Iterator[Finding]:
    """The learning rate is outside 1e-5 to 1e-3, where LoRA trains."""
    learning_rate = facts.config.train.learning_rate
    if not 1e-5 <= learning_rate <= 1e-3:
        yield Finding(
            "learning_rate_unusual",
            "warning",
            f"train.learning_rate={learning_rate:g} is {'low' if learning_rate < 1e-5 else 'high'} for LoRA",
            learning_rate,
            [1e-5, 1e-3],
            "train.learning_rate=1e-4",
        )


def check_truncation(facts: Facts) -> Iterator[Finding]:
    """Rows are cut at max_seq_length, and lose part of what they should teach."""
    counts, limit = facts.train_data.counts, facts.config.data.max_seq_length
    if counts.truncated:
        yield Finding(
            "rows_truncated",
            "warning",
            f"{counts.truncated} of {counted(counts.read, 'row')} are longer than data.max_seq_length={limit} and are "
            f"cut, losing {counts.truncated_tokens:,} tokens ({counts.truncated_supervised_tokens:,} supervised); "
            f"the longest has {counts.longest:,}",
            limit,
            counts.longest,
            f"data.max_seq_length={counts.longest}",
        )


def check_dropped(facts: Facts) -> Iterator[Finding]:
    """Rows are dropped, unreadable or with nothing left to learn from."""
    counts = facts.train_data.counts
    if counts.dropped:
        yield Finding(
            "rows_dropped",
            "warning",
            f"{counts.dropped} of {counted(counts.read, 'row')} are not trained on: {counts.dropped_bad} unreadable, "
            f"{counts.dropped_unsupervised} with nothing supervised",
            counts.dropped,
            0,
            f"data.max_seq_length={counts.longest}" if counts.truncated and not counts.dropped_bad else None,
        )


def check_held_out(facts: Facts) -> Iterator[Finding]:
    """There are no held-out rows, so nothing will tell learning from memorising."""
    if facts.eval_data is None:
        yield Finding(
            "no_held_out_rows",
            "note",
            "no held-out rows: held-out loss is not measured",
            0,
            1,
            "data.eval_fraction=0.1",
        )


def check_overlap(facts: Facts) -> Iterator[Finding]:
    """Training rows also stand in the held-out file, so held-out loss would praise memorising."""
    if facts.eval_data is not None:
        lines = shared_lines(facts.train_data, facts.eval_data)
        if lines:
            shown = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
            yield Finding(
                "eval_overlap",
                "warning",
                f"{counted(len(lines), 'training row')} also stand among the held-out rows (lines {shown}); held-out "
                "loss will look better than it is",
                len(lines),
                0,
                None,
            )


ERROR_IDS = ("warmup_past_end",)

CHECKS: list[Callable[[Facts], Iterator[Finding]]] = [
    check_warmup_past_end,
    check_warmup_long,
    check_few_steps,
    check_batch_larger_than_data,
    check_small_last_step,
    check_intervals_past_end,
    check_targets,
    check_alpha,
    check_learning_rate,
    check_truncation,
    check_dropped,
    check_held_out,
    check_overlap,
]


def run_checks(facts: Facts) -> list[Finding]:
    """Every finding of every check, errors first."""
    findings = [finding for check in CHECKS for finding in check(facts)]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def refuse_errors(findings: Sequence[Finding], allow: Sequence[str]) -> None:
    """Stop a run that would not learn.

    Raises:
        PreflightError: there is an error that `allow` does not name.
        ConfigError: `allow` names an error that no check reports.
    """
    unknown = [name for name in allow if name not in ERROR_IDS]
    if unknown:
        raise ConfigError(f"preflight.allow={unknown}: no such error; known: {', '.join(ERROR_IDS)}")
    refused = [finding for finding in findings if finding.severity == "error" and finding.id not in allow]
    if refused:
        lines = [f"  {finding}" for finding in refused]
        ids = ",".join(finding.id for finding in refused)
        raise PreflightError(
            "\n".join(["this run is not started:", *lines]) + f"\n  (to run it all the same: preflight.allow=[{ids}])"
        )


def gather_facts(config: RunConfig, num_processes: int) -> Facts:
    """Encode the rows and plan the steps; loads the tokenizer and no weights.

    Raises:
        ConfigError, DataError: as `load_tokenizer` and `encode_file`.
    """
    from lora_core.model import load_tokenizer

    train_data, eval_data = load_data(config, load_tokenizer(config.model, config.data.chat_template))
    return Facts(config, plan_for(config, len(train_data.lengths), num_processes), train_data, eval_data)


def apply_fixes(cfg: str | Path, overrides: Sequence[str], model: str | None, num_processes: int) -> RunConfig:
    """The configuration with every fix applied; a fix may bring another to light, so until none is new."""
    applied = list(overrides)
    while True:
        config = load_config(cfg, applied, model)
        findings = run_checks(gather_facts(config, num_processes))
        fixes = [finding.fix for finding in findings if finding.fix and finding.fix not in applied]
        if not fixes:
            return config
        applied += fixes


def describe_processes(facts: Facts) -> str:
    """How the plan changes with the number of processes, and the learning rate over the run as a line of bars."""
    train = facts.config.train
    lines = ["processes  conversations/step  steps/epoch  steps  warmup  peak learning rate"]
    for num_processes in (1, 2, 4, 8):
        plan = plan_for(facts.config, facts.plan.num_rows, num_processes)
        lines.append(
            f"{num_processes:>9}  {plan.rows_per_optimizer_step:>18}  {plan.optimizer_steps_per_epoch:>11}  "
            f"{plan.total_optimizer_steps:>5}  {plan.warmup_steps:>6}  {plan.peak_learning_rate:.3g} "
            f"({plan.peak_fraction:.0%})"
        )
    rates = facts.plan.learning_rates()
    shown = [rates[i * len(rates) // 60] for i in range(60)] if len(rates) > 60 else rates
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * rate / train.learning_rate)] for rate in shown)
    return "\n".join([*lines, f"learning rate, 0 to {train.learning_rate:g}: |{bars}|"])


def plan_for(config: RunConfig, num_rows: int, num_processes: int) -> SchedulePlan:
    """The schedule of a configuration on so many rows and processes."""
    return plan_schedule(
        num_rows,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        num_train_epochs=config.train.num_train_epochs,
        num_processes=num_processes,
        learning_rate=config.train.learning_rate,
        warmup_steps=config.train.warmup_steps,
        warmup_ratio=config.train.warmup_ratio,
        max_steps=config.train.max_steps,
    )
