"""Claim: most of an optimizer step (the bar is three quarters) is matrix products that the maths requires.

    python benchmarks/roofline.py [--rows FILE.jsonl] [--alternations 5] [key=value ...]

The demo's model, LoRA as `configs/base.yaml` has it (rank 16, all seven projections), bfloat16, 8 conversations a step,
packed as the loop packs them. In one process, in turn: an optimizer step, and then the products that this step needs,
alone, at its own shapes and with the model's own weights:

    base layers    forward, and the gradient to the input (not of q, k, v of the first layer: nothing trains below)
    LoRA           A and B forward, the gradients to both, and through both to the input
    attention      scores and values of every segment, forward, and their four gradients; whole squares, as the loop
                   computes them, of which causal attention uses half
    head           logits where the next token is a loss token, and the gradient to their hidden states

Every product runs once before it is timed, so that no time is spent on compiling kernels; the step has no such help,
because its shapes are new with every batch. On one core, the times are the process's own CPU time. Then as many steps
are profiled, and every operation counted under the part of the model that it belongs to, in the backward under the
part whose gradient it computes.

Prints tables, writes roofline.json.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own marks

import common
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.models.llama import modeling_llama

from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import train_batching
from lora_core.model import attention, lora_linear, loss
from lora_core.model.attention import causal_lm_of
from lora_core.model.base import load_base_model, load_tokenizer
from lora_core.model.lora_linear import BitMask, use_lean_lora

BAR = 0.75
WARM_UP_STEPS = 3
Product = Callable[[], Tensor]


def required_products(model: nn.Module, batch: dict[str, Any]) -> dict[str, list[Product]]:
    """Part of the model -> its products, ready to run."""
    config = causal_lm_of(model).config
    num_tokens = batch["input_ids"].shape[1]
    products: dict[str, list[Product]] = {"base layers": [], "LoRA": [], "attention": [], "head": []}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            # Nothing trains before q, k and v of the first layer: their input needs no gradient.
            to_input = ".layers.0.self_attn." not in name or name.endswith("o_proj")
            products["base layers"] += of_linear(layer.get_base_layer().weight, num_tokens, to_input)
            products["LoRA"] += of_adapter(layer, num_tokens, to_input)
    heads = config.num_attention_heads, config.num_key_value_heads
    for length in batch["segment_lengths"] * config.num_hidden_layers:
        products["attention"] += of_attention(*heads, config.head_dim, length)
    head = causal_lm_of(model).get_output_embeddings().weight
    products["head"] += of_linear(head, int(batch["loss_mask"].sum()), to_input=True)
    return products


def of_linear(weight: Tensor, num_tokens: int, to_input: bool) -> Iterator[Product]:
    """weight: (out, in)."""
    out_features, in_features = weight.shape
    yield partial(torch.mm, values(num_tokens, in_features), weight.t())
    if to_input:
        yield partial(torch.mm, values(num_tokens, out_features), weight)


def of_adapter(layer: Any, num_tokens: int, to_input: bool) -> Iterator[Product]:
    a = layer.lora_A["default"].weight.detach().bfloat16()  # (r, in)
    b = layer.lora_B["default"].weight.detach().bfloat16()  # (out, r)
    x, inner, y = (values(num_tokens, size) for size in (a.shape[1], a.shape[0], b.shape[0]))
    yield partial(torch.mm, x, a.t())
    yield partial(torch.mm, inner, b.t())
    yield partial(torch.mm, y, b)  # to inner
    yield partial(torch.mm, inner.t(), x)  # to A
    yield partial(torch.mm, y.t(), inner)  # to B
    if to_input:
        yield partial(torch.mm, inner, a)


def of_attention(heads: int, key_heads: int, dim: int, length: int) -> Iterator[Product]:
    """One segment. The query heads that share a key head are rows of one product."""
    rows = heads // key_heads * length
    query, scores = values(key_heads, rows, dim), values(key_heads, rows, length)
    key = values(key_heads, length, dim)
    yield partial(torch.bmm, query, key.transpose(1, 2))  # scores
    yield partial(torch.bmm, scores, key)  # output
    yield partial(torch.bmm, query, key.transpose(1, 2))  # to weights
    yield partial(torch.bmm, scores.transpose(1, 2), query)  # to values
    yield partial(torch.bmm, scores, key)  # to queries
    yield partial(torch.bmm, scores.transpose(1, 2), query)  # to keys


_values: dict[tuple[int, ...], Tensor] = {}


def values(*shape: int) -> Tensor:
    """Random values; one tensor a shape, so that all layers share it."""
    if shape not in _values:
        _values[shape] = torch.randn(shape, dtype=torch.bfloat16)
    return _values[shape]


@torch.no_grad()
def run_all(products: Sequence[Product]) -> None:
    for product in products:
        product()


# Names of operations that are products, wherever they run.
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mkldnn_linear", "linear")}
PARTS = (
    "norms",
    "rotary positions",
    "attention: softmax, mask, copies",
    "activation of the MLP",
    "LoRA: dropout masks",
    "LoRA and base layers: casts and copies",
    "cross-entropy",
    "residual sums, sums of gradients, embedding",
    "clipping and optimizer",
)
NORMS, ROTARY, ATTENTION, ACTIVATION, DROPOUT, LINEAR, CROSS_ENTROPY, OTHER, OPTIMIZER = PARTS


def named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with everything in it counted under a part."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return wrapped


class NamedBitMask:
    """`BitMask`, counted under its part."""

    draw = staticmethod(named(DROPOUT, BitMask.draw))
    pack = staticmethod(named(DROPOUT, BitMask.pack))
    unpack = staticmethod(named(DROPOUT, BitMask.unpack))
    apply = staticmethod(named(DROPOUT, BitMask.apply))


def name_parts(training: common.Training) -> None:
    """Mark the parts of the model and of the step for the profiler."""
    use_lean_lora(training.model.model, NamedBitMask)
    for module in training.model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            name_method(module, "forward", NORMS)
        elif isinstance(module, modeling_llama.LlamaMLP):
            name_method(module, "forward", ACTIVATION)  # the linear layers in it have their own name
    name_method(modeling_llama, "apply_rotary_pos_emb", ROTARY)
    name_method(attention, "segment_attention", ATTENTION)
    attention.use_segment_attention(training.model.model)
    name_method(training.accelerator, "clip_grad_norm_", OPTIMIZER)
    name_method(training.optimizer, "step", OPTIMIZER)
    name_method(training.optimizer, "zero_grad", OPTIMIZER)
    # Functions of autograd; the layer's has both kinds of products, and casts.
    for function, part in (
        (lora_linear._LoraLinear, LINEAR),
        (attention._ShortSegments, ATTENTION),
        (loss._HeadLoss, CROSS_ENTROPY),
    ):
        for direction in ("forward", "backward"):
            setattr(function, direction, staticmethod(named(part, getattr(function, direction))))


def name_method(owner: Any, method: str, part: str) -> None:
    setattr(owner, method, named(part, getattr(owner, method)))


def profile_step(training: common.Training, batches: common.Batches) -> dict[str, float]:
    """Name -> wall seconds of one step (the profiler knows no other). What is in no operation is Python's."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        training.step(batches)
        whole = time.perf_counter() - started
    events = sorted(profiled.events() or [], key=lambda event: event.time_range.start)
    parts = part_of_each(events)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event, part in zip(events, parts, strict=True):
        if event.name.startswith(("aten::", "mkldnn", "torch::", "bitsandbytes::")):
            seconds["matrix products" if event.name in PRODUCTS else part] += event.self_cpu_time_total / 1e6
        elif part in (DROPOUT, OPTIMIZER) and event.name in PARTS:
            seconds[part] += event.self_cpu_time_total / 1e6  # numpy, bitsandbytes
    seconds["Python, autograd and dispatch between operations"] = whole - sum(seconds.values())
    return dict(seconds)


