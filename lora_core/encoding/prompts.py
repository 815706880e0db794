"""A chat template as rows and generation use it: with a row's own variables, up to the reply, and where replies end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_core.encoding.forms import QUESTION, TemplateForms
from lora_core.encoding.template import template_limits
from lora_core.errors import ChatTemplateError
from lora_core.rows.json_values import is_empty, strings
from lora_core.rows.messages import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Values for a template's variables that rows bring; data has a few.
_VARIABLES_REMEMBERED = 100


class RowForms:
    """Forms of one template with the values that rows have for its variables (`chat_template_kwargs`)."""

    def __init__(self, plain: TemplateForms) -> None:
        self._plain = plain
        self._by_variables: dict[str, TemplateForms] = {}

    def of(self, conversation: Conversation) -> TemplateForms:
        """Those for one row.

        Raises:
            ChatTemplateError: the template has no such variable, or a value holds a special token.
        """
        variables = self._that_say_something(conversation.template_variables or {})
        if not variables:
            return self._plain
        key = json.dumps(variables, sort_keys=True)
        if key not in self._by_variables:
            self._check(variables)
            if len(self._by_variables) == _VARIABLES_REMEMBERED:
                self._by_variables.clear()
            self._by_variables[key] = TemplateForms(self._plain.tokenizer, variables)
        return self._by_variables[key]

    def _that_say_something(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without empty values of variables that the template has not, as rows of many sources have them."""
        return {name: value for name, value in variables.items() if not is_empty(value) or not self._unknown([name])}

    def _unknown(self, names: Iterable[str]) -> list[str]:
        templates = self._plain.tokenizer.chat_template
        text = " ".join(templates.values()) if isinstance(templates, dict) else str(templates)
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]

    def _check(self, variables: Mapping[str, Any]) -> None:
        unknown = self._unknown(variables)
        if unknown:
            raise ChatTemplateError(
                f"chat_template_kwargs: the chat template has no {', '.join(unknown)}, so it would change nothing; "
                "fix: leave it out of the row, or data.chat_template=FILE.jinja that has it"
            )
        if any(self._plain.special.search(value) for value in strings(dict(variables))):
            raise ChatTemplateError("chat_template_kwargs: a value holds a special token; fix: leave it out of the row")


def render_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """What generation starts from: the messages and the generation prompt, in the forms that the template wants.

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
        ChatTemplateError: it refuses the messages.
    """
    with template_limits(tokenizer, [conversation]) as next_one:
        next_one()
        return RowForms(TemplateForms(tokenizer)).of(conversation).render(conversation, add_generation_prompt=True)


def tokens_to_stop_at(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a trained reply ends with: the tokenizer's end, those of the model's generation config, and the template's.

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
    """
    with template_limits(tokenizer, [Conversation([QUESTION])]) as next_one:
        next_one()
        forms = TemplateForms(tokenizer)
        return [*dict.fromkeys([*forms.stop_tokens, *forms.end_tokens])]
