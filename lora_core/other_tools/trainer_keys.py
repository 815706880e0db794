"""The words of transformers' TrainingArguments, PEFT's LoraConfig, BitsAndBytesConfig and TRL's SFT command.

Defaults are those of transformers 5.24, PEFT 0.21 and TRL 1.16, from their sources. The other tools' trainers are built
on the same TrainingArguments, so their tables use this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS, Tracker, TrainConfig
from lora_core.other_tools.not_offered import NOT_OFFERED
from lora_core.other_tools.translation import NotOffered, Rule, Tool, Values, renamed, whole
from lora_core.schedule import schedule_problem

_OTHER_NAMES = {"adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit", "lion": "lion_32bit"}
_OPTIMIZERS = get_args(TrainConfig.model_fields["optim"].annotation)
_TRACKERS = get_args(Tracker)
_ATTENTION = ("sdpa", "eager", "flash_attention_2")


def length(values: Values) -> dict[str, Any]:
    """Epochs, or steps where they are set."""
    steps, epochs = values["max_steps"], values["num_train_epochs"]
    if steps is not None and steps > 0:
        return {"train.max_steps": whole("train.max_steps", steps)}
    return {} if epochs is None else {"train.num_train_epochs": whole("train.num_train_epochs", epochs)}


def warmup(values: Values) -> dict[str, Any]:
    """Steps win over the ratio; steps below 1 are a ratio, as in transformers 5."""
    steps, ratio = values["warmup_steps"], values["warmup_ratio"]
    if isinstance(steps, float) and 0 < steps < 1:
        steps, ratio = 0, steps
    if steps:
        return {"train.warmup_steps": whole("train.warmup_steps", steps)}
    return {"train.warmup_ratio": float(ratio)} if ratio else {"train.warmup_steps": 0, "train.warmup_ratio": None}


def optimizer(values: Values) -> dict[str, Any]:
    name = str(values["optim"]).removeprefix("OptimizerNames.").lower()
    name = _OTHER_NAMES.get(name, name)
    if name not in _OPTIMIZERS:
        raise NotOffered(f"the optimizers here are {', '.join(_OPTIMIZERS)}")
    return {"train.optim": name}


def precision(values: Values) -> dict[str, Any]:
    bf16, fp16 = values["bf16"], values["fp16"]
    if fp16 and not bf16:
        return {"train.fp16": True, "train.bf16": False}
    if bf16 in ("auto", "full"):
        return {"train.bf16": "auto" if bf16 == "auto" else True}
    return {"train.bf16": bool(bf16)}


def logging(values: Values) -> dict[str, Any]:
    if values["logging_strategy"] in ("no", "epoch"):
        raise NotOffered("log lines come after so many steps: train.logging_steps")
    return {"train.logging_steps": whole("train.logging_steps", values["logging_steps"])}


def evaluation(values: Values) -> dict[str, Any]:
    strategy = values["eval_strategy"] or values["evaluation_strategy"] or "no"
    if strategy == "epoch":
        return {"train.eval_steps": None}
    if strategy == "steps":
        return {"train.eval_steps": whole("train.eval_steps", values["eval_steps"] or values["logging_steps"])}
    return {}


def saving(values: Values) -> dict[str, Any]:
    strategy = values["save_strategy"] or "steps"
    if strategy == "no":
        raise NotOffered("checkpoints are written; train.save_steps says how often, null is once an epoch")
    if strategy != "steps":
        return {"train.save_steps": None}
    return {"train.save_steps": whole("train.save_steps", values["save_steps"])}


SCHEDULE_KEYS = {name: f"lr_scheduler_kwargs.{name}" for name in ("min_lr_rate", "num_decay_steps")}


def schedule(values: Values) -> dict[str, Any]:
    name = str(values["lr_scheduler_type"]).removeprefix("SchedulerType.").lower()
    settings = {name: values[key] for name, key in SCHEDULE_KEYS.items() if values.get(key) is not None}
    problem = schedule_problem(name, settings)
    if problem is not None:
        raise NotOffered(f"kept at linear, to zero; {problem}")
    if name == "constant":  # transformers' own passes over any warmup that is asked for
        return {"train.lr_scheduler_type": name, "train.warmup_steps": 0, "train.warmup_ratio": None}
    return {"train.lr_scheduler_type": name} | ({"train.lr_scheduler_kwargs": settings} if settings else {})


def trackers(values: Values) -> dict[str, Any]:
    given = values["report_to"]
    names = [given] if isinstance(given, str) else given
    if names is None or [*names] in ([], ["none"]):
        return {"train.report_to": []}
    unknown = [name for name in names if name not in _TRACKERS]
    if unknown:
        raise NotOffered(f"none is called; train.report_to takes {', '.join(_TRACKERS)}")
    return {"train.report_to": [*names]}


def start(values: Values) -> dict[str, Any]:
    """How A and B begin."""
    given = values["init_lora_weights"]
    if given in (None, True, "default"):
        return {}
    if given == "gaussian":
        return {"lora.init_lora_weights": given}
    reason = "kept at PEFT's default, which changes nothing at first"
    if str(given).startswith(("pissa", "olora")):
        reason += f"; lora.init_lora_weights={given} needs model.dtype=float32 and no quantization"
    raise NotOffered(reason)


def saved_modules(values: Values) -> dict[str, Any]:
    given = values["modules_to_save"] or values["lora_modules_to_save"]
    if not given:
        return {}
    return {"lora.modules_to_save": [name.strip() for name in given.split(",")] if isinstance(given, str) else given}


def streaming(values: Values) -> dict[str, Any]:
    return {"data.streaming": True} if values["dataset_streaming"] or values["streaming"] else {}


def best(values: Values) -> dict[str, Any]:
    if not values["load_best_model_at_end"]:
        return {}
    if values["metric_for_best_model"] not in (None, "loss", "eval_loss"):
        raise NotOffered("the best adapter here is that of the lowest eval loss: train.keep_adapter=best")
    return {"train.keep_adapter": "best"}


def checkpointing(values: Values) -> dict[str, Any]:
    """Unsloth's own kind does the same with other kernels."""
    return {"train.gradient_checkpointing": values["gradient_checkpointing"] in (True, "True", "unsloth")}


