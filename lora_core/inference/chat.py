"""A chat with a model: what was said so far, and the next reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_core.errors import ConfigError, DataError, counted
from lora_core.evaluation.generation import Reply, encode_prompt, generate_replies, generate_reply, longest_context
from lora_core.inference.opened import LoadedModel
from lora_core.model.out_of_memory import is_out_of_memory
from lora_core.rows.messages import Conversation, Message


@dataclass(frozen=True)
class Asking:
    """How replies are generated."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    without_adapter: bool = False
    """The base model answers; the adapter stays loaded."""


def answer(
    loaded: LoadedModel,
    asked: Conversation,
    asking: Asking,
    on_text: Callable[[str], None] | None = None,
) -> Reply:
    """The reply to messages of which the last is not the model's own, in the precision of the training.

    Args:
        asked: the messages, with tools and values for the template's variables.
        on_text: called with each piece of the reply as it is generated.

    Raises:
        ConfigError: there is no chat template, or no adapter to leave out.
        DataError: the messages leave no room for a reply in the model's context.
        ChatTemplateError: the template refuses the messages.
    """
    prompt = prompt_of(loaded, asked, asking)
    with _as_asked(loaded, asking):
        return generate_reply(
            loaded.model, loaded.tokenizer, prompt.ids, prompt.max_new_tokens, asking.temperature, on_text
        )


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and how much it may say."""

    ids: Tensor
    """(1, T)"""
    max_new_tokens: int


def prompt_of(loaded: LoadedModel, asked: Conversation, asking: Asking) -> Prompt:
    """Messages as the model reads them.

    Raises:
        LoraCoreError: as `answer`.
    """
    check_template(loaded)
    ids = encode_prompt(loaded.tokenizer, asked)
    num_tokens, limit = ids.shape[1], longest_context(loaded.model)
    if limit is not None and num_tokens >= limit:
        raise DataError(
            f"the messages take {counted(num_tokens, 'token')}, and the model takes {limit:,} together with its reply; "
            "fix: shorter messages (in a chat, /reset forgets the earlier ones)",
            "prompt_too_long",
        )
    return Prompt(ids, asking.max_new_tokens if limit is None else min(asking.max_new_tokens, limit - num_tokens))


def answer_prompts(loaded: LoadedModel, prompts: Sequence[Prompt], asking: Asking) -> list[Reply]:
    """Their replies, those that may be equally long at once. For a model that `takes_padding`, or a single prompt.

    Raises:
        ConfigError: so many at once do not fit into the device's memory, or there is no adapter to leave out.
    """
    replies: dict[int, Reply] = {}
    for limit in {prompt.max_new_tokens for prompt in prompts}:
        places = [place for place, prompt in enumerate(prompts) if prompt.max_new_tokens == limit]
        ids = [prompts[place].ids for place in places]
        try:
            with _as_asked(loaded, asking):
                given = generate_replies(loaded.model, loaded.tokenizer, ids, limit, asking.temperature)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fix = f"train.per_device_eval_batch_size={len(ids) // 2}" if len(ids) > 1 else "model.quantization=nf4"
            replies_at_once = f"{counted(len(ids), 'reply', 'replies')} at once of up to {counted(limit, 'token')} each"
            raise ConfigError(
                f"{loaded.accelerator.device} has no memory left for {replies_at_once}; fix: {fix}"
            ) from error
        replies |= zip(places, given, strict=True)
    return [replies[place] for place in range(len(prompts))]


@contextmanager
def _as_asked(loaded: LoadedModel, asking: Asking) -> Iterator[None]:
    """In the precision of the training, with the adapter or without."""
    with loaded.accelerator.autocast(), base_alone(loaded) if asking.without_adapter else nullcontext():
        yield


def base_alone(loaded: LoadedModel) -> Any:
    """A context in which the loaded model computes as its base does.

    Raises:
        ConfigError: there is no adapter.
    """
    if loaded.opened.weights is None:
        raise ConfigError(f"{loaded.opened.given}: is a model without an adapter; fix: a run's or adapter's folder")
    return loaded.model.disable_adapter()


def check_template(loaded: LoadedModel) -> None:
    """Refuse a tokenizer that cannot write messages as a prompt.

    Raises:
        ConfigError: it has no chat template.
    """
    if not loaded.tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {loaded.tokenizer.name_or_path} has no chat template; fix: data.chat_template=chatml "
            "(or another name or file)"
        )


class Chat:
    """What was said by two, and what is said next: `ask` continues it."""

    def __init__(
        self,
        loaded: LoadedModel,
        asking: Asking,
        system: str | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """With nothing said yet.

        Args:
            system: the text of the system turn; None is the template's own, if it has one.
        """
        self._loaded, self._asking, self._tools = loaded, asking, tools
        self.system = system
        self.history: list[Message] = []
        """User and assistant turns, the oldest first."""

    def reset(self, system: str | None) -> None:
        """Forget what was said, and begin with this system turn."""
        self.system, self.history = system, []

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Reply:
        """The reply to the next user turn; both become part of the history, or neither where that fails.

        Raises:
            LoraCoreError: as `answer`.
        """
        turns: list[Message] = [*self.history, {"role": "user", "content": text}]
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        reply = answer(self._loaded, Conversation([*system, *turns], self._tools), self._asking, on_text)
        self.history = [*turns, {"role": "assistant", "content": reply.text}]
        return reply
