"""What the loop costs beyond PyTorch: a model so small that hardly anything else does.

    python benchmarks/overhead.py [--rows FILE.jsonl] [--steps 100]

A random model of 2 layers, 64 wide, with 512 tokens in its vocabulary; rows of the lengths and masks of real ones;
8 conversations a step, LoRA as `configs/base.yaml` has it, bfloat16 autocast, AdamW. Three loops take every step in
turn, in one process, each with a copy of the model and each once before it is timed, so that none compiles kernels
for another:

    loop     the body of the training loop: choose the rows, cut them, read them from disk, make tensors (`train`
             has a thread do this during the step before), `train_step`, progress bar, log line, metrics.jsonl, look
             for signals
    bare     the same module and batches, made beforehand: forward, backward, clip, optimizer step, zero_grad
    plain    bare, and the module is plain too: transformers' model with its own loss and attention, PEFT's own layers

The bar is on loop against bare: what is between them is the loop alone. Where it goes is measured over more steps, by
the time of each call. Prints tables, writes overhead.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft
import torch
from common import (
    DEMO_MODEL,
    HERE,
    ROOT,
    Training,
    base_config,
    cpu_accelerator,
    now,
    random_llama,
    set_up,
    spread,
    write,
)
from torch import Tensor, nn
from tqdm import tqdm

from lora_core.config.schema import RunConfig
from lora_core.data.encoded import load_data
from lora_core.data.packing import Batching, step_rows, train_batching
from lora_core.model.base import add_adapter, load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.faults import StopSignals
from lora_core.runtime.run_folder import MetricsFile
from lora_core.training.loop import _log_step
from lora_core.training.step import StepResult

BAR = 0.05
VOCABULARY = 512
WARM_UP_STEPS = 5
GROUPS = 5  # of steps, each with a ratio of its own

Batches = list[dict[str, Any]]
Loop = Callable[[int], float]  # takes one step, gives its loss


def tiny_rows(config: RunConfig, folder: Path) -> tuple[Any, Any]:
    """(dataset on disk, lengths): real rows, their ids folded into a small vocabulary."""
    from datasets import load_from_disk

    data, _ = load_data(config, load_tokenizer(config.model))
    columns = data.dataset.to_dict()
    columns["input_ids"] = [[token % VOCABULARY for token in ids] for ids in columns["input_ids"]]
    type(data.dataset).from_dict(columns, features=data.dataset.features).save_to_disk(folder)
    return load_from_disk(folder), data.lengths


def tiny_model() -> Any:
    return random_llama(
        2, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    )


# ---------------------------------------------------------------------------------------------------------------
# The three loops


class OurLoop:
    """The body of the loop in `lora_core.training.setup.train`."""

    def __init__(self, training: Training, batching: Batching, dataset: Any, lengths: Any, folder: Path) -> None:
        self.training, self.batching, self.dataset, self.lengths = training, batching, dataset, lengths
        self.metrics = MetricsFile(folder / "metrics.jsonl", is_main=True)
        self.bar = tqdm(total=training.plan.total_optimizer_steps, disable=None)
        self.signals = StopSignals()

    def batches(self, step: int) -> Batches:
        plan, seed = self.training.plan, self.training.config.train.seed
        rows = step_rows(plan.num_rows, plan.rows_per_optimizer_step, seed, step)
        cuts = self.batching.cut(rows, self.lengths)
        return [self.batching.tensors(self.dataset, cut) for cut in cuts]

    def log(self, step: int, result: StepResult) -> None:
        self.bar.set_postfix(loss=f"{result.loss:.3f}", lr=f"{result.learning_rate:.1e}", refresh=False)
        self.bar.update()
        _log_step(self.training.accelerator, self.metrics, self.training.plan, step + 1, result, 1.0)
        self.signals.any_rank(self.training.accelerator)

    def __call__(self, step: int) -> float:
        result = self.training.step(self.batches(step))
        self.log(step, result)
        return result.loss


class BareLoop:
    """What anyone would write around the same module."""

    def __init__(self, model: nn.Module, all_batches: Sequence[Batches]) -> None:
        self.model, self.all_batches = model, all_batches
        self.num_tokens = [sum(int(batch["loss_mask"].sum()) for batch in batches) for batches in all_batches]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=5e-5, weight_decay=0.0)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The summed loss of one micro-batch."""
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.model(**batch).loss_sum
        return loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)

    def __call__(self, step: int) -> float:
        mean = 0.0
        for batch in self.all_batches[step]:
            loss = self.forward(batch) / self.num_tokens[step]
            self.backward(loss)
            mean += loss.item()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean


