"""Would this run learn anything, and would it run? Facts -> checks -> findings, all at once.

`train` runs the checks before the first step and refuses on an error, unless the error's id is in
`preflight.allow`; `lora-core preflight` runs them alone, with the tokenizer and the model's config and no weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.config.schema import DataConfig, RunConfig
from lora_core.configuration import load_config, with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data
from lora_core.errors import ConfigError, LoraCoreError, PreflightError, SimulationError
from lora_core.preflight.catalogue import CHECKS, ERROR_IDS, NEVER_ALLOWED
from lora_core.preflight.findings import Facts, Finding, length_that_keeps
from lora_core.preflight.plan import plan_for, with_learning_rate
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_core.runtime.devices import Environment


def gather_facts(
    config: RunConfig,
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    train_data: EncodedFile,
    eval_data: EncodedFile | None,
) -> Facts:
    """Plan the steps and predict the memory; loads the model's config and no weights.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    from lora_core.memory.plan import MemoryPlan, Sharding, plan_memory
    from lora_core.preflight.model_facts import model_facts

    plan = plan_for(config, len(train_data.lengths), environment.num_processes)
    model = model_facts(config)

    def predict(changed: RunConfig, sharding: Sharding | None = None) -> MemoryPlan:
        return plan_memory(
            changed,
            train_data,
            eval_data,
            plan_for(changed, len(train_data.lengths), environment.num_processes),
            environment.device,
            sharding or environment.sharding,
            environment.each_rank_loads,
        )

    problem = None
    try:
        memory = predict(config) if environment.has_bitsandbytes else None
    except ConfigError:  # a target module that matches nothing; a check reports which
        memory = None
    except SimulationError as error:
        memory, problem = None, str(error)
    return Facts(config, plan, train_data, eval_data, tokenizer, model, environment, predict, memory, problem)


def look_at_run(
    config: RunConfig, num_processes: int, gpu_memory_gib: float | None = None, num_machines: int = 1
) -> Facts:
    """The facts of a run that has not been started; the arguments are those of `look_around`.

    Raises:
        ConfigError, DataError: as `load_tokenizer` and `load_data`.
    """
    from lora_core.model.base import load_tokenizer
    from lora_core.preflight.model_facts import with_packing
    from lora_core.runtime.devices import look_around, with_precision

    if gpu_memory_gib is not None and config.train.bf16 == "auto":
        config = with_overrides(config, ["train.bf16=true"])  # GPUs of the last years have it
    config, _ = with_precision(config)
    config = with_packing(config)
    tokenizer = load_tokenizer(config.model, config.data)
    train_data, eval_data = load_data(config, tokenizer)
    environment = look_around(config, num_processes, gpu_memory_gib, num_machines)
    config, rate = with_learning_rate(config, len(train_data.lengths), environment.num_processes)
    facts = gather_facts(config, environment, tokenizer, train_data, eval_data)
    return replace(facts, rate_line=rate)


def run_checks(facts: Facts) -> list[Finding]:
    """Every finding of every check, errors first."""
    findings = [finding for check, _ in CHECKS for finding in check(facts)]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def finding_of(error: LoraCoreError) -> Finding:
    """A mistake that stopped preflight before its checks, as a finding."""
    return Finding(error.finding_id, "error", str(error), None, None, None)


def refused_errors(findings: Sequence[Finding], allow: Sequence[str]) -> list[Finding]:
    """The errors that `allow` does not name."""
    return [finding for finding in findings if finding.severity == "error" and finding.id not in allow]


def refuse_errors(findings: Sequence[Finding], allow: Sequence[str]) -> None:
    """Stop a run that would not learn.

    Raises:
        PreflightError: there is an error that `allow` does not name.
        ConfigError: `allow` names an error that no check reports, or one that cannot be allowed.
    """
    allowable = [name for name in ERROR_IDS if name not in NEVER_ALLOWED]
    unknown = [name for name in allow if name not in allowable]
    if unknown:
        raise ConfigError(
            f"preflight.allow={unknown}: not an error that can be allowed; fix: ids of {', '.join(allowable)}"
        )
    refused = refused_errors(findings, allow)
    if refused:
        lines = [f"  {finding}" for finding in refused]
        can_be_allowed = [finding.id for finding in refused if finding.id in allowable]
        if can_be_allowed:
            lines.append(f"  (to run it anyway: preflight.allow=[{','.join([*allow, *can_be_allowed])}])")
        raise PreflightError("\n".join(["this run is not started:", *lines]))


def apply_fixes(
    cfg: str | Path,
    overrides: Sequence[str],
    model: str | None,
    num_processes: int,
    gpu_memory_gib: float | None = None,
    num_machines: int = 1,
) -> tuple[RunConfig, list[str]]:
    """The configuration with the fixes of its findings, and the overrides that they come to.

    One finding's fix at a time, the most severe first, with all checks repeated after it: a fix that removes a second
    finding leaves nothing to fix there, and one that causes another is followed by that one's.
    """
    applied: list[str] = []
    while True:
        config = load_config(cfg, [*overrides, *applied], model)
        findings = run_checks(look_at_run(config, num_processes, gpu_memory_gib, num_machines))
        fixes = (shlex.split(finding.fix) for finding in findings if finding.fix)
        fix = next((fix for fix in fixes if not set(fix) <= set(applied)), None)
        if fix is None:
            by_key = {override.split("=")[0]: override for override in applied}  # the last one of a key counts
            return config, list(by_key.values())
        applied += fix


