"""What can be told of any causal language model from its modules: its layers, and whether examples can be packed.

No family is known by name here. A model is asked: its decoder runs over a few tokens, with an attention that takes
notes. Shapes are enough for that, so a model without storage gives the same answers as one with weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.errors import ConfigError
from lora_core.model.attention import (
    SEGMENT_ATTENTION,
    causal_lm_of,
    decoder_of,
    use_attention,
    use_segment_attention,
)
from lora_core.model.language_part import has_sdpa, layers_of_images
from lora_core.model.packing_check import check_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = "lora_core_probe"
# Layers that carry a state from one position to the next, by transformers' names for them.
_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "mamba2", "recurrent", "ssm")
# What modules have that count positions from the id of padding on, as RoBERTa does.
_FROM_PADDING = "create_position_ids_from_input_ids"
# Layers whose attention is causal, over all earlier positions or over a window of them.
_PLAIN = ("full_attention", "sliding_attention")
# What attention over segments knows, and what it may ignore: it says nothing about who sees whom.
_KNOWN_ARGUMENTS = ("scaling", "dropout", "segment_lengths", "sliding_window", "softcap")
_IDLE_ARGUMENTS = ("position_ids", "cache_position", "position_embeddings", "input_ids", "inputs_embeds")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, whatever the family calls their list: `layers`, `h`, `blocks`.

    Raises:
        ConfigError: it has no list of layers.
    """
    decoder = decoder_of(model)
    of_others = {id(part) for tower in _towers(decoder) for part in tower.modules()}
    lists = [
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and id(module) not in of_others
    ]
    if not lists:
        name = type(causal_lm_of(model)).__name__
        raise ConfigError(f"{name}: no list of decoder layers is found in it; fix: another model.name_or_path")
    return max(lists, key=len)  # the first of the longest


def _towers(decoder: Any) -> Iterator[nn.Module]:
    """Models inside the decoder for images or sound (GIT, Phi-4-multimodal): their config is of another kind."""
    from transformers import PreTrainedModel

    of_text = (type(decoder.config), type(decoder.config.get_text_config()))
    models = (module for module in decoder.modules() if isinstance(module, PreTrainedModel))
    yield from (module for module in models if type(module.config) not in of_text)


def is_encoder(model: nn.Module) -> bool:
    """Whether each token sees those after it, by what BERT and its kin note in their layers: `is_decoder` of the
    config. `check_head` looks at what any model does."""
    return any(getattr(module, "is_decoder", None) is False for module in decoder_layers(model).modules())


def why_not_packed(model: nn.Module) -> str | None:
    """Why the examples of a packed row would see each other; None if they would not.

    They are kept apart by attention over segments, and by nothing else: a layer that hands a state on, or a family's
    own attention, needs rows of their own. `check_packing` then looks at the numbers.
    """
    causal_lm = causal_lm_of(model)
    with_state = sorted({kind for kind in _kinds(causal_lm.config.get_text_config()) if kind in _WITH_STATE})
    convolves = any(isinstance(module, nn.Conv1d) for module in decoder_layers(causal_lm).modules())
    if with_state or convolves or getattr(causal_lm, "_is_stateful", False):
        what = f" ({', '.join(with_state)})" if with_state else ""
        return f"its layers{what} carry a state from each position to the next, over the border of examples"
    if "position_ids" not in inspect.signature(decoder_of(causal_lm).forward).parameters:
        return "it takes no position_ids, so that positions cannot start again with each example"
    if any(hasattr(module, _FROM_PADDING) for module in decoder_of(causal_lm).modules()):
        return "it counts positions from the id of padding on, and not from 0"
    return why_not_segments(model)


def _kinds(text_config: Any) -> list[str]:
    """The kind of each layer, by transformers' names; empty where all are of one."""
    kinds = getattr(text_config, "layer_types", None)
    return [str(kind) for kind in kinds] if isinstance(kinds, (list, tuple)) else []


