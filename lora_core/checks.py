"""The checks: one function each, listed in `CHECKS`. Its docstring is its row in docs/preflight.md.

A docstring has three paragraphs: what the finding means, why it matters, what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_core.chat import render_chat
from lora_core.config import RunConfig, with_overrides
from lora_core.data import EncodedFile
from lora_core.errors import ChatTemplateError, counted
from lora_core.schedule import SchedulePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_core.devices import Environment
    from lora_core.memory import MemoryPlan, ModelFacts

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    id: str
    """What `preflight.allow` takes."""
    severity: Severity
    """error: the run would not learn, or not run; warning: it would learn less than it could; note: worth knowing."""
    message: str
    value: Any
    """What is."""
    limit: Any
    """Where it would be all right."""
    fix: str | None
    """The overrides that mend it, as the command line takes them, such as `train.warmup_steps=5`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}" + (f"; fix: {self.fix}" if self.fix else "") + f"  [{self.id}]"


@dataclass(frozen=True)
class Facts:
    """What the checks look at."""

    config: RunConfig
    plan: SchedulePlan
    train_data: EncodedFile
    eval_data: EncodedFile | None
    tokenizer: PreTrainedTokenizerBase
    model: ModelFacts
    environment: Environment
    predict_memory: Callable[[RunConfig], MemoryPlan]
    """For this run's rows, device and processes, under any configuration."""
    memory: MemoryPlan | None
    """Of this run; None where the adapter cannot be put on the model."""


def _lines(lines: Sequence[int]) -> str:
    """`line 4`, `lines 4, 71`; past 20 only how many more."""
    shown = ", ".join(f"{line}" for line in lines[:20]) + (f" and {len(lines) - 20:,} more" if len(lines) > 20 else "")
    return f"line{'' if len(lines) == 1 else 's'} {shown}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---------------------------------------------------------------------------------------------------------------
# Schedule


def check_warmup_past_end(facts: Facts) -> Iterator[Finding]:
    """Warmup is as long as the run or longer: the learning rate never gets to what was asked for.

    The failure this project was born from. Steps, warmup and rates all look right on their own, the loss curve is flat,
    and nothing says why.

    Shorten the warmup, or make the run longer.
    """
    plan = facts.plan
    if plan.warmup_steps >= plan.total_optimizer_steps:
        healthy = plan.total_optimizer_steps // 10
        lost = 1 - plan.learning_rate_integral() / plan.with_warmup(healthy).learning_rate_integral()
        yield Finding(
            "warmup_past_end",
            "error",
            "the model would learn next to nothing: the run has "
            f"{counted(plan.total_optimizer_steps, 'optimizer step')}, warmup takes {plan.warmup_steps}, and the "
            f"learning rate would only reach {plan.peak_learning_rate:.3g}, {plan.peak_fraction:.1%} of the "
            f"{plan.learning_rate:g} asked for ({lost:.0%} of all learning lost)",
            plan.warmup_steps,
            healthy,
            f"train.warmup_steps={healthy}",
        )


def check_warmup_long(facts: Facts) -> Iterator[Finding]:
    """Warmup takes more than 30% of the run.

    The steps of a warmup run below the learning rate that was asked for; a third of the run spent so is a third of it
    half lost.

    10% of the steps is usual.
    """
    plan = facts.plan
    limit = math.floor(0.3 * plan.total_optimizer_steps)
    # One step of warmup is the least there is, and the default of a very short run.
    if max(limit, 1) < plan.warmup_steps < plan.total_optimizer_steps:
        share = plan.warmup_steps / plan.total_optimizer_steps
        yield Finding(
            "warmup_long",
            "warning",
            f"warmup takes {plan.warmup_steps} of {plan.total_optimizer_steps} optimizer steps ({share:.0%}); "
            "10% is usual",
            plan.warmup_steps,
            limit,
            f"train.warmup_steps={math.ceil(0.1 * plan.total_optimizer_steps)}",
        )


def check_few_steps(facts: Facts) -> Iterator[Finding]:
    """The run has fewer than 30 optimizer steps.

    Each step moves the adapter by about the learning rate; a handful of them does not take it far, whatever the data.

    More epochs, or fewer conversations a step.
    """
    plan = facts.plan
    if plan.total_optimizer_steps < 30:
        by_epochs = f"train.num_train_epochs={math.ceil(30 / plan.optimizer_steps_per_epoch)}"
        yield Finding(
            "few_steps",
            "warning",
            f"the run has only {counted(plan.total_optimizer_steps, 'optimizer step')}; adapters want 30 or more",
            plan.total_optimizer_steps,
            30,
            "train.max_steps=30" if facts.config.train.max_steps else by_epochs,
        )


