"""The contracts, run small on the user's own model and rows: what held, and by how much.

    mask       every row: the supervised tokens are the assistant's turns and the tokens that end them
    gradient   one optimizer step cut in several ways, padded and packed, against one padded micro-batch
    plan       a short run takes the steps and the learning rates that were planned
    resume     the same run, killed after its first checkpoint and resumed, gives the same adapter and losses
    reload     the adapter that it wrote, loaded by PEFT, gives the loss that was logged; merged, the same logits

All that is written goes to a temporary folder, but for the encoded rows, which any run keeps in data.cache_dir. The
base model is in memory once at a time.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lora_core.attention import causal_lm_of, check_packing, use_segment_attention
from lora_core.chat import ChatEncoder, EncodedChat
from lora_core.config import RunConfig, with_overrides
from lora_core.data import EncodedFile, load_data, pad_id
from lora_core.devices import build_accelerator, device_memory
from lora_core.errors import ConfigError, ContractBroken, DataError, TrainingError, counted
from lora_core.evaluate import evaluate, load_adapter
from lora_core.faults import free_memory
from lora_core.loss import CausalLMLoss
from lora_core.memory import MicroBatch, predict_memory
from lora_core.messages import Conversation, Message, parse_json_row
from lora_core.model import add_adapter, load_base_model, load_tokenizer
from lora_core.packing import Batching, RowIndices, collate, eval_batching, to_device
from lora_core.preflight import plan_for
from lora_core.train import train, train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_GRADIENT_ROWS = 8
_NUM_EVAL_ROWS = 8
_NUM_MERGE_ROWS = 4
_MAX_BATCH_SIZE, _MAX_ACCUMULATION = 4, 4
_SHORT_RUN_STEPS = 5

# Sums in another order differ in the last bits of float32 (2^-24 each); a wrong cut differs by 1e-2 and more.
GRADIENT_LIMIT = 1e-5
RATE_LIMIT = 1e-12
RELOAD_LIMIT = 1e-5
# Of the largest logit. Five steps' adapter was measured to move logits by 8e-3 of it in a warmup, 9e-2 at full rate.
MERGE_LIMIT = 1e-4

Outcome = Literal["held", "broken", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    contract: str
    compared: str
    limit: str
    measured: str
    outcome: Outcome
    reason: str | None = None
    """Why it does not apply, or what exactly broke."""

    @classmethod
    def judged(cls, contract: str, compared: str, limit: str, measured: str, problem: str | None = None) -> Check:
        return cls(contract, compared, limit, measured, "broken" if problem else "held", problem)

    @classmethod
    def not_applicable(cls, contract: str, compared: str, reason: str) -> Check:
        return cls(contract, compared, "-", "-", "not applicable", reason)


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    settings: list[str]
    """Which rows were taken and what was changed for the checks."""
    checks: list[Check]
    wall_time_s: float

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "broken"]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "held": not self.broken}

    def __str__(self) -> str:
        return "\n".join([*self.settings, "", *_table(self.checks), f"{self.wall_time_s:.0f} s"])

    def refuse_broken(self) -> None:
        """
        Raises:
            ContractBroken: a check did not hold; lists each.
        """
        if self.broken:
            lines = [f"  {check.contract}: {check.compared}: {check.reason}" for check in self.broken]
            number = counted(len(self.broken), "check")
            raise ContractBroken("\n".join([f"{number} of {len(self.checks)} did not hold:", *lines]))


def verify(config: RunConfig, say: Callable[[str], None] = print) -> Verification:
    """Run the contracts on this configuration's model and rows, in one process.

    Args:
        say: told what is being checked, a line each.

    Raises:
        ConfigError, DataError, PreflightError: the configuration or the rows cannot be used.
        TrainingError: the short run could not be started.
    """
    started = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: one process is needed; fix: python launch/verify.py")
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    train_data, eval_data = load_data(config, tokenizer)

    say("mask: every row")
    checks = [check_masks("training rows", config.data.train_file, train_data, tokenizer)]
    if eval_data is None:
        checks.append(Check.not_applicable("mask", "held-out rows", "no held-out rows: data.eval_file is null"))
    else:
        checks.append(
            check_masks("held-out rows", config.data.eval_file or config.data.train_file, eval_data, tokenizer)
        )

    with tempfile.TemporaryDirectory(prefix="lora_core_verify_") as name:
        short = short_run(config, train_data, eval_data, Path(name))
        # The child processes come first: the memory of a model that was freed here may stay with this process.
        say("resume: a short run, killed and resumed")
        interrupted = run_interrupted(short, Path(name) / "interrupted")
        say("plan: the same run, uninterrupted")
        problem = run_whole(short, Path(name) / "whole")
        free_memory()
        checks.append(check_plan(short, Path(name) / "whole", problem))
        checks.append(check_resume(Path(name) / "whole", interrupted, problem))
        say("reload: the adapter that it wrote")
        if problem is None:
            checks.append(check_reload(short.config, Path(name) / "whole"))
            free_memory()
            checks.append(check_merge(short.config, Path(name) / "whole/adapter", train_data, tokenizer))
        else:
            checks += [Check.not_applicable("reload", what, "the short run did not end") for what in ("loss", "logits")]
    free_memory()
    say("gradient: one step, cut in several ways")
    checks += check_gradients(config, train_data, tokenizer)
    order = ("mask", "gradient", "plan", "resume", "reload")
    checks.sort(key=lambda check: order.index(check.contract))
    settings = [_describe_rows(config, train_data, eval_data), short.settings]
    return Verification(settings, checks, round(time.monotonic() - started, 1))


def _describe_rows(config: RunConfig, train_data: EncodedFile, eval_data: EncodedFile | None) -> str:
    number = len(train_data.lengths)
    held_out = f" and all {len(eval_data.lengths):,} held-out rows" if eval_data else ""
    precision = {
        "none": "",
        "nf4": "; the weights are your 4-bit ones, multiplied in float32",
        "int8": "; your 8-bit weights, outliers not set apart (int8 looks for them in the whole micro-batch); packed "
        "rows against each packed alone (rounding to 8 bits would enlarge the last bit in which two attentions differ)",
    }[config.model.quantization]
    return (
        f"mask: all {number:,} training rows{held_out}\n"
        f"gradient: {min(_NUM_GRADIENT_ROWS, number)} of the shorter rows, against the same in one padded micro-batch; "
        f"{', '.join(_float32_overrides(config))}{precision}"
    )


def _table(checks: Sequence[Check]) -> list[str]:
    """Aligned columns, one line a check; below each that did not hold or does not apply, why."""
    rows = [("contract", "compared", "limit", "measured", "")]
    rows += [(check.contract, check.compared, check.limit, check.measured, check.outcome) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    reasons = [None, *(check.reason for check in checks)]
    lines = []
    for row, reason in zip(rows, reasons, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if reason is not None:
            lines.append(f"{' ' * widths[0]}  {reason}")
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Mask


def check_masks(rows: str, path: str, data: EncodedFile, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Every row that is trained or measured on, against its line in the file.

    Raises:
        DataError: the file changed meanwhile.
    """
    reader = MaskReader(tokenizer)
    encoder = ChatEncoder(tokenizer)
    cut = in_part = 0
    problems = []
    for row, line in _rows_with_lines(Path(path), data):
        conversation = parse_json_row(line)
        result, was_cut = _read_row(reader, encoder, conversation, row["input_ids"], row["loss_mask"])
        if result.problem is not None:
            problems.append(f"line {row['line']}: {result.problem}")
            continue
        cut += was_cut
        in_part += not result.place_is_known
    exact = len(data.lengths) - len(problems) - cut
    measured = f"{exact:,} of {len(data.lengths):,} exact"
    if cut:
        measured += f", {cut:,} cut at max_seq_length (exact up to there)"
    if in_part:
        measured += f"; {in_part:,} by text and order alone"
    if data.counts.dropped:
        measured += f"; {data.counts.dropped:,} more were dropped"
    problem = None
    if problems:
        more = f"; and {len(problems) - 5:,} more" if len(problems) > 5 else ""
        problem = f"{path}: {counted(len(problems), 'row')} broken: {'; '.join(problems[:5])}{more}"
    return Check.judged("mask", rows, "every row exact", measured, problem)


