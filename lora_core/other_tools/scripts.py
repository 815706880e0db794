"""Settings in a Python script that trains with TRL, transformers or Unsloth, read with `ast`; nothing is executed.

The keywords of a few known calls are settings. Constants are taken, and names that stand for one constant in the whole
script: variables, arguments with a default or given in a call, fields of dataclasses, options of argparse. Everything
else is not guessed: its source is shown.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.config.layers import Setting
from lora_core.errors import ConfigError

_MOST_BYTES = 1_000_000
# Call -> what its keywords are called where that differs.
_LORA = {"r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save"}
_LORA |= {"use_gradient_checkpointing": "gradient_checkpointing", "random_state": "seed"}
_CALLS: dict[str, dict[str, str]] = {
    "SFTConfig": {},
    "TrainingArguments": {},
    "UnslothTrainingArguments": {},
    "LoraConfig": _LORA,
    "get_peft_model": _LORA,
    "BitsAndBytesConfig": {},
    "from_pretrained": {"pretrained_model_name_or_path": "model_name_or_path", "model_name": "model_name_or_path"},
    "load_dataset": {"path": "dataset_name", "split": "dataset_train_split", "name": "dataset_config"},
    "SFTTrainer": {},
}
_CALLS["from_pretrained"] |= {"revision": "model_revision"}
# Keywords that hand over objects, or say nothing of the training.
_OBJECTS = frozenset(
    [
        "model",
        "args",
        "train_dataset",
        "eval_dataset",
        "peft_config",
        "data_collator",
        "tokenizer",
        "processing_class",
        "quantization_config",
        "callbacks",
        "formatting_func",
        "compute_metrics",
        "token",
        "cache_dir",
        "device_map",
        "local_files_only",
        "optimizers",
        "compute_loss_func",
        "preprocess_logits_for_metrics",
        "data_dir",
        "num_proc",
        "padding_side",
        "add_eos_token",
        "add_bos_token",
        "dataset_kwargs",
        "use_auth_token",
        "temporary_location",
    ]
)
_CONFIGURES = ("SFTConfig", "TrainingArguments", "UnslothTrainingArguments")
_DEEPEST = 20


@dataclass(frozen=True)
class Unresolved:
    """An expression that stands for no constant of the script."""

    text: str


@dataclass(frozen=True)
class Script:
    """What a script says of a run."""

    path: Path
    calls: frozenset[str]
    """Names of the known calls that are in it."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """By the words of `trainer_keys.SFT_RULES`; a value may be `Unresolved`."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """`lora_r` -> `lora_rank`, where the script passes `training_args.lora_rank`: a file of settings may hold it."""
    named_files: tuple[str, ...] = ()
    """Names of YAML files in the script."""

    @property
    def trains(self) -> bool:
        return bool(self.calls & set(_CONFIGURES))

    @property
    def unresolved(self) -> dict[str, Setting]:
        """The settings that stand for no constant of the script."""
        return {key: setting for key, setting in self.settings.items() if isinstance(setting.value, Unresolved)}

    @property
    def resolved(self) -> dict[str, Setting]:
        return {key: setting for key, setting in self.settings.items() if not isinstance(setting.value, Unresolved)}


def read_script(path: Path) -> Script:
    """Read the settings of a script.

    Raises:
        ConfigError: it is no Python, or too large.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path}: a script has at most {_MOST_BYTES:,} bytes; is it another file?")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _Names(tree)
        calls: set[str] = set()
        settings: dict[str, Setting] = {}
        attributes: dict[str, str] = {}
        for call in sorted(_calls(tree), key=lambda node: node.lineno):
            name = _called(call)
            if name not in _CALLS or _is_about_a_tokenizer(call):
                continue
            calls.add("FastLanguageModel" if _owner(call).startswith("Fast") else name)
            calls.add(name)
            for key, node in _arguments(call, name):
                if key in _OBJECTS:
                    continue
                theirs = _CALLS[name].get(key, key)
                settings[theirs] = Setting(names.value(node), f"{path}:{node.lineno}")
                attributes.pop(theirs, None)
                if isinstance(node, ast.Attribute):
                    attributes[theirs] = node.attr
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: cannot be read as Python: {' '.join(str(error).split())[:200]}") from error
    return Script(path, frozenset(calls), settings, attributes, _yaml_names(tree))


