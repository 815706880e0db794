"""Checks of the rows, each with the lines it found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_core.encoding.spans import EARLIER_REASONING
from lora_core.encoding.template import render_chat
from lora_core.errors import ChatTemplateError, counted
from lora_core.preflight.findings import Facts, Finding, length_that_keeps


def _places(facts: Facts, lines: list[int]) -> str:
    """Of training rows, in the user's files."""
    return facts.train_data.places.listed(lines)


def check_unreadable(facts: Facts) -> Iterator[Finding]:
    """Rows are dropped because they cannot be read.

    With `data.on_bad_row=skip` the run continues without them; otherwise it stops and lists them.

    Fix the rows: `data.on_bad_row=error` says what is wrong with each.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.is_bad)
    if lines:
        yield Finding(
            "rows_unreadable",
            "warning",
            f"{len(lines)} of {counted(facts.train_data.counts.read, 'row')} cannot be read and "
            f"{'is' if len(lines) == 1 else 'are'} dropped ({_places(facts, lines)})",
            len(lines),
            0,
            None,
        )


def check_unsupervised(facts: Facts) -> Iterator[Finding]:
    """Rows are dropped because no loss token is left in them.

    A question longer than `data.max_seq_length` leaves no room for its answer; what is left teaches nothing.

    A larger `data.max_seq_length`.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.is_unsupervised)
    if lines:
        longest = int(rows.length.max())
        yield Finding(
            "rows_unsupervised",
            "warning",
            f"{len(lines)} of {counted(facts.train_data.counts.read, 'row')} "
            f"{'has' if len(lines) == 1 else 'have'} no loss token in the first "
            f"{facts.config.data.max_seq_length:,} tokens and {'is' if len(lines) == 1 else 'are'} dropped "
            f"({_places(facts, lines)})",
            len(lines),
            0,
            f"data.max_seq_length={longest}" if longest > facts.config.data.max_seq_length else None,
        )


def check_truncation(facts: Facts) -> Iterator[Finding]:
    """Rows are truncated to `data.max_seq_length` tokens and lose what they should teach.

    The end is what is lost: of the last answer, and with it the token that ends the turn. A model that is trained on
    replies without an end learns to talk on.

    The finding names the lengths that keep 99% and all of the rows. `data.truncation=drop` leaves such rows out and
    counts them.
    """
    rows, counts, limit = facts.train_data.rows, facts.train_data.counts, facts.config.data.max_seq_length
    if counts.truncated:
        keeps_99 = length_that_keeps(facts.train_data, 0.99)
        yield Finding(
            "rows_truncated",
            "warning",
            f"{counts.truncated} of {counted(counts.read, 'row')} ({counts.truncated / counts.read:.1%}) "
            f"{'is' if counts.truncated == 1 else 'are'} truncated to {limit:,} tokens (data.max_seq_length), losing "
            f"{counted(counts.truncated_tokens, 'token')} ({counted(counts.truncated_supervised_tokens, 'loss token')})"
            f"{_lost_ends(facts)}; {keeps_99:,} keeps 99% of the rows whole, {counts.longest:,} all "
            f"({_places(facts, rows.lines(rows.length > limit))})",
            limit,
            counts.longest,
            f"data.max_seq_length={counts.longest}",
        )


def _lost_ends(facts: Facts) -> str:
    """How many kept rows are trained on a reply that has lost its end."""
    rows = facts.train_data.rows
    number = int(((rows.lost_supervised > 0) & (rows.num_supervised > 0)).sum())
    return (
        f"; {counted(number, 'reply', 'replies')} without an end (data.truncation=drop drops such rows)"
        if number
        else ""
    )


def check_left_out(facts: Facts) -> Iterator[Finding]:
    """Rows hold something that the model does not see: an unknown key, or a part that the template hides.

    What is not seen is not learned. Identifiers and sources are meant to be left out; a second reply, an earlier
    reasoning or a comment may not be. What would change what is learned, such as a preference pair, is an error.

    No action is needed for what may be left out; `data.columns` says what a column is, if it is one of ours. With
    `data.split_turns=true`, one example of each reply, the reasoning of earlier turns is shown and trained.
    """
    left_out = facts.train_data.left_out
    if left_out:
        shown = sorted(left_out, key=lambda key: (-len(left_out[key]), key))
        listed = ", ".join(f"{key} ({counted(len(left_out[key]), 'row')})" for key in shown[:20])
        yield Finding(
            "parts_left_out",
            "note",
            f"not shown to the model: {listed}" + (f", and {len(shown) - 20:,} more keys" if len(shown) > 20 else ""),
            {key: len(left_out[key]) for key in shown},
            {},
            "data.split_turns=true" if EARLIER_REASONING in left_out and not facts.config.data.split_turns else None,
        )


def check_turn_end(facts: Facts) -> Iterator[Finding]:
    """The token that ends the assistant's turns is not one that generation stops at.

    The model learns to end its turn, but the program that runs it does not notice and keeps generating. The usual case
    is a base model with the template of a chat model.

    Set `eos_token_id` in the generation config where you serve the model, or train the -Instruct model.
    """
    last = {
        int(ids[np.flatnonzero(mask)[-1]])
        for ids, mask in (
            (np.asarray(row["input_ids"]), np.asarray(row["loss_mask"]))
            for row, length in zip(
                facts.train_data.dataset.select(range(min(50, len(facts.train_data.lengths)))),
                facts.train_data.lengths,
                strict=False,
            )
            if length < facts.config.data.max_seq_length
        )
    }
    stops = facts.model.eos_token_ids | {facts.tokenizer.eos_token_id}
    added = facts.tokenizer.added_tokens_decoder
    unknown = sorted(token for token in last - stops if token in added and added[token].special)
    if unknown:
        shown = ", ".join(repr(facts.tokenizer.decode([token])) for token in unknown)
        yield Finding(
            "turn_end_not_eos",
            "warning",
            f"assistant turns end with {shown}, at which generation does not stop (it stops at "
            f"{', '.join(repr(facts.tokenizer.decode([t])) for t in sorted(t for t in stops if t is not None))})",
            unknown,
            sorted(token for token in stops if token is not None),
            None,
        )


def check_duplicates(facts: Facts) -> Iterator[Finding]:
    """The file has duplicate rows: the same tokens as an earlier row.

    A duplicate row is trained on twice as often. With `data.eval_fraction`, rows with the same tokens or words stay
    together, in the training set or in the eval set.

    Remove the duplicates, unless they are intended.
    """
    rows = facts.train_data.rows
    good = np.flatnonzero(~rows.is_bad)
    _, first = np.unique(rows.exact_key[good], return_index=True)
    is_copy = np.zeros(len(rows.line), dtype=np.bool_)
    is_copy[good] = True
    is_copy[good[first]] = False
    is_copy &= ~rows.is_repeat  # asked for, with a weight
    lines = rows.lines(is_copy)
    if lines:
        yield Finding(
            "rows_duplicated",
            "warning",
            f"{counted(len(lines), 'duplicate row')} ({_places(facts, lines)})",
            len(lines),
            0,
            None,
        )


def check_empty_replies(facts: Facts) -> Iterator[Finding]:
    """Assistant turns are empty.

    The model learns to end its turn at once.

    Remove the rows, or fill them in.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.has_empty_reply)
    if lines:
        yield Finding(
            "replies_empty",
            "warning",
            f"{counted(len(lines), 'row')} with an empty assistant turn ({_places(facts, lines)}): the model learns to "
            "reply with nothing",
            len(lines),
            0,
            None,
        )


def check_special_text(facts: Facts) -> Iterator[Finding]:
    """The text of rows contains what looks like a special token, such as `<|im_end|>`.

    It is encoded as plain characters, so it ends no turn; but such a file has often been rendered by a chat template
    already.

    Provide the messages, not the rendered text.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.holds_special_text)
    if lines:
        yield Finding(
            "special_tokens_in_text",
            "warning",
            f"{counted(len(lines), 'row')} with special tokens in the text ({_places(facts, lines)}); they are encoded "
            "as plain characters. Was the file rendered by a chat template before?",
            len(lines),
            0,
            None,
        )


def check_doubled_bos(facts: Facts) -> Iterator[Finding]:
    """Rows begin with two BOS tokens.

    The model never saw that in its own training and answers worse after it. The tokenizer adds none here, so the
    template writes both.

    Remove one from the chat template.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.has_doubled_bos)
    if lines:
        yield Finding(
            "bos_doubled",
            "warning",
            f"{counted(len(lines), 'row')} with two {facts.tokenizer.bos_token!r} at the start, both from the chat "
            f"template ({_places(facts, lines)})",
            len(lines),
            0,
            None,
        )


def check_borders(facts: Facts) -> Iterator[Finding]:
    """A token would reach across the border between a prompt and its answer.

    The model does not generate the half in the prompt. The text is split at the border instead, as in generation, where
    the prompt ends there.

    No action is needed; white space at the start of an answer is the usual reason.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.cut_at_border)
    if lines:
        yield Finding(
            "tokens_cut_at_border",
            "note",
            f"{counted(len(lines), 'row')} in which a token would reach across the start of an answer; the text is "
            f"split there ({_places(facts, lines)})",
            len(lines),
            0,
            None,
        )


def check_template_system(facts: Facts) -> Iterator[Finding]:
    """The chat template adds a system turn of its own to rows that have none.

    The model is trained with that text before each row, so it needs the same text in use; the same template adds it.

    No action is needed if you serve with the model's own template. Otherwise give each row a system turn.
    """
    rows = facts.train_data.rows
    without = int((~rows.is_bad & ~rows.has_system_turn).sum())
    if not without:
        return
    try:
        rendered = render_chat(facts.tokenizer, [{"role": "user", "content": "a"}])
    except ChatTemplateError:  # for example one that requires a system turn
        return
    if "system" in rendered.lower():
        yield Finding(
            "template_adds_system",
            "note",
            f"the chat template adds a system turn to {without:,} of {counted(facts.train_data.counts.read, 'row')}: "
            f"{rendered[:120]!r}",
            without,
            0,
            None,
        )


def check_template_date(facts: Facts) -> Iterator[Finding]:
    """The chat template writes a date into each row.

    The rows have the date of the day on which they were encoded, and keep it for as long as they come from
    `data.cache_dir`; in use the template writes the date of that day.

    No action is needed. To encode the rows with today's date, use another `data.cache_dir`; for a template without a
    date, `data.chat_template=FILE.jinja`.
    """
    template = str(facts.tokenizer.chat_template)
    dates = sorted({data.encoded_on for data in (facts.train_data, facts.eval_data) if data is not None})
    if "strftime_now" in template:
        said = f"writes the date of the day: the encoded rows have {' and '.join(dates)}, the day they were encoded on"
    elif "date_string" in template:
        said = (
            f"writes a date (date_string): the rows, encoded on {' and '.join(dates)}, have the one that the template "
            "falls back to, because none is passed"
        )
    else:
        return
    yield Finding("template_uses_date", "note", f"the chat template {said}", dates[-1], None, None)


def check_held_out(facts: Facts) -> Iterator[Finding]:
    """There is no eval set.

    Training loss falls whether the model learns or memorises; only the loss on other rows can tell which.

    Set `data.eval_file`, or `data.eval_fraction=0.1`.
    """
    if facts.eval_data is None:
        yield Finding(
            "no_held_out_rows",
            "note",
            "no eval set: eval loss is not measured",
            0,
            1,
            "data.eval_fraction=0.1" if facts.plan.num_rows > 1 else None,
        )


def check_overlap(facts: Facts) -> Iterator[Finding]:
    """Training rows are also in the eval set: the same tokens, or the same apart from case, white space, punctuation.

    Eval loss then measures what was memorised, and looks better than it is.

    Remove them from one of the two.
    """
    if facts.eval_data is None or facts.config.data.eval_file is None:  # a share of one file keeps duplicates together
        return
    rows, eval_rows = facts.train_data.rows, facts.eval_data.rows
    exact = ~rows.is_bad & np.isin(rows.exact_key, eval_rows.exact_key[~eval_rows.is_bad])
    either = exact | (~rows.is_bad & np.isin(rows.text_key, eval_rows.text_key[~eval_rows.is_bad]))
    lines = rows.lines(either)
    if lines:
        almost = len(lines) - int(exact.sum())
        yield Finding(
            "eval_overlap",
            "warning",
            f"{counted(len(lines), 'training row')} {'is' if len(lines) == 1 else 'are'} also in the eval set "
            f"({_places(facts, lines)}"
            + (f"; {almost} in other case, white space or punctuation" if almost else "")
            + "); "
            "eval loss will look better than it is",
            len(lines),
            0,
            None,
        )
