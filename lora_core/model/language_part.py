"""A checkpoint that also sees or hears, loaded for its language part: what text does not pass is left out.

Its own class is loaded, and not the family's class for text alone, so that weights and adapter have the names that they
have for whoever loads the whole checkpoint. Towers (what encodes images and sound, and what leads from there to the
decoder) are taken out before weights are read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_core.model.attention import attention_of_text, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OUT = "_lora_core_left_out"


def model_class(model_config: Any) -> Any:
    """The class that loads a checkpoint with this config: `AutoModelForCausalLM`, but for a composite config its own
    class without its towers, and for a text config that `AutoModelForCausalLM` does not know the class it names."""
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

    is_composite = model_config.get_text_config() is not model_config and not model_config.is_encoder_decoder
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(model_config), None) if is_composite else None
    if whole is not None and not whole.__name__.endswith("Diffusion"):  # which fills in blocks, not token after token
        return _without_towers(whole)
    if type(model_config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    named = getattr(transformers, (model_config.architectures or [""])[0] or "-", None)
    has_head = str(getattr(named, "__name__", "")).endswith("ForCausalLM")
    is_own = getattr(named, "config_class", None) is type(model_config)
    return named if has_head and is_own else AutoModelForCausalLM


def _without_towers(whole: Any) -> Any:
    """The same class, by the same name, whose instances have no towers by the time that weights are read."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        names = _towers(self)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, None)
        setattr(self, _LEFT_OUT, names)
        # Where the language part is a causal LM of its own, text goes straight to it: in transformers 5.24, Llama 4's
        # whole forward reads outputs that it only has with images.
        inner = self.get_decoder()
        if inner is not self and inner.get_output_embeddings() is not None:
            self.forward = inner.forward
        in_files = {rf"^{re.escape(name)}\." for name in names}
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *in_files}

    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


def _towers(model: Any) -> list[str]:
    """Dotted names of the largest modules that hold nothing of the decoder, the embedding and the head."""
    parts = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(module) for part in parts if part is not None for module in part.modules()}

    def beside(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if id(child) in kept:
                continue
            if any(id(inner) in kept for inner in child.modules()):
                yield from beside(child, f"{prefix}{name}.")
            else:
                yield prefix + name

    return [*beside(model, "")]


def as_whole_class(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of transformers' own class again: PEFT writes the class into the adapter's config."""
    if hasattr(model, _LEFT_OUT):
        model.__class__ = type(model).__mro__[1]
    return model


def from_config(model_config: Any, dtype: Any, attention: str) -> PreTrainedModel:
    """The model with random weights, or on the meta device none. The config becomes the model's own."""
    found = model_class(model_config)
    build = found.from_config if hasattr(found, "from_config") else found._from_config
    return as_whole_class(
        build(model_config, dtype=dtype, attn_implementation=attention_of_text(model_config, attention))
    )


def has_sdpa(model_config: Any) -> bool:
    """Whether the family has an implementation of attention by SDPA; True too where there is no such family."""
    found = model_class(model_config)
    if hasattr(found, "_model_mapping"):
        known = type(model_config) in found._model_mapping
        found = found._model_mapping[type(model_config)] if known else None
    return bool(getattr(found, "_supports_sdpa", True))


def left_out(model: Any) -> list[str]:
    """Dotted names of the towers that were taken out."""
    return [*getattr(model, _LEFT_OUT, ())]


def layers_of_images(model: Any) -> list[int]:
    """Numbers of the decoder's layers that attend to images, and that text alone does not pass."""
    text_config = model.config.get_text_config()
    numbers = getattr(text_config, "cross_attention_layers", None) or ()
    return [number for number in numbers if number < text_config.num_hidden_layers]


def without_text(model: Any) -> str | None:
    """A regular expression over names of the modules that text does not pass: towers, and layers that attend to
    images. None where there are none. For PEFT's `exclude_modules`."""
    names = left_out(model)
    if layers := layers_of_images(model):
        decoder = decoder_of(model)
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        names += [f"{prefix}.layers.{layer}" for layer in layers]
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in names) or None


@contextmanager
def towers_may_be_out() -> Iterator[None]:
    """PEFT warns where `exclude_modules` finds nothing, as here, where the towers are gone. Of a wrong name in
    `lora.exclude_modules` preflight tells."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You have passed exclude_modules")
        yield