@torch.no_grad()
def why_not_segments(model: nn.Module) -> str | None:
    """Why `segment_attention` cannot stand in for the model's own attention; None if it can."""
    from transformers import AttentionInterface

    causal_lm = causal_lm_of(model)
    text_config = causal_lm.config.get_text_config()
    kinds = _kinds(text_config)
    other = sorted({kind for kind in kinds if kind.endswith(("_attention", "_sparse")) and kind not in _PLAIN})
    if other:
        return f"it has layers of {', '.join(other)}"
    if not getattr(text_config, "is_causal", True):
        return "its attention is not causal"
    calls: list[str | None] = []
    AttentionInterface.register(_PROBE, _taking_notes(text_config, kinds, calls))
    before, was_training = causal_lm.config.get_text_config()._attn_implementation, model.training
    model.eval()
    try:
        use_attention(causal_lm, _PROBE)
        _run(causal_lm)
    except _DoesNotRun as error:
        return f"its decoder does not run with it ({error})"
    finally:
        use_attention(causal_lm, before)
        model.train(was_training)
    if len(calls) < len(decoder_layers(causal_lm)) - len(layers_of_images(causal_lm)):
        return "not all of its layers take their attention from transformers' interface"
    return next((problem for problem in calls if problem is not None), None)


class _DoesNotRun(Exception):
    """A family's own code does not know an argument or an attention."""


def _run(causal_lm: Any) -> None:
    """The decoder on eight tokens, as packed examples are given to it."""
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.ones((1, 8), dtype=torch.long, device=device)
    positions = torch.arange(8, device=device)[None]
    try:
        with _shapes_alone() if device.type == "meta" else nullcontext():
            decoder_of(causal_lm)(input_ids=ids, position_ids=positions, segment_lengths=(8,), use_cache=False)
    except Exception as error:  # each family raises its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _DoesNotRun(f"{type(error).__name__}: {reason}") from error


def _shapes_alone() -> Any:
    mode: Any = _ShapesAlone
    return mode()


class _ShapesAlone(TorchDispatchMode):
    """Lets a model without storage run where its code looks at values: they are 0, and no entry is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if func is torch.ops.aten._grouped_mm.default:
            return grouped_product(*args, **(kwargs or {}))
        if func is torch.ops.aten.split_with_sizes.default:
            return split_evenly_if_unknown(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def split_evenly_if_unknown(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """`split` by sizes that were values, such as how many tokens each expert gets (JetMoE): where they do not add up,
    there were none, and all parts are of one size."""
    length = tensor.shape[dim]
    if sum(sizes) != length:
        each, left = divmod(length, len(sizes))
        sizes = [each + (index < left) for index in range(len(sizes))]
    parts: Sequence[Tensor] = torch.ops.aten.split_with_sizes.default(tensor, sizes, dim)
    return parts


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The shape of `torch._grouped_mm`: rows of each expert times its matrix, or in the backward a matrix an expert."""
    rows, columns = a.shape[-2], b.shape[-1]
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        shape: tuple[int, ...] = (offs.numel(), rows, columns)
    else:
        shape = (len(a), rows, columns) if a.dim() == b.dim() else (rows, columns)
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def _taking_notes(text_config: Any, kinds: list[str], calls: list[str | None]) -> Callable[..., tuple[Tensor, None]]:
    """An attention of the right shape, which notes for each call what segment attention would not do."""
    is_windowed = bool(getattr(text_config, "sliding_window", None)) and getattr(
        text_config, "use_sliding_window", True
    )

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        kind = kinds[layer] if isinstance(layer, int) and layer < len(kinds) else None
        wants_window = kind == "sliding_attention" if kinds else is_windowed
        unknown = [
            name
            for name, argument in given.items()
            if isinstance(argument, Tensor) and name not in (*_KNOWN_ARGUMENTS, *_IDLE_ARGUMENTS)
        ]
        problem = None
        if given.get("segment_lengths") != (8,):
            problem = "it does not pass on where segments end"
        elif attention_mask is not None:
            problem = "it masks attention itself"
        elif unknown:
            problem = f"its attention takes {', '.join(unknown)}"
        elif not getattr(module, "is_causal", True) or given.get("is_causal") is False:
            problem = "its attention is not causal"
        elif query.shape[0] != 1 or query.shape[2] != 8 or key.shape[2] != 8:
            problem = "its attention is over something else than the tokens"
        elif wants_window and given.get("sliding_window") is None:
            problem = "it does not pass on its sliding window"
        calls.append(problem)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    return attention