def clipping(values: Values) -> dict[str, Any]:
    return {"train.max_grad_norm": float(values["max_grad_norm"]) if values["max_grad_norm"] else None}


def quantization(values: Values) -> dict[str, Any]:
    if values["load_in_8bit"]:
        return {"model.quantization": "int8"}
    if not values["load_in_4bit"]:
        return {"model.quantization": "none"}
    if values["bnb_4bit_quant_type"] not in (None, "nf4"):
        raise NotOffered("4 bits are NF4 here: model.quantization=nf4")
    return {"model.quantization": "nf4"}


def weights_type(values: Values) -> dict[str, Any]:
    name = str(values["torch_dtype"] or values["dtype"] or "auto").removeprefix("torch.")
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise NotOffered("model.dtype is auto, bfloat16, float16 or float32")
    return {"model.dtype": name}


def attention(values: Values) -> dict[str, Any]:
    name = values["attn_implementation"]
    if name is not None and name not in _ATTENTION:
        raise NotOffered(f"kept at sdpa; attention here is {', '.join(_ATTENTION)}")
    return {} if name is None else {"model.attn_implementation": name}


def targets(values: Values) -> dict[str, Any]:
    names = values["lora_target_modules"]
    if names is None:
        return {"lora.target_modules": ["q_proj", "v_proj"]}
    if names in ("all-linear", "all", ["all-linear"], ["all"]):
        return {"lora.target_modules": "all-linear"}
    if isinstance(names, str):
        words = [name.strip() for name in names.split(",")]
        is_pattern = any(not word.replace("_", "").replace(".", "").isalnum() for word in words)
        return {"lora.target_modules": names if is_pattern else words}
    return {"lora.target_modules": [*names]}


