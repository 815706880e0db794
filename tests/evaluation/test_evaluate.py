"""The loss of each eval example is its own, however the eval set is laid into micro-batches; and what is made of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_core.config.schema import RunConfig
from lora_core.configuration import load_config
from lora_core.data.encoded import load_data, pad_id
from lora_core.data.packing import eval_batching
from lora_core.evaluation.evaluate import ExampleLosses, compare_examples, evaluate, evaluate_examples, finish_examples
from lora_core.model.base import load_base_model, load_tokenizer
from lora_core.model.loss import CausalLMLoss
from lora_core.runtime.devices import build_accelerator
from tests.conftest import chat


def losses_one_by_one(config: RunConfig) -> list[tuple[float, int]]:
    """(mean loss, loss tokens) of each eval example alone, as transformers computes it from labels."""
    _, data = load_data(config, load_tokenizer(config.model, config.data))
    assert data is not None
    model = load_base_model(config.model, torch.device("cpu")).eval()
    losses = []
    for row in data.dataset:
        input_ids, mask = torch.as_tensor(row["input_ids"])[None], torch.as_tensor(row["loss_mask"]).bool()[None]
        labels = torch.where(mask, input_ids, -100)
        with torch.no_grad():
            losses.append((float(model(input_ids=input_ids, labels=labels).loss), int(mask[:, 1:].sum())))
    return losses


@pytest.mark.parametrize("packing", ["true", "false"])
def test_each_example_has_its_own_loss_in_packed_and_in_padded_batches(
    packing: str, tmp_path: Path, tiny_model_dir: Path, write_rows: Any
) -> None:
    # Of several turns and of any length, so that loss tokens do not sit in one piece.
    rows = write_rows([chat(f"q{i}", "word " * i + "end", "and?", f"a{i}") for i in range(7)])
    config = load_config(
        "demo",
        [
            f"model.name_or_path={tiny_model_dir}",
            "model.dtype=float32",
            f"data.train_file={rows}",
            f"data.eval_file={rows}",
            f"data.cache_dir={tmp_path}",
            f"data.packing={packing}",
            "train.bf16=false",
            "train.per_device_eval_batch_size=3",
        ],
    )
    wanted = losses_one_by_one(config)
    accelerator = build_accelerator(config)
    tokenizer = load_tokenizer(config.model, config.data)
    _, data = load_data(config, tokenizer)
    assert data is not None
    model = CausalLMLoss(load_base_model(config.model, accelerator.device, config.data.packing))
    batching = eval_batching(config, pad_id(tokenizer))
    result, examples = evaluate_examples(accelerator, model, data, batching)
    assert examples.means() == pytest.approx([loss for loss, _ in wanted], abs=1e-5)
    assert examples.num_tokens.tolist() == [num_tokens for _, num_tokens in wanted]
    assert result == evaluate(accelerator, model, data, batching)
    assert result.loss * result.num_tokens == pytest.approx(sum(loss * num for loss, num in wanted), rel=1e-5)
    assert (result.num_tokens, result.num_conversations) == (sum(num for _, num in wanted), 7)


def test_the_change_of_the_eval_loss_has_the_spread_of_another_draw_of_examples() -> None:
    random = np.random.default_rng(0)
    num_tokens = random.integers(5, 60, size=400)
    before = random.normal(3.0, 0.5, size=400)  # examples differ much more than training changes them
    after = before - random.normal(0.1, 0.2, size=400)
    found = compare_examples(before, after, num_tokens)
    weights = num_tokens / num_tokens.sum()
    assert found.change == pytest.approx((weights * after).sum() - (weights * before).sum())
    assert (found.num_examples, found.num_better + found.num_worse) == (400, 400)
    assert found.num_better == (after < before).sum()
    # The bootstrap, which assumes no formula: draw examples anew, and look how far the change moves.
    draws = [compare_examples(before[i], after[i], num_tokens[i]).change for i in random.integers(0, 400, (2000, 400))]
    assert found.standard_error == pytest.approx(np.std(draws), rel=0.05)


def test_with_equal_lengths_the_error_is_the_paired_standard_error_and_one_example_has_none() -> None:
    before, after = np.array([3.0, 2.0, 4.0]), np.array([2.5, 2.25, 4.0])
    found = compare_examples(before, after, np.array([7, 7, 7]))
    assert found.standard_error == pytest.approx(np.std(after - before, ddof=1) / math.sqrt(3))
    assert (found.num_better, found.num_worse) == (1, 1)
    assert compare_examples(before[:1], after[:1], np.array([7])).standard_error is None


@pytest.mark.parametrize("content", [None, "{", "[]", '{"loss_before": [1.0]}', '{"loss_before": ["a", "b"]}'])
def test_without_the_losses_from_before_nothing_is_compared(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "eval_examples.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert finish_examples(path, ExampleLosses(np.array([1.0, 2.0]), np.array([3, 4]))) is None