def attention_for(model_config: Any, asked: str) -> str:
    """The attention that a family runs with: what was asked for, but `eager` where it has no SDPA, as GPT-OSS."""
    return "eager" if asked == "sdpa" and not has_sdpa(model_config) else asked


def prepare_packing(model: PreTrainedModel) -> None:
    """Let the model attend within packed segments, and check that it does, once it has weights.

    Raises:
        ConfigError: its examples would see each other.
    """
    problem = why_not_packed(model)
    if problem is not None:
        raise ConfigError(
            f"data.packing=true: {type(model).__name__} cannot be packed: {problem}; fix: data.packing=false"
        )
    if model.config.get_text_config()._attn_implementation == "sdpa":
        use_segment_attention(model)
    if model.device.type != "meta":
        check_packing(model)
        check_positions(model)


@torch.no_grad()
def check_positions(model: nn.Module) -> None:
    """Check that the model counts an example's positions from 0, as a packed row gives them.

    Raises:
        ConfigError: without `position_ids` it gives other hidden states; in training it would be another model.
    """
    causal_lm = causal_lm_of(model)
    decoder, was_training = decoder_of(causal_lm), model.training
    model.eval()
    ids = torch.arange(1, 8, device=causal_lm.get_input_embeddings().weight.device)[None]
    positions = torch.arange(7, device=ids.device)[None]
    own = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
    ours = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()
    model.train(was_training)
    change = float((ours - own).norm() / own.norm())
    if not change < 0.05:  # turned by another angle, queries and keys are rounded otherwise
        raise ConfigError(
            f"data.packing=true: {type(causal_lm).__name__} does not count positions from 0 (with positions from 0 its "
            f"hidden states change by {change:.2g} of their size); fix: data.packing=false"
        )


def own_positions(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Positions as the model counts them itself, (1, T) -> (1, T), where it begins after the id of padding, as RoBERTa
    and its kin do; None for all others, which count from 0. transformers' `generate` gives all of them those from 0."""
    causal_lm = causal_lm_of(model)
    takes_positions = "position_ids" in inspect.signature(causal_lm.forward).parameters
    for module in decoder_of(causal_lm).modules() if takes_positions else ():
        if hasattr(module, _FROM_PADDING) and hasattr(module, "padding_idx"):
            positions: Tensor = getattr(module, _FROM_PADDING)(input_ids, module.padding_idx)
            return positions
    return None


def takes_padding(model: Any) -> bool:
    """Whether a row that is padded on the left gives what it gives alone. Where examples can be packed, nothing but
    attention looks at other tokens, and attention has a mask; a recurrent layer would read the padding."""
    return bool(causal_lm_of(model).config.get_text_config()._attn_implementation == SEGMENT_ATTENTION)


@contextmanager
def padding_masked(model: Any) -> Iterator[None]:
    """For padded batches: attention over segments takes one row and no mask, so SDPA, which it stands in for, takes its
    place. Other attention knows masks."""
    causal_lm = causal_lm_of(model)
    before = causal_lm.config.get_text_config()._attn_implementation
    if before == SEGMENT_ATTENTION:
        use_attention(causal_lm, "sdpa")
    try:
        yield
    finally:
        use_attention(causal_lm, before)
