"""The words of LLaMA-Factory's YAML files. Defaults are those of 0.9.5, from its `hparams/` and transformers'."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_core.other_tools import llama_factory_rows
from lora_core.other_tools.not_offered import NOT_OFFERED
from lora_core.other_tools.trainer_keys import (
    TRAINING_ARGUMENTS,
    TRANSFORMERS_DEFAULTS,
    packing,
    saved_modules,
    start,
    targets,
    trackers,
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


def _double_quantization(values: Values) -> dict[str, Any]:
    if values["double_quantization"] is False:
        raise NotOffered("NF4 here has double quantization")
    return {}


def _checkpointing(values: Values) -> dict[str, Any]:
    """LLaMA-Factory turns it on by itself; transformers' key turns it on where LLaMA-Factory's own does not."""
    is_on = not values["disable_gradient_checkpointing"] or bool(values["gradient_checkpointing"])
    return {"train.gradient_checkpointing": is_on}


def _swanlab(values: Values) -> dict[str, Any]:
    if not values["use_swanlab"]:
        return {}
    others = trackers({"report_to": values.get("report_to")})["train.report_to"]
    project = values["swanlab_project"] or "llamafactory"
    return {"train.report_to": [*others, "swanlab"], "train.tracker_project": project}


def _attention(values: Values) -> dict[str, Any]:
    names = {"fa2": "flash_attention_2", "sdpa": "sdpa", "auto": None, "disabled": "eager"}
    if values["flash_attn"] not in names:
        raise NotOffered("kept at sdpa; attention here is sdpa, eager, flash_attention_2")
    name = names[values["flash_attn"]]
    return {"model.attn_implementation": name} if name else {}


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
    *(rule for rule in TRAINING_ARGUMENTS if rule.keys != ("gradient_checkpointing",)),
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
    Rule(("double_quantization",), _double_quantization),
    Rule(("disable_gradient_checkpointing", "gradient_checkpointing"), _checkpointing),
    Rule(("use_swanlab", "swanlab_project"), _swanlab),
    Rule(("flash_attn",), _attention),
    Rule(("dataset", "dataset_dir", "max_samples"), llama_factory_rows.rows),
    Rule(("eval_dataset",), llama_factory_rows.eval_rows),
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

_GENERATES = "is of generation, evaluation or export, and not of training"
_FIXED = "says what kind of training the file asks for, and is no setting here"
_LOGGED = "changes where, how fast or with what log it runs, and not what is learned"
_METHOD = "changes how the model is trained, and has no counterpart here"
_NOT_OFFERED = NOT_OFFERED | several(
    {
        "stage finetuning_type": _FIXED,
        "template tool_format default_system": "the tokenizer's own chat template is used; data.chat_template names "
        "another",
        "dataset_dir media_dir overwrite_cache tokenized_path cache_dir data_shared_file_system "
        "preprocessing_batch_size": "encoded rows are kept in data.cache_dir, under a hash of all that decides them",
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
        "infer_backend infer_dtype offload_folder use_kv_cache use_v1_kernels "
        "split_special_tokens "
        "compute_accuracy eval_on_each_dataset ray_run_name ray_storage_path ray_num_workers placement_strategy "
        "resources_per_worker ray_init_kwargs master_addr master_port print_param_status "
        "swanlab_run_name use_kt kt_optimize_rule cpu_infer chunk_size kt_maxlen mode predict_with_generate "
        "ignore_pad_token_for_loss low_cpu_mem_usage use_fast_tokenizer eval_num_beams ray_storage_filesystem "
        "export_quantization_bit export_quantization_dataset export_quantization_method export_dir export_size "
        "export_device export_legacy_format use_hyper_parallel "
        "use_habana use_lazy_mode gaudi_config_name throughput_warmup_steps use_hpu_graphs_for_training "
        "use_hpu_graphs_for_inference": "changes where, how fast or with what log it runs, and not what is learned",
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
        "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend do_sample temperature top_p top_k "
        "num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens task task_dir "
        "batch_size lang n_shot save_dir download_mode export_quantization_nsamples export_quantization_maxlen "
        "export_hub_model_id": _GENERATES,
        "swanlab_workspace swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret "
        "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules "
        "kt_weight_path kt_expert_checkpoint_path": _LOGGED,
        "adapter_folder compute_dtype model_max_length block_diag_attn kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size freeze_extra_modules module_dropout oft_rank oft_block_size oft_target "
        "pref_bco_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
        "ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model_adapters "
        "reward_model_quantization_bit reward_model_type ld_alpha galore_proj_type galore_layerwise apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front badam_start_block badam_mask_mode "
        "badam_verbose hyper_parallel_args fp8_backend fp8_enable_fsdp_float8_all_gather": _METHOD,
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


LLAMA_FACTORY = Tool("LLaMA-Factory 0.9.5", _RULES, _DEFAULTS, _NOT_OFFERED, _refusals, llama_factory_rows.remarks)
