"""Words of TrainingArguments, LoraConfig and TRL, and of Axolotl, that have no counterpart here, with the reason."""

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

_PLACE = "changes where, how fast or with what log it runs, and not what is learned"
_TRAINS = "changes how the model is trained, and has no counterpart here"
_DECIDES = "says what kind of training the file asks for, and is no setting here"
AXOLOTL_NOT_OFFERED = NOT_OFFERED | several(
    {
        "adapter rl pretraining_dataset reward_model process_reward_model num_labels trl ebft vllm "
        "model_quantization_config model_quantization_config_kwargs": _DECIDES,
        "wandb_entity wandb_watch wandb_name wandb_log_model wandb_mode wandb_run_id "
        "mlflow_tracking_uri mlflow_run_name hf_mlflow_log_artifacts "
        "profiler_steps strict debug gc_steps "
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
        "dp_replicate_size flash_optimum gemma4_hybrid_attn_impl use_ray deepcompile "
        "gradient_checkpointing_kwargs use_otel_metrics trackio_run_name swanlab_mode swanlab_description "
        "torch_compile_backend group_by_length offload_optimizer sample_packing_bin_size "
        "sample_packing_group_size sample_packing_sequentially fused_attn_kernel": _PLACE,
        "dataset_prepared_path push_dataset_to_hub "
        "dataset_keep_in_memory max_packed_sequence_len dataset_shard_num dataset_shard_idx "
        "preprocess_iterable is_preprocess": "encoded rows are kept in data.cache_dir",
        "loraplus_lr_embedding relora_steps relora "
        "relora_warmup_steps relora_anneal_steps relora_cpu_offload cosine_constant_lr_ratio "
        "lr_quadratic_warmup lora_fan_in_fan_out peft embedding_lr "
        "embedding_lr_scale unfrozen_parameters adam_beta3 lisa_n_layers lisa_step_interval lisa_layers_attribute "
        "eot_tokens fix_untrained_tokens resize_token_embeddings_to_32x rope_scaling overrides_of_model_config "
        "min_sample_len curriculum_sampling optim_target_modules optim_args s2_attention torchdistx_path use_eaft "
        "use_dynamic_finetuning dft peft_ensure_weight_tying moe_aux_loss_coef router_aux_loss_coef use_pose "
        "train_on_eos eta_min train_on_eot lr_groups "
        "shrink_embeddings mean_resizing_embeddings qat gptq gptq_bits "
        "gptq_groupsize gptq_model_v1": _TRAINS,
        "special_tokens tokens added_tokens_overrides chat_template_jinja default_system_message tokenizer_config "
        "tokenizer_type "
        "tokenizer_use_fast bos_token eos_token": "the model's own tokenizer and its chat template are used",
        "model_type base_model_config base_model_ignore_patterns is_llama_derived_model is_mistral_derived_model "
        "is_falcon_derived_model is_qwen_derived_model model_config cls_model_config "
        "type_of_model tokenizer_use_mistral_common trust_remote_code "
        "image_resize_algorithm": "the model's config says what it is, and code from its repository is never run",
        "processor_type processor_kwargs freeze_mm_modules image_size image_resize_algorithm role_boundaries": "text "
        "alone is trained here",
        "dataset_exact_deduplication": "duplicates are counted and told of, and stay in the rows",
        "shuffle_merged_datasets shuffle_before_merging_datasets": "rows are shuffled anew every epoch",
        "hf_use_auth_token": "tokens are read from the environment, and from no file",
        "lora_target_parameters": "lora.target_modules=auto finds the experts of a model by itself",
        "plugins": "there are no plugins",
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split lm_eval_tasks "
        "lm_eval_batch_size lm_eval_post_train lm_eval_model": "the eval loss is measured while a run trains; "
        "lora-core evaluate measures more afterwards",
        "comet_api_key comet_workspace comet_experiment_key comet_mode comet_online comet_experiment_config "
        "otel_metrics_host otel_metrics_port swanlab_experiment_name swanlab_workspace swanlab_api_key "
        "swanlab_log_model swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret "
        "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer": "trackers are set up "
        "by train.report_to, train.tracker_project and their own environment variables",
        "ray_run_name ray_num_workers resources_per_worker expert_parallel_backend expert_parallel_num_nvl_bytes "
        "expert_parallel_num_rdma_bytes expert_parallel_token_capacity expert_parallel_fallback_on_unsupported "
        "use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_fp4_grouped_mode "
        "moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast expert_backend selective_checkpointing "
        "eval_sequence_len sample_packing_mp_start_method multipack_real_batches pretrain_multipack_buffer_size "
        "pretrain_multipack_attn streaming_multipack_buffer_size large_head_attention flash_attn_d512 sdpa_varlen "
        "ple_cpu_offload chunked_cross_entropy_num_chunks tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "heads_k_stride ring_attn_func profiler_steps_start gc_collect_steps liger_kernel_impl "
        "liger_use_token_scaling num_dataset_shards_to_save total_num_tokens total_supervised_tokens "
        "axolotl_config_path capabilities env_capabilities ddp qlora_sharded_model_loading "
        "tokenizer_save_jinja_files dynamic_checkpoint merge_lora merge_method gradio_title gradio_share "
        "gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature num_generation_samples "
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample sample_packing_seq_len_multiplier": _PLACE,
        "diffusion mora hatchery llmcompressor save_compressed dense_mixer kd_trainer kd_ce_alpha kd_alpha "
        "kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server "
        "kd_online_timeout kd_temperature_min spectrum_top_fraction spectrum_model_name grokfast_alpha grokfast_lamb "
        "relora_prune_ratio relora_prune_method jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps peft_layers_pattern peft_layer_replication peft_autocast_adapter_dtype "
        "use_onebitllms reinit_weights embeddings_skip_upcast trainer_cls quantization fp8 fp8_config "
        "fp8_enable_fsdp_float8_all_gather float32 fp32_norms fp32_norm_classes eaft_alpha eaft_k lr_div_factor "
        "adam_epsilon2 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of scaling_softmax_factor "
        "scaling_softmax_bias pose_split_on_token_ids pose_max_context_len pose_num_chunks nvfp4_merge_aware "
        "nvfp4_merge_aware_start_step nonexpert_quantization dsv4_fp8_nonexpert_mode dsv4_bf16_all "
        "gemma4_fp8_nonexpert gemma4_nf4_nonexpert pretraining_sample_concatenation overrides_of_model_kwargs": _TRAINS,
        "dpo_use_weighting dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_padding_free dpo_use_liger_kernel "
        "dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha precompute_ref_log_probs "
        "orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta "
        "center_rewards_coefficient max_prompt_len nemo_gym_enabled": "is of preference or reinforcement training",
        "resume_from_checkpoint auto_resume_from_checkpoints local_rank": "lora-core train --resume continues from the "
        "newest checkpoint",
        "save_first_step save_only_model save_safetensors generate_samples": "checkpoints hold all that a run needs to "
        "be resumed, as safetensors",
        "bnb_config_kwargs": "NF4 here has double quantization, and computes in bfloat16",
    }
)
