"""The model card: what someone who finds an adapter or a merged model needs to know, as the hub reads it."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lora_core._version import __version__
from lora_core.config.schema import RunConfig, TrainFile
from lora_core.data.counts import RowCounts
from lora_core.errors import counted
from lora_core.runtime.run_folder import write_text
from lora_core.untrusted.text import values_without_secrets

HERE = "PATH_OF_THIS_FOLDER"
# The values that vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py); it refuses any other.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_card(folder: Path, config: RunConfig, counts: RowCounts, summary: Mapping[str, Any] | None = None) -> None:
    """README.md of a folder with an adapter in PEFT's format.

    Args:
        counts: of the training file.
        summary: the run's summary.json, once it has ended.
    """
    peft = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    write_text(folder / "README.md", model_card(config, counts, peft, summary))


def model_card(
    config: RunConfig,
    counts: RowCounts | None,
    peft: Mapping[str, Any],
    summary: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> str:
    """The text of an adapter's card. Names are escaped: Markdown may hold HTML.

    Args:
        counts: of the training file, where they are known.
        peft: what adapter_config.json holds.
    """
    base = base_model or hub_id(config.model.name_or_path)
    values = summary or {}
    metadata = _metadata(config, base, values, "peft", "adapter")
    return "\n".join(
        [
            _front_matter(metadata),
            f"# LoRA adapter for {_title(config, base)}",
            "",
            _settings(config) + (f" Of the training file: {counts}." if counts else ""),
            "",
            *_results(config, values),
            *_loading(base),
            *_serving(peft, base),
            *_hyperparameters(config, values),
        ]
    )


def bare_card(peft: Mapping[str, Any], base_model: str | None) -> str:
    """The text of the card of an adapter whose training is not known."""
    metadata = _metadata(None, base_model, {}, "peft", "adapter")
    title = f"# LoRA adapter for {_title(None, base_model)}"
    return "\n".join([_front_matter(metadata), title, "", *_loading(base_model), *_serving(peft, base_model)])


def merged_card(
    config: RunConfig | None,
    base: str | None,
    counts: RowCounts | None,
    summary: Mapping[str, Any],
    has_towers: bool = False,
) -> str:
    """The text of a merged model's card.

    Args:
        config: of the run, and `counts` of its training file, where they are known.
        base: hub id of the base model, where it has one.
        has_towers: it also sees or hears.
    """
    model, reader = ("ForMultimodalLM", "Processor") if has_towers else ("ForCausalLM", "Tokenizer")
    metadata = _metadata(config, base, summary, "transformers", "finetune")
    title = _title(config, base)
    lines = [_front_matter(metadata), f"# {title}, fine-tuned", ""]
    what = f"A LoRA adapter merged into the weights of {title} by lora_core {__version__}."
    lines += [
        what + (f" {_settings(config)}" if config else "") + (f" Of the training file: {counts}." if counts else "")
    ]
    lines += ["", *(_results(config, summary) if config else [])]
    lines += [
        "## Use",
        "",
        "```python",
        f"from transformers import AutoModel{model}, Auto{reader}",
        "",
        f'{reader.lower()} = Auto{reader}.from_pretrained("{HERE}")',
        f'model = AutoModel{model}.from_pretrained("{HERE}", dtype="auto")',
        "```",
        "",
        "```bash",
        f"vllm serve {HERE}",
        f"transformers serve {HERE}",
        "```",
        "",
        *(_hyperparameters(config, summary) if config else []),
    ]
    return "\n".join(lines)


def counts_of(summary: Mapping[str, Any]) -> RowCounts | None:
    """`RowCounts` of the training file as summary.json holds them."""
    rows = summary.get("train_rows")
    if not isinstance(rows, dict):
        return None
    return RowCounts(**{field.name: rows[field.name] for field in fields(RowCounts) if field.name in rows})


def hub_id(name: str) -> str | None:
    """The name if it is one of the Hugging Face hub, and None for a path: nobody else has that folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if name.startswith(("~", "/", ".")) or "\\" in name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# ---------------------------------------------------------------------------------------------------------------
# What the hub reads


