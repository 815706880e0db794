"""Checks of what the replies teach beside their content: how they begin, what nobody filled in, what is unanswered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_core.data.alike import near_copies, near_pairs
from lora_core.errors import counted
from lora_core.preflight.findings import Facts, Finding

_FEWEST_ROWS = 20
_ALIKE = 0.5


def check_unanswered(facts: Facts) -> Iterator[Finding]:
    """The last turn of rows is the user's, without a reply.

    It is shown and nothing of it is trained. A row whose reply was lost teaches less than it should, and a row whose
    roles were mixed up teaches the other side.

    Add the replies, or see that the roles are right (`data.roles`).
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.ends_unanswered)
    if lines:
        yield Finding(
            "last_turn_unanswered",
            "warning",
            f"{counted(len(lines), 'row')} whose last turn is the user's, without a reply "
            f"({facts.train_data.places.listed(lines)})",
            len(lines),
            0,
            None,
        )


def check_placeholders(facts: Facts) -> Iterator[Finding]:
    """Replies have what looks like a placeholder that nobody filled in: `{{name}}`, `[INSERT NAME]`.

    The model learns to write placeholders.

    Fill them in, unless the replies are meant to be templates, or are code.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.has_placeholder)
    if lines:
        yield Finding(
            "placeholders_in_replies",
            "note",
            f"{counted(len(lines), 'row')} with a placeholder, such as {{{{name}}}} or [INSERT NAME], in a reply "
            f"({facts.train_data.places.listed(lines)})",
            len(lines),
            0,
            None,
        )


def check_repeated_prompts(facts: Facts) -> Iterator[Finding]:
    """Replies begin with all words of the turn that they answer.

    The model learns to say the question again before each reply. The usual cause is a file of whole texts, in which the
    reply was stored with its prompt.

    Cut the prompt from the replies.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.repeats_prompt)
    if lines:
        yield Finding(
            "replies_repeat_prompt",
            "warning",
            f"{counted(len(lines), 'row')} in which a reply begins with the whole turn before it "
            f"({facts.train_data.places.listed(lines)})",
            len(lines),
            0,
            None,
        )


def check_alike_starts(facts: Facts) -> Iterator[Finding]:
    """At least half of the rows have a reply that starts with the same four words.

    A start such as "Sure! Here is the" is learned first and best, and takes loss tokens from what differs.

    No action is needed where that is the format that you want.
    """
    rows = facts.train_data.rows
    starts = rows.reply_start[~rows.is_bad & (rows.reply_start != 0)]
    if len(rows.line) < _FEWEST_ROWS or not len(starts):
        return
    keys, numbers = np.unique(starts, return_counts=True)
    most = int(numbers.max())
    if most >= _ALIKE * int((~rows.is_bad).sum()):
        lines = rows.lines(~rows.is_bad & (rows.reply_start == keys[int(numbers.argmax())]))
        yield Finding(
            "replies_start_alike",
            "note",
            f"{most:,} of {counted(len(rows.line), 'row')} have a reply that starts with the same four words "
            f"({facts.train_data.places.listed(lines)})",
            most,
            int(_ALIKE * len(rows.line)),
            None,
        )


def check_scripts(facts: Facts) -> Iterator[Finding]:
    """Replies are written in other letters than the turns that they answer, such as Latin after Cyrillic.

    The model learns to answer in another language than it was asked in. In a translator's rows that is the task; in
    others it is usually a file in which languages were mixed up.

    Look at the rows; no action is needed where they are meant so.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.changes_script)
    if lines:
        yield Finding(
            "scripts_differ",
            "note",
            f"{counted(len(lines), 'row')} with a reply in other letters than the turn that it answers "
            f"({facts.train_data.places.listed(lines)})",
            len(lines),
            0,
            None,
        )


def check_near_duplicates(facts: Facts) -> Iterator[Finding]:
    """Rows say almost what an earlier row says, or eval rows what a training row says: most of their sequences of five
    words are the same.

    They are trained on as if they were more than they are, and where one is in the eval set, eval loss looks better
    than it is. `data.eval_fraction` keeps them on one side, unless more than half of the rows are of one form. Told by
    a sketch of eight hashes a row, six of them shared; rows of fewer than ten words have too few.

    Remove them, unless rows of one form are what you want.
    """
    rows, eval_lines = facts.train_data.rows, _eval_lines_alike(facts)
    lines = rows.lines(near_copies(rows.sketch, rows.text_key) & ~rows.is_bad)
    is_kept_apart = facts.config.data.eval_fraction > 0 and not eval_lines
    if lines:
        yield Finding(
            "rows_alike",
            "note",
            f"{counted(len(lines), 'row')} that almost {'repeats' if len(lines) == 1 else 'repeat'} an earlier row "
            f"({facts.train_data.places.listed(lines)})"
            + ("; data.eval_fraction keeps near-copies on one side" if is_kept_apart else ""),
            len(lines),
            0,
            None,
        )
    if facts.eval_data is not None and eval_lines:
        why = "; more than half of all rows are of such forms" if facts.config.data.eval_fraction > 0 else ""
        yield Finding(
            "eval_alike",
            "note",
            f"{len(eval_lines):,} of {counted(len(facts.eval_data.indices), 'eval row')} almost "
            f"{'repeats' if len(eval_lines) == 1 else 'repeat'} a training row "
            f"({facts.eval_data.places.listed(eval_lines)}){why}; eval loss will look better than on other rows",
            len(eval_lines),
            0,
            None,
        )


def _eval_lines_alike(facts: Facts) -> list[int]:
    """Lines of the eval rows that are near-copies of a training row, and no copies of it."""
    if facts.eval_data is None:
        return []
    sides = [(data.rows, data.indices) for data in (facts.train_data, facts.eval_data)]
    earlier, later = near_pairs(np.concatenate([rows.sketch[indices] for rows, indices in sides])).T
    text_key = np.concatenate([rows.text_key[indices] for rows, indices in sides])
    num_trained = len(facts.train_data.indices)
    is_across = (earlier < num_trained) & (later >= num_trained) & (text_key[earlier] != text_key[later])
    chosen = facts.eval_data.indices[np.unique(later[is_across]) - num_trained]
    return sorted({int(line) for line in facts.eval_data.rows.line[chosen]})


def check_capacity(facts: Facts) -> Iterator[Finding]:
    """The training set has more loss tokens than an adapter of this rank has room for.

    An adapter stores about 2 bits a parameter, and rows of instructions hold about 1 bit a token ("LoRA Without
    Regret", https://thinkingmachines.ai/blog/lora/): beyond 2 loss tokens per parameter LoRA falls behind full
    fine-tuning.

    A higher `lora.rank`, with `lora.alpha` in proportion, or adapters on more layers.
    """
    if facts.memory is None:
        return
    parameters, tokens = facts.memory.adapter_file_bytes // 4, facts.train_data.num_supervised
    if tokens > 2 * parameters:
        lora = facts.config.lora
        rank = lora.rank
        while tokens > 2 * parameters / lora.rank * rank:
            rank *= 2
        yield Finding(
            "adapter_small_for_rows",
            "note",
            f"{tokens:,} loss tokens for {parameters:,} trainable parameters (lora.rank={lora.rank}); at 2 bits a "
            f"parameter and 1 a token there is room for {2 * parameters:,}; rank {rank} has room for all",
            tokens,
            2 * parameters,
            None,
        )
