"""`RunConfig`: every setting of a run, where it came from, and what is wrong with it.

Settings come in layers: the defaults below, then the YAML that `--cfg` names (with the files it `extends`), then
`key=value` from the command line. Later layers win. A key that is unknown or ill-typed is refused, with the file
and line it stands in, what is allowed, and the nearest key that exists; all problems are reported together.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_core.errors import ConfigError, problem_list
from lora_core.safe_text import quoted, values_without_secrets

ALL_SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    """Unknown keys are errors and nothing is coerced: `train.bf16: "no"` is a mistake, not a truth."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelConfig(_Section):
    """The base model. It stays frozen."""

    name_or_path: str = Field("Qwen/Qwen2.5-0.5B-Instruct", description="hub id or local folder (~ is your home)")
    revision: str | None = Field(None, description="hub branch, tag or commit; null is the newest")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of the frozen weights; the adapter is always float32"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="nf4 is QLoRA: 4 bits, double quantization, bfloat16 compute"
    )
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="what nf4 weights are stored as; under FSDP it must be the same as dtype"
    )
    attn_implementation: str = Field("sdpa", description="what transformers calls it: sdpa, eager, flash_attention_2")


class LoraConfig(_Section):
    """The adapter: Hu et al. 2021, https://arxiv.org/abs/2106.09685. The update is scaled by alpha / rank."""

    rank: PositiveInt = Field(16, description="r, the adapter's inner dimension")
    alpha: PositiveInt = Field(32, description="scale: the update is multiplied by alpha / rank")
    dropout: Fraction = Field(0.05, description="probability, on the adapter's input")
    target_modules: list[str] | Literal["all-linear"] = Field(
        ALL_SEVEN_PROJECTIONS, description="names of the modules that get an adapter, or all-linear"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")
    use_dora: bool = Field(False, description="weight-decomposed update, https://arxiv.org/abs/2402.09353")


class DataConfig(_Section):
    """The rows. Paths are relative to the folder that the command runs in."""

    train_file: str = Field("data/train.jsonl", description="chat JSONL, one conversation a line")
    eval_file: str | None = Field(None, description="held-out chat JSONL; not together with eval_fraction")
    eval_fraction: Fraction = Field(0.0, description="share of the training rows to hold out instead; 0 holds out none")
    max_seq_length: PositiveInt = Field(1024, description="tokens; a longer row is cut on the right, and counted")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be read: stop with file:line, or skip and count it"
    )
    packing: bool = Field(
        True, description="lay conversations end to end in place of padding; same gradient, no token wasted"
    )
    chat_template: str | None = Field(None, description="a Jinja file to use in place of the tokenizer's own template")
    num_proc: PositiveInt | None = Field(
        None, description="processes that encode rows; null is one per core, for large files"
    )
    cache_dir: str = Field("~/.cache/lora_core/encoded", description="where encoded rows are kept between runs")

    @model_validator(mode="after")
    def _one_held_out_source(self) -> DataConfig:
        if self.eval_file is not None and self.eval_fraction > 0:
            raise ValueError(
                f"eval_file={self.eval_file} and eval_fraction={self.eval_fraction} both name held-out rows; "
                "fix: data.eval_fraction=0, or data.eval_file=null"
            )
        return self


