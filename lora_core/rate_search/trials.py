"""Short trainings from the same start: the model is loaded once, and its adapter is put back between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lora_core.config.schema import RunConfig
from lora_core.data.counts import EncodedFile
from lora_core.data.encoded import pad_id
from lora_core.data.packing import Batching, RowIndices, eval_batching, step_rows, train_batching
from lora_core.evaluation.evaluate import EvalResult, ExampleLosses, evaluate_examples
from lora_core.model.base import add_adapter, load_base_model
from lora_core.model.head import check_head
from lora_core.model.loss import CausalLMLoss
from lora_core.model.optimizer import build_optimizer
from lora_core.model.starting_adapter import find_starting_adapter, put_on
from lora_core.preflight.memory import micro_batch_limit_that_fits
from lora_core.rate_search.choice import RangeStep
from lora_core.runtime.devices import build_accelerator, build_scaler, seed_everything
from lora_core.training.step import StepResult, train_step

if TYPE_CHECKING:
    from lora_core.preflight.findings import Facts


class Trials:
    """A model with an adapter that is trained again and again from one start."""

    def __init__(self, facts: Facts) -> None:
        """Load the base model and put the adapter on it.

        Raises:
            ConfigError: the model cannot be loaded, or the adapter not be put on it.
        """
        config = facts.config
        self._config: RunConfig = config
        self._data: EncodedFile = facts.train_data
        self._accelerator: Accelerator = build_accelerator(config)
        limit = micro_batch_limit_that_fits(facts)
        batching = train_batching(config, pad_id(facts.tokenizer))
        self._batching: Batching = batching if limit is None else batching.limited(limit)
        self._eval_batching = eval_batching(config, pad_id(facts.tokenizer))
        base = load_base_model(config.model, self._accelerator.device, bool(config.data.packing))
        adapted = add_adapter(base, config.lora, config.train.seed, config.train.gradient_checkpointing)
        start = find_starting_adapter(config.model)
        if start is not None:
            put_on(start, adapted)
        with self._accelerator.autocast():
            check_head(adapted)
        self.adapted: nn.Module = adapted
        self._model: Any = self._accelerator.prepare_model(CausalLMLoss(adapted, config=config.train))
        self._start = {name: value.detach().clone() for name, value in self.trained()}

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """What an optimizer changes, by name."""
        return ((name, p) for name, p in self.adapted.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the adapter what it was at the start, to the last bit."""
        for name, parameter in self.trained():
            parameter.copy_(self._start[name])

    def rows_of(self, step: int, rows_per_step: int) -> RowIndices:
        """The rows that the run itself takes in this step, or the first of them."""
        return step_rows(len(self._data.lengths), rows_per_step, self._config.train.seed, step)

    def train(self, rates: Sequence[float], rows_per_step: int) -> Iterator[StepResult]:
        """Train from the start, a step for each rate, with an optimizer of its own; ends early where a step fails.

        The same seed each time: the same rows, dropout and first loss.
        """
        self.put_back()
        seed_everything(self._config.train.seed, self._accelerator.process_index)
        peak = self._config.train.peak_learning_rate
        built = build_optimizer(
            self.adapted, self._config.train, self._accelerator.device, self._config.lora.loraplus_lr_ratio
        )
        schedule = LambdaLR(built, lambda step: rates[min(step, len(rates) - 1)] / peak)
        optimizer = AcceleratedOptimizer(built)
        scaler = build_scaler(self._config, self._accelerator)
        self._model.train()
        optimizer.train()
        for step in range(len(rates)):
            cuts = self._batching.cut(self.rows_of(step, rows_per_step), self._data.lengths)
            batches = [self._batching.tensors(self._data.dataset, cut) for cut in cuts]
            limit = self._config.train.max_grad_norm
            result = train_step(self._accelerator, self._model, optimizer, schedule, batches, limit, scaler)
            yield result
            if not result.is_finite and not result.overflowed:
                break
        optimizer.eval()

    def range_test(self, rates: Sequence[float], rows_per_step: int) -> Iterator[RangeStep]:
        """Train with rates that grow, each loss beside the base model's on the same rows."""
        self.put_back()
        steps = [self.rows_of(step, rows_per_step) for step in range(len(rates))]
        rows = np.unique(np.concatenate(steps))
        _, losses = self.evaluate(some(self._data, rows))
        place = {int(row): index for index, row in enumerate(rows)}
        for of_step, result in zip(steps, self.train(rates, rows_per_step), strict=False):
            places = [place[int(row)] for row in of_step]
            base = losses.loss_sums[places].sum() / losses.num_tokens[places].sum()
            loss = result.loss if result.is_finite else math.nan
            yield RangeStep(result.learning_rate, loss, float(base))

    def evaluate(self, data: EncodedFile) -> tuple[EvalResult, ExampleLosses]:
        """Of the model as it is."""
        return evaluate_examples(self._accelerator, self._model, data, self._eval_batching)

    def seconds_per_token(self, rows_per_step: int, clock: Callable[[], float] = time.monotonic) -> float:
        """Of a training step, that moves nothing. The first such step is not counted: it allocates."""
        started, tokens = math.nan, 0
        for step, _ in enumerate(self.train([0.0, 0.0], rows_per_step)):
            if step == 0:
                started = clock()
            tokens = int(self._data.lengths[self.rows_of(step, rows_per_step)].sum())
        return (clock() - started) / tokens


def some(data: EncodedFile, examples: RowIndices) -> EncodedFile:
    """These examples alone."""
    return replace(
        data,
        dataset=data.dataset.select(examples),
        lengths=data.lengths[examples],
        indices=data.indices[examples],
    )