# ---------------------------------------------------------------------------------------------------------------
# What it prints


def report(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain values: `{plan, data, memory, findings}`, for `--json` and preflight.json."""
    plan = {
        **asdict(facts.plan),
        "peak_learning_rate": facts.plan.peak_learning_rate,
        "learning_rates": facts.plan.learning_rates(),
    }
    config = facts.config.data
    return {
        "plan": plan,
        "data": {
            "train": _describe_file(facts.train_data, config.train_source, config.max_seq_length),
            "eval": _describe_eval(facts),
        },
        "memory": facts.memory.to_dict() if facts.memory else None,
        "findings": [finding.to_dict() for finding in findings],
    }


def _describe_eval(facts: Facts) -> dict[str, Any] | None:
    """Of an eval set that is a share of the training file only its size: the file's counts say the rest."""
    config, data = facts.config.data, facts.eval_data
    if data is None:
        return None
    if config.eval_file is None:
        return {"file": eval_source(config), "examples": len(data.lengths)}
    return _describe_file(data, config.eval_file, config.max_seq_length)


def _describe_file(data: EncodedFile, name: str, max_seq_length: int) -> dict[str, Any]:
    lengths = data.rows.length[~data.rows.is_bad]
    counts, edges = np.histogram(lengths, bins=min(30, max(1, int(np.ptp(lengths)))))
    return {
        "file": name,
        "examples": len(data.lengths),
        "counts": data.counts.to_dict(),
        "max_seq_length": max_seq_length,
        "lengths": {
            **{f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99)},
            "max": int(lengths.max()),
            "keep_99_percent": length_that_keeps(data, 0.99),
            "keep_all": length_that_keeps(data, 1),
            "histogram": {"edges": [round(float(edge), 1) for edge in edges], "counts": counts.tolist()},
        },
    }


def describe(facts: Facts) -> str:
    """For the terminal: rows, lengths, the plan on several numbers of processes, learning rates, memory."""
    config = facts.config
    lines = [
        f"train: {config.data.train_source}: {facts.train_data.counts}",
        *(f"       {note}" for note in facts.train_data.places.notes),
        f"       tokens per row: {_describe_lengths(facts.train_data)}; {_describe_limit(facts)}",
    ]
    if facts.eval_data is not None and config.data.eval_file is not None:
        lines.append(f"eval:  {eval_source(config.data)}: {facts.eval_data.counts}")
        lines += [f"       {note}" for note in facts.eval_data.places.notes if config.data.eval_file is not None]
    lines.append(_describe_processes(facts))
    if facts.rate_line is not None:
        lines.append(facts.rate_line)
    lines.append(str(facts.memory or "predicted peak memory: not known"))
    return "\n".join(lines)


def _describe_lengths(data: EncodedFile) -> str:
    lengths = data.rows.length[~data.rows.is_bad]
    p50, p90, p99 = (int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 99))
    return f"p50 {p50:,}, p90 {p90:,}, p99 {p99:,}, max {int(lengths.max()):,} ({p99:,} keeps 99% of the rows whole)"


def _describe_limit(facts: Facts) -> str:
    limit, longest = facts.config.data.max_seq_length, int(facts.train_data.rows.length.max())
    return f"max_seq_length {limit:,}" + (
        f", of which the longest row fills {longest / limit:.0%}" if longest < limit else ""
    )


def _describe_processes(facts: Facts) -> str:
    train = facts.config.train
    lines = ["processes  examples/step  steps/epoch  steps  warmup  peak learning rate"]
    for num_processes in sorted({1, 2, 4, 8, facts.plan.num_processes}):
        plan = plan_for(facts.config, facts.plan.num_rows, num_processes)
        lines.append(
            f"{num_processes:>9}  {plan.rows_per_optimizer_step:>13}  {plan.optimizer_steps_per_epoch:>11}  "
            f"{plan.total_optimizer_steps:>5}  {plan.warmup_steps:>6}  {plan.peak_learning_rate:.3g} "
            f"({plan.peak_fraction:.0%})" + ("  <- this run" if num_processes == facts.plan.num_processes else "")
        )
    rates = facts.plan.learning_rates()
    shown = [rates[i * len(rates) // 60] for i in range(60)] if len(rates) > 60 else rates
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * rate / train.peak_learning_rate)] for rate in shown)
    lines.append(f"learning rate, {describe_schedule(facts.plan)}, 0 to {train.peak_learning_rate:g}: |{bars}|")
    return "\n".join([*lines, *first_step(facts.plan)])


def describe_schedule(plan: SchedulePlan) -> str:
    """`linear`, or `cosine_with_min_lr (min_lr_rate 0.1)`."""
    settings = ", ".join(f"{name} {value}" for name, value in plan.lr_scheduler_kwargs.items())
    return f"{plan.lr_scheduler_type} ({settings})" if settings else plan.lr_scheduler_type


def first_step(plan: SchedulePlan) -> list[str]:
    """A line where warmup's first step, at learning rate 0, is a share of the run."""
    if not plan.first_step_is_lost:
        return []
    return [
        f"       step {plan.first_step + 1} has learning rate 0, as in transformers' warmup: 1 of "
        f"{plan.scheduled_steps} steps ({1 / plan.scheduled_steps:.0%}) moves nothing"
    ]


def eval_source(config: DataConfig) -> str:
    """Where the eval set comes from: the file, or `10% of data/train.jsonl`."""
    return config.eval_file or f"{100 * config.eval_fraction:g}% of {config.train_source}"
