"""What settings are called elsewhere, for the answer to a key that is unknown here."""

from __future__ import annotations

import difflib

from lora_core.config.keys import SECTIONS, config_keys

# Names of TRL and transformers, PEFT, Axolotl, LLaMA-Factory, Unsloth, mlx-lm and everyday speech -> ours.
SAME = {
    "lr": "train.learning_rate",
    "peak_lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "iters": "train.max_steps",
    "num_steps": "train.max_steps",
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "grad_accum": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "optimizer": "train.optim",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "betas": "train.adam_beta1",
    "wandb_project": "train.tracker_project",
    "trackers": "train.report_to",
    "additional_target": "lora.modules_to_save",
    "lora_modules_to_save": "lora.modules_to_save",
    "adapter_name_or_path": "model.adapter",
    "lora_model_dir": "model.adapter",
    "warmup": "train.warmup_ratio",
    "grad_clip": "train.max_grad_norm",
    "clip_grad_norm": "train.max_grad_norm",
    "bfloat16": "train.bf16",
    "grad_checkpoint": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "compile": "train.torch_compile",
    "random_state": "train.seed",
    "log_interval": "train.logging_steps",
    "eval_interval": "train.eval_steps",
    "save_interval": "train.save_steps",
    "save_every": "train.save_steps",
    "load_best_model_at_end": "train.keep_adapter",
    "early_stopping_steps": "train.early_stopping_patience",
    "patience": "train.early_stopping_patience",
    "auto_find_batch_size": "train.auto_batch_size",
    "ddp_timeout": "train.rank_timeout_s",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "peft_use_dora": "lora.use_dora",
    "base_model": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_id": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "flash_attn": "model.attn_implementation",
    "flash_attention": "model.attn_implementation",
    "sequence_len": "data.max_seq_length",
    "max_length": "data.max_seq_length",
    "max_seq_len": "data.max_seq_length",
    "cutoff_len": "data.max_seq_length",
    "dataset": "data.train_file",
    "datasets": "data.train_files",
    "dataset_name": "data.train_file",
    "train_data": "data.train_file",
    "data_path": "data.train_file",
    "eval_dataset": "data.eval_file",
    "val_file": "data.eval_file",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "sample_packing": "data.packing",
    "template": "data.chat_template",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "mask_history": "data.train_on",
    "excess_length_strategy": "data.truncation",
    "preprocessing_num_workers": "data.num_proc",
    "dataset_num_proc": "data.num_proc",
    "save_dir": "output_dir",
}
# Names of what there is no key for, with what there is.
OTHERWISE = {
    "push_to_hub": "nothing is uploaded while a run trains; lora-core push RUN REPO uploads afterwards",
    "hub_model_id": "nothing is uploaded while a run trains; lora-core push RUN REPO uploads afterwards",
    "resume_from_checkpoint": "lora-core train --resume continues from the newest checkpoint",
    "save_strategy": "train.save_steps says how often; null is once an epoch",
    "eval_strategy": "train.eval_steps says how often; null is once an epoch",
    "evaluation_strategy": "train.eval_steps says how often; null is once an epoch",
    "logging_strategy": "train.logging_steps says how often",
    "deepspeed": "sharding is configured by accelerate launch --config_file; configs/accelerate holds files for FSDP",
    "fsdp": "sharding is configured by accelerate launch --config_file; configs/accelerate holds files for FSDP",
    "trust_remote_code": "code from a model's repository is never run",
    "bias": "biases are not trained",
    "group_by_length": "data.packing does what that is for",
    "dataloader_num_workers": "the next micro-batches are made by a thread, without a setting",
    "use_peft": "an adapter is always trained",
    "finetuning_type": "an adapter is always trained",
    "stage": "fine-tuning on chats is what there is",
}


def sectionless(key: str) -> str | None:
    """`train.learning_rate` for `learning_rate`: the only key whose last part it is; None if there is none."""
    if "." in key:
        return None
    if key in config_keys():
        return key
    found = [known for known in config_keys() if known.split(".")[-1] == key]
    return found[0] if len(found) == 1 else None


def nearest_key(key: str) -> str:
    """The key that was most likely meant, with what it allows; what there is instead of it; else the sections.

    Spelling decides only for what looks like a slip of the pen.
    """
    name = key.split(".")[-1]
    if name in OTHERWISE:
        return f"not a key here: {OTHERWISE[name]}"
    keys = list(config_keys())
    names = SAME | {known.split(".")[-1]: known for known in reversed(keys)}
    alike = [name] if name in names else difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if not alike:
        return f"sections: {', '.join(SECTIONS)}"
    key = names[alike[0]]
    meant = f"{alike[0]}, which is " if alike[0] != name and alike[0] in SAME else ""
    return f"nearest: {meant}{key} ({config_keys()[key]})"
