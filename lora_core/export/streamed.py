"""A model whose weights are in memory a layer at a time, read from its files in float32.

The model is built without weights. Each part of it that has some (a layer with its adapter, a norm, the embedding) is
filled right before it runs or is merged, and emptied right after. The adapter itself stays in memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError
from lora_core.export.base_files import WeightFiles
from lora_core.model.decoder import attention_for
from lora_core.model.language_part import from_config, left_out, towers_may_be_out

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Starts that take a part out of the base model's weights, which then are no longer those of its files.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
Change = Callable[["Part"], dict[str, Tensor]]
_ZERO = torch.zeros((), dtype=torch.float32)
"""What a weight is that is not in memory, expanded to the weight's shape."""


@dataclass(frozen=True)
class Part:
    """A piece of the model that is filled and emptied as one: a layer with its adapter, or a module without one."""

    module: nn.Module
    """The PEFT layer around it, where it has an adapter."""
    weights: dict[str, tuple[nn.Module, str]]
    """By their names in the model: the module of the base that holds it, and what it is called there."""
    is_adapted: bool


class StreamedModel:
    """A causal language model, with or without an adapter, in evaluation mode, in float32.

    Of a checkpoint that also sees or hears it is the language part, by the names of the whole.

    Args:
        config: of the base model.
        weights: the base model's files.
        adapter: a folder in PEFT's format; None for the base model alone.
        dtype: of what it is merged into; None is each weight's own in the files.

    Raises:
        ConfigError: the files name the weights otherwise than the model does, or the adapter does not fit.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: WeightFiles,
        adapter: Path | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weights, self.device, self._dtype = weights, device or torch.device("cpu"), dtype
        base = _without_weights(copy.deepcopy(config), None if adapter is None else _vocabulary(adapter))
        named = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in base.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self.tied = _tied(named)
        """Names of weights that are one and the same in the base model, the one that its files hold first."""
        self.sources = _find_in_files(named, self.tied, weights, base)
        """The name in the files of each weight of the model."""
        self.has_towers = bool(left_out(base))
        """Whether the files hold more than the language part."""
        self.vocab_size: int = base.config.get_text_config().vocab_size
        """With the tokens that the adapter adds."""
        _put_placeholders(base)
        self.model: Any = base if adapter is None else _with_adapter(base, adapter, self.device)
        self.model.eval().requires_grad_(False)
        self.parts = _parts(self.model, named)
        self._unchanged = {
            name
            for name, (module, attribute) in named.items()
            if (parameter := module._parameters[attribute]) is not None
            and _is_placeholder(parameter)
            and parameter.shape == weights.shapes[self.sources[name]]
        }
        for buffers in self.model.modules():
            for name, buffer in buffers._buffers.items():
                buffers._buffers[name] = None if buffer is None else buffer.to(self.device)

    @contextmanager
    def filled(self, part: Part, change: Change | None = None) -> Iterator[None]:
        """The part with the base model's weights, in float32, or with those that `change` gives for it, by name."""
        given = change(part) if change else {}
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, (module, attribute) in part.weights.items():
            parameter = module._parameters[attribute]
            assert parameter is not None
            empty.append((module, attribute, parameter))
            weight = given[name] if name in given else self.read(part, name)
            module._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for module, attribute, parameter in empty:
                module._parameters[attribute] = parameter

    def is_in_files(self, name: str) -> bool:
        """Whether the base model's files hold the weight as it is; the adapter's may hold another, or more rows."""
        return name in self._unchanged

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a weight in the merged model."""
        return self._dtype or self.weights.dtypes[self.sources[name]]

    def num_bytes(self, name: str) -> int:
        """Of a weight in the base model's files."""
        return self.weights.num_bytes(self.sources[name])

    def read(self, part: Part, name: str) -> Tensor:
        """A weight of an empty part in float32; from the adapter's file, where that holds it whole."""
        module, attribute = part.weights[name]
        placeholder = module._parameters[attribute]
        assert placeholder is not None
        if not _is_placeholder(placeholder):
            return placeholder.detach().clone()
        weight = self.weights.read(self.sources[name]).to(self.device, torch.float32)
        missing = placeholder.shape[0] - weight.shape[0] if placeholder.shape else 0
        if missing > 0:  # rows of added tokens: the adapter sets them
            weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])
        return weight

    @torch.no_grad()
    def merged(self, part: Part) -> dict[str, Tensor]:
        """The weights of a part with its adapter merged by PEFT's own layer, in float32, by name.

        Raises:
            ConfigError: the adapter holds numbers that are not finite.
        """
        with self.filled(part):
            try:
                saved = _merge_in_place(part.module) if part.is_adapted else {}
            except ValueError as error:  # PEFT's check for numbers that are not finite
                raise ConfigError(
                    f"the adapter cannot be merged: {error}; fix: an earlier checkpoint of the run"
                ) from error
            weights: dict[str, Any] = {
                name: saved.get(attribute, module._parameters[attribute])
                for name, (module, attribute) in part.weights.items()
            }
            return {name: weight.detach() for name, weight in weights.items()}

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor], change: Change | None = None) -> Tensor:
        """(N, vocabulary) at the positions that are not padding, on the CPU.

        Args:
            batch: input_ids and attention_mask, (B, T).
            change: of the parts that the adapter changes, as in `filled`.
        """
        handles = [hook for part in self.parts for hook in self._hooks(part, change)]
        try:
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            output: Tensor = self.model(**inputs, use_cache=False).logits
            return output[inputs["attention_mask"].bool()].float().cpu()
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, part: Part, change: Change | None) -> list[Any]:
        open_parts: list[Any] = []

        def fill(*_: Any) -> None:
            context = self.filled(part, change if part.is_adapted else None)
            context.__enter__()
            open_parts.append(context)

        def empty(*_: Any) -> None:
            open_parts.pop().__exit__(None, None, None)

        # `always_call`: also after an error, so that nothing stays filled.
        return [
            part.module.register_forward_pre_hook(fill),
            part.module.register_forward_hook(empty, always_call=True),
        ]