def check_single_pass(facts: Facts) -> Iterator[Finding]:
    """A small file (under 500 rows) is seen once or less.

    Few rows teach little in one pass; large instruction sets are trained for one epoch, small ones for three to five.

    More epochs, and held-out rows to see when it is enough.
    """
    plan, train = facts.plan, facts.config.train
    if plan.num_rows < 500 and plan.total_optimizer_steps <= plan.optimizer_steps_per_epoch and plan.num_rows > 1:
        steps = max(30, 3 * plan.optimizer_steps_per_epoch)
        epochs = max(3, math.ceil(30 / plan.optimizer_steps_per_epoch))
        yield Finding(
            "single_pass",
            "warning",
            f"the {plan.num_rows} conversations are seen once at most; 3 to 5 passes are usual for so few",
            plan.total_optimizer_steps / plan.optimizer_steps_per_epoch,
            3,
            f"train.max_steps={steps}" if train.max_steps else f"train.num_train_epochs={epochs}",
        )


def check_batch_larger_than_data(facts: Facts) -> Iterator[Finding]:
    """One optimizer step would take more conversations than there are.

    Every epoch is then a single step, and a larger batch or more accumulation changes nothing any more.

    Less accumulation, a smaller batch, or fewer processes.
    """
    plan, train = facts.plan, facts.config.train
    if plan.rows_per_optimizer_step > plan.num_rows:
        # A quarter of the rows a step: four steps an epoch, if accumulation alone can bring that about.
        accumulation = max(1, plan.num_rows // (train.per_device_train_batch_size * plan.num_processes) // 4)
        fix: str | None = f"train.gradient_accumulation_steps={accumulation}"
        if accumulation == train.gradient_accumulation_steps:
            fix = "train.per_device_train_batch_size=1" if train.per_device_train_batch_size > 1 else None
        yield Finding(
            "batch_larger_than_data",
            "warning",
            f"an optimizer step takes up to {plan.rows_per_optimizer_step} conversations, but there are only "
            f"{plan.num_rows}: every epoch is a single step",
            plan.rows_per_optimizer_step,
            plan.num_rows,
            fix,
        )


def check_small_last_step(facts: Facts) -> Iterator[Finding]:
    """The last optimizer step of each epoch holds under a quarter of the conversations that the others hold.

    Its gradient is noisier and moves the adapter as far as any other.

    Nothing has to be done; another batch or accumulation divides the rows more evenly.
    """
    plan = facts.plan
    if plan.optimizer_steps_per_epoch > 1 and plan.last_step_rows * 4 < plan.rows_per_optimizer_step:
        yield Finding(
            "small_last_step",
            "note",
            f"the last optimizer step of each epoch holds {counted(plan.last_step_rows, 'conversation')}, the others "
            f"{plan.rows_per_optimizer_step}; its gradient is noisier and counts as much",
            plan.last_step_rows,
            math.ceil(plan.rows_per_optimizer_step / 4),
            None,
        )


def check_intervals_past_end(facts: Facts) -> Iterator[Finding]:
    """Log lines, evaluations or checkpoints would first come after the end of the run.

    A run of 10 steps that logs every 20 shows nothing of how it went.

    A shorter interval; a tenth of the run is usual, and every step for short ones.
    """
    total = facts.plan.total_optimizer_steps
    for name in ("logging_steps", "eval_steps", "save_steps"):
        interval = getattr(facts.config.train, name)
        if interval is not None and interval > total:
            yield Finding(
                f"{name}_past_end",
                "warning",
                f"train.{name}={interval}, but the run has {counted(total, 'optimizer step')}: it would come once, at "
                "the end, or never",
                interval,
                total,
                f"train.{name}={max(1, total // 10)}",
            )


# ---------------------------------------------------------------------------------------------------------------
# Data


def check_unreadable(facts: Facts) -> Iterator[Finding]:
    """Rows are left out because they cannot be read.

    With `data.on_bad_row=skip` the run goes on without them; without it, it stops and lists them.

    Mend the rows: `data.on_bad_row=error` says what is wrong with each.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.is_bad)
    if lines:
        yield Finding(
            "rows_unreadable",
            "warning",
            f"{len(lines)} of {counted(facts.train_data.counts.read, 'row')} are left out, being unreadable "
            f"({_lines(lines)})",
            len(lines),
            0,
            None,
        )


def check_unsupervised(facts: Facts) -> Iterator[Finding]:
    """Rows are left out because nothing in them is supervised.

    A question longer than `data.max_seq_length` pushes its answer out of sight; what is left teaches nothing.

    A larger `data.max_seq_length`.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.is_unsupervised)
    if lines:
        longest = int(rows.length.max())
        yield Finding(
            "rows_unsupervised",
            "warning",
            f"{len(lines)} of {counted(facts.train_data.counts.read, 'row')} are left out with nothing supervised "
            f"({_lines(lines)})",
            len(lines),
            0,
            f"data.max_seq_length={longest}" if longest > facts.config.data.max_seq_length else None,
        )


