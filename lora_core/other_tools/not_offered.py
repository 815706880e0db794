"""Words of TrainingArguments, LoraConfig and TRL that have no counterpart here, with the reason."""

from __future__ import annotations

from lora_core.other_tools.translation import several

_LOGS = "metrics.jsonl and report.html in the run folder hold what is logged"
_HUB = "nothing is uploaded while a run trains; lora-core push uploads afterwards"
_SPEED = "changes time or memory and not what is learned"
_LEARNS = "changes what is learned, and has no counterpart here"
_SHARDED = "sharding is configured by `accelerate launch --config_file`"
_ROWS = "rows are shaped by data.columns, data.roles and the chat template"
NOT_OFFERED = several(
    {
        "run_name trackio_space_id logging_dir logging_first_step logging_nan_inf_filter log_level "
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
        "lr_scheduler_kwargs optim_args optim_target_modules lora_target_parameters bias lora_bias loss_type adam_mini "
        "layers_pattern "
        "target_parameters router_aux_loss_coef loftq_config layer_replication data_seed dataloader_drop_last": _LEARNS,
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
        "shuffle_dataset": "rows are encoded once, kept on disk, and shuffled every epoch",
        "truncation_mode": "data.truncation says what becomes of a longer row",
        "eos_token pad_token": "the chat template says what ends a turn; padding is masked",
        "model_init_kwargs": "model.dtype, model.attn_implementation and model.revision are what there is",
        "ignore_bias_buffers": _SHARDED,
    }
)
