"""A model as one GGUF file, for llama.cpp and what is built on it; or an adapter as one.

llama.cpp's own converter is used where it is installed: LLAMA_CPP names its folder, or convert_hf_to_gguf.py is on the
PATH. Otherwise the `gguf` package writes the file, for the families below, a tensor at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.config.schema import ModelConfig
from lora_core.errors import ConfigError, LoraCoreError
from lora_core.export.as_adapter import Adapter
from lora_core.export.base_files import find_weights
from lora_core.export.gguf_tokenizer import add_tokenizer
from lora_core.model.base import load_model_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TYPES = ("f16", "bf16", "f32", "q8_0")
# transformers' model_type -> the name of the architecture in GGUF.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_INSTALL = "install llama.cpp and set LLAMA_CPP to its folder"


def find_converter(name: str = "convert_hf_to_gguf.py") -> Path | None:
    """llama.cpp's script: in the folder that LLAMA_CPP names, or on the PATH; None if it is on neither.

    Raises:
        ConfigError: LLAMA_CPP names a folder without it.
    """
    folder = os.environ.get("LLAMA_CPP")
    if folder:
        script = Path(folder).expanduser() / name
        if not script.is_file():
            raise ConfigError(f"LLAMA_CPP={folder}: holds no {name}; fix: the folder of a checkout of llama.cpp")
        return script
    found = shutil.which(name)
    return Path(found) if found else None


def write_gguf(folder: Path, target: Path, kind: str, say: Callable[[str], None] = print) -> None:
    """A folder as transformers saves a model, such as `merge` writes, as one GGUF file.

    Args:
        kind: one of `TYPES`, of the matrices; vectors stay float32.

    Raises:
        ConfigError: the family is not known here and llama.cpp's converter is not installed, or the model does not
            fit the type.
        LoraCoreError: the converter failed.
    """
    converter = find_converter()
    if converter is not None:
        say(f"gguf: by {converter}")
        _run_converter([str(converter), str(folder), "--outfile", str(target), "--outtype", kind])
        return
    model = ModelConfig(name_or_path=str(folder.absolute()), dtype="auto")
    config = load_model_config(model)
    weights = find_weights(model)
    say(f"gguf: by the gguf package; for other families than {', '.join(sorted(FAMILIES))}: {_INSTALL}")
    writer, names = _writer(config, target)
    _add_parameters(writer, config, kind)
    add_tokenizer(writer, load_tokenizer(model), config.vocab_size, stop_ids(folder))
    written = {name: _gguf_name(names, name) for name in weights if not _is_repeated(config, name)}
    types = {name: _type_of(weights.shapes[name], kind) for name in written}
    for name, gguf_name in written.items():
        _add_info(writer, gguf_name, weights.shapes[name], types[name])
    _open(writer)
    for name in written:
        tensor = _rotated(config, name, weights.read(name).float())
        writer.write_tensor_data(_encoded(tensor, types[name], name))
    writer.close()


def write_adapter_gguf(source: Adapter, target: Path, kind: str = "f32", say: Callable[[str], None] = print) -> None:
    """The adapter alone, which llama.cpp puts beside a GGUF of the base model (`--lora`).

    llama.cpp scales each layer by alpha / rank, whatever the rank; where PEFT scales otherwise (rsLoRA, patterns) B
    is multiplied by what is missing.

    Raises:
        ConfigError: the adapter has what llama.cpp does not take, or the family is not known here.
    """
    import numpy as np
    from safetensors.torch import load_file

    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the gguf package; fix: pip install 'lora-core[export]'")
    import gguf
    import peft

    settings: Any = peft.PeftConfig.from_pretrained(str(source.folder))
    unable = [
        name
        for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
        if getattr(settings, name, None)
    ]
    if unable:
        raise ConfigError(
            f"{source.folder}: llama.cpp takes no adapter with {', '.join(unable)}; fix: without --adapter-only, which "
            "writes the merged model"
        )
    config = load_model_config(source.config.model)
    writer, names = _writer(config, target)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings.lora_alpha))
    tensors = load_file(source.folder / "adapter_model.safetensors")
    dtype = {"f32": np.float32, "f16": np.float16}.get(kind)
    if dtype is None:
        raise ConfigError(f"--type {kind}: an adapter is written as f32 or f16; fix: --type f32")
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    others = sorted(name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if others:
        raise ConfigError(f"{source.folder}: llama.cpp takes no {others[0]}; fix: without --adapter-only")
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{side}.weight"].float() for side in "AB")
        name = f"{layer.removeprefix('base_model.model.')}.weight"
        scale = _scale(settings, layer) * len(a) / settings.lora_alpha
        b = _rotated(config, name, b * scale)
        gguf_name = _gguf_name(names, name)
        writer.add_tensor(f"{gguf_name}.lora_a", a.numpy().astype(dtype))
        writer.add_tensor(f"{gguf_name}.lora_b", b.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    say(f"gguf: {len(layers):,} layers of the adapter")


# ---------------------------------------------------------------------------------------------------------------


def _run_converter(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LoraCoreError(
            f"{Path(arguments[0]).name} failed ({done.returncode}): {lines[-1][:300]}; fix: run it by hand to see all "
            "that it says: python " + " ".join(arguments),
            "converter_failed",
        )


def _writer(config: PretrainedConfig, target: Path) -> tuple[Any, Any]:
    """(GGUFWriter, the package's map from the model's names of tensors to GGUF's)."""
    check_family(config)
    import gguf

    architecture = FAMILIES[config.model_type]
    (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.GGUFWriter(target, architecture), gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def check_family(config: PretrainedConfig) -> None:
    """
    Raises:
        ConfigError: the gguf package is missing, or does not write this family here.
    """
    if find_spec("gguf") is None:
        raise ConfigError("GGUF files need the gguf package; fix: pip install 'lora-core[export]'")
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{config.model_type}: is converted by llama.cpp alone (here: {', '.join(sorted(FAMILIES))}); fix: "
            f"{_INSTALL}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type {rope['rope_type']}: is converted by llama.cpp alone; fix: {_INSTALL}")


def _add_parameters(writer: Any, config: Any, kind: str) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(str(config._name_or_path)).name or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(window)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def stop_ids(folder: Path) -> list[int]:
    """Where generation ends, by generation_config.json."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [] if ids is None else [ids] if isinstance(ids, int) else [int(each) for each in ids]


def _is_repeated(config: Any, name: str) -> bool:
    """A head that is the embedding: GGUF leaves it out."""
    return bool(config.tie_word_embeddings) and name == "lm_head.weight"


def _gguf_name(names: Any, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConfigError(f"{name}: GGUF has no name for this tensor; fix: {_INSTALL}")
    return str(found)


def _type_of(shape: torch.Size, kind: str) -> str:
    """Of vectors float32; of matrices whose rows are no multiple of 32, which Q8_0 cannot hold, float16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def _add_info(writer: Any, name: str, shape: torch.Size, kind: str) -> None:
    import gguf
    import numpy as np

    raw = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "bf16": gguf.GGMLQuantizationType.BF16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[kind]
    if kind in ("f32", "f16"):
        dtype = np.dtype(np.float32 if kind == "f32" else np.float16)
        writer.add_tensor_info(name, shape, dtype, shape.numel() * dtype.itemsize, raw)
    else:
        stored = gguf.quant_shape_to_byte_shape(tuple(shape), raw)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw)


