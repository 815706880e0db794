"""The check of attention over packed segments: three ways, where lengths repeat and where they are always new.

cuDNN makes a plan for each length that it has not seen. A benchmark that repeats its lengths pays for that before it
measures; a run, whose examples are all of another length, pays in every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from setting import Setting, set_up_process, spread
from torch import Tensor, nn

from lora_core.errors import counted
from lora_core.model.attention import segment_attention


@dataclass(frozen=True)
class PackedRow:
    """The shape of attention over one packed row."""

    heads: int
    key_heads: int
    head_dim: int
    segments: int
    tokens: int
    window: int | None = None

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        heads = f"{self.heads}/{self.key_heads} heads of {self.head_dim}"
        return f"{heads}, {counted(self.segments, 'segment')} in {self.tokens} tokens{window}"

    def equal_lengths(self) -> tuple[int, ...]:
        return (self.tokens // self.segments,) * self.segments

    def new_lengths(self, rng: random.Random) -> tuple[int, ...]:
        """Other lengths, of another sum, as each micro-batch of a real run has them."""
        tokens = rng.randint(self.tokens * 3 // 4, self.tokens)
        cuts = [0, *sorted(rng.sample(range(1, tokens), self.segments - 1)), tokens]
        return tuple(end - start for start, end in pairwise(cuts))


PACKED_ROWS = (
    PackedRow(14, 2, 64, 9, 1845),
    PackedRow(14, 2, 64, 39, 7995),
    PackedRow(28, 4, 128, 80, 8000),
    PackedRow(28, 4, 128, 8, 8192),
    PackedRow(28, 4, 128, 1, 4096),
    PackedRow(16, 8, 128, 2, 3500, window=512),
)
ERROR_LIMIT = 2e-2
"""Relative: bfloat16 has 8 bits."""
Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], "int | None"], Tensor]


def loop_over_segments(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    """(1, heads, T, D), (1, key heads, T, D) twice -> (1, T, heads, D), by torch's fused attention."""
    outputs = []
    for q, k, v in zip(*(tensor.split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True):
        mask = None if window is None else visible(q.shape[2], window, q.device)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def visible(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L) True where a query may look: at itself and the window - 1 places before it."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return (back >= 0) & (back < window)


def by_product(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """lora_core's own attention."""
    return segment_attention(nn.Identity(), query, key, value, None, segment_lengths=lengths, sliding_window=window)[0]


# How, and whether cuDNN's kernel is allowed. A run does not allow it (`build_accelerator`).
WAYS: dict[str, tuple[Attend, bool]] = {
    "loop over segments, cuDNN allowed": (loop_over_segments, True),
    "loop over segments, cuDNN not allowed": (loop_over_segments, False),
    "lora_core's segment_attention": (by_product, False),
}


def attention(setting: Setting) -> None:
    """How far each way is off, and how long it takes."""
    set_up_process()
    for row in PACKED_ROWS:
        if setting.dry_run:
            row = replace(row, tokens=row.tokens // 32, window=row.window and row.window // 32)
        print(row)
        for way, (attend, cudnn) in WAYS.items():
            with setting.attempt(f"{row}: {way}"), cudnn_allowed(cudnn):
                print(f"    {way}: {measure_attention(setting, row, attend)}")


@contextmanager
def cudnn_allowed(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def measure_attention(setting: Setting, row: PackedRow, attend: Attend) -> str:
    rng = random.Random(0)  # each way gets the same lengths
    new_lengths = [row.new_lengths(rng) for _ in range(1 if setting.dry_run else 3)]
    lengths = row.equal_lengths()
    inputs = random_inputs(setting, row, lengths)
    error = error_against_float32(attend, inputs, lengths, row.window)
    if not error < ERROR_LIMIT:
        setting.fail(f"{row}: off by more than {ERROR_LIMIT:.0e}")

    def time_of(inputs: Sequence[Tensor], lengths: tuple[int, ...]) -> float:
        return setting.milliseconds(lambda: forward_and_backward(attend, inputs, lengths, row.window))

    with_same = [time_of(inputs, lengths) for _ in range(3 if setting.dry_run else 12)][2:]
    with_new = [time_of(random_inputs(setting, row, lengths), lengths) for lengths in new_lengths]
    return (
        f"off by {error:.0e}; forward and backward {spread(with_same)} ms where lengths repeat, "
        f"{spread(with_new)} ms where they are new"
    )


def random_inputs(setting: Setting, row: PackedRow, lengths: tuple[int, ...]) -> list[Tensor]:
    """Query, key, value, and the gradient of the output."""
    generator = torch.Generator(setting.device).manual_seed(0)
    tokens = sum(lengths)
    shapes = [(1, heads, tokens, row.head_dim) for heads in (row.heads, row.key_heads, row.key_heads)]
    shapes.append((1, tokens, row.heads, row.head_dim))
    return [
        torch.randn(shape, generator=generator, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    ]


def forward_and_backward(
    attend: Attend, inputs: Sequence[Tensor], lengths: tuple[int, ...], window: int | None
) -> list[Tensor]:
    """The output, and the gradients to query, key and value."""
    query, key, value, to_output = inputs
    output = attend(query, key, value, lengths, window)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), to_output)]


def error_against_float32(
    attend: Attend, inputs: Sequence[Tensor], lengths: tuple[int, ...], window: int | None
) -> float:
    """The largest of the four relative errors."""
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = forward_and_backward(loop_over_segments, exact_inputs, lengths, window)
    given = forward_and_backward(attend, inputs, lengths, window)
    return max(float((one - other).norm() / other.norm()) for one, other in zip(given, exact, strict=True))
