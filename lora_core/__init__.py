"""LoRA and QLoRA fine-tuning of chat models.

    from lora_core import load_config, train

    summary = train(load_config("qwen0.5b", ["data.train_file=chats.jsonl"]))

Names load when they are first used, so `import lora_core` is quick and pulls in no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_core._version import __version__

if TYPE_CHECKING:
    from lora_core.chat import ChatEncoder, EncodedChat, encode_chat, show_chat
    from lora_core.config import RunConfig, load_config
    from lora_core.data import EncodedFile, RowCounts, encode_file
    from lora_core.errors import (
        ChatTemplateError,
        ConfigError,
        DataError,
        LoraCoreError,
        PreflightError,
        RowError,
        TrainingError,
    )
    from lora_core.evaluate import EvalResult, evaluate
    from lora_core.findings import Facts, Finding
    from lora_core.loss import CausalLMLoss, LossSums
    from lora_core.memory import MemoryPlan, predict_memory
    from lora_core.messages import Conversation, parse_row
    from lora_core.model import add_adapter, load_base_model, load_tokenizer
    from lora_core.preflight import look_at_run, run_checks
    from lora_core.schedule import SchedulePlan, plan_schedule
    from lora_core.train import StepResult, train, train_step

_HOME = {
    "chat": ("ChatEncoder", "EncodedChat", "encode_chat", "show_chat"),
    "findings": ("Facts", "Finding"),
    "config": ("RunConfig", "load_config"),
    "memory": ("MemoryPlan", "predict_memory"),
    "data": ("EncodedFile", "RowCounts", "encode_file"),
    "errors": (
        "ChatTemplateError",
        "ConfigError",
        "DataError",
        "LoraCoreError",
        "PreflightError",
        "RowError",
        "TrainingError",
    ),
    "evaluate": ("EvalResult", "evaluate"),
    "loss": ("CausalLMLoss", "LossSums"),
    "messages": ("Conversation", "parse_row"),
    "model": ("add_adapter", "load_base_model", "load_tokenizer"),
    "preflight": ("look_at_run", "run_checks"),
    "schedule": ("SchedulePlan", "plan_schedule"),
    "train": ("StepResult", "train", "train_step"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ChatEncoder",
    "ChatTemplateError",
    "CausalLMLoss",
    "ConfigError",
    "Conversation",
    "DataError",
    "EncodedChat",
    "EncodedFile",
    "EvalResult",
    "Facts",
    "Finding",
    "LoraCoreError",
    "LossSums",
    "MemoryPlan",
    "PreflightError",
    "RowCounts",
    "RowError",
    "RunConfig",
    "SchedulePlan",
    "StepResult",
    "TrainingError",
    "__version__",
    "add_adapter",
    "encode_chat",
    "encode_file",
    "evaluate",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "look_at_run",
    "parse_row",
    "plan_schedule",
    "predict_memory",
    "run_checks",
    "show_chat",
    "train",
    "train_step",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `lora_core.train` the function: importing the submodule of that name would otherwise replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