def max_length(values: Values) -> dict[str, Any]:
    limit = values["max_seq_length"] or values["max_length"]
    if limit is None:
        raise NotOffered("a row has a limit here: data.max_seq_length")
    return {"data.max_seq_length": limit}


def template_file(values: Values) -> dict[str, Any]:
    path = values["chat_template_path"]
    if path is None:
        return {}
    if not str(path).endswith(".jinja"):
        raise NotOffered("data.chat_template is a Jinja file or the name of a shipped template")
    return {"data.chat_template": path}


def loss_on(values: Values) -> dict[str, Any]:
    if values["assistant_only_loss"]:
        return {"data.train_on": "all_assistant"}
    if values["completion_only_loss"]:
        return {"data.train_on": "completion"}
    raise NotOffered("kept at the assistant's turns; data.train_on=everything trains on all text")


def packing(values: Values) -> dict[str, Any]:
    raise NotOffered(
        "packing is on here (data.packing), examples do not see each other, the gradient is that of padded rows, and a "
        "step counts examples and not packed sequences"
    )


def revision(values: Values) -> dict[str, Any]:
    name = values["model_revision"]
    return {} if name in (None, "main") else {"model.revision": name}


def rows(values: Values) -> dict[str, Any]:
    """A file, or a dataset on the hub with its split."""
    name, files, split = values["dataset_name"], values["data_files"], values["dataset_train_split"] or "train"
    if values["datasets"]:
        return {"data.train_files": [_one_of_a_mixture(each) for each in values["datasets"]]}
    if name in ("json", "csv", "parquet") and files is not None:
        if not isinstance(files, str):
            raise NotOffered("one file, or data.train_files for several: data.train_file=PATH")
        return {"data.train_file": files}
    if name is None:
        raise NotOffered("no rows are named; data.train_file=PATH")
    if values["dataset_config"] is not None:
        raise NotOffered("a dataset's configuration cannot be named here; data.train_file=PATH of its files")
    if split == "train":
        return {"data.train_file": name}
    return {"data.train_files": [{"path": name, "split": split}]}


def _one_of_a_mixture(each: Any) -> Any:
    if not isinstance(each, dict) or not isinstance(each.get("path"), str) or each.get("name"):
        raise NotOffered("each of data.train_files is a path, with split and weight")
    return {"path": each["path"], **({"split": each["split"]} if each.get("split", "train") != "train" else {})}


TRAINING_ARGUMENTS = [
    *renamed(
        per_device_train_batch_size="train.per_device_train_batch_size",
        per_device_eval_batch_size="train.per_device_eval_batch_size",
        gradient_accumulation_steps="train.gradient_accumulation_steps",
        learning_rate="train.learning_rate",
        weight_decay="train.weight_decay",
        adam_beta1="train.adam_beta1",
        adam_beta2="train.adam_beta2",
        adam_epsilon="train.adam_epsilon",
        neftune_noise_alpha="train.neftune_noise_alpha",
        label_smoothing_factor="train.label_smoothing_factor",
        project="train.tracker_project",
        torch_compile="train.torch_compile",
        seed="train.seed",
        save_total_limit="train.save_total_limit",
        ddp_timeout="train.rank_timeout_s",
        output_dir="output_dir",
        overwrite_output_dir="overwrite_output_dir",
        auto_find_batch_size="train.auto_batch_size",
    ),
    Rule(("gradient_checkpointing",), checkpointing),
    Rule(("num_train_epochs", "max_steps"), length),
    Rule(("warmup_steps", "warmup_ratio"), warmup),
    Rule(("optim",), optimizer),
    Rule(("bf16", "fp16"), precision),
    Rule(("logging_steps", "logging_strategy"), logging),
    Rule(("eval_strategy", "evaluation_strategy", "eval_steps", "logging_steps"), evaluation),
    Rule(("save_strategy", "save_steps"), saving),
    Rule(("lr_scheduler_type", *SCHEDULE_KEYS.values()), schedule),
    Rule(("report_to",), trackers),
    Rule(("load_best_model_at_end", "metric_for_best_model"), best),
    Rule(("max_grad_norm",), clipping),
]

