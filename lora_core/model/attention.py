"""Attention over packed segments: examples end to end in one row, none of which sees another.

    row       a a a b b c c c c         a may look at     1 . . . . . . . .
    segments  3, 2, 4                                     1 1 . . . . . . .
                                                          1 1 1 . . . . . .
                                        b                 . . . 1 . . . . .
                                                          . . . 1 1 . . . .

Each segment is computed on its own, so the cost follows the sum of squared segment lengths and not the square of
their sum: on a CPU by plain products (short segments) or torch's fused kernel; on a GPU by torch's kernel for sequences
of any length, all segments in one call, where there is one, else by the fused kernel. Registered with transformers
under `SEGMENT_ATTENTION`; the model passes `segment_lengths` through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

SEGMENT_ATTENTION = "lora_core_segments"

# On a CPU, torch's fused kernel is the slower one for short segments in bfloat16: half the speed of plain matrix
# products at 65 to 512 tokens, and ahead from about 800 (forward and backward, 9 heads of 64, two cores).
_FUSED_FROM_TOKENS_ON_CPU = 768


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def decoder_of(model: Any) -> Any:
    """What gives hidden states. Where a family's `get_decoder` gives a model with its head, as Llama 4's, or the head,
    as ModernBERT's: the model inside."""
    from transformers import PreTrainedModel

    causal_lm = causal_lm_of(model)
    decoder = causal_lm.get_decoder()
    if decoder is not causal_lm and isinstance(decoder, PreTrainedModel):
        return decoder if decoder.get_output_embeddings() is None else decoder_of(decoder)
    return next((part for part in causal_lm.children() if isinstance(part, PreTrainedModel)), causal_lm)


def use_segment_attention(model: nn.Module) -> None:
    """Switch a transformers model from SDPA to attention over segments."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    use_attention(model, SEGMENT_ATTENTION)


def use_attention(model: nn.Module, name: str) -> None:
    """Switch the attention of the language part. A tower's stays: it may not have another, or be left out."""
    causal_lm = causal_lm_of(model)
    causal_lm.set_attn_implementation(attention_of_text(causal_lm.config, name))