def _read_row(
    reader: MaskReader, encoder: ChatEncoder, conversation: Conversation, ids: list[int], mask: list[bool]
) -> tuple[MaskReading, bool]:
    """What the reader says, and whether the row was cut. A cut row is read whole, and must be how that begins."""
    reading = reader.read(conversation, EncodedChat(ids, mask))
    if reading.problem is None:
        return reading, False
    whole = encoder.encode_batch([conversation])[0]
    if not isinstance(whole, EncodedChat) or len(whole.input_ids) <= len(ids):
        return reading, False
    if whole.input_ids[: len(ids)] != ids or [False, *whole.loss_mask[1 : len(ids)]] != mask:
        return reading, False
    return reader.read(conversation, whole), True


def _rows_with_lines(path: Path, data: EncodedFile) -> Iterator[tuple[dict[str, Any], str]]:
    """Each encoded row with the line that it came from; the file is read once, a line at a time."""
    rows: Iterator[dict[str, Any]] = iter(data.dataset)
    row = next(rows, None)
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if row is not None and number == row["line"]:
                yield row, raw.decode("utf-8-sig")
                row = next(rows, None)
    if row is not None:
        raise DataError(f"{path}: has no line {row['line']} any more; it changed meanwhile; fix: start again")


@dataclass(frozen=True)
class MaskReading:
    """What `MaskReader` says of one row."""

    problem: str | None
    place_is_known: bool = True
    """False: the template shows earlier turns differently later on (or has none of its own for a tool call), so that
    the turns were compared by text and order, and not by where they stand."""


