"""A model measured on an eval set: its losses, its replies, a table of its examples; and beside another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.checkpoints.resume import data_hash
from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import encode_set, load_data, pad_id
from lora_core.data.packing import eval_batching
from lora_core.errors import ConfigError, counted
from lora_core.evaluation.evaluate import EvalResult, ExampleLosses, compare_examples, evaluate_examples
from lora_core.inference.chat import Asking
from lora_core.inference.opened import LoadedModel, Opened
from lora_core.inference.paired import ExactDifference, LossDifference, compare_exact, loss_difference
from lora_core.inference.questions import Answered, answers_of_all_ranks, questions_of_examples
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.faults import naming_lack_of_memory
from lora_core.runtime.ranks import first_on_each_machine
from lora_core.training.alike import check_order_of_ranks, check_same_base, check_same_rows, check_same_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of an example, beside how it is trained: a change of these alone leaves its question the same.
_TEMPLATE_KEYS = ("chat_template", "chat_template_kwargs", "fold_system")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model."""

    opened: Opened
    result: EvalResult
    losses: ExampleLosses
    data: EncodedFile
    replies: dict[int, Answered]
    """By the example's place in the eval set; empty if no replies were asked for."""

    @property
    def num_exact(self) -> int:
        return sum(answered.is_exact for answered in self.replies.values())

    def __str__(self) -> str:
        text = f"{self.opened}\n  {self.result}"
        if self.replies:
            cut = sum(answered.problem is not None for answered in self.replies.values())
            asked = len(self.replies)
            text += f"\n  exact replies: {self.num_exact:,} of {asked:,} ({self.num_exact / asked:.1%})"
            text += f"; {cut:,} of {asked:,} stopped at a limit or failed" if cut else ""
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the table."""
        exact = {"num_replies": len(self.replies), "num_exact": self.num_exact} if self.replies else {}
        return {**self.result.to_dict(), **exact, "model": str(self.opened)}

    def rows(self) -> list[dict[str, Any]]:
        """An object for each example: place, loss (per loss token), num_tokens (loss tokens); and reply, expected,
        exact and problem where it was asked."""
        places = [self.data.places.place(int(line)) for line in self.data.dataset["line"]]
        return [
            {"place": place, "loss": loss, "num_tokens": num_tokens, **_reply_columns(self.replies.get(index))}
            for index, (place, loss, num_tokens) in enumerate(
                zip(places, self.losses.means().tolist(), self.losses.num_tokens.tolist(), strict=True)
            )
        ]


def _reply_columns(answered: Answered | None) -> dict[str, Any]:
    if answered is None:
        return {}
    columns = {"reply": answered.reply, "expected": answered.question.expected, "exact": answered.is_exact}
    return columns | ({} if answered.problem is None else {"problem": answered.problem})


def load_eval_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> EncodedFile:
    """The eval set: the rows of data.eval_file, or the share of the training rows that data.eval_fraction takes.

    Raises:
        ConfigError: the settings name none.
        DataError: a file cannot be read.
    """
    if config.data.eval_file is not None:  # the training rows need not be here
        return encode_set(config, tokenizer, "eval_file")
    eval_data = load_data(config, tokenizer)[1] if config.data.eval_fraction > 0 else None
    if eval_data is None:
        raise ConfigError("there is no eval set; fix: data.eval_file=PATH or data.eval_fraction=0.1")
    return eval_data


def evaluate_loaded(
    loaded: LoadedModel, num_replies: int | None, max_new_tokens: int, say: Callable[[str], None]
) -> Evaluation:
    """Measure a model on the eval set of its settings, the way `train` does; call it in every rank.

    Args:
        num_replies: ask it for greedy replies to the first so many examples; 0 is none, None is all.
        say: told what is about to take long.

    Raises:
        LoraCoreError: there is no eval set, it cannot be read, the loss would not be that of the model's own logits, or
            there was no memory left.
    """
    config, accelerator = loaded.config, loaded.accelerator
    check_order_of_ranks()
    check_same_settings(config, None)
    check_same_base(loaded.model)
    with naming_lack_of_memory(accelerator):
        with accelerator.autocast():
            check_head(loaded.model)
        with first_on_each_machine():
            data = load_eval_data(config, loaded.tokenizer)
        check_same_rows(data_hash(data, None), len(data.lengths), config.data.eval_file or config.data.train_source)
        model = accelerator.prepare_model(CausalLMLoss(loaded.model), evaluation_mode=True)
        result, losses = evaluate_examples(accelerator, model, data, eval_batching(config, pad_id(loaded.tokenizer)))
        if num_replies == 0:
            return Evaluation(loaded.opened, result, losses, data, {})
        questions = questions_of_examples(data, config.data, loaded.tokenizer, num_replies)
        say(f"asking for {counted(len(questions), 'reply', 'replies')} ...")
        replies = answers_of_all_ranks(loaded, list(questions.values()), Asking(max_new_tokens))
    return Evaluation(loaded.opened, result, losses, data, dict(zip(questions, replies, strict=True)))


def on_rows_of(opened: Opened, config: RunConfig) -> Opened:
    """The same model, with the eval set of other settings; its chat template stays its own."""
    own = opened.config
    template = {key: getattr(own.data, key) for key in _TEMPLATE_KEYS}
    data = config.data.model_copy(update=template)
    train = own.train.model_copy(
        update={
            "seed": config.train.seed,  # which rows data.eval_fraction takes
            "per_device_eval_batch_size": config.train.per_device_eval_batch_size,
        }
    )
    return replace(opened, config=own.model_copy(update={"data": data, "train": train}))


@dataclass(frozen=True)
class Difference:
    """One evaluation minus another, on the same examples."""

    loss: LossDifference | None
    """None where the two have different loss tokens, whose losses say nothing of each other."""
    exact: ExactDifference | None
    """None where no replies were asked for."""

    def __str__(self) -> str:
        loss = self.loss or "losses are not compared: the two models read the same rows as different tokens"
        return "\n".join(["difference", f"  {loss}", *([] if self.exact is None else [f"  {self.exact}"])])

    def to_dict(self) -> dict[str, Any]:
        return {
            "loss": None if self.loss is None else self.loss.to_dict(),
            "exact": None if self.exact is None else self.exact.to_dict(),
        }


def compare_evaluations(first: Evaluation, second: Evaluation) -> Difference:
    """Pair the examples of two evaluations of one eval set.

    Raises:
        ConfigError: they kept different rows of it.
    """
    rows = [[*zip(each.data.dataset["line"], each.data.dataset["reply"], strict=True)] for each in (first, second)]
    if rows[0] != rows[1]:
        raise ConfigError(
            f"the two cannot be compared: of the eval set, {first.opened} keeps {counted(len(rows[0]), 'example')} and "
            f"{second.opened} {len(rows[1]):,} or others; fix: a larger data.max_seq_length, or one chat template"
        )
    loss = None
    if _tokens_of(first.data) == _tokens_of(second.data):
        num_tokens = first.losses.num_tokens
        loss = loss_difference(compare_examples(second.losses.means(), first.losses.means(), num_tokens))
    asked = sorted(first.replies.keys() & second.replies.keys())
    exact = None
    if asked:
        exact = compare_exact(*([each.replies[index].is_exact for index in asked] for each in (first, second)))
    return Difference(loss, exact)


def _tokens_of(data: EncodedFile) -> list[list[int]]:
    """What decides whether losses can be compared: the examples' hashes, and how many of their tokens count."""
    rows = data.rows
    return [np.asarray(column)[data.indices].tolist() for column in (rows.exact_key, rows.num_supervised)]
