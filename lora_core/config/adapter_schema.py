"""The models of a configuration: the base model and the adapter."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lora_core.untrusted.text import quoted

ALL_SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are errors and nothing is coerced: `train.bf16: "no"` is a mistake, not false."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The base model. It stays frozen."""

    name_or_path: str = Field(
        default="Qwen/Qwen2.5-0.5B-Instruct", description="hub id or local folder (~ is your home)"
    )
    revision: str | None = Field(default=None, description="hub branch, tag or commit; null is the newest")
    adapter: str | None = Field(
        default=None,
        description="an adapter to start from: a run folder, a folder as PEFT saves it, or a checkpoint; null is none",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="of the frozen weights; the adapter is always float32"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description="nf4 is QLoRA: 4 bits, double quantization, computed in model.dtype (auto: bfloat16)",
    )
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8",
        description="what nf4 weights are stored as; under FSDP it must be what is computed in, such as bfloat16",
    )
    attn_implementation: str = Field(
        default="sdpa",
        description="as transformers names it: sdpa (where packed, lora_core's own; eager where a "
        "family has none), eager, flash_attention_2, ...",
    )


class LoraConfig(Section):
    """The adapter: Hu et al. 2021, https://arxiv.org/abs/2106.09685. The update is scaled by alpha / rank."""

    rank: PositiveInt = Field(default=16, description="r, the adapter's inner dimension")
    alpha: PositiveInt = Field(default=32, description="scale: the update is multiplied by alpha / rank")
    dropout: Fraction = Field(default=0.05, description="probability, on the adapter's input")
    target_modules: list[str] | str = Field(
        default="auto",
        description="names of the modules that get an adapter, or a regular expression for whole names; auto: all "
        "linear layers of the decoder and its experts; all-linear: PEFT's",
    )
    exclude_modules: list[str] | str | None = Field(
        default=None, description="of these, the ones that get none: names, or a regular expression for whole names"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="decoder layers that get an adapter, counted from 0; null is all"
    )
    modules_to_save: list[str] = Field(
        default=[], description="modules that are trained whole and saved with the adapter, such as [lm_head]"
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="ids of tokens whose embeddings are trained, such as those of new tokens"
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default={}, description="another rank for some modules, by name or regular expression: {down_proj: 32}"
    )
    alpha_pattern: dict[str, PositiveInt] = Field(
        default={}, description="another alpha for some modules, as rank_pattern"
    )
    init_lora_weights: bool | str = Field(
        default=True,
        description="how A and B begin: true (A random, B zero), gaussian, olora, pissa, or pissa_niter_16 for 16 "
        "iterations of a faster SVD; olora and pissa need model.dtype=float32",
    )
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="LoRA+, https://arxiv.org/abs/2402.12354: learning rate of B over that of A; 16 is the paper's; "
        "null is the same for both",
    )
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")
    use_dora: bool = Field(default=False, description="weight-decomposed update, https://arxiv.org/abs/2402.09353")

    @property
    def changes_base_weights(self) -> bool:
        """PiSSA (https://arxiv.org/abs/2404.02948) and OLoRA (https://arxiv.org/abs/2406.01775) take what A and B begin
        with out of the base weights."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _regular_expression(cls, value: list[str] | str | None, info: ValidationInfo) -> list[str] | str | None:
        if isinstance(value, str):
            _check_pattern(value, f"lora.{info.field_name}=[{value}]")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        for pattern in value:
            _check_pattern(pattern, f"lora.{info.field_name}={{}}")
        return value

    @model_validator(mode="after")
    def _initial_weights(self) -> LoraConfig:
        init = self.init_lora_weights
        if init is not True and not re.fullmatch(r"gaussian|olora|pissa(_niter_[1-9]\d{0,3})?", str(init)):
            why = _NOT_OFFERED_INITS.get(str(init).lower(), "there is no such start")
            raise ValueError(
                f"init_lora_weights={init}: {why}; fix: lora.init_lora_weights=true, or one of gaussian, olora, pissa, "
                "pissa_niter_16"
            )
        if self.changes_base_weights:
            with_it = {
                "use_dora": self.use_dora,
                "modules_to_save": bool(self.modules_to_save),
                "trainable_token_indices": bool(self.trainable_token_indices),
                "rank_pattern": self.use_rslora and bool(self.rank_pattern),
                "alpha_pattern": self.use_rslora and bool(self.alpha_pattern),
            }
            wrong = [name for name, is_set in with_it.items() if is_set]
            if wrong:
                raise ValueError(
                    f"init_lora_weights={init} cannot be saved as a plain adapter together with {', '.join(wrong)}; "
                    "fix: lora.init_lora_weights=true"
                )
        return self

    @model_validator(mode="after")
    def _layers_by_name(self) -> LoraConfig:
        by_name = self.target_modules == "auto" or isinstance(self.target_modules, list)
        if self.layers_to_transform is not None and not by_name:
            raise ValueError(
                f"layers_to_transform goes with a list of names, and target_modules={self.target_modules}; "
                "fix: lora.target_modules=[q_proj,v_proj], or name the layers in the regular expression"
            )
        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform=[] leaves no layer; fix: lora.layers_to_transform=null")
        return self


_NOT_OFFERED_INITS = {
    "false": "B at random would begin with another model than the base",
    "eva": "EVA needs a pass over the rows before training, which lora_core does not make",
    "corda": "CorDA needs a pass over the rows before training, which lora_core does not make",
    "lora_ga": "LoRA-GA needs gradients before training, which lora_core does not take",
    "loftq": "LoftQ quantizes the base weights in its own way, so that the adapter fits no other base",
    "orthogonal": "its A and B cancel only up to rounding, so that training would not begin with the base model",
    "mica": "MiCA freezes B, which is another method",
}


def _check_pattern(pattern: str, fix: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{quoted(pattern)} is no regular expression ({error}); fix: {fix}") from error
