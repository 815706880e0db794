"""The checks of `verify`, run small on the user's own model and rows: what passed, and by how much.

    mask       every row: the loss tokens are the assistant's turns and the tokens that end them
    gradient   one optimizer step divided in several ways, padded and packed, against one padded micro-batch
    plan       a short run takes the steps and the learning rates that were planned
    resume     the same run, killed after its first checkpoint and resumed, gives the same adapter and losses
    reload     the saved adapter, loaded by PEFT, gives the loss that was logged; merged, the same logits

Everything is written to a temporary folder, except the encoded rows, which any run keeps in data.cache_dir. The
base model is in memory once at a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data
from lora_core.model.base import load_tokenizer
from lora_core.preflight.model_facts import with_packing
from lora_core.preflight.plan import with_learning_rate
from lora_core.runtime.devices import with_precision
from lora_core.runtime.faults import free_memory
from lora_core.runtime.launcher import refuse_several
from lora_core.verification.gradients import NUM_GRADIENT_ROWS, check_gradients, float32_overrides
from lora_core.verification.masks import check_masks
from lora_core.verification.reload import check_merge, check_reload
from lora_core.verification.runs import check_plan, check_resume, run_interrupted, run_whole, short_run
from lora_core.verification.table import Check, Verification


def verify(config: RunConfig, say: Callable[[str], None] = print) -> Verification:
    """Run the checks on this configuration's model and rows, in one process.

    Args:
        say: receives a line for each thing that is checked.

    Raises:
        ConfigError, DataError, PreflightError: the configuration or the rows cannot be used.
        TrainingError: the short run could not be started.
    """
    started = time.monotonic()
    refuse_several("verify")
    config, _ = with_precision(config)
    config = with_packing(config)
    tokenizer = load_tokenizer(config.model, config.data)
    train_data, eval_data = load_data(config, tokenizer)
    config, _ = with_learning_rate(config, len(train_data.lengths), 1)

    say("mask: every row")
    checks = [check_masks("training set", config.data.train_source, train_data, tokenizer, config.data)]
    if eval_data is None:
        checks.append(Check.not_applicable("mask", "eval set", "no eval set: data.eval_file is null"))
    else:
        source = config.data.eval_file or config.data.train_source
        checks.append(check_masks("eval set", source, eval_data, tokenizer, config.data))

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
        say("reload: the saved adapter")
        if problem is None:
            checks.append(check_reload(short.config, Path(name) / "whole"))
            free_memory()
            checks.append(check_merge(short.config, Path(name) / "whole/adapter", train_data, tokenizer))
        else:
            checks += [Check.not_applicable("reload", what, "the short run did not end") for what in ("loss", "logits")]
    free_memory()
    say("gradient: one step, divided in several ways")
    checks += check_gradients(config, train_data, tokenizer)
    order = ("mask", "gradient", "plan", "resume", "reload")
    checks.sort(key=lambda check: order.index(check.topic))
    settings = [_describe_rows(config, train_data, eval_data), short.settings]
    return Verification(settings, checks, round(time.monotonic() - started, 1))


def _describe_rows(config: RunConfig, train_data: EncodedFile, eval_data: EncodedFile | None) -> str:
    number = len(train_data.lengths)
    eval_rows = f" and all {len(eval_data.lengths):,} of the eval set" if eval_data else ""
    precision = {
        "none": "",
        "nf4": "; your 4-bit weights, multiplied in float32",
        "int8": "; your 8-bit weights, outliers not separated (int8 looks for them in the whole micro-batch); packed "
        "rows against each packed alone (rounding to 8 bits would enlarge the last bit in which two attentions differ)",
    }[config.model.quantization]
    return (
        f"mask: all {number:,} training rows{eval_rows}\n"
        f"gradient: {min(NUM_GRADIENT_ROWS, number)} of the shorter rows, against the same in one padded micro-batch; "
        f"{', '.join(float32_overrides(config))}{precision}"
    )
