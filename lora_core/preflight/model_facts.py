"""What a model's config tells without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.errors import ConfigError
from lora_core.memory.without_storage import base_without_storage, num_hidden_layers, quantized_without_storage
from lora_core.model.base import add_adapter, load_model_config, resolve_name
from lora_core.model.decoder import is_encoder, why_not_packed
from lora_core.model.language_part import left_out
from lora_core.model.lora_settings import differs_by_layer, linear_names, names_without_match, targeted_names
from lora_core.model.starting_adapter import differing_settings, find_starting_adapter
from lora_core.model.targets import Targets, find_targets, without_adapter


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config tells without its weights."""

    module_names: tuple[str, ...]
    """Dotted names of all modules: of the first decoder layers, or of all where the adapters of layers differ."""
    targeted: tuple[str, ...]
    """Dotted names of those that get an adapter."""
    without_match: tuple[tuple[str, tuple[str, ...]], ...]
    """(key of `lora`, those of its values that match nothing), where there are any."""
    linear_names: tuple[str, ...]
    """Last parts of the names of the linear layers, such as q_proj."""
    adapter_differences: tuple[tuple[str, Any, Any, str], ...]
    """(key of `lora`, its value in `model.adapter`, its value here, the override that takes the adapter's)."""
    dtype: str
    """Of the frozen weights, such as bfloat16."""
    packing_problem: str | None
    """Why this model's examples cannot be packed; None if they can."""
    is_encoder: bool
    """Each token sees those after it, as in BERT; nothing is left to predict."""
    has_checkpointing: bool
    """Its layers can be computed again in the backward (`train.gradient_checkpointing`)."""
    auto_targets: Targets
    """What `lora.target_modules: auto` stands for."""
    vocab_size: int
    """Rows of the embedding."""
    head_name: str | None
    embedding_name: str | None
    eos_token_ids: frozenset[int]
    """At which generation stops."""
    model_type: str
    hidden_size: int
    max_positions: int | None
    """The longest input that the model was made for, in tokens; None where its config does not say."""
    towers: tuple[str, ...]
    """Dotted names of what encodes images and sound, and is not loaded."""
    without_adapter: tuple[tuple[str, float], ...]
    """What of the decoder's layers `lora.target_modules: auto` does not reach, such as mlp.w1: its share of them."""
    router_loss: float
    """How much the config wants of the auxiliary loss of its experts' routers; 0 for none."""


def model_facts(config: RunConfig) -> ModelFacts:
    """Look at the model's modules.

    Raises:
        ConfigError: the model's config cannot be read, or there is no adapter where `model.adapter` says.
    """
    from transformers import GenerationConfig

    start = find_starting_adapter(config.model)
    num_layers = num_hidden_layers(config)
    base = base_without_storage(config, num_layers) if differs_by_layer(config.lora) else base_of_each_kind(config)
    dtype, packing_problem = str(base.dtype).removeprefix("torch."), why_not_packed(base)
    base = quantized_without_storage(base, config.model)  # PEFT reaches less of it then; it does not run here
    text_config = base.config.get_text_config()
    named = dict(base.named_modules())
    targeted = targeted_names(base, config.lora)
    vocab_size = base.get_input_embeddings().weight.shape[0]
    unmatched = names_without_match(config.lora, [*named], targeted, num_layers, vocab_size)
    name_of = {id(module): name.rsplit(".", 1)[-1] for name, module in named.items()}
    load: Any = GenerationConfig.from_pretrained
    revision = {} if config.model.revision is None else {"revision": config.model.revision}
    try:
        stops = load(resolve_name(config.model), **revision).eos_token_id
    except OSError:  # a model need not have one; its config then says where to stop
        stops = text_config.eos_token_id
    return ModelFacts(
        module_names=tuple(named),
        targeted=tuple(targeted),
        without_match=tuple((key, tuple(map(str, values))) for key, values in unmatched if values),
        linear_names=tuple(linear_names(base)),
        adapter_differences=tuple(differing_settings(start, config.lora)) if start is not None else (),
        dtype=dtype,
        packing_problem=packing_problem,
        is_encoder=is_encoder(base),
        has_checkpointing=bool(base.supports_gradient_checkpointing),
        auto_targets=_auto_targets(base),
        vocab_size=vocab_size,
        head_name=name_of.get(id(base.get_output_embeddings())),
        embedding_name=name_of.get(id(base.get_input_embeddings())),
        eos_token_ids=frozenset([stops] if isinstance(stops, int) else stops or ()),
        model_type=text_config.model_type,
        hidden_size=text_config.hidden_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
        towers=tuple(left_out(base)),
        router_loss=_router_loss(text_config),
        without_adapter=_without_adapter(base, config),  # last: it changes the base
    )


def base_of_each_kind(config: RunConfig) -> Any:
    """The base model without storage, with as few layers as show every kind that it has; at least two."""
    text_config = load_model_config(config.model).get_text_config()
    number = num_hidden_layers(config)
    by_layer = [value for value in text_config.to_dict().values() if isinstance(value, list) and len(value) == number]
    kinds = [*zip(*by_layer, strict=True)] if by_layer else [()] * number
    last_new = max(kinds.index(kind) for kind in kinds)
    # Some families have dense layers first, or experts in every so many layers, and say so by a number.
    spaced = [getattr(text_config, name, None) for name in ("first_k_dense_replace", "decoder_sparse_step")]
    more = max([step for step in spaced if isinstance(step, int)], default=0) + 1
    return base_without_storage(config, min(number, max(2, last_new + 1, more)))


def _router_loss(text_config: Any) -> float:
    if not getattr(text_config, "output_router_logits", False):
        return 0.0
    return float(getattr(text_config, "router_aux_loss_coef", None) or 0.0)


def _auto_targets(base: Any) -> Targets:
    try:
        return find_targets(base)
    except ConfigError:  # a run that asks for them is told
        return Targets([], [])


def _without_adapter(base: Any, config: RunConfig) -> tuple[tuple[str, float], ...]:
    if config.lora.target_modules != "auto" or config.lora.exclude_modules or config.lora.layers_to_transform:
        return ()
    targets = _auto_targets(base)
    try:
        return tuple(without_adapter(add_adapter(base, config.lora, config.train.seed), targets).items())
    except ConfigError:  # a finding says what is wrong with `lora`
        return ()


def with_packing(config: RunConfig) -> RunConfig:
    """The configuration with `data.packing: auto` made true or false; a finding says where and why it is false.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    if config.data.packing != "auto":
        return config
    problem = why_not_packed(base_of_each_kind(config))
    return with_overrides(config, [f"data.packing={'false' if problem else 'true'}"])
