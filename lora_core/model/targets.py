"""Where the adapter goes by itself (`lora.target_modules: auto`): every linear layer of the decoder, and its experts.

In Llama and its kin these are the seven projections. Elsewhere they have other names (`c_attn`, `qkv_proj`), and the
experts of a mixture are slices of one parameter, which PEFT reaches by name (`target_parameters`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_core.errors import ConfigError
from lora_core.model.attention import causal_lm_of
from lora_core.model.decoder import decoder_layers
from lora_core.model.language_part import layers_of_images, without_text

if TYPE_CHECKING:
    from peft import PeftModel

_LARGE_SHARE = 0.2
_NAMES_OF_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Targets(NamedTuple):
    """Names as PEFT takes them."""

    modules: list[str] | str
    """Last parts such as q_proj, or dotted names where that part also names something that gets no adapter; or
    `all-linear`."""
    parameters: list[str]
    """Of fused experts, such as experts.down_proj; and of layers beside experts, such as shared_experts.up_proj.weight,
    whose names PEFT takes for the experts'."""

    def in_short(self) -> list[str]:
        """The parameters as they are told to people: experts.down_proj, shared_experts.up_proj."""
        return [*dict.fromkeys(".".join(name.removesuffix(".weight").split(".")[-2:]) for name in self.parameters)]


def find_targets(base: nn.Module) -> Targets:
    """The linear layers in the decoder's layers, and their experts' parameters.

    What only chooses gets no adapter: routers of experts, and indexers of sparse attention, through whose choice no
    gradient comes. Nor does what a kernel reads past the module that holds it (Mamba's out_proj and dt_proj).

    Raises:
        ConfigError: there are none.
    """
    layers = decoder_layers(base)
    inside = {id(module) for module in layers.modules()}
    named = {name: module for name, module in base.named_modules() if id(module) in inside}
    skipped = _read_by_kernels(layers) | _inside_choosers(layers)
    sizes = _sizes_of_gates(base)
    chosen = [
        name
        for name, module in named.items()
        if _is_linear(module)
        and id(module) not in skipped
        and not _is_in_groups(module)
        and _out_features(module) not in sizes
    ]
    experts = [f"{name}.{stacked}" for name, module in named.items() for stacked in _stacked(module, sizes)]
    if not chosen and not experts:
        raise ConfigError(
            f"lora.target_modules=auto: {type(causal_lm_of(base)).__name__} has no linear layers in its decoder; fix: "
            "lora.target_modules=[NAMES OF ITS LAYERS]"
        )
    all_names = [name for name, _ in base.named_modules()]
    moved = _taken_for_experts(base, {name.rsplit(".", 1)[-1] for name in chosen}) if experts else set()
    beside = [name for name in chosen if name.rsplit(".", 1)[-1] in moved and type(named[name].weight) is nn.Parameter]
    layers_alone = [name for name in chosen if name not in beside]
    parameters = [".".join(name.split(".")[-2:]) for name in experts]
    # `exclude_modules`, which keeps an adapter out of a checkpoint's towers, is not for parameters.
    beside = _short(all_names, beside, parts=2) if without_text(base) is None else beside
    parameters += [f"{name}.weight" for name in beside]
    return Targets(_short(all_names, layers_alone), [*dict.fromkeys(parameters)])


