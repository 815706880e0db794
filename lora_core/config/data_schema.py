"""The models of a configuration: the rows."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from lora_core.config.adapter_schema import Fraction, PositiveInt, Section
from lora_core.untrusted.text import quoted

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


COLUMNS = ("messages", "prompt", "input", "completion", "reasoning", "text", "system", "tools")
# What transformers passes to a template itself, or takes for its own.
NOT_TEMPLATE_VARIABLES = (
    *("self", "messages", "conversation", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"),
    *("add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens"),
)
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
        description="share of the rows of train_file that becomes the eval set, with near-copies together; 0 is none",
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
        description="names in the file for messages, prompt, input, completion, reasoning, text, system and tools: "
        "{text: body}",
    )
    roles: dict[str, str] = Field(
        default={}, description="roles that the file calls otherwise: {customer: user, agent: assistant}"
    )
    mask_reasoning: bool = Field(
        default=False, description="show the reasoning of replies to the model and do not train it"
    )
    packing: bool | Literal["auto"] = Field(
        default="auto",
        description="put examples end to end instead of padding: same gradient, no wasted tokens; auto: where the "
        "model can keep them apart",
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
    streaming: bool = Field(
        default=False,
        description="read a dataset of the hub row by row, without a copy of its files; encoded rows are kept",
    )
    cache_dir: str = Field(default="~/.cache/lora_core/encoded", description="where encoded rows are kept between runs")
    cache_limit_gib: Annotated[float, Field(gt=0)] = Field(
        default=20.0,
        description="size of cache_dir above which encoded rows that were not used for longest are removed, in GiB",
    )

    @model_validator(mode="after")
    def _arguments_of_the_template(self) -> DataConfig:
        for name in self.chat_template_kwargs:
            if name in NOT_TEMPLATE_VARIABLES or not (name.isascii() and name.isidentifier()):
                raise ValueError(
                    f"chat_template_kwargs cannot set {quoted(name)}; fix: names of variables in the chat template, "
                    f"and none of {', '.join(NOT_TEMPLATE_VARIABLES)}"
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
    def _one_choice_of_what_is_trained(self) -> DataConfig:
        if self.split_turns and self.train_on == "everything":
            raise ValueError(
                "split_turns=true trains replies, and train_on=everything all text; fix: data.split_turns=false"
            )
        if self.mask_reasoning and self.train_on == "everything":
            raise ValueError(
                "mask_reasoning=true leaves reasoning out, and train_on=everything trains all text; "
                "fix: data.mask_reasoning=false"
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
