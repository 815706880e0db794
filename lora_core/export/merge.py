"""The adapter added to its base model's weights, a layer at a time, and written as a model of its own.

    merged weight = what PEFT's layer merges, from the base weight in float32, rounded once to the type of the file

The whole model is never in memory. The output folder appears whole, and only after the merged model's logits were
compared with those of base + adapter.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_core.checkpoints.card import counts_of, hub_id, merged_card
from lora_core.configuration import shipped_file, with_overrides
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import collate
from lora_core.encoding.prompts import tokens_to_stop_at
from lora_core.errors import ConfigError, DataError, counted
from lora_core.export.as_adapter import Adapter
from lora_core.export.base_files import find_file, find_weights, read_headers
from lora_core.export.compare import Comparison, compare, refuse_beyond_noise
from lora_core.export.streamed import Part, StreamedModel
from lora_core.model.base import load_model_config, resolve_name
from lora_core.runtime.devices import device_memory, peak_memory_bytes
from lora_core.runtime.run_folder import check_output, whole_folder, write_json, write_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_NUM_ROWS, _MOST_TOKENS = 4, 128
# What turns images and sound into what towers take, by the names of transformers.
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_OLD_TEMPLATE = "chat_template.json"  # processors take it in place of the tokenizer's


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    folder: Path
    num_bytes: int
    num_files: int
    comparison: Comparison
    predicted_bytes: int
    peak_bytes: int
    """Of the whole process, on a CPU."""


def merge(
    source: Adapter,
    output: Path,
    *,
    max_shard_size: str = "2GB",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    rows: str | None = None,
    base_model: str | None = None,
    say: Callable[[str], None] = print,
) -> Merged:
    """Write base + adapter as one model, with tokenizer and generation config.

    Args:
        max_shard_size: of a safetensors file, such as 500MB.
        dtype: of all weights; None is each weight's own in the base model's files.
        overwrite: replace what is in `output`.
        rows: a file of rows to compare logits on; None is the run's eval set, or else its training rows.
        base_model: its hub id, for the card, where the run names a folder.

    Raises:
        ConfigError: there is nothing to merge, the output folder is taken, memory is short, the base does not fit.
        DataError: there are no rows to compare on.
        TrainingError: the merged model is not base + adapter; nothing is written.
    """
    base_folder = Path(source.config.model.name_or_path).expanduser()
    check_output(output, overwrite, source.folder, *([base_folder] if base_folder.is_dir() else []))
    base_config = load_model_config(source.config.model)
    _refuse_quantized_base(base_config, source)
    tokenizer = source.load_tokenizer()
    batch = rows_to_compare(source, tokenizer, rows)
    base = find_weights(source.config.model)
    model = StreamedModel(base_config, base, source.folder, dtype=dtype)
    plan = plan_output(model)
    shards = split(plan, max_shard_size)
    predicted = predict_peak(model, plan, shards, batch)
    limit = device_memory().limit_bytes
    say(
        f"merge: {counted(len(plan.names), 'tensor')}, "
        f"{plan.num_bytes / 2**30:.2f} GiB in {counted(len(shards), 'file')}; "
        f"predicted peak memory: {predicted / 2**30:.2f} of {limit / 2**30:.1f} GiB (cpu)"
    )
    if predicted > limit:
        raise ConfigError(
            f"merging is predicted to take {predicted / 2**30:.2f} GiB, and {limit / 2**30:.2f} GiB are free; fix: "
            "--max-shard-size 500MB, or a machine with more memory"
        )
    quantization = source.config.model.quantization
    if quantization != "none":
        say(
            f"merge: trained on {quantization} weights, merged into the unquantized ones: they are what the "
            "adapter was trained on, before rounding, so replies may differ a little from those during training"
        )
    if plan.copied:
        size = sum(map(plan.num_bytes_of, plan.copied)) / 2**30
        say(
            f"merge: into the language part; {counted(len(plan.copied), 'tensor')} beside it ({size:.2f} GiB), such as "
            f"{plan.copied[0]}, as in the base model's files"
        )
    if plan.left_out:
        say(
            f"merge: left out, the model does not use them: {', '.join(plan.left_out[:5])} "
            f"({len(plan.left_out):,} in all)"
        )
    with whole_folder(output) as folder:
        write_shards(model, plan, shards, folder)
        merged_config = _merged_config(base_config, plan, dtype)
        merged_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        generation_config(source, tokenizer).save_pretrained(folder)
        copy_processor(source, tokenizer, folder, say)
        write_text(folder / "README.md", _card(source, base_model, model.has_towers))
        del model
        say(f"merge: comparing logits with base + adapter on {counted(len(batch['input_ids']), 'row')} ...")
        comparison = compare(
            base_config,
            base,
            source.folder,
            merged_config,
            read_headers([folder / name for name in shards]),
            batch,
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            dtype,
        )
        refuse_beyond_noise(comparison)
    say(f"merge: {comparison}")
    if comparison.is_blurred:
        share = comparison.noise.rms / comparison.effect.rms if comparison.effect.rms else 1.0
        say(
            f"warning: rounding to {comparison.dtype} moves the logits by {share:.0%} of what the adapter does; fix: "
            "lora-core merge with --dtype float32, or serve the adapter beside its base"
        )
    return Merged(output, plan.num_bytes, len(shards), comparison, predicted, peak_memory_bytes(torch.device("cpu")))


def _refuse_quantized_base(config: PretrainedConfig, source: Adapter) -> None:
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None:
        raise ConfigError(
            f"model.name_or_path={source.config.model.name_or_path}: its files are quantized ({method}), and a sum "
            "cannot be written into them without rounding it again; fix: train on the unquantized model, with "
            "model.quantization=nf4 where memory is short"
        )


# ---------------------------------------------------------------------------------------------------------------
# What is written


@dataclass(frozen=True)
class OutputPlan:
    """The tensors of the merged model."""

    names: dict[str, tuple[torch.Size, torch.dtype]]
    """By their names in the file."""
    name_of: dict[str, str]
    """Name in the model -> name in the file."""
    tied: bool
    vocab_size: int
    copied: list[str]
    """Tensors of the base model's files beside the language part, such as of towers; they stay as they are."""
    left_out: list[str]
    """Tensors of the base model's files that its model does not use."""

    @property
    def num_bytes(self) -> int:
        return sum(map(self.num_bytes_of, self.names))

    def num_bytes_of(self, name: str) -> int:
        shape, dtype = self.names[name]
        return shape.numel() * dtype.itemsize