def attention_of_text(model_config: Any, name: str) -> str | dict[str, str]:
    """An attention as transformers takes it for the language part alone."""
    text_config = model_config.get_text_config()
    keys = [key for key in model_config.sub_configs if getattr(model_config, key, None) is text_config]
    return {"": name, keys[0]: name} if keys else name


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; the signature is transformers' `AttentionInterface`.

    Args:
        query: (1, heads, T, D); key and value: (1, key heads, T or more, D). Values may have another D.
        segment_lengths: they add up to T. None is one example, such as in generation: the keys may then hold
            earlier positions from a cache.

    Returns:
        (1, T, heads, D) and no attention weights.

    Raises:
        ValueError: more than one row without segment lengths; padding is not known here.
    """
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"segment attention takes one row and no mask; got {query.shape[0]} rows; fix: data.packing=false"
        )
    lengths = segment_lengths or (query.shape[2],)
    if takes_short_segments(query, key, lengths, dropout, softcap):
        # What autocast would do to each product; inside a function of autograd it has to be done before.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        apply: Any = _ShortSegments.apply
        q, k, v = (tensor.to(dtype) for tensor in (query, key, value))
        return apply(q, k, v, lengths, query.shape[3] ** -0.5 if scaling is None else scaling, sliding_window), None
    is_whole = query.shape[2] == key.shape[2]  # and no token after others in a cache, as in generation
    if is_whole and dropout == 0 and softcap is None and has_varlen_kernel(query, value):
        return attend_varlen(query, key, value, lengths, scaling, sliding_window), None
    if len(lengths) == 1:
        return _attend(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2).contiguous(), None
    outputs = [
        _attend(q, k, v, scaling, dropout, sliding_window, softcap)
        for q, k, v in zip(*(torch.split(t, list(lengths), 2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def takes_short_segments(
    query: Tensor, key: Tensor, lengths: tuple[int, ...], dropout: float, softcap: float | None
) -> bool:
    """Whether `segment_attention` computes these by plain products, in one node of the graph."""
    short = query.device.type == "cpu" and max(lengths) < _FUSED_FROM_TOKENS_ON_CPU
    return short and query.shape[2] == key.shape[2] and dropout == 0 and softcap is None


def has_varlen_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch has FlashAttention for sequences of any length on this device, in this type and width."""
    if query.device.type != "cuda":
        return False
    suits = query.dtype in (torch.bfloat16, torch.float16) and _kernel_width(query, value) <= 256
    is_built = torch.backends.cuda.is_flash_attention_available()
    return suits and is_built and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one call of the kernel; as `segment_attention` -> (1, T, heads, D of the values).

    The kernel takes heads of one width, a multiple of 8; DeepSeek's values are narrower than its keys. Zeros at the end
    of a head change neither a score nor what is before them in the output.
    """
    apply: Any = _Varlen.apply
    by_token = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, heads, D)
    width = _kernel_width(query, value)
    padded = [nn.functional.pad(t, (0, width - t.shape[2])) if t.shape[2] < width else t for t in by_token]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    output: Tensor = apply(*padded, _borders(lengths, query.device), max(lengths), scaling, window)
    return output[None, ..., : value.shape[3]].contiguous()


def _kernel_width(query: Tensor, value: Tensor) -> int:
    return -(-max(query.shape[3], value.shape[3]) // 8) * 8


class _Varlen(torch.autograd.Function):
    """torch's FlashAttention over segments, with the same bits each time.

    By the operators themselves: autograd asks for a backward whose sums come in any order, so that no run could be
    repeated, or resumed to the same adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        borders: Tensor,
        longest: int,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """(T, heads, D), (T, key heads, D) twice -> (T, heads, D)."""
        # A causal kernel with a window wants both sides of it.
        ctx.settings = {"scale": scaling} | (
            {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        )
        ctx.longest, ctx.is_causal = longest, window is None
        borders_of_both = (borders, borders, longest, longest)
        output: Tensor
        output, log_sums, *random = flash_forward(
            query, key, value, *borders_of_both, 0.0, ctx.is_causal, False, **ctx.settings
        )[:4]
        ctx.save_for_backward(query, key, value, output, log_sums, borders, *random)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """(T, heads, D) -> gradients to query, key and value."""
        query, key, value, output, log_sums, borders, *random = ctx.saved_tensors
        borders_of_both = (borders, borders, ctx.longest, ctx.longest)
        with _same_bits_each_time():
            to_inputs = flash_backward(
                *(gradients[0], query, key, value, output, log_sums, *borders_of_both, 0.0, ctx.is_causal, *random),
                **ctx.settings,
            )
        return *to_inputs, None, None, None, None


# They group query heads by themselves. Changed in tests, because they need a GPU.
flash_forward: Any = torch.ops.aten._flash_attention_forward
flash_backward: Any = torch.ops.aten._flash_attention_backward


@contextmanager
def _same_bits_each_time() -> Iterator[None]:
    """FlashAttention's backward obeys this switch. On for the whole step, it would refuse operations that have no such
    form, and fill new tensors."""
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills


@lru_cache(maxsize=4)  # all layers of a micro-batch ask for the same, and each answer is a wait for the device
def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(segments + 1,) where each segment starts, and the end."""
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)


class _ShortSegments(torch.autograd.Function):
    """All segments of a layer as plain matrix products, forward and backward, in one node of the graph.

    Autograd would keep a node for each of a segment's ten operations, look at each score twice more for the mask, and
    copy all outputs once more: a quarter of the time of attention over short segments.

        weights = softmax(scaling Q K^T + hidden)        to weights = to output V^T
        output  = weights V                              to scores  = weights (to weights - sum(weights to weights))
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """As `segment_attention`, in one type throughout -> (1, T, heads, D)."""
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        hidden = _hidden_scores(max(lengths), window, query.dtype)
        all_weights = []
        for segment in _slices(lengths):
            k, v = key[0, :, segment], value[0, :, segment]
            q = _by_key_head(query[0, :, segment], len(k))
            # The query heads that share a key head are rows of one product.
            length = k.shape[1]
            added = hidden[:length, :length].expand(q.shape[1] // length, length, length).reshape(1, -1, length)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scaling)
            weights = scores.softmax(dim=-1)  # sums in float32 inside, whatever the type
            all_weights.append(weights)
            output[0, segment] = torch.bmm(weights, v).view(-1, *v.shape[1:]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *all_weights)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """(1, T, heads, D) -> gradients to query, key and value."""
        query, key, value, *all_weights = ctx.saved_tensors
        to_query, to_key, to_value = map(torch.empty_like, (query, key, value))
        for segment, weights in zip(_slices(ctx.lengths), all_weights, strict=True):
            k, v = key[0, :, segment], value[0, :, segment]
            q = _by_key_head(query[0, :, segment], len(k))
            to_output = _by_key_head(gradients[0][0, segment].transpose(0, 1), len(k))
            to_value[0, :, segment] = torch.bmm(weights.transpose(1, 2), to_output)
            to_weights = torch.bmm(to_output, v.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            to_query[0, :, segment] = torch.bmm(to_scores, k).view(-1, *k.shape[1:])
            to_key[0, :, segment] = torch.bmm(to_scores.transpose(1, 2), q)
        return to_query, to_key, to_value, None, None, None


def _slices(lengths: tuple[int, ...]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0))]


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """(heads, L, D) -> (key heads, heads of each x L, D)."""
    return tensor.reshape(key_heads, -1, tensor.shape[2])


def _hidden_scores(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(L, L) to add to scores: minus infinity where a query may not look, else 0."""
    hidden = torch.full((length, length), float("-inf"), dtype=dtype)
    return hidden.triu(1) if window is None else hidden.triu(1) + hidden.tril(-window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """(1, heads, L, D), (1, key heads, S, D) twice -> (1, heads, L, D). The queries are the last L of S positions."""
    length, num_keys = query.shape[2], key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < num_keys else None
    fused = query.device.type != "cpu" or length >= _FUSED_FROM_TOKENS_ON_CPU or dropout > 0
    if fused and softcap is None:
        whole = length == num_keys and window is None
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if whole else ~_hidden(length, num_keys, window, query.device),
            is_causal=whole,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    heads, dim = query.shape[1], query.shape[3]
    key_heads = key.shape[1]
    groups = heads // key_heads
    # The query heads that share a key head become rows of one product.
    grouped = query.reshape(key_heads, groups * length, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = torch.bmm(grouped, key[0].transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(key_heads, groups, length, num_keys)
    scores = scores.masked_fill_(_hidden(length, num_keys, window, query.device), float("-inf"))
    weights = nn.functional.dropout(scores.softmax(dim=-1), dropout)  # sums in float32 inside, whatever the type
    return torch.bmm(weights.view(key_heads, groups * length, num_keys), value[0]).view(
        1, heads, length, value.shape[3]
    )


def _hidden(length: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(L, S) True where a query may not look: at later positions, and past a sliding window."""
    hidden = torch.ones(length, num_keys, dtype=torch.bool, device=device).triu(num_keys - length + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(num_keys - length - window)
    return hidden