# ---------------------------------------------------------------------------------------------------------------


def _without_weights(config: PretrainedConfig, vocabulary: int | None) -> Any:
    """The model on the meta device, its buffers (such as rotary frequencies) in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: Any = from_config(config, torch.float32, attention_for(config, "sdpa"))
        if vocabulary is not None and vocabulary > config.get_text_config().vocab_size:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.tie_weights()  # outside: inside, each would become a weight of its own again
    return model


def _vocabulary(adapter: Path) -> int | None:
    """The rows of the embedding that the adapter was trained with, where its files say it."""
    from safetensors import safe_open

    rows: list[int] = []
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_tokens.base_layer.weight")):
                rows.append(int(file.get_slice(name).get_shape()[0]))
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tokens = config.get("trainable_token_indices") or []
    for indices in tokens.values() if isinstance(tokens, dict) else [tokens]:
        rows += [max(indices) + 1] if indices else []
    return max(rows, default=None)


def _tied(named: dict[str, tuple[nn.Module, str]]) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, (module, attribute) in named.items():
        names.setdefault(id(module._parameters[attribute]), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _find_in_files(
    named: dict[str, tuple[nn.Module, str]], tied: list[list[str]], weights: WeightFiles, model: Any
) -> dict[str, str]:
    group_of = {name: group for group in tied for name in group}
    in_files = _names_of_files(model, weights)
    found: dict[str, str] = {}
    for name in named:
        source = next((in_files[each] for each in (name, *group_of.get(name, [])) if each in in_files), None)
        if source is None:
            raise ConfigError(
                f"the base model's files have no tensor {name}: they name the weights otherwise than transformers' "
                "model does, and a layer at a time cannot be read; fix: with memory for the whole model, PEFT's "
                "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
            )
        found[name] = source
    return found


def _names_of_files(model: Any, weights: WeightFiles) -> dict[str, str]:
    """Name in the model -> name in its files, as transformers renames them while it loads: by the family's table, and
    without or with the prefix, such as `transformer.`. Without tensors that it makes out of others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [each for each in table if isinstance(each, WeightRenaming)]
    converters = [each for each in table if isinstance(each, WeightConverter)]
    on_meta = model.state_dict()
    found: dict[str, str] = {}
    for name in sorted(weights):
        renamed, converted_by = rename_source_key(name, renamings, converters, model.base_model_prefix, on_meta)
        if converted_by is None:
            found[renamed] = name
    return found


def _put_placeholders(model: nn.Module) -> None:
    """In place of each weight a tensor of its shape that takes 4 bytes: PEFT puts adapters where weights are, and not
    where nothing is (the meta device). Tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = _ZERO.expand(parameter.shape)
                made.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))
                module._parameters[name] = made[id(parameter)]


def _is_placeholder(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == _ZERO.untyped_storage().data_ptr()


def _with_adapter(base: Any, adapter: Path, device: torch.device) -> Any:
    import peft

    config = peft.PeftConfig.from_pretrained(str(adapter))
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{adapter}: init_lora_weights={start} changed the base model's weights at the start of training, so this "
            "adapter does not fit the base model's files; fix: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    try:
        with towers_may_be_out():
            model = peft.PeftModel.from_pretrained(
                base, str(adapter), config=config, low_cpu_mem_usage=True, torch_device="cpu"
            )
    except (RuntimeError, ValueError) as error:
        reason = "; ".join(str(error).strip().splitlines()[:2])
        raise ConfigError(
            f"{adapter}: does not fit the base model: {reason}; fix: the base model that it was trained on"
        ) from error
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ConfigError(f"{adapter}: adapter_model.safetensors has no {name}; fix: save the adapter again")
        if not _is_placeholder(parameter):
            parameter.data = parameter.data.to(device)
    return model


def _parts(model: nn.Module, named: dict[str, tuple[nn.Module, str]]) -> list[Part]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    names = {(id(module), attribute): name for name, (module, attribute) in named.items()}
    parts: list[Part] = []
    inside: set[int] = set()  # modules of a PEFT layer that was seen before them
    for module in model.modules():
        if id(module) in inside:
            continue
        is_adapted = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        holders = list(module.modules()) if is_adapted else [module]
        if is_adapted:
            inside |= {id(holder) for holder in holders}
        weights = {
            names[id(holder), attribute]: (holder, attribute)
            for holder in holders
            for attribute in holder._parameters
            if (id(holder), attribute) in names
        }
        if weights:
            parts.append(Part(module, weights, is_adapted))
    return parts


def _merge_in_place(wrapper: Any) -> dict[str, Any]:
    """Let PEFT merge into the weights of a filled layer; returns those that it keeps apart (modules_to_save)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        (name,) = wrapper.active_adapters
        return dict(wrapper.modules_to_save[name].named_parameters())
    layer: Any = wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else wrapper
    while isinstance(layer, BaseTunerLayer):  # for each of the experts' weights one, around the next
        layer.merge(safe_merge=True)
        layer.merged_adapters.clear()  # its weights are emptied right after
        layer = layer.base_layer
    return {}