def plan_output(model: StreamedModel) -> OutputPlan:
    """Each weight as the base model's files have it; tied ones apart where the adapter made them differ."""
    names: dict[str, tuple[torch.Size, torch.dtype]] = {}
    name_of: dict[str, str] = {}
    second = {name for group in model.tied for name in group[1:]}
    differing = {name for group in model.tied if not _still_equal(model, group) for name in group[1:]}
    for part in model.parts:
        for name, (module, attribute) in part.weights.items():
            if name in second and name not in differing:
                continue
            target = name if name in differing else model.sources[name]
            parameter = module._parameters[attribute]
            assert parameter is not None
            names[target] = (parameter.shape, model.dtype_of(name))
            name_of[name] = target
    others = sorted(set(model.weights) - set(model.sources.values()))
    copied, left_out = (others, []) if model.has_towers else ([], others)
    names |= {name: (model.weights.shapes[name], model.weights.dtypes[name]) for name in copied}
    return OutputPlan(names, name_of, not differing, model.vocab_size, copied, left_out)


def _still_equal(model: StreamedModel, group: list[str]) -> bool:
    """Whether tied weights are the same after merging."""
    parts = [part for part in model.parts if set(part.weights) & set(group)]
    if not any(part.is_adapted for part in parts):
        return True
    values = [tensor for part in parts for name, tensor in merged_weights(model, part).items() if name in group]
    return all(torch.equal(values[0], other) for other in values[1:])


def merged_weights(model: StreamedModel, part: Part) -> dict[str, Tensor]:
    """The weights of one part with its adapter merged, in the types of the merged model, by name."""
    if not part.is_adapted and all(model.is_in_files(name) for name in part.weights):
        return {name: model.weights.read(model.sources[name]).to(model.dtype_of(name)) for name in part.weights}
    return {
        name: tensor.to("cpu", model.dtype_of(name), copy=True).contiguous()
        for name, tensor in model.merged(part).items()
    }


def split(plan: OutputPlan, max_shard_size: str) -> dict[str, list[str]]:
    """Names of files -> names of the tensors in each, as huggingface_hub divides them.

    Raises:
        ConfigError: the size cannot be read.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in plan.names.items()}
    try:
        divided = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size}: {error}; fix: --max-shard-size 2GB") from error
    return divided.filename_to_tensors


def write_shards(model: StreamedModel, plan: OutputPlan, shards: dict[str, list[str]], folder: Path) -> None:
    """Merge part after part, and write each file as soon as it is full; with an index where there are several."""
    file_of = {name: file for file, names in shards.items() for name in names}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in shards}
    for name, tensor in _merged_tensors(model, plan):
        file = file_of[name]
        waiting[file][name] = tensor
        if len(waiting[file]) == len(shards[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    assert not waiting
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(file_of.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _merged_tensors(model: StreamedModel, plan: OutputPlan) -> Iterator[tuple[str, Tensor]]:
    for part in model.parts:
        if any(name in plan.name_of for name in part.weights):
            for name, tensor in merged_weights(model, part).items():
                if name in plan.name_of:
                    yield plan.name_of[name], tensor
    for name in plan.copied:
        yield name, model.weights.read(name)


def _merged_config(base: PretrainedConfig, plan: OutputPlan, dtype: torch.dtype | None) -> PretrainedConfig:
    config = copy.deepcopy(base)
    config.dtype = dtype or config.dtype
    text = config.get_text_config()
    text.vocab_size = plan.vocab_size
    if not plan.tied:
        text.tie_word_embeddings = config.tie_word_embeddings = False
    return config


def generation_config(source: Adapter, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The base model's, stopping also at the tokens that end trained replies."""
    from transformers import GenerationConfig

    model = source.config.model
    try:
        config = GenerationConfig.from_pretrained(resolve_name(model), revision=model.revision or "main")
    except (OSError, ValueError):  # the base model has none
        config = GenerationConfig.from_model_config(load_model_config(model))
        config._from_model_config = False  # with the tokens below it is more than that
    given = config.eos_token_id
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    if tokenizer.chat_template is not None:
        ids += [tokenizer.convert_tokens_to_ids(token) for token in tokens_to_stop_at(tokenizer)]
    ids = list(dict.fromkeys(ids))
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    if config.pad_token_id is None:
        config.pad_token_id = pad_id(tokenizer)
    return config


