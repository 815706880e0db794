"""LoRA and QLoRA fine-tuning of chat models.

    from lora_core import load_config, train

    summary = train(load_config("qwen0.5b", ["data.train_file=chats.jsonl"]))

Names load when they are first used, so `import lora_core` is quick and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_core._version import __version__

if TYPE_CHECKING:
    from lora_core.checkpoints.adapter_folder import load_adapter
    from lora_core.config.schema import DataConfig, LoraConfig, ModelConfig, PreflightConfig, RunConfig, TrainConfig
    from lora_core.configuration import load_config, with_overrides
    from lora_core.data.counts import EncodedFile, RowCounts
    from lora_core.data.encoded import encode_file
    from lora_core.data.packing import Batching
    from lora_core.encoding.chat import ChatEncoder, EncodedChat, encode_chat, show_chat
    from lora_core.errors import (
        ChatTemplateError,
        ConfigError,
        DataError,
        LoraCoreError,
        PreflightError,
        RowError,
        TrainingError,
    )
    from lora_core.evaluation.evaluate import EvalResult, evaluate, evaluate_adapter
    from lora_core.memory.plan import MemoryPlan, predict_memory
    from lora_core.model.base import add_adapter, load_base_model, load_tokenizer
    from lora_core.model.loss import CausalLMLoss, LossSums
    from lora_core.model.optimizer import build_optimizer, build_scheduler
    from lora_core.preflight.findings import Facts, Finding
    from lora_core.preflight.preflight import look_at_run, run_checks
    from lora_core.report.page import compare_reports, write_report
    from lora_core.rows.messages import Conversation, parse_row
    from lora_core.schedule import SchedulePlan, plan_schedule
    from lora_core.training.setup import train
    from lora_core.training.step import StepResult, train_step
    from lora_core.verification.contracts import verify
    from lora_core.verification.table import Verification
    from lora_core.watch.callbacks import Callback
    from lora_core.watch.summary import Summary

_HOME = {
    "checkpoints.adapter_folder": ("load_adapter",),
    "config.schema": ("DataConfig", "LoraConfig", "ModelConfig", "PreflightConfig", "RunConfig", "TrainConfig"),
    "configuration": ("load_config", "with_overrides"),
    "data.counts": ("EncodedFile", "RowCounts"),
    "data.encoded": ("encode_file",),
    "data.packing": ("Batching",),
    "encoding.chat": ("ChatEncoder", "EncodedChat", "encode_chat", "show_chat"),
    "errors": (
        "ChatTemplateError",
        "ConfigError",
        "DataError",
        "LoraCoreError",
        "PreflightError",
        "RowError",
        "TrainingError",
    ),
    "evaluation.evaluate": ("EvalResult", "evaluate", "evaluate_adapter"),
    "memory.plan": ("MemoryPlan", "predict_memory"),
    "model.base": ("add_adapter", "load_base_model", "load_tokenizer"),
    "model.loss": ("CausalLMLoss", "LossSums"),
    "model.optimizer": ("build_optimizer", "build_scheduler"),
    "preflight.findings": ("Facts", "Finding"),
    "preflight.preflight": ("look_at_run", "run_checks"),
    "report.page": ("compare_reports", "write_report"),
    "rows.messages": ("Conversation", "parse_row"),
    "schedule": ("SchedulePlan", "plan_schedule"),
    "training.setup": ("train",),
    "training.step": ("StepResult", "train_step"),
    "verification.contracts": ("verify",),
    "verification.table": ("Verification",),
    "watch.callbacks": ("Callback",),
    "watch.summary": ("Summary",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "__version__",
    "add_adapter",
    "Batching",
    "build_optimizer",
    "build_scheduler",
    "Callback",
    "CausalLMLoss",
    "ChatEncoder",
    "ChatTemplateError",
    "compare_reports",
    "ConfigError",
    "Conversation",
    "DataConfig",
    "DataError",
    "encode_chat",
    "encode_file",
    "EncodedChat",
    "EncodedFile",
    "EvalResult",
    "evaluate",
    "evaluate_adapter",
    "Facts",
    "Finding",
    "load_adapter",
    "load_base_model",
    "load_config",
    "load_tokenizer",
    "look_at_run",
    "LoraConfig",
    "LoraCoreError",
    "LossSums",
    "MemoryPlan",
    "ModelConfig",
    "parse_row",
    "plan_schedule",
    "predict_memory",
    "PreflightConfig",
    "PreflightError",
    "RowCounts",
    "RowError",
    "run_checks",
    "RunConfig",
    "SchedulePlan",
    "show_chat",
    "StepResult",
    "Summary",
    "train",
    "train_step",
    "TrainConfig",
    "TrainingError",
    "Verification",
    "verify",
    "with_overrides",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lora_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
