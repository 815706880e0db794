"""Claim: the loop costs less than 5% beyond PyTorch, on a model so small that hardly anything else costs.

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

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data
from lora_core.data.packing import train_batching
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


def tiny_rows(config: RunConfig, folder: Path) -> EncodedFile:
    """Real rows, their ids folded into a small vocabulary, on disk."""
    from datasets import load_from_disk

    data, _ = load_data(config, load_tokenizer(config.model))
    columns = data.dataset.to_dict()
    columns["input_ids"] = [[token % VOCABULARY for token in ids] for ids in columns["input_ids"]]
    type(data.dataset).from_dict(columns, features=data.dataset.features).save_to_disk(folder)
    return replace(data, dataset=load_from_disk(folder))


def tiny_model() -> Any:
    return common.random_llama(
        2, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    )


class OurLoop:
    """The body of the loop in `lora_core.training.loop`."""

    def __init__(self, training: common.Training, data: EncodedFile, folder: Path) -> None:
        self.training, self.data = training, data
        self.batching = train_batching(training.config, pad_token_id=0)
        self.metrics = MetricsFile(folder / "metrics.jsonl", is_main=True)
        self.bar = tqdm(total=training.plan.total_optimizer_steps, disable=None)
        self.signals = StopSignals()

    def batches(self, step: int) -> common.Batches:
        return self.training.batches(self.data, self.batching, step)

    def log(self, step: int, result: StepResult) -> None:
        self.bar.set_postfix(loss=f"{result.loss:.3f}", lr=f"{result.learning_rate:.1e}", refresh=False)
        self.bar.update()
        _log_step(self.training.accelerator, self.metrics, self.training.plan, step + 1, result, 1.0)
        self.signals.any_rank()

    def __call__(self, step: int) -> float:
        result = self.training.step(self.batches(step))
        self.log(step, result)
        return result.loss


class BareLoop:
    """What anyone would write around the same module."""

    def __init__(self, model: nn.Module, all_batches: Sequence[common.Batches]) -> None:
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

    def __init__(self, model: nn.Module, all_batches: Sequence[common.Batches]) -> None:
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


Loops = dict[str, Any]


def take_turns(loops: Loops, step: int) -> dict[str, float]:
    """Every loop takes the step, another one first each time -> seconds of each."""
    names = list(loops)
    turn = step % len(names)
    return {name: common.seconds_of(lambda name=name: loops[name](step)) for name in names[turn:] + names[:turn]}


def warm_up(loops: Loops, step: int) -> dict[str, float]:
    """Every loop takes the step, not timed: the first to see a new shape pays for compiling its kernels. -> losses."""
    return {name: loop(step) for name, loop in loops.items()}


def measure(loops: Loops, steps: Sequence[int]) -> dict[str, list[float]]:
    """Name of a loop -> seconds of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in steps:
        warm_up(loops, step)
        for name, value in take_turns(loops, step).items():
            seconds[name].append(value)
    return seconds


def add_time(spent: dict[str, float], part: str, owner: Any, method: str) -> None:
    """From now on, add the seconds of each call of the method to a part."""
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        started = common.now()
        result = inner(*args, **kwargs)
        spent[part] += common.now() - started
        return result

    setattr(owner, method, outer)


def break_down(ours: OurLoop, bare: BareLoop, steps: Sequence[int]) -> dict[str, tuple[list[float], list[float]]]:
    """Name of a part -> its seconds in each step of the loop, and of the bare loop."""
    training = ours.training
    # Part -> who does it (object, method), in the loop and in the bare loop.
    calls: dict[str, list[tuple[Any, str]]] = {
        "rows chosen, cut, read, made tensors": [(ours, "batches")],
        "sums over ranks": [(training.accelerator, "reduce")],
        "forward": [(training.model, "forward"), (bare, "forward")],
        "backward": [(training.accelerator, "backward"), (bare, "backward")],
        "clipping": [(training.accelerator, "clip_grad_norm_"), (bare, "clip")],
        "optimizer step": [(training.optimizer, "step"), (bare.optimizer, "step")],
        "zero_grad": [(training.optimizer, "zero_grad"), (bare.optimizer, "zero_grad")],
        "learning rate schedule": [(training.scheduler, "step")],
        "progress bar, log, metrics, signals": [(ours, "log")],
    }
    spent: list[defaultdict[str, float]] = [defaultdict(float), defaultdict(float)]

    for part, owners in calls.items():
        for of_loop, (owner, method) in zip(spent, owners, strict=False):
            add_time(of_loop, part, owner, method)
    parts: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part in (*calls, "the rest")}
    loops = {"loop": ours, "bare": bare}
    for step in steps:
        warm_up(loops, step)
        for of_loop in spent:
            of_loop.clear()
        seconds = take_turns(loops, step)
        for index, name in enumerate(loops):
            spent[index]["the rest"] = seconds[name] - sum(spent[index].values())
            for part, values in parts.items():
                values[index].append(spent[index][part])
    return parts