def check_truncation(facts: Facts) -> Iterator[Finding]:
    """Rows are cut at `data.max_seq_length` and lose what they should teach.

    What is cut is the end: of the last answer, and with it the token that ends the turn.

    The finding names the lengths that keep 99% and all of the rows.
    """
    rows, counts, limit = facts.train_data.rows, facts.train_data.counts, facts.config.data.max_seq_length
    if counts.truncated:
        keeps_99 = length_that_keeps(facts.train_data, 0.99)
        yield Finding(
            "rows_truncated",
            "warning",
            f"{counts.truncated} of {counted(counts.read, 'row')} ({counts.truncated / counts.read:.1%}) are longer "
            f"than data.max_seq_length={limit} and are cut, losing {counts.truncated_tokens:,} tokens "
            f"({counts.truncated_supervised_tokens:,} supervised); {keeps_99:,} keeps 99% of the rows whole, "
            f"{counts.longest:,} all ({_lines(rows.lines(rows.length > limit))})",
            limit,
            counts.longest,
            f"data.max_seq_length={counts.longest}",
        )


def check_turn_end(facts: Facts) -> Iterator[Finding]:
    """The token that ends the assistant's turns is not one that generation stops at.

    The model learns to end its turn, and whoever runs it does not notice: it goes on talking. Base models with the
    template of a chat model are the usual case.

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
    """Rows stand in the file more than once.

    A row that stands there twice is trained on twice as often, and one that lands in the held-out share praises
    memorising.

    Remove the copies, unless they are meant.
    """
    rows = facts.train_data.rows
    good = np.flatnonzero(~rows.is_bad)
    _, first = np.unique(rows.exact_key[good], return_index=True)
    is_copy = np.zeros(len(rows.line), dtype=np.bool_)
    is_copy[good] = True
    is_copy[good[first]] = False
    lines = rows.lines(is_copy)
    if lines:
        yield Finding(
            "rows_duplicated",
            "warning",
            f"{counted(len(lines), 'row')} said again: the same tokens as an earlier row ({_lines(lines)})",
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
            f"{counted(len(lines), 'row')} with an empty assistant turn ({_lines(lines)}): the model learns to say "
            "nothing",
            len(lines),
            0,
            None,
        )


def check_special_text(facts: Facts) -> Iterator[Finding]:
    """The text of rows holds what looks like a special token, such as `<|im_end|>`.

    It is encoded as the characters it is, so it ends no turn; but a file that holds it has often been through a chat
    template once already.

    Give the messages, not the rendered text.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.holds_special_text)
    if lines:
        yield Finding(
            "special_tokens_in_text",
            "warning",
            f"{counted(len(lines), 'row')} with special tokens in the text ({_lines(lines)}); they are encoded as "
            "plain characters. Was the file rendered by a chat template before?",
            len(lines),
            0,
            None,
        )