class TrainConfig(_Section):
    """The loop. A step is an optimizer step everywhere."""

    num_train_epochs: PositiveInt = Field(3, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; in place of num_train_epochs when set")
    per_device_train_batch_size: PositiveInt = Field(2, description="conversations per micro-batch and device")
    per_device_eval_batch_size: PositiveInt = Field(8, description="conversations per evaluation batch and device")
    max_tokens_per_device_batch: PositiveInt | None = Field(
        None, description="of a packed micro-batch; null is per_device_train_batch_size x max_seq_length"
    )
    gradient_accumulation_steps: PositiveInt = Field(4, description="micro-batches per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(5e-5, description="at the end of warmup")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="optimizer steps of linear warmup; not together with warmup_ratio"
    )
    warmup_ratio: Fraction | None = Field(0.1, description="warmup as a share of all optimizer steps, rounded up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled, as in AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="clip the global norm; null does not clip"
    )
    optim: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = Field(
        "paged_adamw_8bit", description="paged state is a CUDA feature; on a CPU it is plain 8-bit"
    )
    bf16: bool = Field(True, description="compute under bfloat16 autocast")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward: less memory, more time"
    )
    torch_compile: bool = Field(
        False, description="compile the decoder layers at the first steps; on a CPU it gained nothing (see the README)"
    )
    seed: Annotated[int, Field(ge=0)] = Field(42, description="fixes row order, initial adapter and dropout")
    logging_steps: PositiveInt = Field(1, description="optimizer steps between log lines")
    eval_steps: PositiveInt | None = Field(
        None, description="optimizer steps between evaluations; null is once an epoch"
    )
    save_steps: PositiveInt | None = Field(
        None, description="optimizer steps between checkpoints; null is once an epoch"
    )
    save_total_limit: PositiveInt = Field(
        2, description="checkpoints to keep, the newest ones, and the best beside them"
    )
    on_save_error: Literal["error", "continue"] = Field(
        "error", description="a checkpoint that cannot be written: stop, or say so and go on"
    )
    keep_adapter: Literal["last", "best"] = Field(
        "last", description="which goes into adapter/: the last step's, or that of the lowest held-out loss"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="evaluations in a row without a lower held-out loss before the run ends; null runs to the end"
    )
    max_skipped_steps: PositiveInt = Field(
        3, description="steps in a row, left out for a loss or gradient that is not finite, at which the run stops"
    )
    auto_batch_size: bool = Field(
        False, description="cut steps into smaller micro-batches where memory is short; same steps, same gradient"
    )
    rank_timeout_s: PositiveInt = Field(
        1800, description="seconds that ranks wait for each other before they take one for lost"
    )
    num_sample_replies: Annotated[int, Field(ge=0)] = Field(
        3, description="held-out prompts answered before and after training"
    )
    sample_max_new_tokens: PositiveInt = Field(64, description="tokens per sample reply, greedy")

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} are both set; "
                "fix: set one and leave the other null"
            )
        return self


class PreflightConfig(_Section):
    """The checks before the first step."""

    allow: list[str] = Field([], description="ids of errors to run in spite of, such as warmup_past_end")


class RunConfig(_Section):
    """Everything that decides a run. `load_config` builds it; `to_yaml` writes it."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    output_dir: str = Field("outputs/run", description="the run folder; outputs/<cfg name> unless set")
    overwrite_output_dir: bool = Field(False, description="replace an earlier run in output_dir")

    @model_validator(mode="after")
    def _held_out_rows_where_they_decide(self) -> RunConfig:
        decides = [
            f"train.{name}={value}"
            for name, value in (
                ("keep_adapter", self.train.keep_adapter if self.train.keep_adapter == "best" else None),
                ("early_stopping_patience", self.train.early_stopping_patience),
            )
            if value is not None
        ]
        if decides and self.data.eval_file is None and self.data.eval_fraction == 0:
            raise ValueError(
                f"{' and '.join(decides)} goes by held-out loss, and there are no held-out rows; fix: "
                "data.eval_fraction=0.1, or data.eval_file=FILE"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values by section and key, secrets left out."""
        values: dict[str, Any] = values_without_secrets(self.model_dump(mode="json"))
        return values

    def to_yaml(self) -> str:
        """The resolved configuration; `load_config` reads it back to an equal `RunConfig`, but for secrets."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------------------
# Layers: every value remembers where it was written


@dataclass(frozen=True)
class _Setting:
    value: Any
    source: str  # "configs/demo.yaml:7" or "command line"


# A configuration has some hundred lines; PyYAML reads a megabyte in about five seconds.
_MAX_CONFIG_BYTES = 1_000_000


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML's own rules read `5e-5` as a string because it has no dot.

    No aliases: ten lines of them can stand for more values than fit in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, "an alias (*name); write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """No setting is larger than 64 bits, and Python refuses to write out a number of thousands of digits."""
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 2**63:
            raise yaml.MarkedYAMLError(None, None, "a whole number of more than 64 bits", node.start_mark)
        return value


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_yaml_int)


# What PyYAML raises for values that are none, such as 2024-99-99 or !!bool maybe, besides its own errors.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _flatten(
    node: yaml.Node, file: str, loader: _YamlLoader, prefix: str, problems: list[str]
) -> Iterator[tuple[str, _Setting]]:
    """Leaves of a YAML mapping as (dotted key, setting). Duplicate keys are problems, where PyYAML keeps the last."""
    assert isinstance(node, yaml.MappingNode)
    seen: set[str] = set()
    for key_node, value_node in node.value:
        place = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{place}  a key must be a plain word")
            continue
        key = f"{prefix}{key_node.value}"
        if key in seen:
            problems.append(f"{place}  {key}: set twice in this file; keep one")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            yield from _flatten(value_node, file, loader, f"{key}.", problems)
        else:
            yield key, _Setting(loader.construct_object(value_node, deep=True), place)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, _Setting]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: a configuration has at most {_MAX_CONFIG_BYTES:,} characters; is it another file?")
    loader = None
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: must hold `key: value` lines, not a {node.tag.split(':')[-1]}")
        return dict(_flatten(node, str(path), loader, "", problems))
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{path}: not valid YAML: {reason}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _layers(path: Path, problems: list[str], below: tuple[Path, ...] = ()) -> list[dict[str, _Setting]]:
    """The file's settings, after those of the file that it `extends`."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(map(str, below))}")
    settings = _read_yaml(path, problems)
    parent = settings.pop("extends", None)
    if parent is None:
        return [settings]
    if not isinstance(parent.value, str):
        raise ConfigError(
            f"{parent.source}  extends = {quoted(parent.value)}: must be the name of a file beside this one"
        )
    parent_path = path.parent / parent.value
    # A configuration may come from somebody else: it names no file outside its own folder, not by a link either.
    if not parent_path.resolve().is_relative_to(path.parent.resolve()):
        raise ConfigError(
            f"{parent.source}  extends = {quoted(parent.value)}: must lie beside this file; fix: copy it there"
        )
    if not parent_path.is_file():
        raise ConfigError(f"{parent.source}  extends = {quoted(parent.value)}: there is no {parent_path}")
    return [*_layers(parent_path, problems, (*below, path.resolve())), settings]


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> dict[str, _Setting]:
    layer: dict[str, _Setting] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"command line  {quoted(override)}: must be key=value, such as train.num_train_epochs=3")
            continue
        try:
            value = yaml.load(text, Loader=_YamlLoader)  # a SafeLoader: plain data only
        except _YAML_ERRORS:
            problems.append(f"command line  {quoted(override)}: the value is not valid YAML; quote it")
            continue
        if isinstance(value, dict):
            problems.append(f"command line  {quoted(override)}: set one key at a time, such as {key}.NAME=VALUE")
            continue
        layer[key] = _Setting(value, "command line")
    return layer


