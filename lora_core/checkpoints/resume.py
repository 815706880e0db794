"""A run that resumes from a checkpoint: is it the same run, and how does it keep its steps on other processes?"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.checkpoints.checkpoint import Checkpoint
from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.configuration import with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.errors import ConfigError, counted
from lora_core.preflight.plan import plan_for
from lora_core.schedule import SchedulePlan, extended, largest_micro_batch

# Keys that decide only what is shown and kept: a resumed run may have other values.
_FREE_KEYS = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "data.cache_dir",
        "data.cache_limit_gib",
        "data.num_proc",
        "train.extend",
        "train.logging_steps",
        "train.max_skipped_steps",
        "train.auto_batch_size",
        "train.rank_timeout_s",
        "train.on_save_error",
        "train.save_steps",
        "train.save_total_limit",
        "train.num_sample_replies",
        "train.num_eval_replies",
        "train.sample_max_new_tokens",
        "train.report_to",
        "train.tracker_project",
        "train.on_alarm",
        "preflight.allow",
    }
)
# They decide, with the number of processes, how many examples an optimizer step has: free where that stays.
_STEP_KEYS = frozenset({"train.per_device_train_batch_size", "train.gradient_accumulation_steps"})

# Keys that train.extend may change: how long a run is, and its learning rates from the checkpoint on.
EXTENDABLE_KEYS = frozenset(
    f"train.{name}"
    for name in (
        *("num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "warmup_ratio"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "early_stopping_patience"),
    )
)


def has_got_somewhere(run_folder: Path) -> bool:
    """Whether a run has left something that a start would lose: a checkpoint, damaged ones included, or an adapter.

    What was killed before its first checkpoint has not.
    """
    checkpoints = (run_folder / "checkpoints").glob("[!.]*")  # not what an interrupted save has left
    return any(checkpoints) or (run_folder / "adapter").exists()


def rows_per_step(config: RunConfig, num_processes: int) -> int:
    """Examples in an optimizer step."""
    train = config.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * num_processes


def rows_per_step_of(checkpoint: Checkpoint) -> int:
    """The same, of the run that wrote a checkpoint."""
    state = checkpoint.state
    train = state["config"]["train"]
    # Before a run could resume on other processes, its configuration was what it did.
    as_configured = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * state["world_size"]
    return int(state.get("rows_per_optimizer_step", as_configured))


def keep_rows_per_step(checkpoint: Checkpoint, config: RunConfig, num_processes: int) -> tuple[RunConfig, str | None]:
    """Other accumulation steps, so that an optimizer step has as many examples as before on so many processes.

    Which examples those are is a function of seed and step, so the run ends as the uninterrupted one does, up to
    rounding and dropout masks. What the user has changed in the configuration stays, for `check_same_run` to name.

    Returns:
        The configuration, and a line that says what was changed; None if nothing was.

    Raises:
        ConfigError: no number of accumulation steps does.
    """
    rows, train, before = rows_per_step_of(checkpoint), config.train, checkpoint.state["config"]["train"]
    batch, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    is_changed = (batch, steps) != (before["per_device_train_batch_size"], before["gradient_accumulation_steps"])
    if is_changed or rows_per_step(config, num_processes) == rows:
        return config, None
    processes = counted(num_processes, "process", "processes")
    if rows % (batch * num_processes) != 0:
        fix = _even_share(rows, batch, num_processes)
        raise ConfigError(
            f"--resume {checkpoint.path}: an optimizer step of this run has {counted(rows, 'example')}, and "
            f"{processes} with {batch} per device cannot share them evenly; fix: {fix}"
        )
    steps_now = rows // (batch * num_processes)
    line = (
        f"{counted(steps_now, 'accumulation step')} in place of {steps} on {processes}, so that an optimizer step has "
        f"{counted(rows, 'example')} as before, on {checkpoint.state['world_size']}"
    )
    return with_overrides(config, [f"train.gradient_accumulation_steps={steps_now}"]), line


def _even_share(rows: int, batch: int, num_processes: int) -> str:
    if rows % num_processes == 0:
        smaller = largest_micro_batch(rows // num_processes, batch)
        return (
            f"train.per_device_train_batch_size={smaller} "
            f"train.gradient_accumulation_steps={rows // num_processes // smaller}"
        )
    even = [str(number) for number in range(1, rows // batch + 1) if rows % (batch * number) == 0]
    return f"a number of processes out of {', '.join(even)}"


def check_same_run(checkpoint: Checkpoint, config: RunConfig, data: str, num_processes: int) -> list[str]:
    """What differs and does not matter, one line for each.

    Args:
        config: as `keep_rows_per_step` gave it.
        data: `data_hash` of the rows now.

    Raises:
        ConfigError: something that matters differs, so that the resumed run would end differently.
    """
    # A key that came after this checkpoint was written had no effect then: its default.
    then = flat_keys(RunConfig().to_dict()) | flat_keys(checkpoint.state["config"])
    now = flat_keys(config.to_dict())
    differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    free = _FREE_KEYS | (_STEP_KEYS if rows_per_step(config, num_processes) == rows_per_step_of(checkpoint) else set())
    free |= EXTENDABLE_KEYS if config.train.extend else set()
    problems = [f"{key}: {then.get(key)!r} before, {now.get(key)!r} now" for key in differing if key not in free]
    if checkpoint.state["data"] != data:
        problems.append(f"the rows of {config.data.train_source} (or how they are encoded) are not the same")
    if problems:
        raise ConfigError(
            "\n  ".join([f"--resume {checkpoint.path}: the settings or the data have changed:", *problems])
            + "\nFix: the settings of the checkpoint (config.yaml in the run folder), or start without --resume"
            + ("" if set(differing) - free - EXTENDABLE_KEYS else ", or train.extend=true for a longer run")
        )
    return [f"{key}: {then.get(key)!r} before, {now.get(key)!r} now" for key in differing]


def plan_to_resume(checkpoint: Checkpoint, config: RunConfig, plan: SchedulePlan) -> SchedulePlan:
    """The checkpoint's own plan; with `train.extend` and other lengths or rates, a new schedule from its step on.

    Args:
        plan: of the configuration, as if the run began anew.

    Raises:
        ConfigError: `train.extend` is set, and no step is left.
    """
    then = TrainConfig.model_validate(checkpoint.state["config"]["train"])
    if "plan" in checkpoint.state:
        before = SchedulePlan.from_dict(checkpoint.state["plan"])
    else:  # of a version that had no other plan than the configuration's
        before = plan_for(
            config.model_copy(update={"train": then.model_copy(update={"learning_rate": plan.learning_rate})}),
            plan.num_rows,
            plan.num_processes,
        )
    names = [key.removeprefix("train.") for key in EXTENDABLE_KEYS]
    is_same = all(getattr(then, name) == getattr(config.train, name) for name in names)
    # On another number of processes a step has the same examples, in other micro-batches.
    before = replace(before, num_processes=plan.num_processes, micro_batches_per_epoch=plan.micro_batches_per_epoch)
    if is_same or not config.train.extend:
        return before
    left = plan.total_optimizer_steps - checkpoint.step
    if left < 1:
        longer = (
            f"train.max_steps={2 * checkpoint.step}"
            if config.train.max_steps
            else f"train.num_train_epochs={checkpoint.step // plan.optimizer_steps_per_epoch + 1}"
        )
        raise ConfigError(
            f"train.extend=true: {checkpoint.path} is at step {checkpoint.step}, and the run would end at step "
            f"{plan.total_optimizer_steps}; fix: {longer}"
        )
    rest = plan_for(with_overrides(config, [f"train.max_steps={left}"]), plan.num_rows, plan.num_processes)
    return extended(before, checkpoint.step, rest)


def data_hash(train_data: EncodedFile, eval_data: EncodedFile | None) -> str:
    """Of the rows of both sets, and where they were truncated."""
    digest = hashlib.sha256()
    for data in (train_data, eval_data):
        if data is not None:
            keys = data.rows.exact_key[data.indices] if data.is_part else data.rows.exact_key
            digest.update(keys.tobytes() + data.lengths.tobytes())
    return digest.hexdigest()


def flat_keys(config: dict[str, Any]) -> dict[str, Any]:
    """`{"train": {"seed": 1}}` -> `{"train.seed": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat
