"""The models of a configuration: every key with its type, limits, default and meaning.

Those of the base model and the adapter are in `adapter_schema`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from lora_core.config.adapter_schema import ALL_SEVEN_PROJECTIONS as ALL_SEVEN_PROJECTIONS
from lora_core.config.adapter_schema import Fraction, PositiveInt
from lora_core.config.adapter_schema import LoraConfig as LoraConfig
from lora_core.config.adapter_schema import ModelConfig as ModelConfig
from lora_core.config.adapter_schema import Section as Section
from lora_core.schedule import schedule_problem
from lora_core.untrusted.text import quoted, values_without_secrets

DEFAULT_TRAIN_FILE = "data/train.jsonl"


class TrainFile(Section):
    """One of `data.train_files`, with how much is taken of it."""

    path: str = Field(description="as data.train_file")
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0,
        description="its rows are taken so many times; for the part after the point, a seeded choice of them",
    )
    split: str | None = Field(default=None, description="of a dataset on the hub; null is train")
    revision: str | None = Field(default=None, description="of a dataset on the hub: branch, tag or commit")
    max_rows: PositiveInt | None = Field(default=None, description="take the first so many rows; null is all")


COLUMNS = ("messages", "prompt", "completion", "text", "system", "tools")
TURN_ROLES = ("system", "user", "assistant", "tool")


class DataConfig(Section):
    """The rows. Paths are relative to the folder that the command runs in."""

    train_file: str = Field(
        default=DEFAULT_TRAIN_FILE,
        description="rows as JSONL, JSON, CSV, Parquet or Arrow: a file, folder, pattern, https:// or hub id",
    )
    train_files: list[str | TrainFile] = Field(
        default=[], description="several, in place of train_file; {path, weight, split, revision, max_rows} for one"
    )
    eval_file: str | None = Field(
        default=None, description="the eval set, as train_file; not together with eval_fraction"
    )
    eval_fraction: Fraction = Field(
        default=0.0,
        description="share of the rows of train_file that becomes the eval set, duplicates kept together; 0 is none",
    )
    max_seq_length: PositiveInt = Field(
        default=1024, description="a longer row is truncated to so many tokens, and counted"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="for a row that cannot be read: stop and name file:line, or skip and count it"
    )
    truncation: Literal["right", "drop", "error"] = Field(
        default="right",
        description="of a longer row: keep its beginning (a reply then loses its end), drop it, or stop",
    )
    train_on: Literal["all_assistant", "last_assistant", "completion", "everything"] = Field(
        default="all_assistant",
        description="what is learned: assistant turns, the last one, what follows the prompt or last user turn, or all",
    )
    split_turns: bool = Field(
        default=False,
        description="make one example of each reply, as it is served: for templates that hide earlier reasoning",
    )
    columns: dict[str, str] = Field(
        default={},
        description="what the file calls messages, prompt, completion, text, system, tools: {messages: turns}",
    )
    roles: dict[str, str] = Field(
        default={}, description="roles that the file calls otherwise: {customer: user, agent: assistant}"
    )
    packing: bool = Field(
        default=True, description="put examples end to end instead of padding; same gradient, no wasted tokens"
    )
    chat_template: str | None = Field(
        default=None,
        description="a Jinja file, or the name of a shipped template such as chatml; null is the tokenizer's own",
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default={}, description="values for variables of the chat template, such as enable_thinking: false"
    )
    fold_system: bool = Field(
        default=False,
        description="where the chat template has no system turn, put that text in front of the first user turn",
    )
    num_proc: PositiveInt | None = Field(
        default=None, description="processes that encode rows; null is one per core for large files"
    )
    cache_dir: str = Field(default="~/.cache/lora_core/encoded", description="where encoded rows are kept between runs")
    cache_limit_gib: Annotated[float, Field(gt=0)] = Field(
        default=20.0,
        description="size of cache_dir above which encoded rows that were not used for longest are removed, in GiB",
    )

    @model_validator(mode="after")
    def _arguments_of_the_template(self) -> DataConfig:
        taken = ("messages", "tools", "add_generation_prompt")
        for name in self.chat_template_kwargs:
            if name in taken or not (name.isascii() and name.isidentifier()):
                raise ValueError(
                    f"chat_template_kwargs cannot set {quoted(name)}; fix: names of variables in the chat template, "
                    f"and none of {', '.join(taken)}"
                )
        try:
            json.dumps(self.chat_template_kwargs, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise ValueError(f"chat_template_kwargs must hold JSON values: {error}") from error
        return self

    @field_validator("columns", "roles")
    @classmethod
    def _known_names(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        known, given = (COLUMNS, value.keys()) if info.field_name == "columns" else (TURN_ROLES, value.values())
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}; fix: data.{info.field_name}={{}}")
        return value

    @model_validator(mode="after")
    def _split_turns_trains_replies(self) -> DataConfig:
        if self.split_turns and self.train_on == "everything":
            raise ValueError(
                "split_turns=true trains replies, and train_on=everything all text; fix: data.split_turns=false"
            )
        return self

    @model_validator(mode="after")
    def _one_eval_set(self) -> DataConfig:
        if self.eval_file is not None and self.eval_fraction > 0:
            raise ValueError(
                f"eval_file={self.eval_file} and eval_fraction={self.eval_fraction} both name an eval set; "
                "fix: data.eval_fraction=0, or data.eval_file=null"
            )
        return self

    @model_validator(mode="after")
    def _one_training_set(self) -> DataConfig:
        if self.train_files and self.train_file != DEFAULT_TRAIN_FILE:
            raise ValueError(
                f"train_file={self.train_file} and train_files ({len(self.train_files)}) both name training rows; "
                "fix: put the file into train_files, and leave train_file out"
            )
        repeated = [file.path for file in self.train_files if isinstance(file, TrainFile) and file.weight > 1]
        if repeated and self.eval_fraction > 0:
            raise ValueError(
                f"train_files takes rows of {repeated[0]} more than once, and eval_fraction={self.eval_fraction} would "
                "put copies of a row into both sets; fix: data.eval_file=FILE with data.eval_fraction=0, or weight: 1"
            )
        return self

    @property
    def train_source(self) -> str:
        """Where the training rows come from, for messages: the file, or `a.jsonl, b.csv x 2`."""
        if not self.train_files:
            return self.train_file
        names = [
            file if isinstance(file, str) else file.path + (f" x {file.weight:g}" if file.weight != 1 else "")
            for file in self.train_files
        ]
        return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


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
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(default=5e-5, description="peak, at the end of warmup")
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
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = Field(
        default="paged_adamw_8bit", description="paged state is a CUDA feature; on a CPU it is plain 8-bit"
    )
    bf16: bool | Literal["auto"] = Field(
        default=True,
        description="compute under bfloat16 autocast; auto: true where the device has bfloat16 instructions, else the "
        "whole run is float32",
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
    sample_max_new_tokens: PositiveInt = Field(default=64, description="tokens per sample reply, greedy")

    @model_validator(mode="before")
    @classmethod
    def _one_warmup_set(cls, values: Any) -> Any:
        """One kind of warmup, where only that one is set, replaces the other's default."""
        if isinstance(values, dict) and values.get("warmup_steps") is not None and "warmup_ratio" not in values:
            return {**values, "warmup_ratio": None}
        return values

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
                f"lora.init_lora_weights={self.lora.init_lora_weights} takes the adapter's start out of the base "
                f"weights, and model.dtype={self.model.dtype}, model.quantization={self.model.quantization} would round "
                "what is left, so that the saved adapter would not fit the base model; fix: model.dtype=float32 "
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