def _front_matter(metadata: dict[str, Any]) -> str:
    shown = yaml.safe_dump(values_without_secrets(metadata), sort_keys=False, allow_unicode=True)
    return f"---\n{shown}---\n"


def _metadata(
    config: RunConfig | None, base: str | None, summary: Mapping[str, Any], library: str, relation: str
) -> dict[str, Any]:
    """As `huggingface_hub.ModelCardData` arranges it, with the eval results as a model index."""
    from huggingface_hub import ModelCardData

    results = _eval_results(config, summary) if config is not None else []
    card = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        pipeline_tag="text-generation",
        datasets=_datasets(config) if config is not None else None,
        license=license_of(base),
        tags=["lora", "lora_core"] + (["conversational"] if config is not None else []),
        metrics=[result.metric_type for result in results] or None,
        model_name=f"LoRA adapter for {base}" if base else "LoRA adapter",
        eval_results=results or None,
    )
    if not results:  # huggingface_hub wants both or none
        card.model_name = None
    metadata: dict[str, Any] = card.to_dict()  # type: ignore[no-untyped-call]
    return metadata


def license_of(base: str | None) -> str | None:
    """The license that the base model's own card names, where the hub's cache has the card; it is not downloaded."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card = try_to_load_from_cache(base, "README.md") if base else None
    if not isinstance(card, str):
        return None
    try:
        found = ModelCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file
        return None
    return found if isinstance(found, str) else None


def _datasets(config: RunConfig) -> list[str] | None:
    files = config.data.train_files or [config.data.train_file]
    names = [file.path if isinstance(file, TrainFile) else file for file in files]
    # Of the hub a dataset is owner/name; a file has an ending, and a pattern a star.
    found = [name for name in names if re.fullmatch(r"[\w-]+/[\w.-]+", name) and hub_id(name)]
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip")
    return [name for name in found if not name.lower().endswith(endings)] or None


def _eval_results(config: RunConfig, summary: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    source = config.data.eval_file or config.data.train_source
    on_hub = hub_id(source) if re.fullmatch(r"[\w-]+/[\w.-]+", source) else None
    name = on_hub or f"eval set ({Path(source).name})"
    values = {
        ("loss", "Eval loss"): summary.get("eval_loss_after"),
        ("perplexity", "Perplexity"): summary.get("eval_perplexity_after"),
        ("accuracy", "Token accuracy"): summary.get("eval_token_accuracy_after"),
    }
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=on_hub or "private",
            dataset_name=name,
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(value), 6),
        )
        for (kind, label), value in values.items()
        if value is not None
    ]


# ---------------------------------------------------------------------------------------------------------------
# What people read


def _title(config: RunConfig | None, base: str | None) -> str:
    if base:
        return html.escape(base)
    return html.escape(Path(config.model.name_or_path).name) if config is not None else "a local model"


def _settings(config: RunConfig) -> str:
    lora, train = config.lora, config.train
    modules = html.escape(
        lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    )
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs} epochs"
    return (
        f"{_rank(config)}, on {modules}; learning rate {train.peak_learning_rate:g}, {length}; "
        f"trained with lora_core {__version__}."
    )


def _rank(config: RunConfig) -> str:
    lora = config.lora
    text = f"Rank {lora.rank}, alpha {lora.alpha}"
    if lora.changes_base_weights:
        text += f", begun by {lora.init_lora_weights} and saved at twice that rank, for the untouched base"
    return text if config.model.adapter is None else f"{text}, begun with an earlier adapter"


def _results(config: RunConfig, summary: Mapping[str, Any]) -> list[str]:
    after = summary.get("eval_loss_after")
    if after is None:
        return []
    before, error = summary.get("eval_loss_before"), summary.get("eval_loss_change_error")
    examples = counted(int(summary.get("num_eval_examples") or 0), "example")
    lines = [
        "## Results",
        "",
        f"On an eval set of {examples}, per loss token:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    lines += [f"| loss | {before:.4f} | {after:.4f} |" if before is not None else f"| loss | | {after:.4f} |"]
    for label, key, shape in (
        ("perplexity", "eval_perplexity_after", "{:.2f}"),
        ("token accuracy", "eval_token_accuracy_after", "{:.1%}"),
    ):
        if summary.get(key) is not None:
            lines.append(f"| {label} | | {shape.format(summary[key])} |")
    if error is not None:
        lines += ["", f"Standard error of the change in loss, over examples: {error:.4f}."]
    verdict = summary.get("verdict")
    return [*lines, "", *([html.escape(str(verdict)), ""] if verdict else [])]


def _loading(base: str | None) -> list[str]:
    lines = ["## Use", ""]
    if base is None:
        lines += ["The base model was a local folder, so no hub id is given here: PEFT looks for it where it was.", ""]
    return [
        *lines,
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
        f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")',
        "```",
        "",
    ]


def _serving(peft: Mapping[str, Any], base: str | None) -> list[str]:
    reasons = why_not_vllm(peft)
    merge = [
        "```bash",
        f"lora-core merge {HERE} --output merged",
        "vllm serve merged",
        "transformers serve merged",
        "```",
        "",
    ]
    if reasons:
        return [f"vLLM cannot serve this adapter beside its base: {'; '.join(reasons)}. Merged it can:", "", *merge]
    name = shlex.quote(base or "PATH_OF_THE_BASE_MODEL")
    return [
        "vLLM serves it beside its base; requests name the model `adapter`:",
        "",
        "```bash",
        f"vllm serve {name} --enable-lora --max-lora-rank {vllm_rank(peft)} --lora-modules adapter={HERE} \\",
        f"    --chat-template {HERE}/chat_template.jinja",
        "```",
        "",
        "Merged, it is a model of its own, which `transformers serve` takes too:",
        "",
        *merge,
    ]


def vllm_rank(peft: Mapping[str, Any]) -> int | None:
    """The least value of vLLM's --max-lora-rank that holds the adapter; None if there is none."""
    ranks = [int(peft.get("r") or 8), *map(int, (peft.get("rank_pattern") or {}).values())]
    return next((rank for rank in VLLM_RANKS if rank >= max(ranks)), None)


