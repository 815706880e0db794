"""Checks of what trains, and how: target modules, scale, learning rate, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from lora_core.config.schema import uses_bitsandbytes
from lora_core.preflight.findings import Facts, Finding
from lora_core.preflight.plan import suggested_rate

_LOWEST_RATE, _HIGHEST_RATE = 1e-5, 2e-3
_FAR = 3


def check_targets_exist(facts: Facts) -> Iterator[Finding]:
    """A name in `lora.target_modules` matches nothing in the model, or all that match are excluded.

    PEFT complains only when no name matches; otherwise the run would train without these, silently.

    The finding lists the linear layers of the model.
    """
    lora = facts.config.lora
    missing = dict(facts.model.without_match).get("target_modules", ())
    if not missing and facts.model.targeted:
        return
    linear, experts = _linear_layers(facts), facts.model.auto_targets.in_short()
    if missing or not lora.target_modules:
        what = f"{', '.join(missing) or 'an empty list'} matches nothing in this model"
    else:
        what = "all that match are in lora.exclude_modules, lora.modules_to_save or not in lora.layers_to_transform"
    hint = ""
    if isinstance(lora.target_modules, str) and lora.target_modules in linear:
        hint = " (a str is a regular expression for whole names; a list holds names)"
        linear = [lora.target_modules]
    yield Finding(
        "targets_missing",
        "error",
        f"lora.target_modules: {what}{hint}; its linear layers: {', '.join(_linear_layers(facts))}"
        + (f"; by lora.target_modules=auto also {', '.join(experts)}" if experts else ""),
        list(missing),
        linear,
        "lora.target_modules=auto" if experts else f"lora.target_modules=[{','.join(linear)}]",
    )


def check_starting_adapter(facts: Facts) -> Iterator[Finding]:
    """The adapter that training starts from (`model.adapter`) has another rank, scale or other targets than `lora`.

    Its tensors would not fit, or would mean another update than the one that was trained.

    The adapter's own settings, which the fix names.
    """
    differing = facts.model.adapter_differences
    if differing:
        words = ", ".join(f"lora.{key}={ours} and {theirs} in the adapter" for key, theirs, ours, _ in differing)
        yield Finding(
            "adapter_differs",
            "error",
            f"model.adapter={facts.config.model.adapter} was made with other settings: {words}",
            {key: ours for key, _, ours, _ in differing},
            {key: theirs for key, theirs, _, _ in differing},
            " ".join(fix for *_, fix in differing),
        )


def check_lora_names(facts: Facts) -> Iterator[Finding]:
    """A name, layer or token in another key of `lora` is not in the model.

    PEFT says nothing of a pattern, an exclusion or a module to save that matches no module: the run would train as if
    the key were not set. A layer or token that does not exist stops it later.

    Correct the name, or leave the key out.
    """
    unset = {"exclude_modules": "null", "layers_to_transform": "null", "trainable_token_indices": "null"}
    empty = {"modules_to_save": "[]", "rank_pattern": "{}", "alpha_pattern": "{}"}
    for key, missing in facts.model.without_match:
        if key != "target_modules":
            yield Finding(
                "lora_names_missing",
                "error",
                f"lora.{key}: {', '.join(missing)} matches nothing in this model"
                + (" that gets an adapter" if key.endswith("pattern") else ""),
                list(missing),
                None,
                f"lora.{key}={(unset | empty)[key]}",
            )


def _linear_layers(facts: Facts) -> list[str]:
    return [name for name in facts.model.linear_names if name != facts.model.head_name]


def check_targets_head(facts: Facts) -> Iterator[Finding]:
    """The output head or the embedding gets an adapter, or is trained whole.

    The head's cross-entropy then keeps all logits, which costs more memory than everything else together, and a tied
    embedding changes with it.

    Adapters on the layers between learn the same at a fraction of the cost. New tokens need their embeddings trained:
    `lora.trainable_token_indices` trains those alone.
    """
    lora, ends = facts.config.lora, [name for name in (facts.model.head_name, facts.model.embedding_name) if name]
    hit = [name for name in dict.fromkeys(n.rsplit(".", 1)[-1] for n in facts.model.targeted) if name in ends]
    if hit:
        rest = [t for t in lora.target_modules if t not in hit] if isinstance(lora.target_modules, list) else []
        yield Finding(
            "targets_head",
            "warning",
            f"lora.target_modules: {', '.join(hit)} is the output head or the embedding; every logit is kept in memory",
            hit,
            [],
            f"lora.target_modules=[{','.join(rest or _linear_layers(facts))}]",
        )
    whole = [name for name in lora.modules_to_save if name.rsplit(".", 1)[-1] in ends]
    if whole:
        yield Finding(
            "trains_head",
            "note",
            f"lora.modules_to_save: {', '.join(whole)} is the output head or the embedding, trained whole in float32 "
            "and saved with the adapter; every logit is kept in memory",
            whole,
            [],
            None,
        )


def check_targets(facts: Facts) -> Iterator[Finding]:
    """The adapter sits on the attention's q and v only.

    Adapters on all linear layers learn more from the same rows; the README has figures.

    Name all seven projections.
    """
    parts = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in facts.model.targeted))
    if parts and set(parts) <= {"q_proj", "v_proj"}:
        linear = _linear_layers(facts)
        yield Finding(
            "targets_q_v_only",
            "warning",
            f"LoRA on {', '.join(parts)} only; adapters on all linear layers learn more from the same rows",
            parts,
            linear,
            f"lora.target_modules=[{','.join(linear)}]",
        )


def check_experts(facts: Facts) -> Iterator[Finding]:
    """The adapter goes on fused experts, for which PEFT has neither DoRA nor dropout.

    All experts of a layer are slices of one parameter; PEFT adds the adapter's product to it, and never sees an input
    that it could drop from. It reaches layers beside experts (a shared expert, a dense layer) in the same way where it
    takes their names for the experts'. The others keep `lora.dropout`, and the saved adapter says 0, so that PEFT loads
    it.

    For DoRA: `lora.use_dora=false`, or `lora.target_modules=all-linear`, which leaves such experts out.
    """
    lora, experts = facts.config.lora, facts.model.auto_targets.in_short()
    if lora.target_modules != "auto" or not experts:
        return
    if lora.use_dora:
        yield Finding(
            "experts_dora",
            "error",
            f"lora.use_dora=true: PEFT has no DoRA for what it reaches as parameters ({', '.join(experts)})",
            True,
            False,
            "lora.use_dora=false",
        )
    if lora.dropout > 0:
        yield Finding(
            "experts_without_dropout",
            "note",
            f"lora.dropout={lora.dropout:g} is not applied to {', '.join(experts)}: PEFT reaches them as parameters, "
            "and has no dropout there; the other layers keep it",
            lora.dropout,
            0,
            None,
        )


def check_causal(facts: Facts) -> Iterator[Finding]:
    """The model is an encoder: each token sees those after it.

    It would learn to copy the next token, which it sees, and a loss near 0 would say nothing of the replies that it
    writes.

    Another model. One of BERT's kind that was trained to write has `"is_decoder": true` in its config.json.
    """
    if facts.model.is_encoder:
        yield Finding(
            "not_causal",
            "error",
            f"model.name_or_path={facts.config.model.name_or_path}: a {facts.model.model_type} model whose config.json "
            "does not say is_decoder=true; its tokens see those after them, which they should predict",
            False,
            True,
            None,
        )


def check_idle_adapters(facts: Facts) -> Iterator[Finding]:
    """No gradient reaches some of the adapter: text does not pass these layers, or only through a choice.

    They would be saved as they began, and make the file larger: layers of an image tower, or of what chooses which
    tokens or experts are looked at.

    Leave them out: `lora.target_modules=auto`, or names without these.
    """
    idle = facts.memory.idle_adapters if facts.memory is not None else ()
    if idle:
        names = sorted({".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in idle})
        yield Finding(
            "adapter_idle",
            "warning",
            f"no gradient reaches the adapter on {', '.join(names)} (such as {idle[0]}), so it does not train there",
            list(idle),
            [],
            None if facts.config.lora.target_modules == "auto" else "lora.target_modules=auto",
        )


def check_packing_off(facts: Facts) -> Iterator[Finding]:
    """The model cannot keep packed examples apart, so they are padded.

    A state-space layer, linear attention or a convolution hands something of each token to the next, over the border of
    examples too. Padded micro-batches give the same gradient and compute their padding for nothing.

    No action is needed; rows of like length go together already. `data.packing=true` asks for packing by name and is
    refused here.
    """
    problem = facts.model.packing_problem
    if problem is None:
        return
    if facts.config.data.packing is True:
        yield Finding(
            "packing_impossible",
            "error",
            f"data.packing=true: this model cannot be packed: {problem}",
            True,
            False,
            "data.packing=false",
        )
    else:
        yield Finding(
            "packing_off", "note", f"examples are padded: this model cannot be packed: {problem}", False, False, None
        )


def check_dora(facts: Facts) -> Iterator[Finding]:
    """`lora.use_dora` is on.

    DoRA computes the norm of every adapted weight in each step, and its layers are PEFT's own in place of the lean ones
    here: more time and memory a step. What it learns more is small once the rate suits.

    No action is needed; compare its eval loss with plain LoRA's.
    """
    if facts.config.lora.use_dora:
        yield Finding(
            "dora_costs",
            "note",
            "lora.use_dora=true takes the norm of every adapted weight in each step, in PEFT's own layers: more time "
            "and memory than plain LoRA",
            True,
            False,
            None,
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
    (135M parameters, 78 rows, 50 steps, all seven projections) eval loss fell from 3.42 to 2.77 with 5e-5, 2.31 with
    1e-4, 1.80 with 2e-4, 1.00 with 5e-4, 0.32 with 1e-3 and 0.12 with 2e-3. Other models and rows may differ.

    `train.learning_rate=auto`, and let eval loss decide; for a note no action is needed.
    """
    rate, steps = facts.plan.learning_rate, facts.plan.total_optimizer_steps
    formula = suggested_rate(facts.config, facts.model.model_type, facts.model.hidden_size, steps)
    if "adamw" not in facts.config.train.optim:  # the formula and the limits are AdamW's
        return
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
            " (a 135M model after 50 steps on 78 rows, eval loss 3.42 before: 2.77 with 5e-5, 0.32 with 1e-3)"
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
    """An optimizer of bitsandbytes cannot run here, or not paged.

    bitsandbytes has no kernels for Apple's GPUs, and its 8-bit state cannot be sharded by FSDP. Paging is a CUDA
    feature: elsewhere the same optimizer runs without it, which changes no result. On a CPU its 8 bits cost time: 7% of
    a step of the demo, for which adamw_torch needs 6 bytes more per trainable parameter.

    `train.optim=adamw_torch`: the state of an adapter is small.
    """
    optim, environment = facts.config.train.optim, facts.environment
    if not uses_bitsandbytes(optim):
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
            f"train.optim={optim} runs without paging on {environment.device.kind}, as paging needs CUDA; adamw_torch "
            "takes less time here",
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
