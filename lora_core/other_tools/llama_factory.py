"""The words of LLaMA-Factory's YAML files. Defaults are those of 0.9.5, from its `hparams/` and transformers'."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_core.other_tools.not_offered import NOT_OFFERED
from lora_core.other_tools.trainer_keys import (
    TRAINING_ARGUMENTS,
    TRANSFORMERS_DEFAULTS,
    packing,
    saved_modules,
    start,
    targets,
)
from lora_core.other_tools.translation import NotOffered, Rule, Tool, Values, renamed, several


def _alpha(values: Values) -> dict[str, Any]:
    return {"lora.alpha": values["lora_alpha"] or 2 * values["lora_rank"]}


def _targets(values: Values) -> dict[str, Any]:
    return targets({"lora_target_modules": values["lora_target"]})


def _quantization(values: Values) -> dict[str, Any]:
    bits, method = values["quantization_bit"], values["quantization_method"] or "bnb"
    if bits is None:
        return {"model.quantization": "none"}
    if method not in ("bnb", "bitsandbytes") or values["quantization_type"] not in (None, "nf4") or bits not in (4, 8):
        raise NotOffered("model.quantization is nf4 or int8, of bitsandbytes")
    return {"model.quantization": "nf4" if bits == 4 else "int8"}


def _checkpointing(values: Values) -> dict[str, Any]:
    return {"train.gradient_checkpointing": not values["disable_gradient_checkpointing"]}


def _attention(values: Values) -> dict[str, Any]:
    names = {"fa2": "flash_attention_2", "sdpa": "sdpa", "auto": None, "disabled": "eager"}
    if values["flash_attn"] not in names:
        raise NotOffered("kept at sdpa; attention here is sdpa, eager, flash_attention_2")
    name = names[values["flash_attn"]]
    return {"model.attn_implementation": name} if name else {}


def _rows(values: Values) -> dict[str, Any]:
    raise NotOffered(
        f"a name in {values['dataset_dir']}/dataset_info.json, which says where the rows are; data.train_file=PATH"
    )


def _eval_rows(values: Values) -> dict[str, Any]:
    raise NotOffered("a name in dataset_info.json, which says where the rows are; data.eval_file=PATH")


def _share(values: Values) -> dict[str, Any]:
    if values["val_size"] and values["val_size"] >= 1:
        raise NotOffered("a number of rows; the eval set here is a share: data.eval_fraction=0.1")
    return {"data.eval_fraction": float(values["val_size"] or 0)}


def _loss_on(values: Values) -> dict[str, Any]:
    if values["train_on_prompt"]:
        return {"data.train_on": "everything"}
    return {"data.train_on": "last_assistant" if values["mask_history"] else "all_assistant"}


def _precision(values: Values) -> dict[str, Any]:
    if values["pure_bf16"]:
        raise NotOffered("the adapter is float32 here, and computes in bfloat16 with train.bf16=true")
    return {}


def _thinking(values: Values) -> dict[str, Any]:
    if values["enable_thinking"] is False:
        return {"data.chat_template_kwargs": {"enable_thinking": False}}
    return {}


def _start(values: Values) -> dict[str, Any]:
    return start({"init_lora_weights": "pissa" if values["pissa_init"] else True})


def _revision(values: Values) -> dict[str, Any]:
    return {} if values["model_revision"] in (None, "main") else {"model.revision": values["model_revision"]}


_RULES = [
    *TRAINING_ARGUMENTS,
    *renamed(
        model_name_or_path="model.name_or_path",
        lora_dropout="lora.dropout",
        use_rslora="lora.use_rslora",
        use_dora="lora.use_dora",
        cutoff_len="data.max_seq_length",
        preprocessing_num_workers="data.num_proc",
        early_stopping_steps="train.early_stopping_patience",
        loraplus_lr_ratio="lora.loraplus_lr_ratio",
        adapter_name_or_path="model.adapter",
    ),
    Rule(("pissa_init", "pissa_iter"), _start),
    Rule(("additional_target",), lambda values: saved_modules({"modules_to_save": values["additional_target"]})),
    Rule(("streaming", "buffer_size"), lambda values: {"data.streaming": True} if values["streaming"] else {}),
    Rule(("lora_alpha", "lora_rank"), _alpha),
    Rule(("lora_rank",), lambda values: {"lora.rank": values["lora_rank"]}),
    Rule(("lora_target",), _targets),
    Rule(("quantization_bit", "quantization_method", "quantization_type"), _quantization),
    Rule(("disable_gradient_checkpointing",), _checkpointing),
    Rule(("flash_attn",), _attention),
    Rule(("dataset", "dataset_dir"), _rows),
    Rule(("eval_dataset",), _eval_rows),
    Rule(("val_size",), _share),
    Rule(("train_on_prompt", "mask_history"), _loss_on),
    Rule(("packing", "neat_packing"), packing),
    Rule(("pure_bf16",), _precision),
    Rule(("enable_thinking",), _thinking),
    Rule(("model_revision",), _revision),
]

_DEFAULTS = TRANSFORMERS_DEFAULTS | {
    "lora_rank": 8,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "cutoff_len": 2048,
    "val_size": 0.0,
    "train_on_prompt": False,
    "mask_history": False,
    "quantization_bit": None,
    "disable_gradient_checkpointing": False,
    "dataset_dir": "data",
}
del _DEFAULTS["gradient_checkpointing"]  # it has a switch of its own, and is on

_FIXED = "is decided by this, and the rest of the file is read for it"
_METHOD = "changes how the model is trained, and has no counterpart here"
_NOT_OFFERED = NOT_OFFERED | several(
    {
        "stage finetuning_type": _FIXED,
        "template tool_format default_system": "the tokenizer's own chat template is used; data.chat_template names "
        "another",
        "dataset_dir media_dir overwrite_cache tokenized_path cache_dir data_shared_file_system "
        "preprocessing_batch_size": "encoded rows are kept in data.cache_dir, under a hash of all that decides them",
        "max_samples": "max_rows of one of data.train_files takes the first so many rows",
        "loraplus_lr_embedding pissa_convert use_galore "
        "galore_target galore_rank galore_update_interval galore_scale use_apollo use_badam badam_mode "
        "badam_switch_mode badam_switch_interval badam_update_ratio use_adam_mini use_muon use_llama_pro use_dft_loss "
        "use_asft_loss use_eaft_loss mixture_of_depths shift_attn rope_scaling moe_aux_loss_coef fp8 use_mca "
        "create_new_adapter freeze_trainable_layers freeze_trainable_modules preserve_thinking "
        "resize_vocab add_tokens add_special_tokens new_special_tokens_config init_special_tokens "
        "disable_shuffling asft_alpha eaft_alpha quantization_device_map "
        "train_from_scratch pref_beta pref_loss pref_ftx dpo_label_smoothing kto_chosen_weight reward_model "
        "apollo_target apollo_rank apollo_scale apollo_update_interval": _METHOD,
        "mix_strategy interleave_probs": "weight of one of data.train_files says how often its rows are taken",
        "use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc upcast_layernorm upcast_lmhead_output "
        "infer_backend infer_dtype offload_folder use_kv_cache use_v1_kernels double_quantization "
        "split_special_tokens "
        "compute_accuracy eval_on_each_dataset ray_run_name ray_storage_path ray_num_workers placement_strategy "
        "resources_per_worker ray_init_kwargs master_addr master_port print_param_status use_swanlab swanlab_project "
        "swanlab_run_name use_kt kt_optimize_rule cpu_infer chunk_size kt_maxlen mode predict_with_generate "
        "ignore_pad_token_for_loss low_cpu_mem_usage use_fast_tokenizer eval_num_beams ray_storage_filesystem "
        "export_quantization_bit export_quantization_dataset export_quantization_method export_dir export_size "
        "export_device export_legacy_format use_hyper_parallel": "changes where, how fast or with what "
        "log it runs, and not what is learned",
        "hf_hub_token ms_hub_token om_hub_token": "tokens are read from the environment, and from no file",
        "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen "
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model audio_sampling_rate "
        "use_audio_in_video image_do_pan_and_scan crop_to_patches": "text alone is trained here",
    }
)


def _refusals(values: Values) -> Iterable[str]:
    stage, kind = values.get("stage", "sft"), values.get("finetuning_type", "lora")
    if stage != "sft":
        yield f"stage: {stage}; fine-tuning on chats (sft) is what is done here"
    if kind != "lora":
        yield f"finetuning_type: {kind}; adapters (lora) are what is trained here"
    if not values.get("do_train"):
        yield "do_train is not true: a file for prediction, export or chat, and not for training"
    if "model_name_or_path" not in values:
        yield "model_name_or_path is missing"


LLAMA_FACTORY = Tool("LLaMA-Factory 0.9.5", _RULES, _DEFAULTS, _NOT_OFFERED, _refusals)