class PlainLoop(BareLoop):
    """With transformers' own loss; its attention tells packed rows apart by their positions."""

    def __init__(self, model: nn.Module, all_batches: Sequence[Batches]) -> None:
        super().__init__(model, all_batches)
        self.all_batches = [[self.with_labels(batch) for batch in batches] for batches in all_batches]

    @staticmethod
    def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
        labels = batch["input_ids"].masked_fill(~batch["loss_mask"], -100)
        return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": labels}

    def forward(self, batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.model(**batch, num_items_in_batch=torch.tensor(1), use_cache=False).loss
        return loss


def bare_model(config: RunConfig) -> nn.Module:
    """The loop's module, not touched by Accelerate."""
    return CausalLMLoss(add_adapter(tiny_model(), config.lora, config.train.seed)).train()


def plain_model(config: RunConfig) -> nn.Module:
    base = tiny_model()
    base.set_attn_implementation("sdpa")
    lora = config.lora
    adapter = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules
    )
    model: nn.Module = peft.get_peft_model(base, adapter, autocast_adapter_dtype=True)
    return model.train()


# ---------------------------------------------------------------------------------------------------------------
# Time


def warm_up(loops: dict[str, Loop], step: int) -> None:
    """Every loop takes the step, not timed: the first to see a new shape pays for compiling its kernels."""
    for loop in loops.values():
        loop(step)


def take_turns(loops: dict[str, Loop], step: int) -> dict[str, float]:
    """Every loop takes the step, another one first each time -> seconds of each."""
    names = list(loops)
    seconds = {}
    for name in names[step % len(names) :] + names[: step % len(names)]:
        started = now()
        loops[name](step)
        seconds[name] = now() - started
    return seconds


