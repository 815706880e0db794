"""The words of Axolotl's YAML files. Defaults are those of 0.19, from its `utils/schemas/` and `core/builders/`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_core.other_tools.not_offered import NOT_OFFERED
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
)
from lora_core.other_tools.translation import NotOffered, Rule, Tool, Values, renamed, several, whole

_READ_TYPES = (None, "alpaca", "chat_template", "sharegpt", "completion", "input_output", "alpaca:phi")


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
    if values["warmup_steps"] is not None:
        return {"train.warmup_steps": whole("train.warmup_steps", values["warmup_steps"])}
    ratio = 0.03 if values["warmup_ratio"] is None else values["warmup_ratio"]
    return {"train.warmup_ratio": float(ratio)}


def _optimizer(values: Values) -> dict[str, Any]:
    return optimizer({"optim": values["optimizer"]})


def _schedule(values: Values) -> dict[str, Any]:
    return schedule({**values, "lr_scheduler_type": values["lr_scheduler"]})


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


def _eval_rows(values: Values) -> dict[str, Any]:
    given = values["test_datasets"]
    if not given:
        return {}
    if len(given) > 1 or not isinstance(given[0], dict) or given[0].get("split", "train") != "train":
        raise NotOffered("one file is the eval set here: data.eval_file=PATH")
    return {"data.eval_file": _path(given[0])}


def _rows(values: Values) -> dict[str, Any]:
    given = values["datasets"]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise NotOffered("no rows are named; data.train_file=PATH")
    kinds = {each.get("type") for each in given if isinstance(each.get("type"), (str, type(None)))}
    unread = [each for each in given if not isinstance(each.get("type"), (str, type(None)))]
    if unread or not kinds <= set(_READ_TYPES):
        named = "a format of its own" if unread else ", ".join(sorted(map(str, kinds - set(_READ_TYPES))))
        raise NotOffered(
            f"rows of type {named} are not made here; data.train_file=PATH, with data.columns and data.roles"
        )
    files = [_train_file(each) for each in given]
    made: dict[str, Any] = {"data.train_file": files[0]} if files == [str(files[0])] else {"data.train_files": files}
    columns = {each["field_messages"] for each in given if each.get("field_messages")}
    if columns and columns != {"messages"}:
        if len(columns) > 1:
            raise NotOffered("one name for the column of messages: data.columns={messages: NAME}")
        made["data.columns"] = {"messages": columns.pop()}
    if kinds == {"completion"}:
        fields = {each.get("field") or "text" for each in given}
        made |= {"data.train_on": "everything"} | (
            {"data.columns": {"text": fields.pop()}} if fields != {"text"} else {}
        )
    return made


def _path(each: dict[str, Any]) -> str:
    files = each.get("data_files")
    name = files if isinstance(files, str) else each.get("path")
    if not isinstance(name, str) or each.get("name") or isinstance(files, list):
        raise NotOffered("each of data.train_files is a path, with split and weight")
    return name


def _train_file(each: dict[str, Any]) -> str | dict[str, Any]:
    split = each.get("split") or "train"
    revision = each.get("revision")
    if split == "train" and revision is None:
        return _path(each)
    return {
        "path": _path(each),
        **({"split": split} if split != "train" else {}),
        **({"revision": revision} if revision else {}),
    }


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


def _checkpointing(values: Values) -> dict[str, Any]:
    return {"train.gradient_checkpointing": bool(values["gradient_checkpointing"])}


# Axolotl's name -> the shipped template of the same turns.
_SHIPPED_TEMPLATES = {"phi_3": "phi3", **{name: name for name in ("alpaca", "chatml", "gemma", "llama3", "qwen3")}}


def _template(values: Values) -> dict[str, Any]:
    name = values["chat_template"]
    if name in (None, "tokenizer_default"):
        return {}
    if name in _SHIPPED_TEMPLATES:
        return {"data.chat_template": _SHIPPED_TEMPLATES[name]}
    raise NotOffered("the tokenizer's own chat template is used; data.chat_template names another")


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
    Rule(("noisy_embedding_alpha",), lambda values: {"train.neftune_noise_alpha": values["noisy_embedding_alpha"]}),
    Rule(("lora_modules_to_save",), lambda values: saved_modules({**values, "modules_to_save": None})),
    Rule(("peft_init_lora_weights",), lambda values: start({"init_lora_weights": values["peft_init_lora_weights"]})),
    Rule(("streaming",), lambda values: {"data.streaming": True} if values["streaming"] else {}),
    Rule(("micro_batch_size", "gradient_accumulation_steps", "batch_size"), _batch),
    Rule(("num_epochs", "max_steps"), _epochs),
    Rule(("save_steps", "saves_per_epoch", "save_strategy"), _saving),
    Rule(("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy"), _evaluation),
    Rule(("val_set_size",), _share),
    Rule(("test_datasets",), _eval_rows),
    Rule(("datasets",), _rows),
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
    Rule(("gradient_checkpointing",), _checkpointing),
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

_PLACE = "changes where, how fast or with what log it runs, and not what is learned"
_METHOD = "changes how the model is trained, and has no counterpart here"
_DECIDES = "is decided by this, and the rest of the file is read for it"
_NOT_OFFERED = NOT_OFFERED | several(
    {
        "adapter rl pretraining_dataset reward_model process_reward_model num_labels trl ebft vllm "
        "model_quantization_config model_quantization_config_kwargs": _DECIDES,
        "wandb_project wandb_entity wandb_watch wandb_name wandb_log_model wandb_mode wandb_run_id use_wandb "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_mlflow hf_mlflow_log_artifacts use_tensorboard "
        "use_comet comet_project_name use_trackio trackio_project_name profiler_steps strict debug gc_steps "
        "sample_packing_eff_est eval_table_size eval_max_new_tokens include_tkps loss_watchdog_threshold "
        "loss_watchdog_patience wandb_run_name logging_first_step": "metrics.jsonl and report.html in the run folder "
        "hold what is logged",
        "tf32 flash_attn_rms_norm flash_attn_cross_entropy flash_attn_fuse_qkv flash_attn_fuse_mlp sdp_attention "
        "pad_to_sequence_len eval_sample_packing lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_on_cpu "
        "lora_embedding_kernel "
        "liger_rope liger_rms_norm liger_glu_activation liger_fused_linear_cross_entropy liger_layer_norm "
        "liger_swiglu liger_cross_entropy liger_rms_norm_gated "
        "device world_size low_cpu_mem_usage special_tokens_map tokenizer_legacy batch_flattening "
        "activation_offloading "
        "xformers_attention dataloader_prefetch_factor cut_cross_entropy chunked_cross_entropy layer_offloading "
        "sequence_parallel_degree context_parallel_size tiled_mlp gptq_disable_exllama use_kernels "
        "skip_prepare_dataset dp_shard_size tensor_parallel_size scaling_softmax max_memory gpu_memory_limit "
        "experts_implementation quantize_moe_experts fsdp_version fsdp_final_state_dict_type use_scattermoe "
        "use_sonicmoe "
        "llama4_linearized_experts experimental_skip_move_to_device flex_attn_compile_kwargs expert_parallel_size "
        "dp_replicate_size flash_optimum gemma4_hybrid_attn_impl use_ray use_swanlab swanlab_project deepcompile "
        "gradient_checkpointing_kwargs use_otel_metrics trackio_run_name swanlab_mode swanlab_description "
        "torch_compile_backend group_by_length offload_optimizer sample_packing_bin_size "
        "sample_packing_group_size sample_packing_sequentially fused_attn_kernel": _PLACE,
        "dataset_prepared_path push_dataset_to_hub hf_use_auth_token dataset_exact_deduplication "
        "dataset_keep_in_memory shuffle_merged_datasets max_packed_sequence_len dataset_shard_num dataset_shard_idx "
        "preprocess_iterable is_preprocess": "encoded rows are kept in data.cache_dir",
        "loraplus_lr_embedding relora_steps relora "
        "relora_warmup_steps relora_anneal_steps relora_cpu_offload cosine_min_lr_ratio cosine_constant_lr_ratio "
        "lr_quadratic_warmup lora_fan_in_fan_out lora_target_parameters peft embedding_lr "
        "embedding_lr_scale unfrozen_parameters adam_beta3 lisa_n_layers lisa_step_interval lisa_layers_attribute "
        "eot_tokens fix_untrained_tokens resize_token_embeddings_to_32x rope_scaling overrides_of_model_config "
        "min_sample_len curriculum_sampling optim_target_modules optim_args s2_attention torchdistx_path use_eaft "
        "use_dynamic_finetuning dft peft_ensure_weight_tying moe_aux_loss_coef router_aux_loss_coef use_pose "
        "train_on_eos eta_min train_on_eot lr_groups "
        "shrink_embeddings mean_resizing_embeddings qat gptq gptq_bits "
        "gptq_groupsize gptq_model_v1": _METHOD,
        "special_tokens tokens added_tokens_overrides chat_template_jinja default_system_message tokenizer_config "
        "tokenizer_type "
        "tokenizer_use_fast bos_token eos_token": "the model's own tokenizer and its chat template are used",
        "model_type base_model_config base_model_ignore_patterns is_llama_derived_model is_mistral_derived_model "
        "is_falcon_derived_model is_qwen_derived_model model_config processor_type processor_kwargs cls_model_config "
        "type_of_model tokenizer_use_mistral_common trust_remote_code "
        "freeze_mm_modules image_size image_resize_algorithm": "the model's config says what it is, and code "
        "from its repository is never run",
        "plugins": "there are no plugins",
        "resume_from_checkpoint auto_resume_from_checkpoints local_rank": "lora-core train --resume continues from the "
        "newest checkpoint",
        "save_first_step save_only_model save_safetensors generate_samples": "checkpoints hold all that a run needs to "
        "be resumed, as safetensors",
        "bnb_config_kwargs": "NF4 here has double quantization, and computes in bfloat16",
    }
)


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


AXOLOTL = Tool("Axolotl 0.19", _RULES, _DEFAULTS, _NOT_OFFERED, _refusals)
