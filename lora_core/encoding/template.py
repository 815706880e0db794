"""A row as the chat template writes it, with bounds on what the template may do: it is a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_core.errors import ChatTemplateError, ConfigError, counted
from lora_core.rows.json_values import strings
from lora_core.rows.messages import Conversation, Message
from lora_core.untrusted.limits import OutOfTime, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a chat template may use for one row. Real ones take milliseconds and write some thousand characters of
# their own and some dozen per turn; the rest is the row, which indented JSON makes many times as long.
_TEMPLATE_SECONDS = 10.0
_TEMPLATE_MEMORY_BYTES = 2**29
_TEMPLATE_BYTES_PER_CHARACTER = 64
_TEMPLATE_OWN_CHARACTERS = 100_000
_TEMPLATE_CHARACTERS_PER_TURN = 1_000
_TEMPLATE_GROWTH = 50


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The messages as the template writes them.

    Raises:
        ConfigError: the template takes too much time or memory, or writes too much.
        ChatTemplateError: it refuses the messages.
    """
    with template_limits(tokenizer, [Conversation(list(messages), tools)]) as next_one:
        next_one()
        return apply_template(tokenizer, messages, tools, add_generation_prompt)


@contextmanager
def template_limits(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> Iterator[Callable[[], None]]:
    """Bounds on what the template may do: it is a program from a model repository.

    Yields what to call before each of them, in order: every one gets the full time.
    """
    characters = [_num_characters(conversation) for conversation in conversations]
    memory_bytes = _TEMPLATE_MEMORY_BYTES + _TEMPLATE_BYTES_PER_CHARACTER * sum(characters)
    number = -1
    try:
        with limited(_TEMPLATE_SECONDS, memory_bytes) as restart_clock:

            def next_one() -> None:
                nonlocal number
                number += 1
                restart_clock()

            yield next_one
    except OutOfTime:
        did = f"ran for more than {_TEMPLATE_SECONDS:g} s"
        raise _runaway(tokenizer, did, conversations[number]) from None
    except MemoryError:
        did = f"asked for more than {memory_bytes / 2**30:.1f} GiB of memory"
        raise _runaway(tokenizer, did, conversations[number]) from None


def _runaway(tokenizer: PreTrainedTokenizerBase, did: str, conversation: Conversation) -> ConfigError:
    turns = counted(len(conversation.messages), "turn")
    characters = counted(_num_characters(conversation), "character")
    return ConfigError(
        f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} (or data.chat_template) {did} on a "
        f"row of {turns} and {characters}; fix: data.chat_template=FILE.jinja, one that ends",
        "template_runaway",
    )


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Any,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render inside `template_limits`, with values for variables of the template."""
    # A chat template is somebody's program and may raise anything; transformers runs it in Jinja's sandbox.
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
        assert isinstance(rendered, str)
        rendered.encode("utf-8")  # half a surrogate pair is not text
    except MemoryError:
        raise
    except Exception as error:
        said = str(error)[:500]  # a template can raise the whole row
        raise ChatTemplateError(f"the chat template refuses it: {type(error).__name__}: {said}") from error
    if len(rendered) > _TEMPLATE_OWN_CHARACTERS:
        conversation = Conversation(list(messages), tools)
        limit = (
            _TEMPLATE_OWN_CHARACTERS
            + _TEMPLATE_CHARACTERS_PER_TURN * len(messages)
            + _TEMPLATE_GROWTH * _num_characters(conversation)
        )
        if len(rendered) > limit:
            raise _runaway(tokenizer, f"wrote {len(rendered):,} characters, more than {limit:,},", conversation)
    return rendered


def _num_characters(conversation: Conversation) -> int:
    total = sum(map(len, strings(conversation.tools))) if conversation.tools else 0
    for message in conversation.messages:
        total += len(message["content"])
        if "tool_calls" in message:
            total += sum(map(len, strings(message["tool_calls"])))
    return total