def _stacked(module: nn.Module, sizes: set[int]) -> list[str]:
    """Names of its parameters that are a matrix for each expert. LongCat's have more for some of a module than for
    others: experts that do nothing have none."""
    stacked = {name: len(p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return [*stacked] if sizes & {*stacked.values()} else []


def _taken_for_experts(base: nn.Module, names: set[str]) -> set[str]:
    """Those of `names` that PEFT replaces by parameters of stacked experts, whatever else has them: transformers 5
    stacked the experts of some families, and PEFT keeps reading adapters of the time before by their old names.

    A layer of such a name gets an adapter as the parameter that its weight is. A quantized weight has another shape
    there: PEFT reaches that layer by no name.
    """
    import peft
    from peft.utils import transformers_weight_conversion

    # It refuses a part of those that belong together.
    every = {*names, "gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    settings = peft.LoraConfig(target_modules=[*every])
    transformers_weight_conversion.convert_peft_config_for_transformers(settings, base, None)
    return names - set(settings.target_modules or ())


def _short(all_names: list[str], chosen: list[str], parts: int = 1) -> list[str]:
    """Last parts that say the same as the chosen names, else the names themselves."""

    def last(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    number, of_chosen = (Counter(map(last, names)) for names in (all_names, chosen))
    short = {name: last(name) for name in chosen}
    return [*dict.fromkeys(part if number[part] == of_chosen[part] else name for name, part in short.items())]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # Falcon's and bitsandbytes' layers are kinds of nn.Linear; that of torch's own attention is not called.
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _is_in_groups(module: Any) -> bool:
    """Groups of inputs have a block of the matrix each (DeepSeek-V4): PEFT would add a product with all of it."""
    return isinstance(module, nn.Linear) and hasattr(module, "n_groups")


def _out_features(module: Any) -> int:
    return int(module.nf if hasattr(module, "nf") else module.out_features)  # Conv1D, of GPT-2, says nf


def _sizes_of_gates(base: nn.Module) -> set[int]:
    """How many outputs a layer has that chooses or weighs experts: one an expert, or one for a shared expert."""
    config = causal_lm_of(base).config.get_text_config()
    numbers = {getattr(config, name, None) for name in _NAMES_OF_NUM_EXPERTS}
    of_experts = {number for number in numbers if isinstance(number, int) and number > 1}
    return of_experts | {1} if of_experts else set()


def _read_by_kernels(layers: nn.Module) -> set[int]:
    """ids of the layers of state-space mixers whose weights fused kernels take without calling the module."""
    mixers = [module for module in layers.modules() if isinstance(getattr(module, "A_log", None), torch.Tensor)]
    parts = (getattr(mixer, name, None) for mixer in mixers for name in ("out_proj", "dt_proj"))
    return {id(part) for part in parts if part is not None}


def _inside_choosers(layers: nn.Module) -> set[int]:
    choosers = [module for module in layers.modules() if type(module).__name__.endswith(("Indexer", "Router"))]
    return {id(module) for chooser in choosers for module in chooser.modules()}


def without_adapter(model: PeftModel, targets: Targets) -> dict[str, float]:
    """The matrices of the decoder's layers that got no adapter, though `targets` names their layer or they are large:
    last parts of their names, such as mlp.w1 -> their share of the layers' parameters.

    DBRX reads its experts past the module that holds them, Mamba's kernel its out_proj. PEFT does not reach quantized
    layers whose names it takes for those of experts.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers: Any = decoder_layers(model)
    reached = {
        id(module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight)
        for module in layers.modules()
        if isinstance(module, LoraLayer)
    }
    of_images = {str(number) for number in layers_of_images(causal_lm_of(model))}
    named = {
        name: parameter
        for name, parameter in layers.named_parameters()
        if "lora_" not in name and name.split(".")[0] not in of_images
    }
    left = {name.removesuffix(".weight"): p for name, p in named.items() if p.dim() > 1 and id(p) not in reached}
    total = sum(parameter.numel() for parameter in named.values())
    sizes: Counter[str] = Counter()
    expected: set[str] = set()
    for name, parameter in left.items():
        part = ".".join(name.split(".")[-2:])
        sizes[part] += parameter.numel()
        if any(f".{name}".endswith(f".{target}") or f".{target}".endswith(f".{name}") for target in targets.modules):
            expected.add(part)
    return {part: size / total for part, size in sizes.items() if part in expected or size > _LARGE_SHARE * total}


def add_dropout(model: PeftModel, p: float) -> None:
    """Dropout on the input of every adapted linear layer; experts have none."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(p)


def describe_targets(model: PeftModel) -> str:
    """`q_proj 24, k_proj 24, experts.down_proj 24`: how many layers of each name have an adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            # Of several parameters of one module, each is wrapped around the one before.
            parts = [part for part in name.split(".") if part != "base_layer"]
            counts[f"{parts[-1]}.{module.parameter_name}"] += 1
        elif isinstance(module, LoraLayer):
            counts[name.rsplit(".", 1)[-1]] += 1
    return ", ".join(f"{name} {number}" for name, number in counts.items())
