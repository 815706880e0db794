"""The models of a configuration: every key with its type, limits, default and meaning.

Those of the base model and the adapter are in `adapter_schema`, those of the rows in `data_schema`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, model_validator

from lora_core.config.adapter_schema import ALL_SEVEN_PROJECTIONS as ALL_SEVEN_PROJECTIONS
from lora_core.config.adapter_schema import Fraction, PositiveInt
from lora_core.config.adapter_schema import LoraConfig as LoraConfig
from lora_core.config.adapter_schema import ModelConfig as ModelConfig
from lora_core.config.adapter_schema import Section as Section
from lora_core.config.data_schema import DEFAULT_TRAIN_FILE as DEFAULT_TRAIN_FILE
from lora_core.config.data_schema import NOT_TEMPLATE_VARIABLES as NOT_TEMPLATE_VARIABLES
from lora_core.config.data_schema import DataConfig as DataConfig
from lora_core.config.data_schema import TrainFile as TrainFile
from lora_core.schedule import schedule_problem
from lora_core.untrusted.text import values_without_secrets

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab"]
"""Accelerate's names, which are those of the packages too."""


def uses_bitsandbytes(optim: str) -> bool:
    """Whether bitsandbytes has the optimizer that `train.optim` names."""
    return optim.endswith(("8bit", "32bit"))


