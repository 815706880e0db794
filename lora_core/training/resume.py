"""What a resumed run must have in common with the one that was stopped, and its plan (a longer one: `train.extend`)."""

from __future__ import annotations

from typing import Any

from lora_core.config.load import with_overrides
from lora_core.config.schema import RunConfig, TrainConfig
from lora_core.errors import ConfigError
from lora_core.preflight.preflight import plan_for
from lora_core.schedule import SchedulePlan, extended
from lora_core.training.checkpoint import Checkpoint

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
        "train.sample_max_new_tokens",
        "preflight.allow",
    }
)

# Keys that train.extend may change: how long a run is, and its learning rates from the checkpoint on.
EXTENDABLE_KEYS = frozenset(
    f"train.{name}"
    for name in (
        *("num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "warmup_ratio"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "early_stopping_patience"),
    )
)


def check_same_run(checkpoint: Checkpoint, config: RunConfig, data: str, world_size: int) -> list[str]:
    """What differs and does not matter, one line for each.

    Args:
        data: `data_hash` of the rows now.

    Raises:
        ConfigError: something that matters differs, so that the resumed run would end differently.
    """
    # A key that came after this checkpoint was written had no effect then: its default.
    then = _flat(RunConfig().to_dict()) | _flat(checkpoint.state["config"])
    now = _flat(config.to_dict())
    differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    free = _FREE_KEYS | (EXTENDABLE_KEYS if config.train.extend else frozenset())
    problems = [f"{key}: {then.get(key)!r} before, {now.get(key)!r} now" for key in differing if key not in free]
    if checkpoint.state["data"] != data:
        problems.append(f"the rows of {config.data.train_source} (or how they are encoded) are not the same")
    if checkpoint.state["world_size"] != world_size:
        problems.append(f"number of processes: {checkpoint.state['world_size']} before, {world_size} now")
    if problems:
        raise ConfigError(
            "\n  ".join([f"--resume {checkpoint.path}: the settings or the data have changed:", *problems])
            + "\nFix: the settings of the checkpoint (config.yaml in the run folder), or start without --resume"
            + ("" if set(differing) - _FREE_KEYS - EXTENDABLE_KEYS else ", or train.extend=true for a longer run")
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
        before = plan_for(config.model_copy(update={"train": then}), plan.num_rows, plan.num_processes)
    names = [key.removeprefix("train.") for key in EXTENDABLE_KEYS]
    is_same = all(getattr(then, name) == getattr(config.train, name) for name in names)
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


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """`{"train": {"seed": 1}}` -> `{"train.seed": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat
