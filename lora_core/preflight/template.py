"""Checks of how the chat template and the tokenizer fit the rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from lora_core.encoding.named_templates import folds_system, missing_end_token
from lora_core.errors import counted
from lora_core.preflight.findings import Facts, Finding


def check_template_end_token(facts: Facts) -> Iterator[Finding]:
    """The tokenizer lacks the token that the named chat template ends turns with; its EOS ends them instead.

    A model learns to stop only at a single token, and generation stops at EOS. The template's other marks, such as
    `<|im_start|>`, are plain text to this tokenizer, of several tokens each.

    No action is needed: the tokenizer that is saved with the adapter has the same template.
    """
    name = facts.config.data.chat_template
    missing = missing_end_token(facts.tokenizer, name)
    if missing is not None:
        yield Finding(
            "template_end_token",
            "note",
            f"the tokenizer has no {missing!r}, which data.chat_template={name} ends turns with; its EOS "
            f"{facts.tokenizer.eos_token!r} ends them instead",
            missing,
            facts.tokenizer.eos_token,
            None,
        )


def check_folded_system(facts: Facts) -> Iterator[Finding]:
    """The chat template has no system turn, and `data.fold_system` puts that text in front of the first user turn.

    The model is trained on system texts as part of questions, and needs them there in use.

    No action is needed: the tokenizer that is saved with the adapter does the same.
    """
    rows = facts.train_data.rows
    folded = int((~rows.is_bad & rows.has_system_turn).sum())
    if folded and folds_system(facts.tokenizer):
        yield Finding(
            "system_folded",
            "note",
            f"the chat template has no system turn: in {folded:,} of {counted(facts.train_data.counts.read, 'row')} "
            "its text is put in front of the first user turn (data.fold_system)",
            folded,
            0,
            None,
        )


def check_tools_twice(facts: Facts) -> Iterator[Finding]:
    """Rows have tools, and say them in their texts too: the schemas in a system text, or a tool's answer in
    `<tool_response>` where the chat template writes that tag itself.

    The model is shown them twice, in two forms; in use it is shown them once. Files in the form of Hermes have both.

    Leave one out: `data.columns` can give the tools a name that no column has, or take them out of the texts.
    """
    rows, places = facts.train_data.rows, facts.train_data.places
    is_twice = rows.lists_tools_twice & ~rows.is_bad
    lines = rows.lines(is_twice)
    if lines:
        columns = json.dumps({**facts.config.data.columns, "tools": "in_the_text"}, ensure_ascii=False)
        are_all = bool((is_twice == (rows.has_tools & ~rows.is_bad)).all())
        yield Finding(
            "tools_shown_twice",
            "warning",
            f"{counted(len(lines), 'row')} with tools that a system text lists too, so that the model is shown them "
            f"twice ({places.listed(lines)})",
            len(lines),
            0,
            f"data.columns={shlex.quote(columns)}" if are_all else None,
        )
    wrapped = rows.lines(rows.wraps_answers & ~rows.is_bad)
    if wrapped and "<tool_response>" in str(facts.tokenizer.chat_template):
        yield Finding(
            "answers_wrapped_twice",
            "warning",
            f"{counted(len(wrapped), 'row')} with a tool's answer in <tool_response>, which the chat template writes "
            f"around it once more ({places.listed(wrapped)})",
            len(wrapped),
            0,
            None,
        )


def check_normalized(facts: Facts) -> Iterator[Finding]:
    """The tokenizer changes letters of rows before it encodes them: its normalizer makes one é of an e and an accent
    (NFC), say, or small letters of capitals.

    What is trained is not what the file says. It is what the model would read in use, too, and it writes such letters
    only as the tokenizer leaves them.

    No action is needed, unless it is these letters that should be learned.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.is_normalized & ~rows.is_bad)
    if lines:
        yield Finding(
            "text_normalized",
            "note",
            f"{counted(len(lines), 'row')} with letters that the tokenizer changes before it encodes them (its "
            f"normalizer: {_normalizer_name(facts)}; {facts.train_data.places.listed(lines)})",
            len(lines),
            0,
            None,
        )


def _normalizer_name(facts: Facts) -> str:
    name = type(facts.tokenizer.backend_tokenizer.normalizer).__name__
    return "several" if name == "Sequence" else name


def check_vocabulary(facts: Facts) -> Iterator[Finding]:
    """Rows have tokens for which the model has no embedding.

    The tokenizer got new tokens and the model did not, so the first of them would stop the run in the middle of its
    mathematics.

    Give the model rows for them, save it, and train these rows with `lora.trainable_token_indices`; or use the model's
    own tokenizer.
    """
    number, rows = len(facts.tokenizer), facts.model.vocab_size
    if number <= rows:
        return
    files = [file for file in (facts.train_data, facts.eval_data) if file is not None]
    beyond = sorted({token for file in files for ids in file.dataset["input_ids"] for token in ids if token >= rows})
    if beyond:
        tokens = ", ".join(str(facts.tokenizer.convert_ids_to_tokens(token)) for token in beyond[:5])
        indices = ",".join(map(str, beyond[:20])) + (",..." if len(beyond) > 20 else "")
        yield Finding(
            "tokens_without_embedding",
            "error",
            f"the model's embedding has {rows:,} rows and its tokenizer {number:,} tokens; the rows hold {tokens}: in "
            f"Python, model.resize_token_embeddings({number}), model.save_pretrained(FOLDER) and "
            "tokenizer.save_pretrained(FOLDER), then model.name_or_path=FOLDER "
            f"lora.trainable_token_indices=[{indices}]",
            max(beyond),
            rows - 1,
            None,
        )