def why_not_vllm(peft: Mapping[str, Any]) -> list[str]:
    """What keeps vLLM from serving an adapter as it is; by the rules of its PEFTHelper and its parser of names."""
    reasons = []
    if peft.get("modules_to_save"):
        reasons.append("it takes no modules_to_save")
    if peft.get("use_dora"):
        reasons.append("it has no DoRA")
    if peft.get("bias", "none") != "none" or peft.get("lora_bias"):
        reasons.append("it takes no biases")
    if peft.get("trainable_token_indices"):
        reasons.append("it takes no trained tokens")
    if peft.get("rank_pattern") or peft.get("alpha_pattern"):
        reasons.append("it scales every layer by alpha / r, whatever rank_pattern and alpha_pattern say")
    if vllm_rank(peft) is None:
        reasons.append(f"its ranks end at {VLLM_RANKS[-1]}")
    return reasons


def _hyperparameters(config: RunConfig, summary: Mapping[str, Any]) -> list[str]:
    train = config.train
    values: dict[str, Any] = {
        "learning rate (peak)": f"{train.peak_learning_rate:g}",
        "optimizer": train.optim,
        "optimizer steps": summary.get("total_optimizer_steps") or train.max_steps,
        "warmup steps": summary.get("warmup_steps"),
        "examples per device": train.per_device_train_batch_size,
        "accumulation steps": train.gradient_accumulation_steps,
        "processes": summary.get("world_size"),
        "weight decay": f"{train.weight_decay:g}",
        "max sequence length": config.data.max_seq_length,
        "packing": config.data.packing,
        "LoRA rank, alpha, dropout": f"{config.lora.rank}, {config.lora.alpha}, {config.lora.dropout:g}",
        "rsLoRA, DoRA": f"{config.lora.use_rslora}, {config.lora.use_dora}",
        "quantization of the base": config.model.quantization,
        "base model's revision": config.model.revision,
        "seed": train.seed,
        "hardware": summary.get("hardware"),
    }
    rows = [f"| {name} | {html.escape(str(value))} |" for name, value in values.items() if value is not None]
    return ["## Hyperparameters", "", "| | |", "|---|---|", *rows, ""]
