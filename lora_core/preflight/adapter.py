"""Checks of what trains, and how: target modules, scale, learning rate, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from lora_core.preflight.findings import Facts, Finding
from lora_core.preflight.plan import suggested_rate

_LOWEST_RATE, _HIGHEST_RATE = 1e-5, 2e-3
_FAR = 3


def check_targets_exist(facts: Facts) -> Iterator[Finding]:
    """A name in `lora.target_modules` matches nothing in the model.

    PEFT complains only when no name matches; otherwise the run would train without these, silently.

    The finding lists the linear layers of the model.
    """
    targets = facts.config.lora.target_modules
    if isinstance(targets, str):
        return
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in facts.model.module_names)]
    if missing or not targets:
        linear = [name for name in facts.model.linear_names if name != facts.model.head_name]
        yield Finding(
            "targets_missing",
            "error",
            f"lora.target_modules: {', '.join(missing) or 'an empty list'} matches nothing in this model; its linear "
            f"layers: {', '.join(linear)}",
            missing,
            linear,
            f"lora.target_modules=[{','.join(linear)}]",
        )


def check_targets_head(facts: Facts) -> Iterator[Finding]:
    """An adapter sits on the output head or the embedding.

    The head's cross-entropy then keeps all logits, which costs more memory than everything else together, and a tied
    embedding changes with it.

    Adapters on the layers between learn the same at a fraction of the cost.
    """
    targets = facts.config.lora.target_modules
    ends = [name for name in (facts.model.head_name, facts.model.embedding_name) if name]
    hit = [target for target in targets if target in ends] if isinstance(targets, list) else []
    if hit:
        rest = [target for target in targets if target not in hit] or facts.model.linear_names
        yield Finding(
            "targets_head",
            "warning",
            f"lora.target_modules: {', '.join(hit)} is the output head or the embedding; every logit is kept in memory",
            hit,
            [],
            f"lora.target_modules=[{','.join(rest)}]",
        )


def check_targets(facts: Facts) -> Iterator[Finding]:
    """The adapter sits on the attention's q and v only.

    Adapters on all linear layers learn more from the same rows; the README has figures.

    Name all seven projections.
    """
    targets = facts.config.lora.target_modules
    if isinstance(targets, list) and targets and set(targets) <= {"q_proj", "v_proj"}:
        linear = [name for name in facts.model.linear_names if name != facts.model.head_name]
        yield Finding(
            "targets_q_v_only",
            "warning",
            f"LoRA on {', '.join(targets)} only; adapters on all linear layers learn more from the same rows",
            targets,
            linear,
            f"lora.target_modules=[{','.join(linear)}]",
        )


def check_alpha(facts: Facts) -> Iterator[Finding]:
    """alpha / rank, the scale of the update, is outside 0.5 to 4.

    It multiplies the learning rate of the adapter's product, so a scale of 12 is a learning rate 12 times as high.

    alpha = 2 x rank is usual.
    """
    lora = facts.config.lora
    scale = lora.alpha / lora.rank
    if not lora.use_rslora and not 0.5 <= scale <= 4:
        yield Finding(
            "alpha_unusual",
            "warning",
            f"lora.alpha={lora.alpha} with lora.rank={lora.rank} scales the update by {scale:g}; 1 or 2 is usual",
            scale,
            [0.5, 4],
            f"lora.alpha={2 * lora.rank}",
        )


def check_learning_rate(facts: Facts) -> Iterator[Finding]:
    """The learning rate is far from what a published formula gives, or outside the range in which LoRA trains.

    A warning: below 1e-5 the adapter hardly moves from zero, and AdamW above 2e-3 diverges with most models. A note: it
    is more than 3 times, or less than a third, of what `train.learning_rate=auto` gives. In benchmarks/diagnosis.py
    (135M parameters, 78 rows, 50 steps, all seven projections) eval loss fell from 3.42 to 2.87 with 5e-5, 2.36 with
    1e-4, 1.83 with 2e-4 and 1.05 with 5e-4. Other models and rows may differ.

    `train.learning_rate=auto`, and let eval loss decide; for a note no action is needed.
    """
    rate, steps = facts.plan.learning_rate, facts.plan.total_optimizer_steps
    formula = suggested_rate(facts.config, facts.model.model_type, facts.model.hidden_size, steps)
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        yield Finding(
            "learning_rate_unusual",
            "warning",
            f"train.learning_rate={rate:g} is {'low' if rate < _LOWEST_RATE else 'high'} for LoRA with AdamW; "
            f"train.learning_rate=auto gives {formula}",
            rate,
            [_LOWEST_RATE, _HIGHEST_RATE],
            f"train.learning_rate={formula.value:g}",
        )
    elif not formula.value / _FAR <= rate <= formula.value * _FAR:
        factor = max(rate / formula.value, formula.value / rate)
        measured = (
            " (a 135M model after 50 steps on 78 rows, eval loss 3.42 before: 2.87 with 5e-5, 1.05 with 5e-4)"
            if rate < formula.value
            else ""
        )
        yield Finding(
            "learning_rate_differs",
            "note",
            f"train.learning_rate={rate:g} is {factor:.1f} times {'below' if rate < formula.value else 'above'} "
            f"{formula.value:g}, which train.learning_rate=auto gives: {formula}{measured}",
            rate,
            formula.value,
            None,
        )


def check_optimizer(facts: Facts) -> Iterator[Finding]:
    """The 8-bit or paged optimizer cannot run here.

    bitsandbytes has no kernels for Apple's GPUs, and its 8-bit state cannot be sharded by FSDP. Paging is a CUDA
    feature: elsewhere the same optimizer runs without it, which changes no result. On a CPU its 8 bits cost time: 7% of
    a step of the demo, for which adamw_torch needs 6 bytes more per trainable parameter.

    `train.optim=adamw_torch`: the state of an adapter is small.
    """
    optim, environment = facts.config.train.optim, facts.environment
    if optim == "adamw_torch":
        return
    if environment.device.kind == "mps" or environment.sharding == "fsdp":
        where = "FSDP cannot shard its state" if environment.sharding == "fsdp" else "there are no kernels for MPS"
        yield Finding(
            "optimizer_cannot_run",
            "error",
            f"train.optim={optim} cannot run here: {where}",
            optim,
            "adamw_torch",
            "train.optim=adamw_torch",
        )
    elif optim.startswith("paged") and environment.device.kind != "cuda":
        yield Finding(
            "optimizer_not_paged",
            "note",
            f"train.optim={optim} runs as plain 8-bit AdamW on {environment.device.kind}; paging needs CUDA, and "
            "adamw_torch takes less time here",
            optim,
            "adamw_torch",
            "train.optim=adamw_torch",
        )


def check_fsdp_quantization(facts: Facts) -> Iterator[Finding]:
    """A quantized model under FSDP is stored in a type that FSDP cannot shard.

    FSDP casts what it gathers to the type that is computed in, and 4-bit weights packed in another type would become
    other weights. It leaves weights that are stored as bytes whole on each GPU. int8 weights cannot take part.

    `model.quant_storage` the type that is computed in: bfloat16, or `model.dtype` where `train.bf16` is off; for int8,
    NF4 or no quantization.
    """
    model = facts.config.model
    computes_in = model.dtype if facts.config.train.bf16 is False else "bfloat16"
    if facts.environment.sharding != "fsdp" or model.quantization == "none":
        return
    if model.quantization == "int8":
        yield Finding(
            "fsdp_quant_storage",
            "error",
            "model.quantization=int8 cannot be sharded by FSDP",
            "int8",
            "nf4",
            f"model.quantization=nf4 model.quant_storage={computes_in}",
        )
    elif model.quant_storage != computes_in:
        yield Finding(
            "fsdp_quant_storage",
            "error",
            f"model.quant_storage={model.quant_storage}: FSDP shards NF4 weights only if they are stored as the type "
            f"that is computed in, {computes_in}",
            model.quant_storage,
            computes_in,
            f"model.quant_storage={computes_in}",
        )
