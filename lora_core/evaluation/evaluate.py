"""Eval loss, perplexity and accuracy over the eval set's loss tokens; and the loss of each of its examples."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_core.checkpoints.adapter_folder import load_adapter
from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import Batching, eval_batching, to_device
from lora_core.errors import ConfigError, counted
from lora_core.model.base import load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.preflight.model_facts import with_packing
from lora_core.runtime.devices import build_accelerator, with_precision
from lora_core.runtime.ranks import first_on_each_machine, sum_over_ranks
from lora_core.runtime.run_folder import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvalResult:
    """Over all loss tokens of the eval set."""

    loss: float
    """Mean cross-entropy per loss token."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of loss tokens that were the model's first guess, 0 to 1."""
    num_tokens: int
    """Loss tokens."""
    num_conversations: int
    """Examples."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}, token accuracy {self.token_accuracy:.1%} "
            f"({counted(self.num_conversations, 'example')}, {counted(self.num_tokens, 'loss token')})"
        )


@dataclass(frozen=True)
class ExampleLosses:
    """The loss of each eval example, in the order of the eval set."""

    loss_sums: npt.NDArray[np.float64]
    """(N,) cross-entropy, summed over the example's loss tokens."""
    num_tokens: npt.NDArray[np.int64]
    """(N,) loss tokens."""

    def means(self) -> npt.NDArray[np.float64]:
        """(N,) per loss token, to six decimals: what is smaller is rounding and no change of the model."""
        return np.round(self.loss_sums / np.maximum(self.num_tokens, 1), 6)


def evaluate(accelerator: Accelerator, model: nn.Module, data: EncodedFile, batching: Batching) -> EvalResult:
    """Run the eval set through the model, shared out over the ranks. Leaves the model's mode as it was.

    Args:
        model: a `CausalLMLoss`, as `accelerator.prepare` returned it.
        batching: how the examples are laid into micro-batches; it changes nothing but the time.
    """
    return evaluate_examples(accelerator, model, data, batching)[0]


@torch.no_grad()
def evaluate_examples(
    accelerator: Accelerator, model: nn.Module, data: EncodedFile, batching: Batching
) -> tuple[EvalResult, ExampleLosses]:
    """`evaluate`, and the loss of each example; every rank returns those of all."""
    was_training = model.training
    model.eval()
    num_examples = len(data.lengths)
    # An example is in one micro-batch of one rank, so the sum over the ranks is that rank's figure.
    loss_sums = torch.zeros(num_examples, dtype=torch.float64)
    num_tokens = torch.zeros(num_examples, dtype=torch.float64)
    num_correct = torch.zeros(1, dtype=torch.float64)
    for cut in batching.cut(
        np.arange(num_examples), data.lengths, accelerator.num_processes, accelerator.process_index
    ):
        batch = batching.tensors(data.dataset, cut)
        result = model(**to_device(batch, accelerator.device))
        example = torch.as_tensor(cut.rows)[_place_of_loss_tokens(batch)]  # (N,) the example of each loss token
        loss_sums.index_add_(0, example, result.token_losses.cpu().double())
        num_tokens.index_add_(0, example, torch.ones(len(example), dtype=torch.float64))
        num_correct += result.num_correct.cpu()
    sums = sum_over_ranks(torch.cat([loss_sums, num_tokens, num_correct]))
    model.train(was_training)
    examples = ExampleLosses(
        sums[:num_examples].numpy(), sums[num_examples : 2 * num_examples].numpy().astype(np.int64)
    )
    total = int(examples.num_tokens.sum())
    loss = float(examples.loss_sums.sum()) / total
    result = EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=float(sums[-1]) / total,
        num_tokens=total,
        num_conversations=num_examples,
    )
    return result, examples


def _place_of_loss_tokens(batch: dict[str, Any]) -> Tensor:
    """(N,) which of the micro-batch's examples each loss token belongs to, in the order of `LossSums.token_losses`."""
    loss_mask: Tensor = batch["loss_mask"]
    row, position = loss_mask[:, 1:].nonzero(as_tuple=True)
    if "segment_lengths" not in batch:
        return row
    ends = torch.as_tensor(batch["segment_lengths"]).cumsum(0)
    return torch.searchsorted(ends, position + 1, right=True)