def part_of_each(events: Sequence[Any]) -> list[str]:
    """The part of each operation: the innermost marked one around it, or around what it is the gradient of.

    Autograd numbers its nodes: an operation of the forward and its gradient have the same number.
    """
    part_of_node: dict[int, str] = {}
    parts = []
    for event in events:
        part, node = None, None
        around = event
        while around is not None and part is None:
            if around.name in PARTS:
                part = around.name
            elif around.name.startswith("autograd::engine::evaluate_function"):
                node = around.sequence_nr
                part = part_of_node.get(node, OTHER)
            around = around.cpu_parent
        part = part or OTHER
        if node is None and event.sequence_nr >= 0:
            part_of_node[event.sequence_nr] = part
        parts.append(part)
    return parts


def main() -> None:
    parser = common.options_of(__doc__, "roofline.json", "--rows", "--alternations", "overrides")
    options = parser.parse_args()
    config = common.base_config(
        f"model.name_or_path={common.DEMO_MODEL}", f"data.train_file={options.rows}", *options.overrides
    )
    accelerator = common.cpu_accelerator(config)
    tokenizer = load_tokenizer(config.model)
    data, _ = load_data(config, tokenizer)
    base = load_base_model(config.model, accelerator.device, packing=True)
    training = common.set_up(config, accelerator, base, len(data.lengths))
    batches_of = partial(training.batches, data, train_batching(config, pad_id(tokenizer)))

    for step in range(WARM_UP_STEPS):
        training.step(batches_of(step))
    step_s: list[float] = []
    product_s: list[dict[str, float]] = []
    for step in range(WARM_UP_STEPS, WARM_UP_STEPS + options.alternations):
        batches = batches_of(step)
        step_s.append(common.seconds_of(partial(training.step, batches)))
        of_step: defaultdict[str, float] = defaultdict(float)
        for batch in batches:
            for part, products in required_products(training.model.model, batch).items():
                run_all(products)
                of_step[part] += common.seconds_of(partial(run_all, products))
        _values.clear()
        product_s.append(dict(of_step))
        tokens = sum(batch["input_ids"].shape[1] for batch in batches)
        share = sum(of_step.values()) / step_s[-1]
        print(f"step {step}: {tokens} tokens in {step_s[-1]:.1f} s, products {share:.3f} of it", flush=True)
    name_parts(training)
    first = WARM_UP_STEPS + options.alternations
    profiles = [profile_step(training, batches_of(step)) for step in range(first, first + options.alternations)]

    whole = common.ratios([sum(of_step.values()) for of_step in product_s], step_s)
    rows = [
        [part, common.spread(common.ratios([of_step[part] for of_step in product_s], step_s), ".3f")]
        for part in product_s[0]
    ]
    rows.append(
        [f"**all** (bar {BAR}: {common.met(statistics.median(whole) >= BAR)})", f"**{common.spread(whole, '.3f')}**"]
    )
    shares = {name: [parts[name] / sum(parts.values()) for parts in profiles] for name in profiles[0]}
    by_size = sorted(shares.items(), key=lambda item: -statistics.median(item[1]))
    table = common.markdown(["required products alone / step", ""], rows)
    table += "\n\n" + common.markdown(
        ["where a step goes (profiled)", "share"], [[name, common.spread(each, ".1%")] for name, each in by_size]
    )
    common.write(
        options.output,
        table,
        rows=str(options.rows),
        overrides=options.overrides,
        bar=BAR,
        step_s=step_s,
        product_s=product_s,
        profile_s=profiles,
    )


if __name__ == "__main__":
    main()
