"""The schedule of a configuration on its rows, and its learning rate where that is `auto`."""

from __future__ import annotations

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.learning_rate import SuggestedRate, suggest_learning_rate
from lora_core.schedule import SchedulePlan, plan_schedule


def plan_for(config: RunConfig, num_rows: int, num_processes: int) -> SchedulePlan:
    """The schedule of a configuration on so many rows and processes.

    `train.learning_rate=auto` must have become a number: `with_learning_rate`.
    """
    return _plan(config, num_rows, num_processes, config.train.peak_learning_rate)


def _plan(config: RunConfig, num_rows: int, num_processes: int, learning_rate: float) -> SchedulePlan:
    return plan_schedule(
        num_rows,
        per_device_train_batch_size=config.train.per_device_train_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        num_train_epochs=config.train.num_train_epochs,
        num_processes=num_processes,
        learning_rate=learning_rate,
        warmup_steps=config.train.warmup_steps,
        warmup_ratio=config.train.warmup_ratio,
        max_steps=config.train.max_steps,
        lr_scheduler_type=config.train.lr_scheduler_type,
        lr_scheduler_kwargs=config.train.lr_scheduler_kwargs,
    )


def with_learning_rate(config: RunConfig, num_rows: int, num_processes: int) -> tuple[RunConfig, str | None]:
    """The configuration with `train.learning_rate: auto` made a number, and a line that says how.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    if config.train.learning_rate != "auto":
        return config, None
    from lora_core.model.base import load_model_config

    model = load_model_config(config.model).get_text_config()
    total_steps = _plan(config, num_rows, num_processes, learning_rate=1.0).total_optimizer_steps
    rate = suggested_rate(config, model.model_type, model.hidden_size, total_steps)
    line = f"learning rate: {rate.value:g} (train.learning_rate=auto): {rate}"
    return with_overrides(config, [f"train.learning_rate={rate.value!r}"]), line


def suggested_rate(config: RunConfig, model_type: str, hidden_size: int, total_steps: int) -> SuggestedRate:
    """What the formula gives for this adapter, whatever the configuration's rate."""
    lora = config.lora
    return suggest_learning_rate(
        model_type=model_type,
        hidden_size=hidden_size,
        alpha=lora.alpha,
        rank=lora.rank,
        use_rslora=lora.use_rslora,
        total_steps=total_steps,
    )