# What decides what is learned; where a key is not here, the tool's default does as we do.
TRANSFORMERS_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "warmup_steps": 0,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "gradient_checkpointing": False,
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "seed": 42,
}
SFT_DEFAULTS = TRANSFORMERS_DEFAULTS | {
    "learning_rate": 2e-5,
    "bf16": True,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "max_length": 1024,
}
_COMMAND_DEFAULTS = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "load_in_4bit": False,
    "dtype": "float32",
}

SFT_RULES = [
    *TRAINING_ARGUMENTS,
    *renamed(
        model_name_or_path="model.name_or_path",
        lora_r="lora.rank",
        lora_alpha="lora.alpha",
        lora_dropout="lora.dropout",
        use_rslora="lora.use_rslora",
        use_dora="lora.use_dora",
        exclude_modules="lora.exclude_modules",
        layers_to_transform="lora.layers_to_transform",
        trainable_token_indices="lora.trainable_token_indices",
        rank_pattern="lora.rank_pattern",
        alpha_pattern="lora.alpha_pattern",
        chat_template_kwargs="data.chat_template_kwargs",
    ),
    Rule(("init_lora_weights",), start),
    Rule(("modules_to_save", "lora_modules_to_save"), saved_modules),
    Rule(("dataset_streaming", "streaming"), streaming),
    Rule(("model_revision",), revision),
    Rule(("lora_target_modules",), targets),
    Rule(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"), quantization),
    Rule(("dtype", "torch_dtype"), weights_type),
    Rule(("attn_implementation",), attention),
    Rule(("max_length", "max_seq_length"), max_length),
    Rule(("chat_template_path",), template_file),
    Rule(("assistant_only_loss", "completion_only_loss"), loss_on),
    Rule(("packing",), packing),
    Rule(("dataset_name", "dataset_config", "dataset_train_split", "data_files", "datasets"), rows),
]


def _sft_refusals(values: Values) -> Iterable[str]:
    if not values.get("use_peft"):
        yield "use_peft is false: that is full fine-tuning, and adapters are trained here; fix: use_peft: true"
    yield from preference_refusals(values)


def preference_refusals(values: Values) -> Iterable[str]:
    """Keys that only the preference and reinforcement trainers of TRL have."""
    found = [key for key in ("beta", "num_generations", "max_prompt_length", "reward_model_path") if key in values]
    if found:
        yield f"{', '.join(found)}: a file for preference or reinforcement training; SFT is what is done here"


PEFT_DEFAULTS = {
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "load_in_4bit": False,
    "dtype": None,
}
UNSLOTH_DEFAULTS = {
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ALL_SEVEN_PROJECTIONS,
    "load_in_4bit": True,
    "max_seq_length": 2048,
    "gradient_checkpointing": True,
    "dtype": None,
}


def sft_remarks(values: Values) -> Iterable[str]:
    """What TRL does otherwise."""
    if not values.get("assistant_only_loss") and not values.get("completion_only_loss"):
        yield (
            "TRL trains on all text of a chat, or on completions, unless assistant_only_loss is true; here on the "
            "assistant's turns (data.train_on=all_assistant)"
        )


SFT_COMMAND = Tool("TRL 1.16", SFT_RULES, SFT_DEFAULTS | _COMMAND_DEFAULTS, NOT_OFFERED, _sft_refusals, sft_remarks)
# What a saved SFTConfig or TrainingArguments holds: no adapter, no model.
SFT_CONFIG = Tool("TRL 1.16's SFTConfig", SFT_RULES, SFT_DEFAULTS, NOT_OFFERED, preference_refusals, sft_remarks)