def _open(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _encoded(tensor: Tensor, kind: str, name: str) -> Any:
    import gguf
    import numpy as np

    values = tensor.contiguous().numpy()
    if kind == "f32":
        return values
    if kind == "f16":
        largest = float(tensor.abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise ConfigError(f"--type f16: {name} holds {largest:g}, more than float16 can; fix: --type bf16")
        return values.astype(np.float16)
    return gguf.quants.quantize(
        values, gguf.GGMLQuantizationType.BF16 if kind == "bf16" else gguf.GGMLQuantizationType.Q8_0
    )


def _rotated(config: Any, name: str, weight: Tensor) -> Tensor:
    """Rows of q and k in the order that llama.cpp rotates them in.

    transformers rotates value i of a head with value i + D/2, llama.cpp's "llama" architecture value 2i with 2i + 1.
    """
    if FAMILIES[config.model_type] != "llama":
        return weight
    heads = None
    if "q_proj." in name:
        heads = config.num_attention_heads
    elif "k_proj." in name:
        heads = config.num_key_value_heads
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _scale(settings: Any, layer: str) -> float:
    """By which PEFT multiplies B A in this layer."""
    from peft.utils.other import get_pattern_key

    def of(patterns: dict[str, Any], default: float) -> float:
        return float(patterns.get(get_pattern_key(patterns.keys(), layer), default))

    rank, alpha = of(settings.rank_pattern, settings.r), of(settings.alpha_pattern, settings.lora_alpha)
    return alpha / (rank**0.5 if settings.use_rslora else rank)
