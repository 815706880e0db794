"""`train`: everything up to the first step, then the loop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method

from lora_core.checkpoints.adapter_folder import save_adapter_start
from lora_core.checkpoints.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    read_checkpoint,
    restore,
    set_aside_newer,
)
from lora_core.checkpoints.resume import (
    check_same_run,
    data_hash,
    has_got_somewhere,
    keep_rows_per_step,
    plan_to_resume,
)
from lora_core.config.schema import RunConfig
from lora_core.configuration import with_overrides
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.in_memory import with_rows
from lora_core.data.packing import train_batching
from lora_core.encoding.chat import text_spans
from lora_core.errors import ConfigError, counted
from lora_core.evaluation.leak import look_for_leak
from lora_core.evaluation.replies import sample_prompts
from lora_core.model.base import compile_layers, describe_parameters, load_tokenizer
from lora_core.model.lora_linear import left_to_peft
from lora_core.model.loss import CausalLMLoss
from lora_core.model.optimizer import build_optimizer, build_scheduler
from lora_core.model.starting_adapter import find_starting_adapter
from lora_core.model.targets import describe_targets
from lora_core.preflight.memory import micro_batch_limit_that_fits
from lora_core.preflight.model_facts import with_packing
from lora_core.preflight.plan import with_learning_rate
from lora_core.preflight.preflight import (
    describe_schedule,
    eval_source,
    first_step,
    gather_facts,
    refuse_errors,
    report,
    run_checks,
)
from lora_core.runtime.console import Console
from lora_core.runtime.devices import build_accelerator, build_scaler, look_around, seed_everything, with_precision
from lora_core.runtime.faults import naming_lack_of_memory, naming_lost_ranks
from lora_core.runtime.launcher import check_restarts, end_with_launcher, num_machines
from lora_core.runtime.ranks import first_on_each_machine, from_first_rank, meet
from lora_core.runtime.run_folder import (
    MetricsFile,
    check_run_folder,
    clear_run_folder,
    cut_metrics,
    write_json,
    write_text,
)
from lora_core.runtime.sharding import check_sharding, check_units
from lora_core.schedule import SchedulePlan
from lora_core.training.alike import check_order_of_ranks, check_same_base, check_same_rows, check_same_settings
from lora_core.training.build import build_model, fill, settle_exchange
from lora_core.training.end import RecordedEnd, recorded_end
from lora_core.training.finish import finish
from lora_core.training.lookout import Lookout
from lora_core.training.loop import Run
from lora_core.watch.callbacks import Callback
from lora_core.watch.journal import Journal
from lora_core.watch.progress import Progress
from lora_core.watch.summary import Summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MORE_STEPS = "; no step is left; for more: train.extend=true and a larger train.num_train_epochs or train.max_steps"


def train(
    config: RunConfig,
    resume: str | Path | None = None,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    eval_rows: Iterable[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> Summary:
    """Fine-tune as the configuration says; returns what is written to `summary.json`.

    Call it in every process of the launch (`accelerate launch`, `torchrun`), or in one process for one device.

    Args:
        resume: a checkpoint's folder, or "newest" for the newest whole one in `config.output_dir`. The run then ends as
            if it had never been stopped. "auto" is "newest", or a start where the run has not yet come to a checkpoint:
            for a scheduler that gives the same command line again.
        rows: dicts as a line of a file may hold, or a `datasets.Dataset` of them, in place of `data.train_file`.
        eval_rows: the same, in place of `data.eval_file`.
        callbacks: told of log lines, evaluations, checkpoints and the end, in the main process.
        console: where lines and events go; None prints lines to stdout.

    Raises:
        RunStopped: SIGTERM, SIGINT or SIGUSR1 came; a checkpoint was written.
        LoraCoreError: and nothing else for a mistake in configuration or data; the message names value, limit and fix.
    """
    started = time.monotonic()
    if not isinstance(config, RunConfig):
        fix = f"load_config({str(config)!r})" if isinstance(config, (str, Path)) else 'load_config("qwen0.5b", [...])'
        raise ConfigError(f"train() takes a RunConfig, not a {type(config).__name__}; fix: train({fix})")
    end_with_launcher()
    check_restarts()
    config, precision = with_precision(with_rows(config, rows, eval_rows))
    config = with_packing(config)
    accelerator = build_accelerator(config)
    check_sharding(accelerator)
    console = console or Console()
    if precision is not None:
        console.say(precision)
    with (
        naming_lost_ranks(config.train.rank_timeout_s, "--resume"),
        recorded_end(config, console) as end,
        naming_lack_of_memory(accelerator),
    ):
        run = _set_up(config, accelerator, resume, callbacks, console, end)
        run.train()
        return finish(run, started)


def _set_up(
    config: RunConfig,
    accelerator: Accelerator,
    resume: str | Path | None,
    callbacks: Sequence[Callback],
    console: Console,
    end: RecordedEnd,
) -> Run:
    """Everything up to the first step, or to the step that a checkpoint was written after."""
    say = console.say

    check_order_of_ranks()
    check_same_settings(config, resume)
    folder = Path(config.output_dir).expanduser()
    checkpoint, asked_config = None, config
    is_auto = resume == "auto"
    if is_auto:
        resume = from_first_rank(lambda: "newest" if has_got_somewhere(folder) else None)
        if resume is None:
            say(f"resume: {folder} has no checkpoint yet, so the run starts")
    if resume is not None:  # how many examples a step has is in the checkpoint
        asked = None if resume == "newest" else Path(resume)
        checkpoint = from_first_rank(lambda: find_checkpoint(folder, asked, say, may_rename=True))
        config, replanned = keep_rows_per_step(checkpoint, config, accelerator.num_processes)
        if replanned is not None:
            say(f"resume: {replanned}")
    # Data first: it is cheap, and most mistakes are in it.
    tokenizer = load_tokenizer(config.model, config.data)
    with first_on_each_machine():
        train_data, eval_data = load_data(config, tokenizer)
    say(f"train: {config.data.train_source}: {train_data.counts}")
    for note in train_data.places.notes:
        say(f"       {note}")
    if eval_data is not None and config.data.eval_file is not None:
        say(f"eval:  {eval_source(config.data)}: {eval_data.counts}")
        for note in eval_data.places.notes if config.data.eval_file is not None else ():
            say(f"       {note}")
    # What the main process sees decides for all: free memory and disk differ from moment to moment.
    num_processes = accelerator.num_processes
    environment = from_first_rank(lambda: look_around(config, num_processes, num_machines=num_machines(num_processes)))
    if resume is not None or is_auto:  # the run that is there is the one to resume, or to start once more
        environment = replace(environment, output_dir_problem=None)
    config, rate = with_learning_rate(config, len(train_data.lengths), accelerator.num_processes)
    if rate is not None:
        asked_config = with_overrides(asked_config, [f"train.learning_rate={config.train.learning_rate!r}"])
        say(rate)
    fingerprint = data_hash(train_data, eval_data)
    check_same_rows(fingerprint, len(train_data.lengths), config.data.train_source)
    if checkpoint is not None:
        for difference in check_same_run(checkpoint, config, fingerprint, accelerator.num_processes):
            say(f"resume: {difference}")
    say("checking the run, and predicting its memory ...")
    facts = gather_facts(config, environment, tokenizer, train_data, eval_data)
    if checkpoint is not None:
        facts = replace(facts, plan=plan_to_resume(checkpoint, config, facts.plan))
    plan = facts.plan
    is_extended = checkpoint is not None and plan.before is not None and plan.first_step == checkpoint.step
    say(describe_plan(plan, config))
    say(str(facts.memory or "predicted peak memory: not known"))
    findings = run_checks(facts)
    refuse_errors(findings, config.preflight.allow)
    for finding in findings:
        say(str(finding), "detail" if finding.severity == "note" else "always")

    if checkpoint is None:
        from_first_rank(lambda: check_run_folder(config.output_dir, config.overwrite_output_dir or is_auto))
    meet()  # all have looked before one writes

    say(f"loading {config.model.name_or_path} ...")
    start = find_starting_adapter(config.model) if checkpoint is None else None
    if start is not None and start.is_checkpoint:
        read_checkpoint(start.weights.parent)  # whole, or said so
    adapted, loaded = build_model(config, accelerator, start, say)
    if not config.lora.changes_base_weights:  # then DDP sends those of rank 0, and FSDP is refused
        check_same_base(adapted)
    if start is not None:
        say(f"adapter: starts as {start.weights.parent}, trained on {start.base_model}")
    if config.train.torch_compile:
        compile_layers(adapted, accelerator.device)
    described = describe_parameters(adapted)
    optimizer = build_optimizer(adapted, config.train, accelerator.device, config.lora.loraplus_lr_ratio)
    scheduler = build_scheduler(optimizer, plan)
    loss = CausalLMLoss(adapted, accelerator.device.type, config.train)
    check_units(accelerator, loss._no_split_modules)
    model, optimizer = accelerator.prepare(loss, optimizer)
    for method in ("generate", "check_weights"):  # they gather embedding and head; without FSDP this does nothing
        register_fsdp_forward_method(model, method)
    fill(config, accelerator, model, loaded, say)
    batching = train_batching(config, pad_id(tokenizer))
    settle_exchange(model, optimizer, batching, train_data)
    if accelerator.is_main_process:  # only now: if the model cannot be loaded, an earlier run stays
        if checkpoint is None:
            if (folder / "config.yaml").is_file():
                say(f"replacing the earlier run in {folder} (overwrite_output_dir=true)")
            clear_run_folder(folder)
        else:
            cut_metrics(folder / "metrics.jsonl", checkpoint.step)
            for name in set_aside_newer(checkpoint):
                say(f"resume: a later checkpoint was renamed to {name}")
        write_text(folder / "config.yaml", config.to_yaml())
        if config.lora.changes_base_weights:
            save_adapter_start(adapted, folder)
        write_json(folder / "preflight.json", report(facts, findings))
        write_json(folder / "rows.json", rows_as_seen(tokenizer, train_data))
    resumed_at_step = checkpoint.step if checkpoint else None
    end.begin(folder, fingerprint, resumed_at_step, accelerator.is_main_process)
    meet()
    say(f"model: {config.model.name_or_path} on {accelerator.device}: {described}")
    say(f"adapter: on {describe_targets(adapted)}")
    if others := left_to_peft(adapted):
        say(
            f"       {counted(others, 'layer')} of the adapter {'is' if others == 1 else 'are'} computed by PEFT itself"
        )
    seed_everything(config.train.seed, accelerator.process_index)
    told = (*end.trackers, *callbacks) if accelerator.is_main_process else ()
    journal = Journal(console, MetricsFile(folder / "metrics.jsonl", accelerator.is_main_process), told)
    run = Run(
        config=config,
        asked_config=asked_config,
        accelerator=accelerator,
        facts=facts,
        fingerprint=fingerprint,
        folder=folder,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        batching=batching,
        scaler=build_scaler(config, accelerator),
        writer=CheckpointWriter(accelerator),
        prompts=sample_prompts(config, train_data, eval_data),
        progress=Progress(),
        resumed_at_step=resumed_at_step,
        journal=journal,
        lookout=Lookout(config, plan, journal),
    )
    if checkpoint is None:
        run.progress.micro_batch_limit = micro_batch_limit_that_fits(facts)
        if eval_data is not None:
            say(f"evaluating {counted(len(eval_data.lengths), 'example')} before training ...")
        run.progress.before = run.progress.after = run.measure()
        looked_at = train_data if eval_data is None else eval_data
        leak = look_for_leak(accelerator, model, looked_at, tokenizer, run.batching)
        run.lookout.before_training(run.progress, leak)
        replies = run.reply("before")
        run.progress.replies_before = [reply.text for reply in replies]
        run.progress.ended_before = [reply.is_whole for reply in replies]
        run.keep_replies(replies, 0)
    else:
        known = Progress().to_dict().keys() & checkpoint.state.keys()
        run.progress = Progress.from_dict({key: checkpoint.state[key] for key in known})
        if is_extended:
            run.progress.evaluations_since_best = 0
        if run.lookout.stops(run.progress):
            raise ConfigError(f"--resume {checkpoint.path}: {run.lookout.why(run.progress)}")
        restore(checkpoint, accelerator, model, optimizer, None if is_extended else scheduler)
        if run.scaler is not None:
            run.scaler.load_state_dict(checkpoint.state["scaler"])
        left = "" if run.progress.step < plan.total_optimizer_steps else MORE_STEPS
        say(f"resume: from {checkpoint.path}, at step {run.progress.step} of {plan.total_optimizer_steps}{left}")
    if run.progress.micro_batch_limit is not None:
        run.batching = run.batching.limited(run.progress.micro_batch_limit)
    return run


def describe_plan(plan: SchedulePlan, config: RunConfig) -> str:
    """Two lines for the log, and one more of a short run."""
    train = config.train
    processes = "1 process" if plan.num_processes == 1 else f"{plan.num_processes} processes"
    lines = (
        f"plan:  {counted(plan.num_rows, 'example')} / ({train.per_device_train_batch_size} per device x "
        f"{counted(train.gradient_accumulation_steps, 'accumulation step')} x {processes}) = "
        f"{counted(plan.optimizer_steps_per_epoch, 'optimizer step')} per epoch, {plan.total_optimizer_steps} in all\n"
        f"       {counted(plan.warmup_steps, 'warmup step')}, peak learning rate {plan.peak_learning_rate:.3g} "
        f"({plan.peak_fraction:.1%} of {train.peak_learning_rate:g}), {describe_schedule(plan)}"
    )
    if config.lora.loraplus_lr_ratio is not None:
        peak = plan.peak_learning_rate * config.lora.loraplus_lr_ratio
        lines += f"\n       LoRA+: B learns at {config.lora.loraplus_lr_ratio:g} times these rates, at most {peak:.3g}"
    if plan.before is not None:
        lines += f"\n       planned anew from step {plan.first_step} on: a schedule of {plan.scheduled_steps} steps"
    return "\n".join([lines, *first_step(plan)])


def rows_as_seen(tokenizer: PreTrainedTokenizerBase, data: EncodedFile, num_rows: int = 12) -> list[dict[str, Any]]:
    """The first rows as the model sees them: line, numbers of tokens, spans of text (and whether of loss tokens)."""
    return [
        {
            "line": data.places.mark(row["line"]),
            "num_tokens": len(row["input_ids"]),
            "num_supervised": sum(row["loss_mask"]),
            "spans": [*text_spans(tokenizer, row["input_ids"], row["loss_mask"])],
        }
        for row in (data.dataset[index] for index in range(min(num_rows, len(data.lengths))))
    ]