def more_time(seconds: dict[str, list[float]], over: str, under: str) -> list[float]:
    """In each group of steps, by how much the one takes longer than the other."""
    size = len(seconds[over]) // GROUPS
    groups = [slice(start, start + size) for start in range(0, GROUPS * size, size)]
    return [sum(seconds[over][group]) / sum(seconds[under][group]) - 1 for group in groups]


def tables(seconds: dict[str, list[float]], parts: dict[str, tuple[list[float], list[float]]]) -> str:
    overhead, against_plain = (more_time(seconds, "loop", name) for name in ("bare", "plain"))
    step_ms = 1000 * statistics.median(seconds["bare"])
    bar = f"bar under {BAR:.0%}: {common.met(statistics.median(overhead) < BAR)}"
    first = common.markdown(
        [f"step of the loop against ({step_ms:.0f} ms bare)", "more time"],
        [
            [f"**bare loop** ({bar})", f"**{common.spread(overhead, '+.1%')}**"],
            ["bare loop, plain transformers and PEFT", common.spread(against_plain, "+.1%")],
        ],
    )
    medians = {name: [1000 * statistics.median(values) for values in both] for name, both in parts.items()}
    second = common.markdown(
        ["part of a step, ms (median)", "loop", "bare", "difference / bare step"],
        [
            [name, f"{loop:.2f}", f"{bare:.2f}", f"{(loop - bare) / step_ms:+.1%}"]
            for name, (loop, bare) in medians.items()
        ],
    )
    return f"{first}\n\n{second}"


def main() -> None:
    parser = common.options_of(__doc__, "overhead.json", "--rows")
    parser.add_argument("--steps", type=int, default=100, help=f"timed, in {GROUPS} groups")
    options = parser.parse_args()
    num_steps = WARM_UP_STEPS + 2 * options.steps
    config = common.base_config(
        f"model.name_or_path={common.DEMO_MODEL}",
        f"data.train_file={options.rows}",
        f"train.max_steps={2 * num_steps}",
        "train.optim=adamw_torch",
    )
    accelerator = common.cpu_accelerator(config)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout((Path(scratch) / "log.txt").open("w")):
        data = tiny_rows(config, Path(scratch) / "rows")
        ours = OurLoop(common.set_up(config, accelerator, tiny_model(), len(data.lengths)), data, Path(scratch))
        all_batches = [ours.batches(step) for step in range(num_steps)]
        bare = BareLoop(bare_model(config), all_batches)
        loops = {"loop": ours, "bare": bare, "plain": PlainLoop(plain_model(config), all_batches)}
        losses = warm_up(loops, 0)  # the adapter adds nothing yet, so all have the same loss
        if max(losses.values()) > 1.01 * min(losses.values()):
            raise SystemExit(f"the loops do not compute the same loss, so their times do not compare: {losses}")
        measure(loops, range(1, WARM_UP_STEPS))
        seconds = measure(loops, range(WARM_UP_STEPS, WARM_UP_STEPS + options.steps))
        parts = break_down(ours, bare, range(WARM_UP_STEPS + options.steps, num_steps))
    common.write(options.output, tables(seconds, parts), rows=str(options.rows), bar=BAR, step_s=seconds, part_s=parts)


if __name__ == "__main__":
    main()
