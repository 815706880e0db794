"""The checks: one function each, listed in `CHECKS`. Its docstring is its row in docs/preflight.md.

A docstring has three paragraphs: what the finding means, why it matters, what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_core.preflight.adapter import (
    check_alpha,
    check_causal,
    check_dora,
    check_experts,
    check_fsdp_quantization,
    check_idle_adapters,
    check_learning_rate,
    check_lora_names,
    check_optimizer,
    check_packing_off,
    check_starting_adapter,
    check_targets,
    check_targets_exist,
    check_targets_head,
)
from lora_core.preflight.environment import (
    check_attention,
    check_bf16,
    check_bitsandbytes,
    check_disk,
    check_float16,
    check_fp16,
    check_output_dir,
    check_schedule_free,
    check_trackers,
    check_world_size,
)
from lora_core.preflight.findings import Facts, Finding, Severity
from lora_core.preflight.memory import check_checkpointing, check_memory, check_sharding
from lora_core.preflight.replies import (
    check_alike_starts,
    check_capacity,
    check_near_duplicates,
    check_placeholders,
    check_repeated_prompts,
    check_scripts,
    check_unanswered,
)
from lora_core.preflight.rows import (
    check_borders,
    check_doubled_bos,
    check_duplicates,
    check_empty_replies,
    check_held_out,
    check_left_out,
    check_overlap,
    check_special_text,
    check_template_date,
    check_template_system,
    check_truncation,
    check_turn_end,
    check_unreadable,
    check_unsupervised,
)
from lora_core.preflight.schedule import (
    check_batch_large_for_rows,
    check_batch_larger_than_data,
    check_decay_past_end,
    check_few_steps,
    check_intervals_past_end,
    check_single_pass,
    check_small_last_step,
    check_warmup_long,
    check_warmup_past_end,
)
from lora_core.preflight.serving import check_serving_prompt
from lora_core.preflight.template import (
    check_folded_system,
    check_normalized,
    check_template_end_token,
    check_tools_twice,
    check_vocabulary,
)
from lora_core.preflight.untrained import check_router_loss, check_towers, check_without_adapter

Check = Callable[[Facts], Iterator[Finding]]

# Every check, with the findings it may yield.
CHECKS: list[tuple[Check, dict[str, Severity]]] = [
    (check_warmup_past_end, {"warmup_past_end": "error"}),
    (check_warmup_long, {"warmup_long": "warning"}),
    (check_decay_past_end, {"decay_past_end": "error"}),
    # Before few steps: the usual number of epochs is often enough to cure that too.
    (check_single_pass, {"single_pass": "warning"}),
    (check_few_steps, {"few_steps": "warning"}),
    (check_batch_larger_than_data, {"batch_larger_than_data": "warning"}),
    (check_batch_large_for_rows, {"batch_large_for_rows": "warning"}),
    (check_small_last_step, {"small_last_step": "note"}),
    (
        check_intervals_past_end,
        {"logging_steps_past_end": "warning", "eval_steps_past_end": "warning", "save_steps_past_end": "warning"},
    ),
    (check_unreadable, {"rows_unreadable": "warning"}),
    (check_unsupervised, {"rows_unsupervised": "warning"}),
    (check_truncation, {"rows_truncated": "warning"}),
    (check_left_out, {"parts_left_out": "note"}),
    (check_turn_end, {"turn_end_not_eos": "warning"}),
    (check_duplicates, {"rows_duplicated": "warning"}),
    (check_empty_replies, {"replies_empty": "warning"}),
    (check_unanswered, {"last_turn_unanswered": "warning"}),
    (check_repeated_prompts, {"replies_repeat_prompt": "warning"}),
    (check_placeholders, {"placeholders_in_replies": "note"}),
    (check_alike_starts, {"replies_start_alike": "note"}),
    (check_scripts, {"scripts_differ": "note"}),
    (check_near_duplicates, {"rows_alike": "note", "eval_alike": "note"}),
    (check_special_text, {"special_tokens_in_text": "warning"}),
    (check_tools_twice, {"tools_shown_twice": "warning", "answers_wrapped_twice": "warning"}),
    (check_normalized, {"text_normalized": "note"}),
    (check_doubled_bos, {"bos_doubled": "warning"}),
    (check_borders, {"tokens_cut_at_border": "note"}),
    (check_template_system, {"template_adds_system": "note"}),
    (check_template_end_token, {"template_end_token": "note"}),
    (check_folded_system, {"system_folded": "note"}),
    (check_template_date, {"template_uses_date": "note"}),
    (check_serving_prompt, {"serving_prompt": "note"}),
    (check_held_out, {"no_held_out_rows": "note"}),
    (check_overlap, {"eval_overlap": "warning"}),
    (check_vocabulary, {"tokens_without_embedding": "error"}),
    (check_targets_exist, {"targets_missing": "error"}),
    (check_starting_adapter, {"adapter_differs": "error"}),
    (check_lora_names, {"lora_names_missing": "error"}),
    (check_targets_head, {"targets_head": "warning", "trains_head": "note"}),
    (check_targets, {"targets_q_v_only": "warning"}),
    (check_capacity, {"adapter_small_for_rows": "note"}),
    (check_dora, {"dora_costs": "note"}),
    (check_alpha, {"alpha_unusual": "warning"}),
    (check_learning_rate, {"learning_rate_unusual": "warning", "learning_rate_differs": "note"}),
    (check_optimizer, {"optimizer_cannot_run": "error", "optimizer_not_paged": "note"}),
    (check_fsdp_quantization, {"fsdp_quant_storage": "error"}),
    (check_idle_adapters, {"adapter_idle": "warning"}),
    (check_causal, {"not_causal": "error"}),
    (check_experts, {"experts_dora": "error", "experts_without_dropout": "note"}),
    (check_towers, {"towers_left_out": "note"}),
    (check_without_adapter, {"without_adapter": "note"}),
    (check_router_loss, {"router_loss_off": "note"}),
    (check_packing_off, {"packing_impossible": "error", "packing_off": "note"}),
    (check_memory, {"memory_too_small": "error", "micro_batches_smaller": "note", "memory_unknown": "note"}),
    (check_checkpointing, {"checkpointing_missing": "error"}),
    (check_sharding, {"ddp_fits": "note", "fsdp_fits": "note"}),
    (check_world_size, {"world_size_differs": "error"}),
    (check_bf16, {"bf16_unsupported": "error", "bf16_slow": "warning"}),
    (check_float16, {"float16_unscaled": "error"}),
    (check_fp16, {"fp16_unsupported": "error", "fp16_slow": "warning"}),
    (check_attention, {"attention_unknown": "error", "attention_missing": "error"}),
    (check_bitsandbytes, {"bitsandbytes_missing": "error"}),
    (check_schedule_free, {"schedulefree_missing": "error"}),
    (check_trackers, {"tracker_missing": "error"}),
    (check_disk, {"disk_too_small": "error"}),
    (check_output_dir, {"output_dir_taken": "error"}),
]

ERROR_IDS = tuple(name for _, ids in CHECKS for name, severity in ids.items() if severity == "error")
# Errors that would only fail later, with a less clear message, cannot be allowed.
NEVER_ALLOWED = (
    "tokens_without_embedding",
    "targets_missing",
    "experts_dora",
    "not_causal",
    "checkpointing_missing",
    "packing_impossible",
    "lora_names_missing",
    "adapter_differs",
    "float16_unscaled",
    "attention_unknown",
    "attention_missing",
    "bitsandbytes_missing",
    "schedulefree_missing",
    "tracker_missing",
    "output_dir_taken",
)


def documentation() -> str:
    """docs/preflight.md: a row a check, from its docstring."""
    lines = [
        "# Preflight",
        "",
        "Every run is checked before it starts, and can be asked about without loading any weights:",
        "",
        "```bash",
        "lora-core preflight --cfg qwen0.5b data.train_file=chats.jsonl --num-processes 2",
        "lora-core preflight --cfg qwen7b data.train_file=chats.jsonl --gpu-memory-gib 24  # a GPU that is not here",
        "lora-core preflight --from llama_factory.yaml data.train_file=chats.jsonl  # a file of another tool",
        "```",
        "",
        "It prints what became of the rows, their lengths, the plan on 1, 2, 4 and 8 processes, the learning rate over",
        "the run, the predicted peak memory, and every finding with its fix. For several processes it says what",
        "[each rank has to do](multi-gpu.md#for-your-rows), and the line that starts them. `--json` prints one object,",
        "`{plan, data, memory, findings, ranks}`, and nothing else; `--write FILE.yaml` writes the configuration",
        "with all fixes applied, to a new file. An error stops a run before its first step, with exit code 2. Where it",
        "is marked *, `preflight.allow=[id]` lets it pass. What keeps a run from being looked at, such as rows or",
        "a model that cannot be read, is one finding too, whose message says all.",
        "[Files of other tools](configs.md#coming-from-another-tool) are read by",
        "every command; `lora-core prescribe` [chooses the settings](configs.md#settings-with-reasons).",
        "",
        "The table is made from the docstrings in `lora_core/preflight/` by `python docs/write.py`.",
        "",
        "| finding | what it means | why it matters | what to do |",
        "|---|---|---|---|",
    ]
    for check, ids in CHECKS:
        means, matters, fix = (" ".join(part.split()) for part in (check.__doc__ or "").split("\n\n"))
        names = "<br>".join(
            f"`{name}` {severity}{'*' if severity == 'error' and name not in NEVER_ALLOWED else ''}"
            for name, severity in ids.items()
        )
        lines.append(f"| {names} | {means} | {matters} | {fix} |")
    return "\n".join([*lines, ""])
