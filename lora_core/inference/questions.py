"""The questions that rows ask, with the replies that they expect, and a model's replies beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_core.config.schema import DataConfig
from lora_core.data.counts import EncodedFile
from lora_core.encoding.chat import ChatEncoder
from lora_core.errors import DataError, RowError, counted, problem_list
from lora_core.evaluation.replies import lines_by_number
from lora_core.inference.chat import Asking, Prompt, answer_prompts, prompt_of
from lora_core.inference.opened import LoadedModel
from lora_core.model.decoder import takes_padding
from lora_core.rows.messages import (
    Conversation,
    one_for_each_reply,
    parse_file,
    parse_json_row,
    shape_of,
    trained_messages,
    up_to_reply,
)
from lora_core.runtime.ranks import gather_from_ranks
from lora_core.sources.files import as_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """An example up to its last trained reply."""

    place: str
    """`rows.jsonl:4`."""
    asked: Conversation
    expected: str
    """That reply as training has the model write it, calls and reasoning too; without special tokens, and without
    white space around it."""


@dataclass(frozen=True)
class Answered:
    """A question with the model's reply."""

    question: Question
    reply: str | None
    """None where the model could not be asked."""
    problem: str | None = None
    """Why there is no reply, or what is wrong with it."""

    @property
    def is_exact(self) -> bool:
        """Character by character, but for white space around it."""
        return self.reply == self.question.expected


def question_of(row: Conversation, place: str, data: DataConfig, encoder: ChatEncoder) -> Question | None:
    """The row up to its last trained reply; None if it asks nothing: a text, or no turn before a reply that is trained.

    Args:
        encoder: one that trains the last assistant turn.

    Raises:
        RowError: the chat template cannot show the reply.
    """
    trained = trained_messages(row, data.train_on) if row.text is None else []
    if not trained or trained[-1] == 0:
        return None
    (encoded,) = encoder.encode_batch([up_to_reply(row, trained[-1])])
    if isinstance(encoded, RowError):
        raise encoded
    ids = [token for token, is_loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if is_loss]
    expected = str(encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    asked = Conversation(row.messages[: trained[-1]], row.tools, template_variables=row.template_variables)
    return Question(place, asked, expected)


def questions_of_file(file: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], int]:
    """(The questions of any file that `data.train_file` accepts, how many rows ask nothing).

    Raises:
        DataError: the file cannot be read; or rows of it cannot, and data.on_bad_row is not "skip". Lists them.
    """
    places = as_jsonl(file, data.cache_dir, key="--file", streaming=data.streaming)
    encoder = ChatEncoder(tokenizer, "last_assistant")
    found: list[Question] = []
    problems: list[str] = []
    num_rows = num_silent = 0
    for line, row in parse_file(places.path, shape_of(data)):
        num_rows += 1
        place = places.place(line)
        try:
            if isinstance(row, RowError):
                raise row
            parts = [part for _, part in one_for_each_reply(row, data.train_on)] if data.split_turns else [row]
            asked = [question_of(part, place, data, encoder) for part in parts]
            num_silent += asked.count(None)
            found += [question for question in asked if question is not None]
        except RowError as error:
            problems.append(f"{place}: {error}")
    if problems and data.on_bad_row == "error":
        title = f"{file}: {len(problems):,} of {counted(num_rows, 'row')} cannot be used:"
        raise DataError(problem_list(title, problems) + "\nFix them, or leave them out with data.on_bad_row=skip")
    if not found:
        raise DataError(f"{file}: none of {counted(num_rows, 'row')} asks anything; fix: rows with a user's turn")
    return found, num_silent + len(problems)


def questions_of_examples(
    examples: EncodedFile, data: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[int, Question]:
    """The question of each example that asks one, by its place among the examples.

    Args:
        limit: the first so many; None is all.
    """
    encoder = ChatEncoder(tokenizer, "last_assistant")
    lines, replies = list(examples.dataset["line"]), list(examples.dataset["reply"])
    by_line = lines_by_number(examples.places.path, set(lines))
    found: dict[int, Question] = {}
    for index, (line, reply) in enumerate(zip(lines, replies, strict=True)):
        if limit is not None and len(found) == limit:
            break
        row = up_to_reply(parse_json_row(by_line[line], shape_of(data)), reply)
        question = question_of(row, examples.places.place(line), data, encoder)
        if question is not None:
            found[index] = question
    return found


def replies_at_once(loaded: LoadedModel) -> int:
    """train.per_device_eval_batch_size, or 1 where the model does not take padding."""
    return loaded.config.train.per_device_eval_batch_size if takes_padding(loaded.model) else 1


def answers(loaded: LoadedModel, questions: Sequence[Question], asking: Asking) -> Iterator[Answered]:
    """The replies in order, `replies_at_once` at a time. What cannot be answered says why."""
    size = replies_at_once(loaded)
    for start in range(0, len(questions), size):
        yield from _answers_at_once(loaded, questions[start : start + size], asking)


def _answers_at_once(loaded: LoadedModel, questions: Sequence[Question], asking: Asking) -> list[Answered]:
    prompts: dict[int, Prompt] = {}
    answered: dict[int, Answered] = {}
    for place, question in enumerate(questions):
        try:
            prompts[place] = prompt_of(loaded, question.asked, asking)
        except (DataError, RowError) as error:
            answered[place] = Answered(question, None, str(error))
    replies = answer_prompts(loaded, [*prompts.values()], asking)
    for place, reply in zip(prompts, replies, strict=True):
        cut = None if reply.is_whole else f"stopped after {counted(reply.num_tokens, 'token')}"
        answered[place] = Answered(questions[place], reply.text, cut)
    return [answered[place] for place in range(len(questions))]


def answers_of_all_ranks(loaded: LoadedModel, questions: Sequence[Question], asking: Asking) -> list[Answered]:
    """`answers` in order; every rank answers its share, and all get all."""
    rank, num_ranks = loaded.accelerator.process_index, loaded.accelerator.num_processes
    mine = list(range(rank, len(questions), num_ranks))
    given = zip(mine, answers(loaded, [questions[index] for index in mine], asking), strict=True)
    gathered = [pair for of_rank in gather_from_ranks(list(given)) for pair in of_rank]
    return [answered for _, answered in sorted(gathered, key=lambda pair: pair[0])]