def evaluate_adapter(config: RunConfig, adapter_dir: str | Path) -> EvalResult:
    """Eval loss of a saved adapter, the way `train` measures it.

    Raises:
        ConfigError: there is no adapter in the folder, or the configuration names no eval set.
    """
    if not (Path(adapter_dir) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{adapter_dir}: holds no adapter_config.json; fix: --adapter FOLDER, such as outputs/demo/adapter"
        )
    config, _ = with_precision(config)
    config = with_packing(config)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data)
    with first_on_each_machine():
        _, eval_data = load_data(config, tokenizer)
    if eval_data is None:
        raise ConfigError("there is no eval set; fix: data.eval_file=PATH or data.eval_fraction=0.1")
    adapted = load_adapter(config, adapter_dir, accelerator.device)
    model = accelerator.prepare_model(CausalLMLoss(adapted, config=config.train), evaluation_mode=True)
    return evaluate(accelerator, model, eval_data, eval_batching(config, pad_id(tokenizer)))


# ---------------------------------------------------------------------------------------------------------------
# Before and after, example by example


@dataclass(frozen=True)
class Comparison:
    """The loss of the eval examples before and after training, paired."""

    num_examples: int
    num_better: int
    """Examples with a lower loss after than before."""
    num_worse: int
    change: float
    """Of the eval loss: after minus before."""
    standard_error: float | None
    """Of `change`, over examples; None for a single one."""


def compare_examples(
    before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int64]
) -> Comparison:
    """Compare the examples' mean losses, with the uncertainty that comes from which examples are in the eval set.

    The eval loss is a mean over tokens that come in clusters, the examples. With d = sum(t_i * (after_i - before_i)) /
    sum(t_i) and e_i = t_i * (after_i - before_i - d), the standard error of the paired change is
    sqrt(G / (G - 1) * sum(e_i ** 2)) / sum(t_i) for G examples: Miller 2024, "Adding Error Bars to Evals",
    https://arxiv.org/abs/2411.00640, clustered standard errors on paired differences, with the usual correction for
    few clusters.

    Args:
        before, after: (G,) mean loss per loss token of each example.
        num_tokens: (G,) loss tokens t of each.
    """
    differences = after - before
    weights = num_tokens / num_tokens.sum()
    change = float((weights * differences).sum())
    num = len(differences)
    error = None
    if num > 1:
        error = math.sqrt(num / (num - 1) * float(((weights * (differences - change)) ** 2).sum()))
    return Comparison(num, int((differences < 0).sum()), int((differences > 0).sum()), change, error)


def write_examples(path: Path, data: EncodedFile, before: ExampleLosses) -> None:
    """Write what is known before the first step: a JSON object of columns, some 30 bytes an example."""
    columns = {
        "line": [data.places.mark(int(line)) for line in data.dataset["line"]],
        "num_tokens": before.num_tokens.tolist(),
        "loss_before": before.means().tolist(),
    }
    write_text(path, json.dumps(columns) + "\n")


def compare_with_before(path: Path, now: ExampleLosses) -> Comparison | None:
    """Compare with the losses in `write_examples`' file; None if that is not what was written."""
    try:
        before = np.array(json.loads(path.read_text(encoding="utf-8"))["loss_before"], dtype=np.float64)
    except (OSError, ValueError, TypeError, KeyError):  # a run that was started before there was such a file
        return None
    return compare_examples(before, now.means(), now.num_tokens) if before.shape == now.loss_sums.shape else None


def finish_examples(path: Path, after: ExampleLosses) -> Comparison | None:
    """Add the losses after training to `write_examples`' file and compare, as `compare_with_before`."""
    comparison = compare_with_before(path, after)
    if comparison is not None:
        columns = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps({**columns, "loss_after": after.means().tolist()}) + "\n")
    return comparison
