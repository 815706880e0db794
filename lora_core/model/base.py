"""The frozen base model (bf16, NF4, int8), its tokenizer, and the adapter."""

from __future__ import annotations

import copy
import gc
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import patch_environment
from torch import nn

from lora_core.config.schema import DataConfig, LoraConfig, ModelConfig
from lora_core.encoding.named_templates import set_template
from lora_core.errors import ConfigError, counted
from lora_core.model.attention import (
    SEGMENT_ATTENTION,
    attention_of_text,
    segment_attention,
)
from lora_core.model.decoder import attention_for, decoder_layers, prepare_packing
from lora_core.model.heap import give_back_freed_memory, keep_freed_memory
from lora_core.model.language_part import (
    as_whole_class,
    from_config,
    model_class,
    towers_may_be_out,
    without_text,
)
from lora_core.model.lora_linear import mask_for, use_lean_lora
from lora_core.model.lora_settings import peft_settings, targets_of
from lora_core.model.targets import add_dropout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig, data: DataConfig | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that `data` asks for, or its own.

    Raises:
        ConfigError: the model or the template cannot be read, or the template does not fit.
    """
    name = resolve_name(config)
    tokenizer = _read_tokenizer(name, config.revision)
    if data is not None:
        set_template(tokenizer, data)
    tokenizer.stop_tokens = _stop_tokens(tokenizer, name, config.revision)
    return tokenizer


def load_saved_tokenizer(folder: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved beside an adapter, with the chat template of its training.

    Raises:
        ConfigError: it cannot be read.
    """
    tokenizer = _read_tokenizer(str(folder), None)
    tokenizer.stop_tokens = _stop_tokens(tokenizer, resolve_name(config), config.revision)
    return tokenizer