def measure(loops: dict[str, Loop], steps: Sequence[int]) -> dict[str, list[float]]:
    """Name of a loop -> seconds of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in steps:
        warm_up(loops, step)
        for name, value in take_turns(loops, step).items():
            seconds[name].append(value)
    return seconds


def check_same_loss(loops: dict[str, Loop]) -> None:
    """Before the first step the adapter adds nothing, so all loops have the same loss.

    Raises:
        SystemExit: they have not, and their times cannot be compared.
    """
    losses = {name: loop(0) for name, loop in loops.items()}
    if max(losses.values()) > 1.01 * min(losses.values()):
        raise SystemExit(f"the loops do not compute the same loss: {losses}")


def time_calls(spent: dict[str, float], calls: dict[str, tuple[Any, str]]) -> None:
    """From now on, add the seconds of each call (object, name of the method) to `spent`."""
    for label, (owner, method) in calls.items():
        setattr(owner, method, timed(spent, label, getattr(owner, method)))


def timed(spent: dict[str, float], label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = now()
        result = function(*args, **kwargs)
        spent[label] += now() - started
        return result

    return wrapped


def break_down(ours: OurLoop, bare: BareLoop, steps: Sequence[int]) -> dict[str, tuple[list[float], list[float]]]:
    """Name of a part -> its seconds in each step of the loop, and of the bare loop."""
    training = ours.training
    of_ours: defaultdict[str, float] = defaultdict(float)
    of_bare: defaultdict[str, float] = defaultdict(float)
    time_calls(
        of_ours,
        {
            "rows chosen, cut, read, made tensors": (ours, "batches"),
            "sums over ranks": (training.accelerator, "reduce"),
            "forward": (training.model, "forward"),
            "backward": (training.accelerator, "backward"),
            "clipping": (training.accelerator, "clip_grad_norm_"),
            "optimizer step": (training.optimizer, "step"),
            "zero_grad": (training.optimizer, "zero_grad"),
            "learning rate schedule": (training.scheduler, "step"),
            "progress bar, log, metrics, signals": (ours, "log"),
        },
    )
    time_calls(
        of_bare,
        {
            "forward": (bare, "forward"),
            "backward": (bare, "backward"),
            "clipping": (bare, "clip"),
            "optimizer step": (bare.optimizer, "step"),
            "zero_grad": (bare.optimizer, "zero_grad"),
        },
    )
    parts: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    loops: dict[str, Loop] = {"loop": ours, "bare": bare}
    for step in steps:
        warm_up(loops, step)
        of_ours.clear()
        of_bare.clear()
        seconds = take_turns(loops, step)
        of_ours["the rest"] = seconds["loop"] - sum(of_ours.values())
        of_bare["the rest"] = seconds["bare"] - sum(of_bare.values())
        for name, value in of_ours.items():
            parts[name][0].append(value)
            parts[name][1].append(of_bare[name])
    return dict(parts)


# ---------------------------------------------------------------------------------------------------------------


def group_ratios(seconds: dict[str, list[float]], over: str, under: str) -> list[float]:
    """The ratio of the summed times in each group of steps."""
    size = len(seconds[over]) // GROUPS
    starts = range(0, GROUPS * size, size)
    return [sum(seconds[over][s : s + size]) / sum(seconds[under][s : s + size]) for s in starts]


def tables(seconds: dict[str, list[float]], parts: dict[str, tuple[list[float], list[float]]]) -> str:
    overhead = [ratio - 1 for ratio in group_ratios(seconds, "loop", "bare")]
    verdict = "met" if statistics.median(overhead) < BAR else "NOT met"
    against_plain = [ratio - 1 for ratio in group_ratios(seconds, "loop", "plain")]
    step_ms = 1000 * statistics.median(seconds["bare"])
    lines = [f"| step of the loop against ({step_ms:.0f} ms bare) | more time |", "|---|---|"]
    lines.append(f"| **bare loop** (bar under {BAR:.0%}: {verdict}) | **{spread(overhead, '+.1%')}** |")
    lines.append(f"| bare loop, plain transformers and PEFT | {spread(against_plain, '+.1%')} |")
    lines += ["", "| part of a step, ms (median) | loop | bare | difference / bare step |", "|---|---|---|---|"]
    for name, (ours, bare) in parts.items():
        mine, theirs = 1000 * statistics.median(ours), 1000 * statistics.median(bare)
        lines.append(f"| {name} | {mine:.2f} | {theirs:.2f} | {(mine - theirs) / step_ms:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "examples" / "train.jsonl", help="rows in any shape")
    parser.add_argument("--steps", type=int, default=100, help=f"timed, in {GROUPS} groups")
    parser.add_argument("--output", type=Path, default=HERE / "overhead.json")
    options = parser.parse_args()
    num_steps = WARM_UP_STEPS + 2 * options.steps
    config = base_config(
        f"model.name_or_path={DEMO_MODEL}",
        f"data.train_file={options.rows}",
        f"train.max_steps={2 * num_steps}",
        "train.optim=adamw_torch",
    )
    accelerator = cpu_accelerator(config)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout((Path(scratch) / "log.txt").open("w")):
        dataset, lengths = tiny_rows(config, Path(scratch) / "rows")
        training = set_up(config, accelerator, tiny_model(), len(lengths))
        ours = OurLoop(training, train_batching(config, pad_token_id=0), dataset, lengths, Path(scratch))
        all_batches = [ours.batches(step) for step in range(num_steps)]
        bare = BareLoop(bare_model(config), all_batches)
        loops: dict[str, Loop] = {"loop": ours, "bare": bare, "plain": PlainLoop(plain_model(config), all_batches)}
        check_same_loss(loops)
        measure(loops, range(1, WARM_UP_STEPS))
        seconds = measure(loops, range(WARM_UP_STEPS, WARM_UP_STEPS + options.steps))
        parts = break_down(ours, bare, range(WARM_UP_STEPS + options.steps, num_steps))
    table = tables(seconds, parts)
    write(options.output, table, rows=str(options.rows), bar=BAR, step_s=seconds, part_s=parts)


if __name__ == "__main__":
    main()
