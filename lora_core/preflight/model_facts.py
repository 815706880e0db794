"""What a model's config tells without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_core.config.schema import RunConfig
from lora_core.memory.without_storage import base_without_storage, num_hidden_layers
from lora_core.model.base import resolve_name


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config tells without its weights."""

    module_names: tuple[str, ...]
    """Dotted names of all modules of the first decoder layers."""
    linear_names: tuple[str, ...]
    """Last parts of the names of the linear layers, such as q_proj."""
    head_name: str | None
    embedding_name: str | None
    eos_token_ids: frozenset[int]
    """At which generation stops."""
    model_type: str
    hidden_size: int
    max_positions: int | None
    """The longest input that the model was made for, in tokens; None where its config does not say."""


def model_facts(config: RunConfig) -> ModelFacts:
    """Look at the model's modules.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    from transformers import GenerationConfig

    base = base_without_storage(config, min(2, num_hidden_layers(config)))
    text_config = base.config.get_text_config()
    named = dict(base.named_modules())
    name_of = {id(module): name.rsplit(".", 1)[-1] for name, module in named.items()}
    load: Any = GenerationConfig.from_pretrained
    revision = {} if config.model.revision is None else {"revision": config.model.revision}
    try:
        stops = load(resolve_name(config.model), **revision).eos_token_id
    except OSError:  # a model need not have one; its config then says where to stop
        stops = text_config.eos_token_id
    return ModelFacts(
        module_names=tuple(named),
        linear_names=tuple(dict.fromkeys(n.rsplit(".", 1)[-1] for n, m in named.items() if isinstance(m, nn.Linear))),
        head_name=name_of.get(id(base.get_output_embeddings())),
        embedding_name=name_of.get(id(base.get_input_embeddings())),
        eos_token_ids=frozenset([stops] if isinstance(stops, int) else stops or ()),
        model_type=text_config.model_type,
        hidden_size=text_config.hidden_size,
        max_positions=getattr(text_config, "max_position_embeddings", None),
    )