def _yaml_names(tree: ast.AST) -> tuple[str, ...]:
    """The last parts of texts that end in .yaml, also in f-strings."""
    texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return tuple(dict.fromkeys(text.rsplit("/", 1)[-1] for text in texts if text.endswith((".yaml", ".yml"))))


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    """`from_pretrained` of `AutoModel.from_pretrained(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _owner(call: ast.Call) -> str:
    """`AutoModel` of `AutoModel.from_pretrained(...)`."""
    return getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""


def _is_about_a_tokenizer(call: ast.Call) -> bool:
    """Or a saved adapter: of `from_pretrained`, only the one that loads the base model counts."""
    owner = _owner(call)
    is_model = owner.startswith("AutoModel") or owner.endswith(("ForCausalLM", "FastLanguageModel", "FastModel"))
    return _called(call) == "from_pretrained" and (not is_model or owner.startswith("AutoPeft"))


def _arguments(call: ast.Call, name: str) -> Iterator[tuple[str, ast.expr]]:
    first = {
        "from_pretrained": "model_name_or_path",
        "load_dataset": "dataset_name",
        "SFTTrainer": "model_name_or_path",
    }
    if name in first and call.args and not isinstance(call.args[0], ast.Starred):
        yield first[name], call.args[0]
    for keyword in call.keywords:
        if keyword.arg is not None:
            is_id = name == "SFTTrainer" and keyword.arg == "model" and isinstance(keyword.value, ast.Constant)
            yield ("model_name_or_path" if is_id else keyword.arg), keyword.value


class _Names:
    """What the names of a script stand for, wherever in it they are set."""

    def __init__(self, tree: ast.AST) -> None:
        self.nodes: dict[str, list[ast.expr]] = {}
        self.fields: dict[str, list[ast.expr]] = {}
        self.plain: set[int] = set()  # ids of the names in plain assignments
        functions = {n.name: n.args for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, ast.ClassDef):
                self._class(node)
            elif isinstance(node, ast.Call):
                self._call(node, functions)
        stored = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self.varying = {name.id for name in stored if id(name) not in self.plain}  # loops, unpacking, `with`
        for arguments in functions.values():
            positional = [*arguments.posonlyargs, *arguments.args]
            last = positional[len(positional) - len(arguments.defaults) :]
            pairs: list[tuple[ast.arg, ast.expr | None]] = [*zip(last, arguments.defaults, strict=True)]
            pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            for argument, default in pairs:
                if default is not None and argument.arg not in self.nodes:  # a call says more than a default
                    self.nodes.setdefault(argument.arg, []).append(default)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.plain.add(id(target))
            self.nodes.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Attribute):
            self.fields.setdefault(target.attr, []).append(value)

    def _class(self, node: ast.ClassDef) -> None:
        """Fields of dataclasses, with `field(default=...)`."""
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value is not None:
                value = part.value
                if isinstance(value, ast.Call):
                    defaults = [keyword.value for keyword in value.keywords if keyword.arg == "default"]
                    if not defaults:
                        continue
                    value = defaults[0]
                self.fields.setdefault(part.target.id, []).append(value)

    def _call(self, node: ast.Call, functions: Mapping[str, ast.arguments]) -> None:
        """Arguments of the script's own functions; keywords of its classes; options of argparse."""
        name = _called(node)
        if name in functions:
            parameters = [argument.arg for argument in functions[name].args if argument.arg != "self"]
            for parameter, value in zip(parameters, node.args, strict=False):
                self.nodes.setdefault(parameter, []).append(value)
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self.nodes.setdefault(keyword.arg, []).append(keyword.value)
        elif name == "add_argument":
            options = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            defaults = [keyword.value for keyword in node.keywords if keyword.arg == "default"]
            if options and defaults:
                self.fields.setdefault(options[-1].lstrip("-").replace("-", "_"), []).append(defaults[0])
        elif name[:1].isupper() and name not in _CALLS:  # a class, such as the script's own settings
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self.fields.setdefault(keyword.arg, []).append(keyword.value)

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The constant that an expression stands for, or `Unresolved`."""
        if depth > _DEEPEST:
            return Unresolved(ast.unparse(node)[:80])
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                return self._all([self.value(part, depth + 1) for part in parts], node)
            case ast.Dict(keys=names, values=parts) if all(map(_is_text, names)):
                keys = [getattr(name, "value", "") for name in names]
                values = self._all([self.value(part, depth + 1) for part in parts], node)
                return dict(zip(keys, values, strict=True)) if isinstance(values, list) else values
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                number = self.value(operand, depth + 1)
                return -number if _is_number(number) else Unresolved(ast.unparse(node)[:80])
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                factors = self.value(left, depth + 1), self.value(right, depth + 1)
                if all(map(_is_number, factors)):
                    return factors[0] * factors[1]
            case ast.Name(id=name) if name not in self.varying:
                return self._one(self.nodes.get(name, []), node, depth)
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                return name
            case ast.Attribute(attr=name):
                return self._one(self.fields.get(name, []), node, depth)
            case ast.Call() if "bf16_supported" in _called(node) or "bfloat16_supported" in _called(node):
                return "auto"
            case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call) if self.value(call, depth + 1) == "auto":
                return False  # fp16 where there is no bfloat16: what `auto` says already
        return Unresolved(ast.unparse(node)[:80])

    def _one(self, nodes: list[ast.expr], asked: ast.expr, depth: int) -> Any:
        """What all of them stand for, if that is one value."""
        values = [self.value(node, depth + 1) for node in nodes if not _is_itself(node, asked)]
        known = [value for value in values if not isinstance(value, Unresolved)]
        if len(known) != len(values) or not known or any(value != known[0] for value in known):
            return Unresolved(ast.unparse(asked)[:80])
        return known[0]

    def _all(self, values: list[Any], node: ast.expr) -> Any:
        return Unresolved(ast.unparse(node)[:80]) if any(isinstance(v, Unresolved) for v in values) else values


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_itself(node: ast.expr, asked: ast.expr) -> bool:
    """`context_length=context_length`: a name handed on under the same name says nothing new."""
    return ast.dump(node) == ast.dump(asked)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
