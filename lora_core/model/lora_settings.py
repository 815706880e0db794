"""The keys of `lora` as PEFT takes them, and what of them finds nothing in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_core.config.schema import LoraConfig
from lora_core.errors import ConfigError
from lora_core.model.language_part import without_text
from lora_core.model.targets import Targets, find_targets

if TYPE_CHECKING:
    import peft


def peft_settings(
    lora: LoraConfig, model_is_tied: bool = False, targets: Targets | None = None, without: str | None = None
) -> peft.LoraConfig:
    """PEFT's own configuration of the adapter.

    Args:
        model_is_tied: output head and embedding are one matrix; what is trained of one is then trained of both.
        targets: what `lora.target_modules` comes to on the model; PEFT has no dropout for experts, so that the file of
            an adapter on experts says 0.
        without: a regular expression over names of modules that get no adapter, beside `lora.exclude_modules`.
    """
    import peft

    trains_whole_rows = bool(lora.modules_to_save or lora.trainable_token_indices)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0 if targets is not None and targets.parameters else lora.dropout,
        target_modules=lora.target_modules if targets is None else targets.modules,
        target_parameters=targets.parameters or None if targets is not None else None,
        exclude_modules=_both(lora.exclude_modules, without),
        layers_to_transform=lora.layers_to_transform,
        modules_to_save=[*lora.modules_to_save] or None,  # PEFT puts the name of a tied embedding into this list
        trainable_token_indices=lora.trainable_token_indices,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        init_lora_weights=lora.init_lora_weights,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=trains_whole_rows and model_is_tied,
        # Without it PEFT writes down the model's class, which its Auto classes then load.
        task_type="CAUSAL_LM" if without is None else None,
    )


def _both(excluded: list[str] | str | None, without: str | None) -> list[str] | str | None:
    if not excluded or without is None:
        return excluded or without
    names = "|".join(rf"(.*\.)?{re.escape(name)}" for name in excluded) if isinstance(excluded, list) else excluded
    return f"{names}|{without}"


def targeted_names(model: nn.Module, lora: LoraConfig) -> list[str]:
    """Dotted names of the modules that get an adapter, by PEFT's own rules."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    targets = find_targets(model) if lora.target_modules == "auto" else None
    settings = _maybe_include_all_linear_layers(
        peft_settings(lora, targets=targets, without=without_text(model)), model
    )
    # A module that is excluded gives an object that counts as true.
    names = [name for name, _ in model.named_modules() if name]
    found = ((name, check_target_module_exists(settings, name)) for name in names)
    return [name for name, answer in found if answer is True or isinstance(answer, re.Match)]


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the linear layers, such as q_proj."""
    return list(
        dict.fromkeys(
            name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
        )
    )


def differs_by_layer(lora: LoraConfig) -> bool:
    """Whether the decoder layers may get different adapters."""
    by_name = isinstance(lora.target_modules, str) and lora.target_modules not in ("auto", "all-linear")
    return bool(by_name or lora.exclude_modules or lora.layers_to_transform is not None or lora.rank_pattern)


def names_without_match(
    lora: LoraConfig, names: Sequence[str], targeted: Sequence[str], num_layers: int, vocab_size: int
) -> Iterator[tuple[str, list[Any]]]:
    """(key of `lora`, those of its values that match nothing), where PEFT would train without them in silence.

    Args:
        names: of all modules of the model.
        targeted: of those that get an adapter.
    """

    def missing(wanted: Sequence[str], among: Sequence[str]) -> list[Any]:
        return [part for part in wanted if not any(name == part or name.endswith(f".{part}") for name in among)]

    def missing_patterns(patterns: Sequence[str]) -> list[Any]:
        return [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in targeted)]

    targets, excluded = lora.target_modules, lora.exclude_modules
    if isinstance(targets, list):
        yield "target_modules", missing(targets, names)
    elif not targeted:
        yield "target_modules", [targets]
    if isinstance(excluded, list):
        yield "exclude_modules", missing(excluded, names)
    elif excluded is not None:
        yield "exclude_modules", [] if any(re.fullmatch(excluded, name) for name in names) else [excluded]
    yield "modules_to_save", missing(lora.modules_to_save, names)
    yield "rank_pattern", missing_patterns([*lora.rank_pattern])
    yield "alpha_pattern", missing_patterns([*lora.alpha_pattern])
    yield "layers_to_transform", [layer for layer in lora.layers_to_transform or [] if not layer < num_layers]
    yield "trainable_token_indices", [token for token in lora.trainable_token_indices or [] if not token < vocab_size]


def targets_of(base: nn.Module, lora: LoraConfig) -> Targets:
    """What gets an adapter, by the names that PEFT takes.

    Raises:
        ConfigError: a name matches nothing, or fused experts are to have what PEFT has for linear layers only.
    """
    if lora.target_modules != "auto":
        check_target_modules(base, lora.target_modules)
        return Targets(lora.target_modules, [])
    targets = find_targets(base)
    wrong = [name for name in ("use_dora", "layers_to_transform", "exclude_modules") if getattr(lora, name)]
    if targets.parameters and (wrong or lora.changes_base_weights):
        key = (wrong or ["init_lora_weights"])[0]
        raise ConfigError(
            f"lora.{key}={getattr(lora, key)}: PEFT has that for linear layers, and lora.target_modules=auto takes "
            f"what it reaches as parameters too ({', '.join(targets.in_short())}); fix: lora.target_modules=all-linear"
        )
    return targets


def check_target_modules(model: nn.Module, target_modules: list[str] | str) -> None:
    """Every name must match a module; PEFT itself only complains when none does.

    Raises:
        ConfigError: lists the names that match nothing, and the linear layers.
    """
    if isinstance(target_modules, str):
        return
    names = [name for name, _ in model.named_modules()]
    missing = [target for target in target_modules if not any(n == target or n.endswith(f".{target}") for n in names)]
    if missing or not target_modules:
        linear = set(linear_names(model))
        fix = f"lora.target_modules=[{','.join(sorted(linear - {'lm_head'}))}]"
        raise ConfigError(
            f"lora.target_modules: {', '.join(missing) or 'an empty list'} matches nothing in {type(model).__name__}; "
            f"its linear layers: {', '.join(sorted(linear))}; fix: {fix}"
        )
