"""The words of Axolotl's YAML files. Defaults are those of 0.19, from its `utils/schemas/` and `core/builders/`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_core.other_tools.axolotl_rows import eval_rows, remarks, rows
from lora_core.other_tools.not_offered import AXOLOTL_NOT_OFFERED
from lora_core.other_tools.trainer_keys import (
    SCHEDULE_KEYS,
    attention,
    best,
    clipping,
    length,
    optimizer,
    packing,
    saved_modules,
    schedule,
    start,
    targets,
    warmup,
)
from lora_core.other_tools.translation import NotOffered, Rule, Tool, Values, renamed, whole


def _quantization(values: Values) -> dict[str, Any]:
    if values["load_in_8bit"]:
        return {"model.quantization": "int8"}
    return {"model.quantization": "nf4" if values["load_in_4bit"] else "none"}


def _precision(values: Values) -> dict[str, Any]:
    bf16 = values["bf16"] or values["bfloat16"]
    if (values["fp16"] or values["float16"]) and bf16 not in (True, "full"):
        return {"train.fp16": True, "train.bf16": False}
    if bf16 == "auto":
        return {"train.bf16": "auto"}
    return {"train.bf16": bool(bf16)}


def _targets(values: Values) -> dict[str, Any]:
    if values["lora_target_linear"]:
        return {"lora.target_modules": "all-linear"}
    return targets(values)


def _warmup(values: Values) -> dict[str, Any]:
    steps, ratio = values["warmup_steps"], values["warmup_ratio"]
    if steps is None:
        return {"train.warmup_ratio": 0.03 if ratio is None else float(ratio)}
    return warmup({"warmup_steps": steps, "warmup_ratio": None})


def _optimizer(values: Values) -> dict[str, Any]:
    return optimizer({"optim": values["optimizer"]})


def _schedule(values: Values) -> dict[str, Any]:
    return schedule({**values, "lr_scheduler_type": values["lr_scheduler"]})


def _lowest_rate(values: Values) -> dict[str, Any]:
    """A cosine that ends at a share of its peak is transformers' `cosine_with_min_lr`."""
    share = values["cosine_min_lr_ratio"]
    if not share:
        return {}
    if values["lr_scheduler"] != "cosine" or values.get("cosine_constant_lr_ratio"):
        raise NotOffered("a lowest rate here is of a cosine that ends with it: lr_scheduler_type=cosine_with_min_lr")
    return {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": share}}


def _batch(values: Values) -> dict[str, Any]:
    """`batch_size` is of a whole step on one device."""
    micro, accumulation, whole_batch = (
        values["micro_batch_size"],
        values["gradient_accumulation_steps"],
        values["batch_size"],
    )
    if whole_batch:
        accumulation = max(1, whole_batch // micro)
    return {"train.per_device_train_batch_size": micro, "train.gradient_accumulation_steps": accumulation}


def _epochs(values: Values) -> dict[str, Any]:
    return length({"max_steps": values["max_steps"], "num_train_epochs": values["num_epochs"]})


def _saving(values: Values) -> dict[str, Any]:
    if values["save_steps"]:
        return {"train.save_steps": whole("train.save_steps", values["save_steps"])}
    if values["saves_per_epoch"] not in (None, 1):
        raise NotOffered("kept at once an epoch; train.save_steps is in optimizer steps")
    return {"train.save_steps": None}


def _evaluation(values: Values) -> dict[str, Any]:
    if values["eval_steps"]:
        return {"train.eval_steps": whole("train.eval_steps", values["eval_steps"])}
    if values["evals_per_epoch"] not in (None, 1):
        raise NotOffered("kept at once an epoch; train.eval_steps is in optimizer steps")
    return {"train.eval_steps": None}


def _share(values: Values) -> dict[str, Any]:
    share = values["val_set_size"] or 0
    if share >= 1:
        raise NotOffered("a number of rows; the eval set here is a share: data.eval_fraction=0.1")
    return {"data.eval_fraction": float(share)}


def _loss_on(values: Values) -> dict[str, Any]:
    return {"data.train_on": "everything" if values["train_on_inputs"] else "all_assistant"}


def _truncation(values: Values) -> dict[str, Any]:
    strategy = {None: "drop", "drop": "drop", "truncate": "right", "raise": "error"}
    if values["excess_length_strategy"] not in strategy:
        raise NotOffered("data.truncation is right, drop or error")
    return {"data.truncation": strategy[values["excess_length_strategy"]]}


def _attention(values: Values) -> dict[str, Any]:
    if values["flash_attention"]:
        return {"model.attn_implementation": "flash_attention_2"}
    if values["eager_attention"]:
        return {"model.attn_implementation": "eager"}
    if values["xformers_attention"] or values["flex_attention"] or values["sage_attention"]:
        raise NotOffered("kept at sdpa; attention here is sdpa, eager, flash_attention_2")
    return attention(values)


_CHECKPOINTING = (
    "gradient_checkpointing",
    "fsdp_config.activation_checkpointing",
    "fsdp_config.fsdp_activation_checkpointing",
)


def _checkpointing(values: Values) -> dict[str, Any]:
    """FSDP's own kind does the same."""
    return {"train.gradient_checkpointing": any(values[key] for key in _CHECKPOINTING)}


# Axolotl's name -> the shipped template of the same turns.
_SHIPPED_TEMPLATES = {"phi_3": "phi3", **{name: name for name in ("alpaca", "chatml", "gemma", "llama3", "qwen3")}}


def _template(values: Values) -> dict[str, Any]:
    name = values["chat_template"]
    if name in (None, "tokenizer_default"):
        return {}
    if name in _SHIPPED_TEMPLATES:
        return {"data.chat_template": _SHIPPED_TEMPLATES[name]}
    raise NotOffered("the tokenizer's own chat template is used; data.chat_template names another")


# Tracker here -> Axolotl's switch for it, and the project that turns it on as well.
_TRACKERS = {
    "wandb": ("use_wandb", "wandb_project"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name"),
    "tensorboard": ("use_tensorboard", None),
    "comet_ml": ("use_comet", "comet_project_name"),
    "trackio": ("use_trackio", "trackio_project_name"),
    "swanlab": ("use_swanlab", "swanlab_project"),
}
_TRACKER_KEYS = tuple(key for keys in _TRACKERS.values() for key in keys if key)


def _trackers(values: Values) -> dict[str, Any]:
    names = [name for name, keys in _TRACKERS.items() if any(key and values[key] for key in keys)]
    if not names:
        return {}
    projects = [str(values[key]) for _, key in _TRACKERS.values() if key and values[key]]
    return {"train.report_to": names} | ({"train.tracker_project": projects[0]} if projects else {})


def _compiled(values: Values) -> dict[str, Any]:
    return {"train.torch_compile": values["torch_compile"] is True}


_RULES = [
    *renamed(
        base_model="model.name_or_path",
        revision_of_model="model.revision",
        lora_r="lora.rank",
        lora_alpha="lora.alpha",
        lora_dropout="lora.dropout",
        peft_use_rslora="lora.use_rslora",
        peft_use_dora="lora.use_dora",
        sequence_len="data.max_seq_length",
        learning_rate="train.learning_rate",
        weight_decay="train.weight_decay",
        eval_batch_size="train.per_device_eval_batch_size",
        seed="train.seed",
        logging_steps="train.logging_steps",
        save_total_limit="train.save_total_limit",
        early_stopping_patience="train.early_stopping_patience",
        auto_find_batch_size="train.auto_batch_size",
        ddp_timeout="train.rank_timeout_s",
        dataset_num_proc="data.num_proc",
        dataset_processes="data.num_proc",
        output_dir="output_dir",
        neftune_noise_alpha="train.neftune_noise_alpha",
        label_smoothing_factor="train.label_smoothing_factor",
        adam_beta1="train.adam_beta1",
        adam_beta2="train.adam_beta2",
        adam_epsilon="train.adam_epsilon",
        loraplus_lr_ratio="lora.loraplus_lr_ratio",
        peft_layers_to_transform="lora.layers_to_transform",
        peft_trainable_token_indices="lora.trainable_token_indices",
        lora_model_dir="model.adapter",
        lora_rank_pattern="lora.rank_pattern",
        lora_alpha_pattern="lora.alpha_pattern",
        chat_template_kwargs="data.chat_template_kwargs",
    ),
    Rule(("load_in_8bit", "load_in_4bit"), _quantization),
    Rule(("bf16", "fp16", "bfloat16", "float16"), _precision),
    Rule(("lora_target_linear", "lora_target_modules"), _targets),
    Rule(("warmup_steps", "warmup_ratio"), _warmup),
    Rule(("optimizer",), _optimizer),
    Rule(("lr_scheduler", *SCHEDULE_KEYS.values()), _schedule),
    Rule(("cosine_min_lr_ratio",), _lowest_rate),
    Rule(("noisy_embedding_alpha",), lambda values: {"train.neftune_noise_alpha": values["noisy_embedding_alpha"]}),
    Rule(("lora_modules_to_save",), lambda values: saved_modules({**values, "modules_to_save": None})),
    Rule(("peft_init_lora_weights",), lambda values: start({"init_lora_weights": values["peft_init_lora_weights"]})),
    Rule(("streaming",), lambda values: {"data.streaming": True} if values["streaming"] else {}),
    Rule(("micro_batch_size", "gradient_accumulation_steps", "batch_size"), _batch),
    Rule(("num_epochs", "max_steps"), _epochs),
    Rule(("save_steps", "saves_per_epoch", "save_strategy"), _saving),
    Rule(("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"), _evaluation),
    Rule(("val_set_size",), _share),
    Rule(("test_datasets",), eval_rows),
    Rule(("datasets",), rows),
    Rule(("train_on_inputs",), _loss_on),
    Rule(("sample_packing",), packing),
    Rule(("excess_length_strategy",), _truncation),
    Rule(
        (
            "flash_attention",
            "eager_attention",
            "xformers_attention",
            "flex_attention",
            "sage_attention",
            "attn_implementation",
        ),
        _attention,
    ),
    Rule(_CHECKPOINTING, _checkpointing),
    Rule(_TRACKER_KEYS, _trackers),
    Rule(("chat_template",), _template),
    Rule(("torch_compile",), _compiled),
    Rule(("load_best_model_at_end", "metric_for_best_model"), best),
    Rule(("max_grad_norm",), clipping),
]

_DEFAULTS = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": "auto",
    "gradient_checkpointing": False,
    "sequence_len": 512,
    "val_set_size": 0.0,
    "train_on_inputs": False,
    "lora_dropout": 0.0,
    "warmup_ratio": 0.03,
    "save_total_limit": 4,
    "excess_length_strategy": "drop",
    "seed": 42,
}


def _refusals(values: Values) -> Iterable[str]:
    if values.get("rl"):
        yield f"rl: {values['rl']}; fine-tuning on chats is what is done here"
    if values.get("adapter") not in ("lora", "qlora"):
        yield f"adapter: {values.get('adapter')}; adapters (lora, qlora) are what is trained here"
    if values.get("pretraining_dataset"):
        yield "pretraining_dataset: text without chats; fine-tuning on chats is what is done here"
    if values.get("reward_model") or values.get("process_reward_model"):
        yield "reward_model: fine-tuning on chats is what is done here"
    if values.get("gptq"):
        yield "gptq: true; a model is quantized here as NF4 or int8 when it is loaded: model.quantization"
    if values.get("model_quantization_config"):
        yield "model_quantization_config: a model is quantized here as NF4 or int8: model.quantization"


AXOLOTL = Tool("Axolotl 0.19", _RULES, _DEFAULTS, AXOLOTL_NOT_OFFERED, _refusals, remarks)