def copy_processor(
    source: Adapter, tokenizer: PreTrainedTokenizerBase, folder: Path, say: Callable[[str], None]
) -> None:
    """The base model's settings for images and sound, as they are. Its chat template is the training's."""
    found = {name: find_file(source.config.model, name) for name in (*_PROCESSOR_FILES, _OLD_TEMPLATE)}
    template = found[_OLD_TEMPLATE]
    if template is not None and tokenizer.chat_template is not None:
        if json.loads(template.read_text(encoding="utf-8")).get("chat_template") != tokenizer.chat_template:
            say(
                f"merge: {_OLD_TEMPLATE} of the base model is left out; chat_template.jinja, of the training, is for it"
            )
        del found[_OLD_TEMPLATE]
    for name, file in found.items():
        if file is not None:
            shutil.copyfile(file, folder / name)


def _card(source: Adapter, base_model: str | None, has_towers: bool) -> str:
    base = base_model or hub_id(source.config.model.name_or_path)
    config = source.config if source.has_config else None
    return merged_card(config, base, counts_of(source.summary), source.summary, has_towers)


# ---------------------------------------------------------------------------------------------------------------
# Rows and memory


def rows_to_compare(source: Adapter, tokenizer: PreTrainedTokenizerBase, rows: str | None) -> dict[str, Tensor]:
    """A micro-batch of a few rows: input_ids, attention_mask and loss_mask, each (B, T).

    Raises:
        DataError: there are none, or they cannot be read.
    """
    config = source.config
    file = rows if rows is not None else None if source.has_config else str(shipped_file("examples/eval.jsonl"))
    if file is not None:
        overrides = ["data.eval_file=null", "data.eval_fraction=0.0", "data.train_files=[]", "train.keep_adapter=last"]
        overrides += ["train.early_stopping_patience=null", f"data.train_file={json.dumps(file, ensure_ascii=False)}"]
        config = with_overrides(config, overrides)
    try:
        train_data, eval_data = load_data(config, tokenizer)
    except (ConfigError, DataError) as error:
        if rows is not None:
            raise DataError(f"--rows {error}".replace("fix: data.train_file=", "fix: --rows ")) from error
        raise DataError(
            f"logits are compared on rows, and those of the run cannot be read: {error}\nFix: --rows FILE.jsonl, or "
            "run the command in the folder that the run was started in"
        ) from error
    data = eval_data if eval_data is not None else train_data
    number = min(_NUM_ROWS, len(data.lengths))
    chosen = [data.dataset[index] for index in range(number)]
    cut = [
        {**row, "input_ids": row["input_ids"][:_MOST_TOKENS], "loss_mask": row["loss_mask"][:_MOST_TOKENS]}
        for row in chosen
    ]
    return collate([{**row, "loss_weights": row["loss_weights"][:_MOST_TOKENS]} for row in cut], pad_id(tokenizer))


def predict_peak(model: StreamedModel, plan: OutputPlan, shards: dict[str, list[str]], batch: dict[str, Tensor]) -> int:
    """The most bytes of this process: while a layer is merged and a file is full, or while logits are compared.

    While a layer is merged there are its weight as read, in float32 and as a copy, the update, the sum and what is
    written; DoRA holds two more. While logits are compared, there are those of two models and of the one that runs, and
    a layer's weight as read and in float32, with what `compare` moves it by. What is only copied is there twice.
    """
    import psutil

    sizes = {True: [0], False: [0]}  # adapted or not
    for part in model.parts:
        for name, (module, attribute) in part.weights.items():
            parameter = module._parameters[attribute]
            assert parameter is not None
            sizes[part.is_adapted].append(parameter.numel() * (4 * 8 if part.is_adapted else 4) + model.num_bytes(name))
    sizes[True] += [2 * plan.num_bytes_of(name) for name in plan.copied]
    files = [sum(plan.num_bytes_of(name) for name in names) for names in shards.values()]
    rows, length = batch["input_ids"].shape
    logits = rows * length * plan.vocab_size * 4
    most = max(*sizes[True], *sizes[False])
    return int(psutil.Process().memory_info().rss + max(max(files) + max(*sizes[True]), 4 * logits + most))