class MaskReader:
    """Reads a mask back, without knowing how `chat.py` made it.

    From the row, the turns' contents; from the template, the whole text and what stands before each turn; from the
    tokenizer, the special tokens. The decoded tokens must agree with all three.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._specials = sorted(specials | set(tokenizer.all_special_tokens), key=len, reverse=True)

    def read(self, conversation: Conversation, encoded: EncodedChat) -> MaskReading:
        """Read one row that was not cut."""
        shown = self._render(conversation.messages, conversation)
        if shown is None:
            return MaskReading("the chat template refuses it now")
        text = self._decode(encoded.input_ids)
        # Some tokenizers do not give back every space, or compose characters: then both sides go without.
        same = _plain if text == shown or self._gives_back(shown) else _loose
        if same(text) != same(shown):
            return MaskReading(f"its tokens read {_shortened(text)!r}, the template writes {_shortened(shown)!r}")
        replies = self._replies(conversation, shown)
        supervised = same(
            self._decode([t for t, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag])
        )
        assistants = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        pattern = "".join(
            self._turn(conversation.messages[i], reply, same) for i, reply in zip(assistants, replies, strict=True)
        )
        if re.fullmatch(pattern, supervised, re.DOTALL) is None:
            contents = " | ".join(conversation.messages[i]["content"] for i in assistants)
            return MaskReading(
                f"supervised is {_shortened(supervised)!r}, the assistant's turns are {_shortened(contents)!r}"
            )
        starts = _starts(encoded.loss_mask)
        place_is_known = len(starts) == len(assistants)
        if place_is_known:
            for index, start in zip(assistants, starts, strict=True):
                before = self._before(conversation, index, shown)
                place_is_known &= before is not None
                here = same(self._decode(encoded.input_ids[:start]))
                if before is not None and not here.startswith(same(before)):
                    return MaskReading(
                        f"turn {index + 1} is supervised too early, from {_shortened(here, from_end=True)!r} on"
                    )
        return MaskReading(None, place_is_known)

    def _turn(self, message: Message, reply: str | None, same: Callable[[str], str]) -> str:
        """A regular expression for a supervised turn: the content, with or without the white space at its ends, or the
        whole of what the template writes after the prompt; and the special tokens that end it."""
        content = message["content"]
        forms = [content, content.strip(), content.lstrip(), content.rstrip()]
        alternatives = [] if "tool_calls" in message else [re.escape(same(form)) for form in dict.fromkeys(forms)]
        if reply is not None:
            alternatives.append(re.escape(same(reply)))
        if not alternatives:  # a tool call in a form that is not known here
            alternatives.append(".+?")
        special = "|".join(re.escape(same(token)) for token in self._specials)
        eos = re.escape(same(str(self._tokenizer.eos_token)))
        return rf" ?(?:{'|'.join(alternatives)})\s*(?:{special})(?:{eos})?"

    def _replies(self, conversation: Conversation, shown: str) -> list[str | None]:
        """For each assistant turn what the template writes after the prompt, up to the special tokens that end it; None
        where the template shows it otherwise in the whole conversation."""
        special = re.compile("|".join(map(re.escape, self._specials)) or r"(?!)")
        replies: list[str | None] = []
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            before = self._before(conversation, index, shown)
            after = self._render(conversation.messages[: index + 1], conversation)
            reply = None
            if before is not None and after is not None and shown.startswith(after) and after.startswith(before):
                ends = list(special.finditer(after, len(before)))
                reply = after[len(before) : ends[-1].start()].rstrip() if ends else None
            replies.append(reply)
        return replies

    def _before(self, conversation: Conversation, index: int, shown: str) -> str | None:
        """What the template writes before a turn: the generation prompt with it, if the whole conversation has it."""
        for with_prompt in (True, False):
            before = self._render(conversation.messages[:index], conversation, with_prompt)
            if before is not None and shown.startswith(before):
                return before
        return None

    def _render(self, messages: list[Message], conversation: Conversation, with_prompt: bool = False) -> str | None:
        tools: Any = conversation.tools
        # A template is somebody's program and may raise anything, such as for a conversation without a question.
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=with_prompt
                )
            )
        except Exception:  # noqa: BLE001
            return None

    def _gives_back(self, text: str) -> bool:
        """Whether this text comes out of the tokenizer as it went in."""
        return self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _starts(mask: Sequence[bool]) -> list[int]:
    """Where each run of supervised tokens starts."""
    return [i for i, flag in enumerate(mask) if flag and (i == 0 or not mask[i - 1])]


def _plain(text: str) -> str:
    return text


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _shortened(text: str, from_end: bool = False, limit: int = 60) -> str:
    if len(text) <= limit:
        return text
    return f"...{text[-limit:]}" if from_end else f"{text[:limit]}..."


# ---------------------------------------------------------------------------------------------------------------
# Gradient


class KeepsGradients(torch.optim.SGD):
    """Notes the gradients in place of a step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