def check_doubled_bos(facts: Facts) -> Iterator[Finding]:
    """Rows begin with two BOS tokens.

    The model never saw that in training and answers worse for it. The tokenizer adds none here, so the template writes
    both.

    Take one out of the chat template.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.has_doubled_bos)
    if lines:
        yield Finding(
            "bos_doubled",
            "warning",
            f"{counted(len(lines), 'row')} with two {facts.tokenizer.bos_token!r} at the start, both from the chat "
            f"template ({_lines(lines)})",
            len(lines),
            0,
            None,
        )


def check_borders(facts: Facts) -> Iterator[Finding]:
    """A token would reach across the border between a prompt and its answer.

    Half of it is not the model's to write. The text is cut at the border instead, as it is in generation, where the
    prompt ends there.

    Nothing has to be done; white space at the start of an answer is the usual reason.
    """
    rows = facts.train_data.rows
    lines = rows.lines(rows.cut_at_border)
    if lines:
        yield Finding(
            "tokens_cut_at_border",
            "note",
            f"{counted(len(lines), 'row')} in which a token would reach across the start of an answer; the text is cut "
            f"there ({_lines(lines)})",
            len(lines),
            0,
            None,
        )


def check_template_system(facts: Facts) -> Iterator[Finding]:
    """The chat template adds a system turn of its own to rows that have none.

    The model is trained behind that text, so it has to be there in use as well; the same template sees to it.

    Nothing has to be done if you serve with the model's own template. Otherwise give each row its system turn.
    """
    if not getattr(facts.tokenizer, "chat_template", None):
        return
    try:
        rendered = render_chat(facts.tokenizer, [{"role": "user", "content": "a"}])
    except ChatTemplateError:  # such as one that wants a system turn
        return
    if "system" in rendered.lower():
        yield Finding(
            "template_adds_system",
            "note",
            f"rows without a system turn get one from the chat template: {rendered[:120]!r}",
            rendered[:120],
            None,
            None,
        )


def check_held_out(facts: Facts) -> Iterator[Finding]:
    """There are no held-out rows.

    Training loss falls whether the model learns or memorises; only rows it has not seen tell the two apart.

    Name a file, or hold out a tenth.
    """
    if facts.eval_data is None:
        yield Finding(
            "no_held_out_rows",
            "note",
            "no held-out rows: held-out loss is not measured",
            0,
            1,
            "data.eval_fraction=0.1" if facts.plan.num_rows > 1 else None,
        )


def check_overlap(facts: Facts) -> Iterator[Finding]:
    """Training rows also stand among the held-out rows: exactly, or but for case, white space and punctuation.

    Held-out loss then measures what was memorised, and looks better than it is.

    Remove them from one side.
    """
    if facts.eval_data is None:
        return
    rows, held_out = facts.train_data.rows, facts.eval_data.rows
    exact = ~rows.is_bad & np.isin(rows.exact_key, held_out.exact_key[~held_out.is_bad])
    either = exact | (~rows.is_bad & np.isin(rows.text_key, held_out.text_key[~held_out.is_bad]))
    lines = rows.lines(either)
    if lines:
        almost = len(lines) - int(exact.sum())
        yield Finding(
            "eval_overlap",
            "warning",
            f"{counted(len(lines), 'training row')} also stand among the held-out rows ({_lines(lines)}"
            + (f"; {almost} but for case, white space or punctuation" if almost else "")
            + "); held-out loss will look better than it is",
            len(lines),
            0,
            None,
        )


# ---------------------------------------------------------------------------------------------------------------
# LoRA and optimizer


def check_targets_exist(facts: Facts) -> Iterator[Finding]:
    """A name in `lora.target_modules` matches nothing in the model.

    PEFT minds only when none of them does; the others would be trained without it, and nobody would know.

    The finding lists the linear layers that there are.
    """
    targets = facts.config.lora.target_modules
    if isinstance(targets, str):
        return
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in facts.model.module_names)]
    if missing or not targets:
        linear = [name for name in facts.model.linear_names if name != facts.model.head_name]
        yield Finding(
            "targets_missing",
            "error",
            f"lora.target_modules: {', '.join(missing) or 'an empty list'} matches nothing in this model; its linear "
            f"layers: {', '.join(linear)}",
            missing,
            linear,
            f"lora.target_modules=[{','.join(linear)}]",
        )


def check_targets_head(facts: Facts) -> Iterator[Finding]:
    """An adapter sits on the output head or the embedding.

    The head's cross-entropy then keeps all logits, which costs more memory than everything else together, and a tied
    embedding changes with it.

    Adapters on the layers between learn the same at a fraction of the cost.
    """
    targets = facts.config.lora.target_modules
    ends = [name for name in (facts.model.head_name, facts.model.embedding_name) if name]
    hit = [target for target in targets if target in ends] if isinstance(targets, list) else []
    if hit:
        rest = [target for target in targets if target not in hit] or facts.model.linear_names
        yield Finding(
            "targets_head",
            "warning",
            f"lora.target_modules: {', '.join(hit)} is the output head or the embedding; every logit is kept in memory",
            hit,
            [],
            f"lora.target_modules=[{','.join(rest)}]",
        )


def check_targets(facts: Facts) -> Iterator[Finding]:
    """The adapter sits on the attention's q and v only.

    Adapters on all linear layers learn more from the same rows; on the demo's data the README has the figures.

    Name all seven projections.
    """
    targets = facts.config.lora.target_modules
    if isinstance(targets, list) and targets and set(targets) <= {"q_proj", "v_proj"}:
        linear = [name for name in facts.model.linear_names if name != facts.model.head_name]
        yield Finding(
            "targets_q_v_only",
            "warning",
            f"LoRA on {', '.join(targets)} only; adapters on all linear layers learn more from the same rows",
            targets,
            linear,
            f"lora.target_modules=[{','.join(linear)}]",
        )


def check_alpha(facts: Facts) -> Iterator[Finding]:
    """alpha / rank, the scale of the update, is outside 0.5 to 4.

    It multiplies the learning rate of the adapter's product, so a scale of 12 is a learning rate 12 times as high.

    alpha = 2 x rank is usual.
    """
    lora = facts.config.lora
    scale = lora.alpha / lora.rank
    if not lora.use_rslora and not 0.5 <= scale <= 4:
        yield Finding(
            "alpha_unusual",
            "warning",
            f"lora.alpha={lora.alpha} with lora.rank={lora.rank} scales the update by {scale:g}; 1 or 2 is usual",
            scale,
            [0.5, 4],
            f"lora.alpha={2 * lora.rank}",
        )


def check_learning_rate(facts: Facts) -> Iterator[Finding]:
    """The learning rate is outside 1e-5 to 1e-3, where LoRA trains.

    Below, the adapter hardly moves from zero; above, training diverges.

    2e-4 is a start; the README has a table of what four rates did on the demo's data.
    """
    learning_rate = facts.config.train.learning_rate
    if not 1e-5 <= learning_rate <= 1e-3:
        yield Finding(
            "learning_rate_unusual",
            "warning",
            f"train.learning_rate={learning_rate:g} is {'low' if learning_rate < 1e-5 else 'high'} for LoRA",
            learning_rate,
            [1e-5, 1e-3],
            "train.learning_rate=2e-4",
        )


def check_learning_rate_for_steps(facts: Facts) -> Iterator[Finding]:
    """The run is short, and a higher learning rate learned more where it was measured.

    On the demo (135M parameters, 78 rows, 50 steps, all seven projections) held-out loss fell from 3.42 to 2.87 with
    5e-5, 2.36 with 1e-4, 1.83 with 2e-4 and 1.05 with 5e-4. Other models and rows may differ.

    Nothing has to be done. Try `train.learning_rate=2e-4`, and let held-out loss decide.
    """
    plan = facts.plan
    if 30 <= plan.total_optimizer_steps <= 100 and 1e-5 <= plan.learning_rate < 2e-4:
        yield Finding(
            "learning_rate_low_for_steps",
            "note",
            f"train.learning_rate={plan.learning_rate:g} over {plan.total_optimizer_steps} optimizer steps: on the "
            "demo's 50 steps held-out loss fell from 3.42 to 2.87 with 5e-5, 2.36 with 1e-4, 1.83 with 2e-4, 1.05 with "
            "5e-4 (see the README); train.learning_rate=2e-4 is worth a try",
            plan.learning_rate,
            2e-4,
            None,
        )


def check_optimizer(facts: Facts) -> Iterator[Finding]:
    """The 8-bit or paged optimizer cannot run here.

    bitsandbytes has no kernels for Apple's GPUs, and its 8-bit state cannot be sharded by FSDP. Paging is a CUDA
    feature: elsewhere the same optimizer runs without it, which changes no result.

    `train.optim=adamw_torch`: the state of an adapter is small.
    """
    optim, environment = facts.config.train.optim, facts.environment
    if optim == "adamw_torch":
        return
    if environment.device.kind == "mps" or environment.sharding == "fsdp":
        where = "FSDP cannot shard its state" if environment.sharding == "fsdp" else "there are no kernels for MPS"
        yield Finding(
            "optimizer_cannot_run",
            "error",
            f"train.optim={optim} cannot run here: {where}",
            optim,
            "adamw_torch",
            "train.optim=adamw_torch",
        )
    elif optim.startswith("paged") and environment.device.kind != "cuda":
        yield Finding(
            "optimizer_not_paged",
            "note",
            f"train.optim={optim} runs as plain 8-bit AdamW on {environment.device.kind}; paging needs CUDA",
            optim,
            "adamw_8bit",
            None,
        )


def check_fsdp_quantization(facts: Facts) -> Iterator[Finding]:
    """A quantized model under FSDP is stored in a type that FSDP cannot shard.

    FSDP flattens parameters of one floating-point type; 4-bit weights packed in bytes cannot take part unless they are
    stored as that type, and int8 weights not at all.

    `model.quant_storage` the same as `model.dtype`; for int8, NF4 or no quantization.
    """
    model = facts.config.model
    if facts.environment.sharding != "fsdp" or model.quantization == "none":
        return
    if model.quantization == "int8":
        yield Finding(
            "fsdp_quant_storage",
            "error",
            "model.quantization=int8 cannot be sharded by FSDP",
            "int8",
            "nf4",
            f"model.quantization=nf4 model.quant_storage={model.dtype}",
        )
    elif model.quant_storage != model.dtype:
        yield Finding(
            "fsdp_quant_storage",
            "error",
            f"model.quant_storage={model.quant_storage}, model.dtype={model.dtype}: FSDP shards NF4 weights only if "
            "they are stored as the model's own type",
            model.quant_storage,
            model.dtype,
            f"model.quant_storage={model.dtype}",
        )


# ---------------------------------------------------------------------------------------------------------------
# Memory


def check_memory(facts: Facts) -> Iterator[Finding]:
    """The predicted peak is more than the device has.

    The run would stop in its first step, or, on a CPU, be killed without a word.

    The fix is the cheapest change that fits: checkpointing (more time, same result), smaller micro-batches (same
    result), NF4, then shorter rows. With `train.auto_batch_size` the run takes smaller micro-batches by itself, if
    they fit, and a note says of what size.
    """
    memory = facts.memory
    if memory is None or memory.fits:
        return
    limit = micro_batch_limit_that_fits(facts)
    if limit is not None:
        yield Finding(
            "micro_batches_smaller",
            "note",
            f"train.auto_batch_size: the run needs {_gib(memory.total_bytes)} at its peak and the device has "
            f"{_gib(memory.limit_bytes)}, so a micro-batch holds at most {limit} "
            f"{'tokens' if facts.config.data.packing else 'rows'}; same steps, same gradient",
            memory.total_bytes,
            memory.limit_bytes,
            None,
        )
        return
    fix, fixed = cheapest_change(facts)
    largest = sorted(memory.components.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    yield Finding(
        "memory_too_small",
        "error",
        f"the run needs {_gib(memory.total_bytes)} at its peak and the device has {_gib(memory.limit_bytes)} "
        f"({parts})"
        + (
            f"; with the fix {_gib(fixed.total_bytes)}"
            if fixed
            else "; not even checkpointing, small micro-batches, NF4 and half the length fit: use a smaller model"
        ),
        memory.total_bytes,
        memory.limit_bytes,
        fix,
    )


def micro_batch_limit_that_fits(facts: Facts) -> int | None:
    """The limit (tokens where packed, rows where padded) that `train.auto_batch_size` takes so that the run fits.

    None where the run fits as it is, or no limit makes it fit, or it is not asked for.
    """
    config, memory = facts.config, facts.memory
    if not config.train.auto_batch_size or memory is None or memory.fits:
        return None
    packed, rows = config.data.packing, config.train.per_device_train_batch_size
    limit = memory.micro_batch.num_tokens if packed else rows
    smallest = int(facts.train_data.lengths.max()) if packed else 1  # smaller ones would hold one row all the same
    while limit > smallest:
        limit = max(limit // 2, smallest)
        overrides = (
            [f"train.max_tokens_per_device_batch={limit}"]
            if packed
            else [
                f"train.per_device_train_batch_size={limit}",
                f"train.gradient_accumulation_steps={-(-rows * config.train.gradient_accumulation_steps // limit)}",
            ]
        )
        if facts.predict_memory(with_overrides(config, overrides)).fits:
            return limit
    return None


def cheapest_change(facts: Facts) -> tuple[str | None, MemoryPlan | None]:
    """The first change that fits alone, else the shortest run of changes that fit together; cheapest first."""
    config, longest, memory = facts.config, int(facts.train_data.lengths.max()), facts.memory
    assert memory is not None
    changes: list[list[str]] = []
    if not config.train.gradient_checkpointing:
        changes.append(["train.gradient_checkpointing=true"])
    if config.data.packing and memory.micro_batch.num_tokens > longest:
        changes.append([f"train.max_tokens_per_device_batch={longest}"])
    if config.train.per_device_train_batch_size > 1 and not config.data.packing:
        accumulation = config.train.gradient_accumulation_steps * config.train.per_device_train_batch_size
        changes.append(["train.per_device_train_batch_size=1", f"train.gradient_accumulation_steps={accumulation}"])
    if config.train.per_device_eval_batch_size > 1 and facts.eval_data is not None:
        changes.append(["train.per_device_eval_batch_size=1"])
    if config.model.quantization == "none":
        changes.append(["model.quantization=nf4"])
    if config.data.max_seq_length >= 256:
        changes.append([f"data.max_seq_length={config.data.max_seq_length // 2}"])
    together = [[change for part in changes[: n + 1] for change in part] for n in range(1, len(changes))]
    for overrides in [*changes, *together]:
        plan = facts.predict_memory(with_overrides(config, overrides))
        if plan.fits:
            return " ".join(overrides), plan
    return None, None


# ---------------------------------------------------------------------------------------------------------------
# Environment


def check_world_size(facts: Facts) -> Iterator[Finding]:
    """The launcher was asked for another number of processes than run.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing: half the batch, twice the steps,
    and a schedule that is not the one you planned.

    On CPUs, `torchrun --nproc_per_node N launch/train.py ...`.
    """
    asked, running = facts.environment.asked_processes, facts.environment.num_processes
    if asked is not None and asked != running:
        yield Finding(
            "world_size_differs",
            "error",
            f"accelerate launch was asked for {asked} processes, and {running} "
            f"of them run: on a CPU it starts only one; start the run with: torchrun --nproc_per_node {asked} "
            "launch/train.py ...",
            running,
            asked,
            None,
        )


def check_bf16(facts: Facts) -> Iterator[Finding]:
    """bfloat16 was asked for and the device has no hardware for it.

    A GPU without it fails or is slower than in float32; a CPU without it computes in float32 and rounds: right, but
    slow.

    `train.bf16=false`.
    """
    bf16 = facts.environment.bf16
    if not facts.config.train.bf16 or bf16 == "native":
        return
    yield Finding(
        "bf16_unsupported" if bf16 == "none" else "bf16_slow",
        "error" if bf16 == "none" else "note",
        "train.bf16=true: the GPU has no bfloat16"
        if bf16 == "none"
        else "train.bf16=true: this CPU has no bfloat16 instructions and emulates them: right, but slow",
        bf16,
        "native",
        "train.bf16=false model.dtype=float32" if bf16 == "none" else None,
    )


def check_bitsandbytes(facts: Facts) -> Iterator[Finding]:
    """8-bit AdamW, NF4 or int8 was asked for, and bitsandbytes is not installed.

    The run would stop when it first needs it, with the model loaded.

    Install it, or do without: `train.optim=adamw_torch`, `model.quantization=none`.
    """
    needs = [
        name
        for name, on in (
            (f"train.optim={facts.config.train.optim}", facts.config.train.optim != "adamw_torch"),
            (f"model.quantization={facts.config.model.quantization}", facts.config.model.quantization != "none"),
        )
        if on
    ]
    if needs and not facts.environment.has_bitsandbytes:
        without = {"train.optim": "train.optim=adamw_torch", "model.quantization": "model.quantization=none"}
        yield Finding(
            "bitsandbytes_missing",
            "error",
            f"{' and '.join(needs)} need bitsandbytes, which is not installed (pip install bitsandbytes)",
            None,
            "bitsandbytes",
            " ".join(without[name.split("=")[0]] for name in needs),
        )


def check_disk(facts: Facts) -> Iterator[Finding]:
    """The disk has no room for the checkpoints.

    A run that cannot save what it learned has learned nothing.

    Fewer checkpoints, or an `output_dir` on another disk.
    """
    if facts.memory is None:
        return
    # The checkpoints that are kept, one more while the oldest goes, and the adapter at the end; each adapter comes with
    # its tokenizer, of which 15 MB is a large one.
    limit = facts.config.train.save_total_limit
    adapter = facts.memory.adapter_file_bytes
    needed = (limit + 1) * (adapter + facts.memory.components["optimizer"]) + adapter + 15 * 10**6
    free = facts.environment.free_disk_bytes
    if needed > free:
        yield Finding(
            "disk_too_small",
            "error",
            f"{limit + 1} checkpoints and the adapter need {_gib(needed)}, and the disk of "
            f"output_dir={facts.config.output_dir} has {_gib(free)}",
            free,
            needed,
            "train.save_total_limit=1" if limit > 1 and needed - (limit - 1) * adapter <= free else None,
        )


def check_output_dir(facts: Facts) -> Iterator[Finding]:
    """The output folder holds an earlier run or other files, or cannot be written.

    What is there is never replaced unasked.

    Another `output_dir`, or `overwrite_output_dir=true` to replace an earlier run.
    """
    problem = facts.environment.output_dir_problem
    if problem is not None:
        yield Finding(
            "output_dir_taken",
            "error",
            problem.split("; fix:")[0],
            facts.config.output_dir,
            None,
            f"output_dir={facts.environment.free_output_dir}" if facts.environment.free_output_dir else None,
        )


# ---------------------------------------------------------------------------------------------------------------

Check = Callable[[Facts], Iterator[Finding]]

# Every check, with the findings it may yield.
CHECKS: list[tuple[Check, dict[str, Severity]]] = [
    (check_warmup_past_end, {"warmup_past_end": "error"}),
    (check_warmup_long, {"warmup_long": "warning"}),
    (check_few_steps, {"few_steps": "warning"}),
    (check_single_pass, {"single_pass": "warning"}),
    (check_batch_larger_than_data, {"batch_larger_than_data": "warning"}),
    (check_small_last_step, {"small_last_step": "note"}),
    (
        check_intervals_past_end,
        {"logging_steps_past_end": "warning", "eval_steps_past_end": "warning", "save_steps_past_end": "warning"},
    ),
    (check_unreadable, {"rows_unreadable": "warning"}),
    (check_unsupervised, {"rows_unsupervised": "warning"}),
    (check_truncation, {"rows_truncated": "warning"}),
    (check_turn_end, {"turn_end_not_eos": "warning"}),
    (check_duplicates, {"rows_duplicated": "warning"}),
    (check_empty_replies, {"replies_empty": "warning"}),
    (check_special_text, {"special_tokens_in_text": "warning"}),
    (check_doubled_bos, {"bos_doubled": "warning"}),
    (check_borders, {"tokens_cut_at_border": "note"}),
    (check_template_system, {"template_adds_system": "note"}),
    (check_held_out, {"no_held_out_rows": "note"}),
    (check_overlap, {"eval_overlap": "warning"}),
    (check_targets_exist, {"targets_missing": "error"}),
    (check_targets_head, {"targets_head": "warning"}),
    (check_targets, {"targets_q_v_only": "warning"}),
    (check_alpha, {"alpha_unusual": "warning"}),
    (check_learning_rate, {"learning_rate_unusual": "warning"}),
    (check_learning_rate_for_steps, {"learning_rate_low_for_steps": "note"}),
    (check_optimizer, {"optimizer_cannot_run": "error", "optimizer_not_paged": "note"}),
    (check_fsdp_quantization, {"fsdp_quant_storage": "error"}),
    (check_memory, {"memory_too_small": "error", "micro_batches_smaller": "note"}),
    (check_world_size, {"world_size_differs": "error"}),
    (check_bf16, {"bf16_unsupported": "error", "bf16_slow": "note"}),
    (check_bitsandbytes, {"bitsandbytes_missing": "error"}),
    (check_disk, {"disk_too_small": "error"}),
    (check_output_dir, {"output_dir_taken": "error"}),
]

ERROR_IDS = tuple(name for _, ids in CHECKS for name, severity in ids.items() if severity == "error")
# What would only fail later, and less clearly, cannot be allowed.
NEVER_ALLOWED = ("targets_missing", "bitsandbytes_missing", "output_dir_taken")


def length_that_keeps(data: EncodedFile, share: float) -> int:
    """The smallest max_seq_length that leaves so large a share of the readable rows whole."""
    return int(np.quantile(data.rows.length[~data.rows.is_bad], share, method="higher"))


def documentation() -> str:
    """docs/preflight.md: a row a check, from its docstring."""
    lines = [
        "# What preflight looks at",
        "",
        "Made from the docstrings in `lora_core/checks.py` by `python docs/write.py`. An error stops a run before its",
        "first step. Where it is marked *, `preflight.allow=[id]` lets it pass.",
        "",
        "| finding | what it means | why it matters | what to do |",
        "|---|---|---|---|",
    ]
    for check, ids in CHECKS:
        means, matters, fix = (" ".join(part.split()) for part in (check.__doc__ or "").split("\n\n"))
        names = "<br>".join(
            f"`{name}` {severity}{'*' if severity == 'error' and name not in NEVER_ALLOWED else ''}"
            for name, severity in ids.items()
        )
        lines.append(f"| {names} | {means} | {matters} | {fix} |")
    return "\n".join([*lines, ""])