class TrainConfig(Section):
    """The loop. A step is an optimizer step everywhere."""

    num_train_epochs: PositiveInt = Field(default=3, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(
        default=None, description="optimizer steps; replaces num_train_epochs when set"
    )
    extend: bool = Field(
        default=False,
        description="with --resume and more epochs or steps: train on past the planned end, with a new schedule",
    )
    per_device_train_batch_size: PositiveInt = Field(default=2, description="examples per device and micro-batch")
    per_device_eval_batch_size: PositiveInt = Field(default=8, description="examples per device and evaluation batch")
    max_tokens_per_device_batch: PositiveInt | None = Field(
        default=None, description="tokens of a packed micro-batch; null is per_device_train_batch_size x max_seq_length"
    )
    gradient_accumulation_steps: PositiveInt = Field(default=4, description="micro-batches per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        default=5e-5,
        description="peak, at the end of warmup; auto: from the model, the adapter and the number of steps, by a "
        "published formula",
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="optimizer steps of linear warmup; not together with warmup_ratio"
    )
    warmup_ratio: Fraction | None = Field(
        default=0.1, description="warmup as a share of all optimizer steps, rounded up"
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "warmup_stable_decay"
    ] = Field(
        default="linear",
        description="how the learning rate falls after warmup, as transformers names it; constant has no warmup either",
    )
    lr_scheduler_kwargs: dict[str, JsonValue] = Field(
        default={},
        description="what that schedule takes: {min_lr_rate: 0.1} for cosine_with_min_lr, {num_decay_steps: 10} for "
        "warmup_stable_decay",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="decoupled, as in AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="clip the global norm; null does not clip"
    )
    optim: Literal[
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
        "sgd",
        "schedule_free_adamw",
    ] = Field(
        default="paged_adamw_8bit",
        description="as transformers names it; paged state is a CUDA feature, and on a CPU not paged",
    )
    adam_beta1: Fraction = Field(default=0.9, description="of AdamW and Lion: decay of the mean of the gradient")
    adam_beta2: Fraction = Field(default=0.999, description="of AdamW and Lion: decay of the mean of its square")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(default=1e-8, description="of AdamW: added to the root")
    label_smoothing_factor: Fraction = Field(
        default=0.0, description="share of each token's target that is spread over the vocabulary; eval loss has none"
    )
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="noise on the embeddings in training, https://arxiv.org/abs/2310.05914; 5 is usual"
    )
    bf16: bool | Literal["auto"] = Field(
        default=True,
        description="compute under bfloat16 autocast; auto: true where the device has bfloat16 instructions, else the "
        "whole run is float32",
    )
    fp16: bool = Field(
        default=False,
        description="compute under float16 autocast with loss scaling, for GPUs without bfloat16; replaces bf16",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, more time"
    )
    torch_compile: bool = Field(
        default=False,
        description="compile the decoder layers at the first steps; on a CPU it gained nothing (see the README)",
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=42, description="fixes row order, initial adapter and dropout")
    logging_steps: PositiveInt = Field(default=1, description="optimizer steps between log lines")
    eval_steps: PositiveInt | None = Field(
        default=None, description="optimizer steps between evaluations; null is once an epoch"
    )
    save_steps: PositiveInt | None = Field(
        default=None, description="optimizer steps between checkpoints; null is once an epoch"
    )
    save_total_limit: PositiveInt = Field(
        default=2, description="checkpoints to keep, the newest ones, and the best beside them"
    )
    on_save_error: Literal["error", "continue"] = Field(
        default="error", description="for a checkpoint that cannot be written: stop, or warn and continue"
    )
    keep_adapter: Literal["last", "best"] = Field(
        default="last", description="which adapter is saved in adapter/: of the last step, or of the lowest eval loss"
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None,
        description="evaluations in a row without a lower eval loss before the run stops; null never stops early",
    )
    max_skipped_steps: PositiveInt = Field(
        default=3,
        description="the run stops after so many skipped steps in a row (loss or gradient not finite)",
    )
    auto_batch_size: bool = Field(
        default=False, description="use smaller micro-batches where memory is short; same steps, same gradient"
    )
    rank_timeout_s: PositiveInt = Field(
        default=1800, description="seconds that ranks wait for each other before they report one as lost"
    )
    num_sample_replies: Annotated[int, Field(ge=0)] = Field(
        default=3, description="prompts of the eval set answered before and after training"
    )
    num_eval_replies: Annotated[int, Field(ge=0)] = Field(
        default=1, description="of those prompts, the first so many are answered at every evaluation too"
    )
    sample_max_new_tokens: PositiveInt = Field(default=64, description="tokens per sample reply, greedy")
    report_to: Tracker | Literal["none"] | list[Tracker] = Field(
        default=[],
        description="trackers that get the figures as they come: "
        "tensorboard, wandb, mlflow, trackio, comet_ml, swanlab",
    )
    tracker_project: Annotated[str, Field(min_length=1)] = Field(
        default="lora_core", description="project, or experiment, that trackers file the run under"
    )
    on_alarm: Literal["stop", "warn"] = Field(
        default="stop",
        description="where an alarm is certain that the run does not learn: stop it, or only say so (docs/watch.md)",
    )

    @property
    def trackers(self) -> list[Tracker]:
        """`report_to` as a list, each once."""
        if isinstance(self.report_to, str):
            return [] if self.report_to == "none" else [self.report_to]
        return list(dict.fromkeys(self.report_to))

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, once `auto` has become a number (`preflight.rate.with_learning_rate`)."""
        assert self.learning_rate != "auto", "train.learning_rate=auto is resolved before it is used"
        return self.learning_rate

    @model_validator(mode="before")
    @classmethod
    def _one_warmup_set(cls, values: Any) -> Any:
        """One kind of warmup or precision, where only that one is set, replaces the other's default."""
        if isinstance(values, dict) and values.get("warmup_steps") is not None and "warmup_ratio" not in values:
            values = {**values, "warmup_ratio": None}
        if isinstance(values, dict) and values.get("fp16") is True and "bf16" not in values:
            values = {**values, "bf16": False}
        return values

    @model_validator(mode="after")
    def _one_precision(self) -> TrainConfig:
        if self.fp16 and self.bf16 is not False:
            raise ValueError(f"fp16=true and bf16={self.bf16} are both set; fix: train.bf16=false, or train.fp16=false")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} are both set; "
                "fix: set one and leave the other null"
            )
        return self

    @model_validator(mode="after")
    def _schedule(self) -> TrainConfig:
        problem = schedule_problem(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        if problem is None and self.lr_scheduler_type == "constant" and self.warmup_steps:
            problem = (
                f"lr_scheduler_type=constant has no warmup, and warmup_steps={self.warmup_steps}; fix: "
                "train.lr_scheduler_type=constant_with_warmup, or train.warmup_steps=null"
            )
        if problem is None and self.optim.startswith("schedule_free") and "constant" not in self.lr_scheduler_type:
            problem = (
                f"optim={self.optim} averages its steps in place of a falling rate, and lr_scheduler_type="
                f"{self.lr_scheduler_type}; fix: train.lr_scheduler_type=constant_with_warmup"
            )
        if problem is not None:
            raise ValueError(problem)
        return self


class PreflightConfig(Section):
    """The checks before the first step."""

    allow: list[str] = Field(default=[], description="ids of errors to ignore, such as warmup_past_end")


class RunConfig(Section):
    """Everything that decides a run. `load_config` builds it; `to_yaml` writes it."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    output_dir: str = Field(default="outputs/run", description="the run folder; outputs/<cfg name> unless set")
    overwrite_output_dir: bool = Field(default=False, description="replace an earlier run in output_dir")

    @model_validator(mode="after")
    def _base_that_can_be_changed(self) -> RunConfig:
        if self.lora.changes_base_weights and (self.model.quantization != "none" or self.model.dtype != "float32"):
            raise ValueError(
                f"lora.init_lora_weights={self.lora.init_lora_weights} takes the adapter's start out of the "
                f"base weights, and model.dtype={self.model.dtype}, model.quantization={self.model.quantization} would "
                "round what is left, so that the saved adapter would not fit the base model; fix: model.dtype=float32 "
                "model.quantization=none"
            )
        return self

    @model_validator(mode="after")
    def _one_start_of_the_adapter(self) -> RunConfig:
        if self.model.adapter is not None and self.lora.changes_base_weights:
            raise ValueError(
                f"model.adapter={self.model.adapter} is a start, and lora.init_lora_weights="
                f"{self.lora.init_lora_weights} another; fix: lora.init_lora_weights=true"
            )
        return self

    @model_validator(mode="after")
    def _eval_set_where_it_decides(self) -> RunConfig:
        decides = [
            f"train.{name}={value}"
            for name, value in (
                ("keep_adapter", self.train.keep_adapter if self.train.keep_adapter == "best" else None),
                ("early_stopping_patience", self.train.early_stopping_patience),
            )
            if value is not None
        ]
        if decides and self.data.eval_file is None and self.data.eval_fraction == 0:
            raise ValueError(
                f"{' and '.join(decides)} needs an eval loss, and there is no eval set; fix: "
                "data.eval_fraction=0.1, or data.eval_file=FILE"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values by section and key, secrets left out."""
        values: dict[str, Any] = values_without_secrets(self.model_dump(mode="json"))
        return values

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back to an equal `RunConfig`, but for secrets."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