class OneStep:
    """An adapter on the float32 base model, B random (at zero, where training starts, A has no gradient)."""

    def __init__(self, config: RunConfig) -> None:
        self.accelerator = build_accelerator(config)
        self.base = load_base_model(config.model, self.accelerator.device)
        _compute_each_row_alone(self.base)
        self.adapted = add_adapter(self.base, config.lora, config.train.seed)
        for name, parameter in self.adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = KeepsGradients([p for p in self.adapted.parameters() if p.requires_grad])
        self.model = self.accelerator.prepare(CausalLMLoss(self.adapted))
        self.model.eval()  # the base's own dropout, if it has any, must not differ from cut to cut

    def gradient(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """(all adapter parameters,) of one optimizer step over these micro-batches."""
        scheduler: Any = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        train_step(self.accelerator, self.model, self.optimizer, scheduler, batches, max_grad_norm=None)
        return torch.cat([part.flatten().float().cpu() for part in self.optimizer.seen])


def check_gradients(config: RunConfig, data: EncodedFile, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """One optimizer step over a few short rows, cut in several ways, against one padded micro-batch.

    Raises:
        ConfigError: the model cannot keep packed conversations apart.
    """
    rows = short_rows(data.lengths, _NUM_GRADIENT_ROWS)
    in_float32 = with_overrides(config, _float32_overrides(config))
    unable = "there is 1 row, and nothing to cut" if len(rows) < 2 else _does_not_fit(in_float32, data, rows)
    if unable is not None:
        return [Check.not_applicable("gradient", "accumulation, packing", unable)]
    step = OneStep(in_float32)

    def gradient(batching: Batching) -> tuple[Tensor, int]:
        """(gradient, number of micro-batches)"""
        cuts = batching.cut(rows, data.lengths)
        return step.gradient([batching.tensors(data.dataset, cut) for cut in cuts]), len(cuts)

    def check(batching: Batching, wanted: Tensor) -> Check:
        got, micro_batches = gradient(batching)
        difference = float((got - wanted).norm() / wanted.norm())
        return Check.judged(
            "gradient",
            f"{number} rows {'padded' if batching.max_tokens is None else 'packed'} into {micro_batches}",
            f"{GRADIENT_LIMIT:g} of its norm",
            f"{difference:.1e}",
            None if difference <= GRADIENT_LIMIT else f"the gradient differs by {difference:.2g} of its norm",
        )

    number, padding = len(rows), pad_id(tokenizer)
    whole, _ = gradient(Batching(number, padding))
    checks = [check(Batching(size, padding), whole) for size in (1, -(-number // 2))]
    if not config.data.packing:
        return [*checks, Check.not_applicable("gradient", "packing", "data.packing=false: the run never packs")]
    if in_float32.model.attn_implementation == "sdpa":
        use_segment_attention(step.base)
    check_packing(step.adapted)
    if config.model.quantization == "int8":
        whole, _ = gradient(Batching(number, padding, max_tokens=1))
    longest, total = int(data.lengths[rows].max()), int(data.lengths[rows].sum())
    return [*checks, *(check(Batching(number, padding, tokens), whole) for tokens in (longest, 2 * longest, total))]


def _float32_overrides(config: RunConfig) -> list[str]:
    """What shows a difference in the maths and not in the rounding."""
    overrides = ["model.dtype=float32", "train.bf16=false", "lora.dropout=0.0"]
    if config.model.attn_implementation.startswith("flash"):
        overrides.append("model.attn_implementation=sdpa")  # flash attention has no float32
    return overrides


def _compute_each_row_alone(base: torch.nn.Module) -> None:
    """Quantized weights stay what they are; what is multiplied with them depends on nothing but itself."""
    module: Any
    for module in base.modules():
        if hasattr(module, "compute_dtype"):  # 4 bits
            module.compute_dtype = torch.float32
        if hasattr(
            getattr(module, "state", None), "threshold"
        ):  # 8 bits: columns with outliers are found over the whole micro-batch
            module.state.threshold = 0.0


def _does_not_fit(config: RunConfig, data: EncodedFile, rows: RowIndices) -> str | None:
    """Why a step over these rows has no room on this device; None if it has."""
    num_supervised = sum(sum(data.dataset[int(row)]["loss_mask"]) for row in rows)
    micro_batch = MicroBatch(tuple(int(length) for length in data.lengths[rows]), num_supervised, packed=False)
    plan = predict_memory(config, micro_batch, device_memory())
    if plan.fits:
        return None
    return f"the model in float32 needs {plan.total_bytes / 2**30:.1f} GiB, there are {plan.limit_bytes / 2**30:.1f}"


def short_rows(lengths: RowIndices, number: int) -> RowIndices:
    """(number,) of the shortest quarter, from its shortest to its longest; the shortest ones if that is too few."""
    by_length = np.argsort(lengths, kind="stable")
    candidates = by_length[: max(number, len(lengths) // 4)]
    number = min(number, len(candidates))
    chosen: RowIndices = candidates[np.linspace(0, len(candidates) - 1, number).round().astype(np.int64)]
    return chosen


# ---------------------------------------------------------------------------------------------------------------
# A short run


@dataclass(frozen=True)
class ShortRun:
    """The user's run over a few of its rows and steps."""

    config: RunConfig
    num_rows: int
    settings: str
    """What differs from the user's run, to be read."""


def short_run(config: RunConfig, train_data: EncodedFile, eval_data: EncodedFile | None, folder: Path) -> ShortRun:
    """Write a few rows to `folder`, and the configuration that trains on them."""
    batch_size = min(config.train.per_device_train_batch_size, _MAX_BATCH_SIZE)
    accumulation = min(config.train.gradient_accumulation_steps, _MAX_ACCUMULATION)
    # Two whole steps and a smaller one an epoch, so that the run crosses an epoch's end with a part of a step left.
    rows_per_step = batch_size * accumulation
    rows = short_rows(train_data.lengths, 2 * rows_per_step + -(-rows_per_step // 2))
    _copy_lines(Path(config.data.train_file), train_data, rows, folder / "train.jsonl")
    if eval_data is None:
        eval_rows, from_file = rows[:_NUM_EVAL_ROWS], "of the same rows as held-out ones, for want of any"
        _copy_lines(Path(config.data.train_file), train_data, eval_rows, folder / "heldout.jsonl")
    else:
        eval_rows, from_file = short_rows(eval_data.lengths, _NUM_EVAL_ROWS), "held-out rows"
        source = Path(config.data.eval_file or config.data.train_file)
        _copy_lines(source, eval_data, eval_rows, folder / "heldout.jsonl")
    overrides = [
        f"train.max_steps={_SHORT_RUN_STEPS}",
        "train.save_steps=1",
        "train.logging_steps=1",
        "train.eval_steps=null",
        "train.num_sample_replies=0",
        "train.on_save_error=error",
        f"train.per_device_train_batch_size={batch_size}",
        f"train.gradient_accumulation_steps={accumulation}",
    ]
    # A warmup that suits the user's run may be longer than this one; nothing else is let through.
    allowed = list(dict.fromkeys([*config.preflight.allow, "warmup_past_end"]))
    files = [
        f"data.train_file={json.dumps(str(folder / 'train.jsonl'))}",
        f"data.eval_file={json.dumps(str(folder / 'heldout.jsonl'))}",
        "data.eval_fraction=0.0",
        f"data.cache_dir={json.dumps(str(folder / 'cache'))}",
        f"preflight.allow=[{','.join(allowed)}]",
        "overwrite_output_dir=false",
    ]
    changed = [override for override in overrides if with_overrides(config, [override]) != config]
    settings = (
        f"plan, resume, reload: a run over {counted(len(rows), 'row')} of the shorter ones and {len(eval_rows)} "
        f"{from_file}; {', '.join(changed)}; all else is as you set it"
    )
    return ShortRun(with_overrides(config, [*overrides, *files]), len(rows), settings)


def _copy_lines(source: Path, data: EncodedFile, rows: RowIndices, target: Path) -> None:
    wanted = {int(data.dataset[int(row)]["line"]) for row in rows}
    with source.open("rb") as file, target.open("wb") as copy:
        for number, line in enumerate(file, start=1):
            if number in wanted:
                copy.write(line.rstrip(b"\r\n") + b"\n")


@dataclass(frozen=True)
class Interrupted:
    """A run that was killed and resumed."""

    folder: Path
    killed_after_step: int
    problem: str | None
    """Why it could not be resumed."""


def run_interrupted(short: ShortRun, folder: Path) -> Interrupted:
    """Start the run as a user does, kill it once its first checkpoint is there, and resume it.

    Raises:
        ConfigError: the run was refused.
        TrainingError: it ended before it wrote a checkpoint.
    """
    config = with_overrides(short.config, [f"output_dir={json.dumps(str(folder))}"])
    config_file = folder.with_suffix(".yaml")
    config_file.write_text(config.to_yaml(), encoding="utf-8")
    script = Path(__file__).resolve().parent.parent / "launch/train.py"
    command = [sys.executable, str(script), "--cfg", str(config_file)]
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and not _checkpoints(folder):
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    if not _checkpoints(folder):
        said = _last_error(log)
        if process.returncode == 2:
            raise ConfigError(said)
        raise TrainingError(f"the short run ended (exit code {process.returncode}) without a checkpoint: {said}")
    killed_after_step = int(_checkpoints(folder)[-1].name.removeprefix("step-"))
    with log.open("w", encoding="utf-8") as file:
        returncode = subprocess.run([*command, "--resume"], stdout=file, stderr=subprocess.STDOUT).returncode
    problem = None if returncode == 0 else f"--resume ended with exit code {returncode}: {_last_error(log)}"
    return Interrupted(folder, killed_after_step, problem)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def _last_error(log: Path) -> str:
    """What a command said last, without its log."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    _, found, message = text.rpartition("\nerror: ")
    return message if found else (text.splitlines() or ["it said nothing"])[-1]


def run_whole(short: ShortRun, folder: Path) -> str | None:
    """The run in this process, silently; returns why it did not end, None if it did."""
    config = with_overrides(short.config, [f"output_dir={json.dumps(str(folder))}"])
    with redirect_stdout(io.StringIO()):
        try:
            train(config)
        except TrainingError as error:
            return str(error)
    return None


def check_plan(short: ShortRun, folder: Path, problem: str | None) -> Check:
    """The steps and learning rates that were taken, against the plan's arithmetic."""
    plan = plan_for(short.config, short.num_rows, 1)
    planned = plan.learning_rates()
    steps = [event for event in _events(folder) if event["event"] == "train"]
    largest = max(planned) or 1.0
    difference = max(
        (abs(event["learning_rate"] - rate) / largest for event, rate in zip(steps, planned, strict=False)), default=0.0
    )
    if problem is None and [event["step"] for event in steps] != list(range(1, plan.total_optimizer_steps + 1)):
        problem = f"{plan.total_optimizer_steps} steps were planned, the steps {[e['step'] for e in steps]} were taken"
    if problem is None and not difference <= RATE_LIMIT:
        problem = f"planned {planned}, taken {[event['learning_rate'] for event in steps]}"
    return Check.judged(
        "plan",
        f"steps and learning rates, {plan.optimizer_steps_per_epoch} an epoch",
        f"{plan.total_optimizer_steps} steps, {RATE_LIMIT:g} of rate",
        f"{len(steps)} steps, {difference:.1e}",
        problem,
    )


def check_resume(whole: Path, interrupted: Interrupted, problem: str | None) -> Check:
    """The killed and resumed run against the one that was not."""
    compared = "killed and resumed: adapter, losses"
    if problem is not None:
        return Check.not_applicable("resume", compared, "the uninterrupted run did not end")
    if interrupted.problem is not None:
        return Check.judged("resume", compared, "every bit", "-", interrupted.problem)
    same_adapter = _adapter_file(whole).read_bytes() == _adapter_file(interrupted.folder).read_bytes()
    pairs = list(zip(_losses(whole), _losses(interrupted.folder), strict=False))
    same = sum(ours == theirs for ours, theirs in pairs)
    total = max(len(_losses(whole)), len(_losses(interrupted.folder)))
    measured = (
        f"killed after step {interrupted.killed_after_step}: adapter {'same' if same_adapter else 'differs'}, "
        f"{same} of {total} losses same"
    )
    if same_adapter and same == total:
        return Check.judged("resume", compared, "every bit", measured)
    if torch.accelerator.is_available():
        reason = f"bit-identity is promised on a CPU; here, {measured}"
        return Check("resume", compared, "every bit", measured, "not applicable", reason)
    return Check.judged("resume", compared, "every bit", measured, "the resumed run is another run")


def _adapter_file(folder: Path) -> Path:
    return folder / "adapter/adapter_model.safetensors"


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(event["event"], event["step"], event["loss"], event.get("grad_norm")) for event in _events(folder)]


# ---------------------------------------------------------------------------------------------------------------
# The adapter that the short run wrote


def check_reload(config: RunConfig, folder: Path) -> Check:
    """The adapter as PEFT loads it onto a fresh base model, by the loss of the model that was trained."""
    logged = [event["loss"] for event in _events(folder) if event["event"] == "eval"][-1]
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    _, eval_data = load_data(config, tokenizer)
    assert eval_data is not None
    adapted = load_adapter(config, folder / "adapter", accelerator.device)
    model = accelerator.prepare_model(CausalLMLoss(adapted), evaluation_mode=True)
    loss = evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer))).loss
    difference = abs(loss - logged)
    return Check.judged(
        "reload",
        f"adapter/ loaded by PEFT: loss on {len(eval_data.lengths)} rows",
        f"{RELOAD_LIMIT:g} nats",
        f"{difference:.1e} nats",
        None if difference <= RELOAD_LIMIT else f"loss {logged:.6f} in memory, {loss:.6f} after loading",
    )


def check_merge(config: RunConfig, adapter_dir: Path, data: EncodedFile, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Base and adapter against the two merged, in float32: rounding to bfloat16 would hide a small adapter."""
    compared = "adapter/ merged: logits, float32"
    quantization = config.model.quantization
    if quantization != "none":
        reason = (
            f"merging into {quantization} rounds the sum to {quantization} again: another model; merge into bfloat16"
        )
        return Check.not_applicable("reload", compared, reason)
    in_float32 = with_overrides(config, _float32_overrides(config))
    rows = short_rows(data.lengths, _NUM_MERGE_ROWS)
    too_large = _does_not_fit(in_float32, data, rows)
    if too_large is not None:
        return Check.not_applicable("reload", compared, too_large)
    accelerator = build_accelerator(in_float32)
    adapted: Any = load_adapter(with_overrides(in_float32, ["data.packing=false"]), adapter_dir, accelerator.device)
    adapted.eval()
    batch = to_device(collate([data.dataset[int(row)] for row in rows], pad_id(tokenizer)), accelerator.device)

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        """(N, vocabulary) at the positions that are not padding."""
        mask = batch["attention_mask"]
        output = causal_lm_of(model)(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        result: Tensor = output.logits[mask.bool()].float().cpu()
        return result

    beside = logits(adapted)
    with adapted.disable_adapter():
        effect = float((beside - logits(adapted)).abs().max())
    merged = logits(adapted.merge_and_unload())
    limit = MERGE_LIMIT * float(beside.abs().max())
    difference = float((merged - beside).abs().max())
    measured = f"{difference:.1e} (the adapter: {effect:.1e})"
    if effect <= limit:
        reason = f"the short run's adapter moves no logit by more than {effect:.1e}: too little to see it merged"
        return Check("reload", compared, f"{limit:.1e}", measured, "not applicable", reason)
    problem = None if difference <= limit else f"a logit differs by {difference:.2g}"
    return Check.judged("reload", compared, f"{limit:.1e}", measured, problem)
