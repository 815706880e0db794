"""The words of transformers' TrainingArguments, PEFT's LoraConfig, BitsAndBytesConfig and TRL's SFT command.

Defaults are those of transformers 5.24, PEFT 0.21 and TRL 1.16, from their sources. The other tools' trainers are built
on the same TrainingArguments, so their tables use this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_core.config.schema import ALL_SEVEN_PROJECTIONS
from lora_core.config.translation import NotOffered, Rule, Tool, Values, renamed, several, whole

_ADAMW = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
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
    if name not in _ADAMW:
        raise NotOffered(f"the optimizers here are {', '.join(dict.fromkeys(_ADAMW.values()))}")
    return {"train.optim": _ADAMW[name]}


def precision(values: Values) -> dict[str, Any]:
    bf16, fp16 = values["bf16"], values["fp16"]
    if fp16 and not bf16:
        raise NotOffered("float16 training; here bfloat16, or float32 with train.bf16=false")
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


def schedule(values: Values) -> dict[str, Any]:
    name = str(values["lr_scheduler_type"]).removeprefix("SchedulerType.").lower()
    has_warmup = values.get("warmup_steps") or values.get("warmup_ratio")
    if name not in ("linear", "cosine", "constant_with_warmup", "constant") or (name == "constant" and has_warmup):
        raise NotOffered("kept at linear, to zero; train.lr_scheduler_type and train.lr_scheduler_kwargs say another")
    return {"train.lr_scheduler_type": name}


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
        names = [name.strip() for name in names.split(",")]
    if not all(isinstance(name, str) and name.replace("_", "").replace(".", "").isalnum() for name in names):
        raise NotOffered("lora.target_modules are names of modules, not a regular expression")
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
    Rule(("lr_scheduler_type",), schedule),
    Rule(("load_best_model_at_end", "metric_for_best_model"), best),
    Rule(("max_grad_norm",), clipping),
]

_LOGS = "metrics.jsonl and report.html in the run folder hold what is logged"
_HUB = "nothing is uploaded while a run trains"
_SPEED = "changes time or memory and not what is learned"
_LEARNS = "changes what is learned, and has no counterpart here"
_ADAM = "AdamW's betas and epsilon are torch's own here, 0.9, 0.999 and 1e-8"
_SHARDED = "sharding is configured by `accelerate launch --config_file`"
_ROWS = "rows are shaped by data.columns, data.roles and the chat template"
NOT_OFFERED = several(
    {
        "report_to run_name project trackio_space_id logging_dir logging_first_step logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
        "plot_loss skip_memory_metrics trackio_bucket_id trackio_static_space_id include_effective_tokens_per_second "
        "tracking wandb_run_group wandb_run_id wandb_tags wandb_project wandb_entity wandb_mode": _LOGS,
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_revision hub_always_push "
        "push_to_hub_revision push_to_hub_model_id push_to_hub_token push_to_hub_organization": _HUB,
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_in_order dataloader_multiprocessing_context tf32 group_by_length length_column_name "
        "train_sampling_strategy use_liger_kernel liger_kernel_config torch_empty_cache_steps pad_to_multiple_of "
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs activation_offloading "
        "torch_compile_backend torch_compile_mode use_cache dataset_num_proc dataset_batch_size packing_strategy "
        "padding_free eval_packing low_cpu_mem_usage device_map eval_accumulation_steps jit_mode_eval "
        "average_tokens_across_devices batch_eval_metrics eval_do_concat_batches eval_use_gather_object "
        "include_for_metrics use_reentrant preprocessing_num_workers use_flash_attention_2 torch_compile_options "
        "bf16_full_eval fp16_full_eval "
        "prediction_loss_only use_fast use_fast_tokenizer": _SPEED,
        "neftune_noise_alpha label_smoothing_factor optim_args optim_target_modules lora_modules_to_save "
        "lora_target_parameters bias lora_bias loss_type lr_scheduler_kwargs adam_mini exclude_modules rank_pattern "
        "alpha_pattern layers_to_transform layers_pattern target_parameters router_aux_loss_coef loftq_config "
        "trainable_token_indices layer_replication data_seed dataloader_drop_last": _LEARNS,
        "init_lora_weights": "the adapter starts as PEFT's default: it changes nothing at first",
        "adam_beta1 adam_beta2 adam_epsilon": _ADAM,
        "deepspeed fsdp fsdp_config accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank use_cpu no_cuda _n_gpu": _SHARDED,
        "resume_from_checkpoint": "lora-core train --resume continues from the newest checkpoint",
        "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint": "checkpoints hold all that a run needs to be "
        "resumed, as safetensors",
        "remove_unused_columns dataset_text_field dataset_kwargs label_names columns formatting_func "
        "chat_template": _ROWS,
        "do_train do_eval do_predict eval_on_start eval_delay greater_is_better debug full_determinism "
        "task_type lora_task_type peft_type inference_mode base_model_name_or_path fan_in_fan_out auto_mapping "
        "use_peft past_index ray_scope peft_version revision hub_hash": "says nothing of what is learned here",
        "trust_remote_code": "code from a model's repository is never run",
        "dataset_mixture dataset_mixer dataset_splits": "data.train_files takes several files, with split and weight",
        "block_size": "data.max_seq_length is what limits a row",
        "dataset_test_split eval_dataset test_split_size": "the eval set is data.eval_file, or a share of "
        "the rows: data.eval_fraction",
        "bnb_4bit_compute_dtype bnb_4bit_use_double_quant use_bnb_nested_quant bnb_4bit_quant_storage "
        "llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight": ""
        "NF4 here "
        "has double quantization, computes in bfloat16, and is stored as model.quant_storage",
        "dataset_streaming streaming shuffle_dataset": "rows are encoded once, kept on disk, and shuffled every epoch",
        "truncation_mode": "data.truncation says what becomes of a longer row",
        "eos_token pad_token": "the chat template says what ends a turn; padding is masked",
        "model_init_kwargs": "model.dtype, model.attn_implementation and model.revision are what there is",
        "ignore_bias_buffers": _SHARDED,
    }
)

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
    ),
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