_EITHER_OR = {"train.warmup_steps": "train.warmup_ratio", "train.warmup_ratio": "train.warmup_steps"}


def _merge(layers: Sequence[Mapping[str, _Setting]]) -> dict[str, _Setting]:
    """Later layers win. Setting either kind of warmup replaces the other kind from earlier layers."""
    merged: dict[str, _Setting] = {"train.warmup_ratio": _Setting(0.1, "default")}
    for layer in layers:
        for key, other in _EITHER_OR.items():
            if key in layer and layer[key].value is not None and other not in layer:
                merged[other] = _Setting(None, layer[key].source)
        merged.update(layer)
    return merged


# ---------------------------------------------------------------------------------------------------------------
# Keys: what there is, what is allowed

_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "preflight": PreflightConfig,
}


@lru_cache(maxsize=1)
def config_keys() -> dict[str, str]:
    """Every dotted key with what it allows, its default and its meaning, in order."""
    keys = {}
    sections: dict[str, type[BaseModel]] = {**_SECTIONS, "": RunConfig}
    for section, fields in sections.items():
        schema = fields.model_json_schema()["properties"]
        for name, field in fields.model_fields.items():
            if not section and name in _SECTIONS:
                continue
            default = yaml.safe_dump(field.get_default(), default_flow_style=True, width=1000).split("\n")[0]
            keys[f"{section}.{name}" if section else name] = (
                f"{_allowed(schema[name])}, default {default}: {field.description}"
            )
    return keys


