"""The chat template that a run uses: the tokenizer's own, a file, or one that comes with the package, by name.

Everything that decides what a template writes becomes part of its text, as lines in front of it:

    {{ bos_token }}{% set end_of_turn = "</s>" %}                     a shipped template, fitted to the tokenizer
    {% set enable_thinking = enable_thinking if ... else false %}     data.chat_template_kwargs
    {% if messages[0].role == 'system' ... %}                         data.fold_system

So training, evaluation, replies and the checks render alike, the cache of encoded rows knows, and the tokenizer that is
saved with the adapter renders as in training, in any program.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.config.schema import DataConfig
from lora_core.encoding.template import render_chat
from lora_core.errors import ChatTemplateError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "templates"
# Name -> the token of its own that ends a turn; None where that is the tokenizer's EOS.
NAMED_TEMPLATES = {
    "alpaca": None,
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "mistral": None,
    "phi3": "<|end|>",
    "qwen3": "<|im_end|>",
    "vicuna": None,
    "zephyr": None,
}
# The longest templates of real models have some ten thousand.
_MAX_TEMPLATE_CHARACTERS = 1_000_000
# transformers trims the line break after a tag, so a line in front of a template adds nothing to what it writes.
_FOLD_SYSTEM = (
    "{% if messages[1:] and messages[0].role == 'system' and messages[1].role == 'user' %}"
    "{% set messages = [{'role': 'user', 'content': messages[0].content + '\\n\\n' + messages[1].content}]"
    " + messages[2:] %}{% endif %}\n"
)


def set_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Give the tokenizer the template that the configuration asks for, with its arguments.

    Raises:
        ConfigError: there is no such file or name, it needs a token that the tokenizer lacks, or it knows no such
            argument.
    """
    if data.chat_template is not None:
        if is_named(data.chat_template):
            tokenizer.chat_template = _fitted(tokenizer, data.chat_template)
        else:
            tokenizer.chat_template = _read_template(data.chat_template)
    if not tokenizer.chat_template:
        return  # the rows are refused, with a fix
    if data.chat_template_kwargs:
        _check_arguments(tokenizer, data.chat_template_kwargs)
        _put_in_front(tokenizer, with_arguments("", data.chat_template_kwargs))
    if data.fold_system and _has_no_system_turn(tokenizer):
        _put_in_front(tokenizer, _FOLD_SYSTEM)


def is_named(chat_template: str) -> bool:
    """Whether `data.chat_template` means a shipped template: a file of that name goes first."""
    path = Path(chat_template)
    return chat_template in NAMED_TEMPLATES and not (path.exists() and not path.is_dir())


def missing_end_token(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """The token that the named template ends turns with, if the tokenizer lacks it and its EOS ends them instead."""
    if chat_template is None or not is_named(chat_template):
        return None
    token = NAMED_TEMPLATES[chat_template]
    specials = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    return None if token is None or token in specials | set(tokenizer.all_special_tokens) else token


def folds_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has no system turn, and puts that text in front of the first user turn."""
    return any(_FOLD_SYSTEM in text for text in _texts(tokenizer).values())


def with_arguments(template: str, arguments: dict[str, Any]) -> str:
    """The template with values for its variables; what a caller passes goes before them."""
    lines = [
        f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
        for name, value in arguments.items()
    ]
    return "".join([*lines, template])


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _fitted(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A shipped template, with the tokens that this tokenizer has."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    missing = missing_end_token(tokenizer, name)
    if not tokenizer.eos_token and (missing is not None or NAMED_TEMPLATES[name] is None):
        lacks = f"neither {missing} nor an EOS token" if missing else "no EOS token"
        raise ConfigError(
            f"data.chat_template={name}: the tokenizer of {tokenizer.name_or_path} has {lacks} to end a turn with; "
            "fix: data.chat_template=FILE.jinja that ends turns with one of its special tokens",
            "template_end_token",
        )
    if missing is not None:
        text = with_arguments(text, {"end_of_turn": tokenizer.eos_token})
    # The model knows texts with a BOS if its tokenizer puts one there (some have a BOS token and never write it).
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = "{{- bos_token }}" + text
    return text


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise OSError("not a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_TEMPLATE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        (nearest,) = difflib.get_close_matches(name, NAMED_TEMPLATES, n=1) or ["chatml"]
        raise ConfigError(
            f"data.chat_template={name}: cannot be read as a text file ({error}), and is no name of a template (there "
            f"are: {', '.join(NAMED_TEMPLATES)}); fix: data.chat_template={nearest}",
            "template_unreadable",
        ) from error
    if len(text) > _MAX_TEMPLATE_CHARACTERS:
        raise ConfigError(
            f"data.chat_template={name}: longer than {_MAX_TEMPLATE_CHARACTERS:,} characters; is it another file?",
            "template_unreadable",
        )
    return text


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Templates by name: some tokenizers have a second one, for tools."""
    template: Any = tokenizer.chat_template
    if not template:
        return {}
    return dict(template) if isinstance(template, dict) else {"default": str(template)}


def _put_in_front(tokenizer: PreTrainedTokenizerBase, line: str) -> None:
    texts = {name: line + text for name, text in _texts(tokenizer).items()}
    tokenizer.chat_template = texts if isinstance(tokenizer.chat_template, dict) else texts["default"]


def _check_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> None:
    """A template that does not know an argument would ignore it."""
    text = " ".join(_texts(tokenizer).values())
    unknown = [name for name in arguments if not re.search(rf"\b{name}\b", text)]
    if unknown:
        rest = json.dumps({name: value for name, value in arguments.items() if name not in unknown})
        raise ConfigError(
            f"data.chat_template_kwargs: the chat template has no {', '.join(map(repr, unknown))}, so it would change "
            f"nothing; fix: data.chat_template_kwargs='{rest}'",
            "template_argument_unknown",
        )


def _has_no_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The template refuses a system turn, or leaves its text out, and takes a user turn."""
    system, user = {"role": "system", "content": "SystemMarker"}, {"role": "user", "content": "UserMarker"}
    try:
        if "SystemMarker" in render_chat(tokenizer, [system, user]):
            return False
    except ChatTemplateError:
        pass
    try:
        return "UserMarker" in render_chat(tokenizer, [user])
    except ChatTemplateError:
        return False