def _read_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # the files are somebody else's, and transformers raises many kinds of errors for them
        raise cannot_load("tokenizer", name, error) from error
    return tokenizer


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> list[str]:
    """What generation stops at by the model's own generation config; empty if it has none."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):  # there is none, or an old one that transformers does not take
        return []
    tokens = tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else list(ids or []))
    return [str(token) for token in tokens if token is not None]


def load_model_config(config: ModelConfig) -> Any:
    """The model's `PretrainedConfig`: shapes, and no weights. Read once; each call gives a copy that may be changed.

    Raises:
        ConfigError: the model cannot be read.
    """
    return copy.deepcopy(_read_model_config(resolve_name(config), config.revision))


@lru_cache(maxsize=8)
def _read_model_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # as in load_tokenizer
        raise cannot_load("config", name, error) from error


def load_base_model(config: ModelConfig, device: torch.device, packing: bool = False) -> PreTrainedModel:
    """The base model on one device, frozen.

    Args:
        device: on "meta" it has shapes and no weights, which are not read: its files need not be here.
        packing: attend within packed segments (in place of SDPA; other implementations find the segments themselves).

    Raises:
        ConfigError: it cannot be found or read, or cannot keep packed examples apart.
    """
    attention = attention_for(load_model_config(config), config.attn_implementation)
    if device.type == "meta":
        model = base_on_meta(config, load_model_config(config), attention)
    else:
        model = _read_base_model(config, device, attention)
    model.config.use_cache = False
    if device.type == "cpu":
        keep_4bit_weights_trainable(model)
        _let_go_of_files(model)
    if packing:
        prepare_packing(model)
    return model.requires_grad_(False)


def _read_base_model(config: ModelConfig, device: torch.device, attention: str) -> PreTrainedModel:
    name = resolve_name(config)
    model_config = load_model_config(config)
    try:
        with _one_tensor_at_a_time(device, config.quantization != "none"):
            model, found = model_class(model_config).from_pretrained(
                name,
                revision=config.revision,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                attn_implementation=attention_of_text(model_config, attention),
                quantization_config=quantization_config(config),
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load("model", name, error) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"model.name_or_path={config.name_or_path}: its files lack {counted(len(missing), 'tensor')} of "
            f"{type(model).__name__}, which would be random: {', '.join(missing[:3])}; fix: files of the whole model",
            "model_unreadable",
        )
    return as_whole_class(model)


def base_on_meta(config: ModelConfig, model_config: Any, attention: str) -> PreTrainedModel:
    """A model of this `PretrainedConfig` with shapes and no storage, not quantized.

    Raises:
        ConfigError: transformers has no causal language model of this family, or it cannot be built.
    """
    dtype = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        with torch.device("meta"):
            return from_config(copy.deepcopy(model_config), dtype, attention)
    except Exception as error:  # each family checks its config in its own way
        raise cannot_load("model", config.name_or_path, error) from error


@contextmanager
def _one_tensor_at_a_time(device: torch.device, is_quantized: bool) -> Iterator[None]:
    """Load weights in one thread on a CPU, and wherever they are quantized: early versions of transformers 5 would have
    the whole model on the GPU in 16 bits before most of it is quantized.

    On a CPU with the garbage collector off, and what is freed is kept only after that. What threads convert ahead of
    time, or what a collection moves about in between, leaves holes in the heap: 150 to 260 MiB of the demo model, for
    the whole run.
    """
    in_one_thread = {"HF_DEACTIVATE_ASYNC_LOAD": "1"} if device.type == "cpu" or is_quantized else {}
    # Under FSDP transformers would leave part of it, in other ranks than the first, to what Accelerate sends later.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false", **in_one_thread):
        if device.type != "cpu":
            yield
            return
        was_enabled = gc.isenabled()
        gc.disable()
        give_back_freed_memory()
        try:
            yield
        finally:
            keep_freed_memory()
            if was_enabled:
                gc.enable()


def keep_4bit_weights_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from re-packing 4-bit weights for inference on a CPU with AVX512-BF16.

    It does so, for good, in the first forward without gradients; after that its matmul has no backward, and an
    adapter below gets no gradient through the layer: one evaluation, and training continues without it, silently.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what was not quantized, so that no tensor looks into a weights file.

    As long as one does, such as the embedding, the whole file stays in the process: 200 MiB of the demo model.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def resolve_name(config: ModelConfig) -> str:
    """`name_or_path` with `~` resolved; what looks like a path must exist."""
    name = config.name_or_path
    _refuse_other_paths(name)
    if not name.startswith(("~", "/", "./", "../")):
        return name
    path = Path(name).expanduser()
    if not path.is_dir():
        hint = (
            "; fix: lora-core demo"
            if path.name == "SmolLM2-135M-Instruct"
            else "; fix: model.name_or_path=FOLDER or a hub id"
        )
        raise ConfigError(f"model.name_or_path={name}: no such folder{hint}", "model_unreadable")
    return str(path)


def _refuse_other_paths(name: str) -> None:
    """Refuse a file, and a run or an adapter, of which transformers would only say that it knows no such model."""
    path = Path(name).expanduser()
    if path.is_file():
        fix = "model.name_or_path=FOLDER or a hub id"
        raise ConfigError(f"model.name_or_path={name}: is a file; fix: {fix}", "model_unreadable")
    adapter = next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)
    if adapter is None or (path / "config.json").is_file():
        return
    try:
        base = str(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        base = "NAME"
    fix = shlex.join([f"model.name_or_path={base}", f"model.adapter={name}"])
    raise ConfigError(f"model.name_or_path={name}: is an adapter and no model; fix: {fix}", "model_unreadable")


def cannot_load(what: str, name: str, error: Exception) -> ConfigError:
    """What transformers said, as a sentence with a fix."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "gated repo" in str(error) or "awaiting a review" in str(error):
        return ConfigError(
            f"model.name_or_path={name}: the model is gated, and no token with access was found; fix: request "
            f"access at https://huggingface.co/{name}, then `hf auth login`",
            "model_gated",
        )
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"model.name_or_path={name}: the {what} needs code from the model's repository, and lora_core runs no such "
            "code; fix: a model of a family that transformers supports itself",
            "model_needs_code",
        )
    is_here = Path(name).is_dir()
    absent = "" if is_here else f"no such folder here (working folder: {Path.cwd()}), and from the hub "
    another = "" if is_here else "model.name_or_path=NAME, "
    return ConfigError(
        f"model.name_or_path={name}: {absent}the {what} cannot be loaded: {reason.rstrip('.')}; fix: {another}a hub id "
        "or a local folder; `hf auth login` for a gated model; unset HF_HUB_OFFLINE if it is not cached",
        "model_unreadable",
    )