def _allowed(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "|".join(schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        return f"list of {_allowed(schema['items'])}s"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true|false",
        "string": "text",
        "null": "null",
    }
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return " ".join([words[schema["type"]], " and ".join(limits)]).strip()


def _nearest(key: str) -> str:
    keys = list(config_keys())
    by_last_part = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    close = by_last_part or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"nearest: {close[0]} ({config_keys()[close[0]]})" if close else f"sections: {', '.join(_SECTIONS)}"


def _check(settings: Mapping[str, _Setting], problems: list[str]) -> RunConfig | None:
    """Build the config, or add one line per wrong key to `problems`."""
    keys = config_keys()
    nested: dict[str, Any] = {}
    for key, setting in settings.items():
        if key in _SECTIONS and setting.value is None:
            continue  # an empty section
        if key not in keys:
            what = "a section, which holds keys" if key in _SECTIONS else "unknown key"
            problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: {what}; {_nearest(key)}")
            continue
        if _holds_control_characters(setting.value):
            problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: holds a control character")
            continue
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = setting.value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        for key, details in {_error_key(details["loc"], keys): details for details in error.errors()}.items():
            if key in keys:
                setting = settings[key]
                problems.append(f"{setting.source}  {key} = {quoted(setting.value)}: must be {keys[key]}")
            else:  # a check over a whole section
                message = details["msg"].removeprefix("Value error, ")
                named = [name for name in settings if name.startswith(f"{key}.") and name.split(".")[1] in message]
                sources = dict.fromkeys(settings[name].source for name in named)
                problems.append(f"{', '.join(sources)}  {key}: {message}")
        return None


def _holds_control_characters(value: Any) -> bool:
    """In a text or a list of texts; half a surrogate pair is one too. No path, name or word has any."""
    if isinstance(value, list):
        return any(_holds_control_characters(item) for item in value if isinstance(item, str))
    return isinstance(value, str) and any(unicodedata.category(character) in ("Cc", "Cs") for character in value)


def _error_key(location: tuple[int | str, ...], keys: Mapping[str, str]) -> str:
    """The config key of a pydantic error; what follows it tells union members and list positions apart."""
    if str(location[0]) in keys:
        return str(location[0])
    return ".".join(str(part) for part in location[:2])


# ---------------------------------------------------------------------------------------------------------------
# The old format: one file for all models, keyed by model id

_LEGACY_KEYS = {
    **{name: f"train.{name}" for name in TrainConfig.model_fields},
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "max_seq_length": "data.max_seq_length",
}


def _is_legacy(settings: Mapping[str, _Setting]) -> bool:
    return bool(settings) and all("/" in key for key in settings)


def _legacy_layer(
    path: Path, settings: Mapping[str, _Setting], model: str | None, problems: list[str]
) -> dict[str, _Setting]:
    models = list(dict.fromkeys(key.rpartition(".")[0] or key for key in settings))
    if model is None and len(models) == 1:
        model = models[0]
    if model not in models:
        asked = "no --model was given" if model is None else f"--model {model} is not among them"
        raise ConfigError(
            problem_list(
                f"{path} holds settings for {len(models)} models, and {asked}. Fix: one of",
                [f"--model {m}" for m in models],
            )
        )
    layer = {"model.name_or_path": _Setting(model, str(path))}
    for key, setting in settings.items():
        owner, _, name = key.rpartition(".")
        if owner != model:
            continue
        if name in _LEGACY_KEYS:
            layer[_LEGACY_KEYS[name]] = setting
        else:
            close = difflib.get_close_matches(name, _LEGACY_KEYS, n=1)
            hint = f"nearest: {close[0]}" if close else f"known: {', '.join(_LEGACY_KEYS)}"
            problems.append(f"{setting.source}  {name} = {quoted(setting.value)}: unknown key; {hint}")
    return layer


# ---------------------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """The file that `--cfg NAME` means: a path, or a name in `configs/` here or beside the package.

    Raises:
        ConfigError: there is no such file; names the configs that there are.
    """
    as_path = Path(name).expanduser()
    if as_path.is_file():
        return as_path
    folders = [Path("configs"), Path(__file__).resolve().parent.parent / "configs"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    close = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"--cfg {name}: no such file, and no such name in configs/ (there: {', '.join(names) or 'nothing'})"
        + (f"; nearest: --cfg {close[0]}" if close else "")
    )


def load_config(cfg: str | Path, overrides: Sequence[str] = (), model: str | None = None) -> RunConfig:
    """Read a configuration.

    Args:
        cfg: a path, or a name in `configs/` such as `qwen7b`.
        overrides: `key=value` strings, the value in YAML, such as `train.num_train_epochs=3`.
        model: which model's settings to take from a legacy `training_args.yaml`, whose top-level keys are model ids.

    Raises:
        ConfigError: lists every unknown or ill-typed key with its file, line and value.
    """
    path = find_config(str(cfg))
    problems: list[str] = []
    layers = _layers(path, problems)
    name = path.stem
    if _is_legacy(layers[-1]):
        layers[-1] = _legacy_layer(path, layers[-1], model, problems)
        name = layers[-1]["model.name_or_path"].value.split("/")[-1]
    elif model is not None:
        problems.append(
            f"command line  --model {model}: only for a legacy file keyed by model id; fix: model.name_or_path={model}"
        )
    layers.append(_parse_overrides(overrides, problems))
    settings = _merge([{"output_dir": _Setting(f"outputs/{name}", "default")}, *layers])
    config = _check(settings, problems)
    if problems or config is None:
        raise ConfigError(problem_list(f"The configuration has {len(problems)} problem(s):", problems))
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with some keys changed; `overrides` as in `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    problems: list[str] = []
    settings = {
        f"{section}.{name}" if section else name: _Setting(value, "configuration")
        for section in ("", *_SECTIONS)
        for name, value in (config if not section else getattr(config, section)).__dict__.items()
        if name not in _SECTIONS
    }
    changed = _check(_merge([settings, _parse_overrides(overrides, problems)]), problems)
    if problems or changed is None:
        raise ConfigError(problem_list(f"The configuration has {len(problems)} problem(s):", problems))
    return changed