def quantization_config(config: ModelConfig) -> Any:
    """What transformers takes to quantize while loading; None for none."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "nf4":
        # QLoRA, https://arxiv.org/abs/2305.14314
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype),
            bnb_4bit_quant_storage=getattr(torch, config.quant_storage),
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def add_adapter(
    base: PreTrainedModel,
    config: LoraConfig,
    seed: int,
    gradient_checkpointing: bool = False,
    device_kind: str | None = None,
) -> PeftModel:
    """Put a LoRA adapter on the base model: float32, the only thing that trains, its start fixed by `seed`.

    `auto` goes to what `find_targets` finds. PEFT has no dropout for experts, so the file of such an adapter says 0,
    and the other layers get theirs here.

    Args:
        device_kind: where it is going to compute, if not where the base model is.

    Raises:
        ConfigError: a target module matches nothing (lists the linear layers), PEFT cannot make the adapter, or the
            model has no gradient checkpointing.
    """
    import peft

    targets = targets_of(base, config)
    torch.manual_seed(seed)
    tied = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    settings = peft_settings(config, tied, targets, without_text(base))
    try:
        with towers_may_be_out():
            model: PeftModel = peft.get_peft_model(base, settings, autocast_adapter_dtype=True)
    except ValueError as error:  # PEFT finds that no module is left, or a combination that it does not have
        raise ConfigError(f"lora: {str(error).splitlines()[0]}; fix: see `lora` in docs/keys.md") from error
    for parameter in model.parameters():  # modules that are trained whole come in the base's type
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if targets.parameters and config.dropout > 0:
        add_dropout(model, config.dropout)
    use_lean_lora(model, mask_for(device_kind or model.device.type))
    if gradient_checkpointing:
        if not base.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.gradient_checkpointing=true: transformers has none for {type(base).__name__}; fix: "
                "train.gradient_checkpointing=false"
            )
        # transformers has called it so since 5.24, and warns of the older name.
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        # Non-reentrant: the reentrant kind needs gradients on its inputs, which a frozen embedding does not give.
        enable({"use_reentrant": False})
    return model


def compile_layers(model: PeftModel, device: torch.device) -> None:
    """Compile each decoder layer with `torch.compile`; equal layers share what is compiled.

    Attention over segments and the LoRA layers stay as they are, between the compiled parts: they are functions of
    their own for autograd, and the segments' number differs from one micro-batch to the next.

    Args:
        device: where it is going to compute.

    Raises:
        ConfigError: this machine cannot compile.
    """
    from transformers import AttentionInterface

    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler is missing, too old, or out of disk space: each raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"train.torch_compile=true: torch.compile cannot run on {device}: {reason}; fix: train.torch_compile=false"
        ) from error
    for module in model.modules():
        if "forward" in vars(module):  # a LoRA layer, as `use_lean_lora` left it
            module.forward = torch.compiler.disable(module.forward)
    AttentionInterface.register(SEGMENT_ATTENTION, torch.compiler.disable(segment_attention))
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all). A 4-bit weight packs two parameters into each stored byte and is counted as two."""
    trainable = total = 0
    for parameter in model.parameters():
        quant_state = getattr(parameter, "quant_state", None)
        number = quant_state.shape.numel() if quant_state is not None else parameter.numel()
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def describe_parameters(model: nn.Module) -> str:
    """`4,884,480 of 139,400,064 parameters train (3.50%)`."""
    trainable, total = count_parameters(model)
    return f"{trainable:,} of {counted(total, 'parameter')} train ({trainable / total:.2%})"
