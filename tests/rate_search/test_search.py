"""A search on a tiny model: against a sweep, from one start, within its time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.commands.main import main
from lora_core.configuration import load_config
from lora_core.errors import ConfigError
from lora_core.preflight.findings import Facts
from lora_core.preflight.preflight import look_at_run
from lora_core.rate_search import trials as trials_module
from lora_core.rate_search.budget import Work
from lora_core.rate_search.choice import range_rates, shortened
from lora_core.rate_search.search import find_rate
from lora_core.rate_search.trials import Trials
from tests.tiny import chat, run_settings, write_jsonl

STEPS = 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> list[str]:
    """A colour decides the reply; a number beside it does not."""
    folder = tmp_path_factory.mktemp("rates")
    numbers = random.Random(0)
    replies = {"red": "stop", "green": "go on", "amber": "wait", "blue": "turn left"}
    rows = [chat(f"{colour} {numbers.randrange(99)}", reply) for colour, reply in [*replies.items()] * 12]
    numbers.shuffle(rows)
    train = write_jsonl(folder / "train.jsonl", rows[:36])
    held_out = write_jsonl(folder / "eval.jsonl", rows[36:])
    return [
        *run_settings(folder, tiny_model_dir, train, held_out),
        "model.dtype=float32",
        "train.bf16=false",
        f"train.max_steps={STEPS}",
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=1",
    ]


@pytest.fixture(scope="module")
def facts(settings: list[str]) -> Facts:
    return look_at_run(load_config("demo", settings), 1)


def test_its_answer_is_within_a_factor_2_of_the_best_of_a_sweep(facts: Facts) -> None:
    said: list[str] = []
    found = find_rate(facts, 600, said.append)
    assert found.work == Work(4, STEPS, 12, 30)
    trials = Trials(facts)
    assert facts.eval_data is not None
    losses = {}
    for rate in [found.rate * 2.0**power for power in range(-3, 4)]:
        if rate <= 1:
            for _ in trials.train(shortened(facts.plan, STEPS, rate), 4):
                pass
            losses[rate] = trials.evaluate(facts.eval_data)[0].loss
    best = min(losses, key=lambda rate: losses[rate])
    assert 0.5 <= found.rate / best <= 2
    # The same trainings: the sweep's loss at this rate is the candidate's, to the last bit.
    taken = next(candidate for candidate in found.candidates if candidate.rate == found.rate)
    assert losses[found.rate] == taken.eval_loss
    assert found.loss_before > taken.eval_loss
    assert json.loads(json.dumps(found.to_dict()))["rate"] == found.rate


def test_every_training_begins_at_the_same_start(facts: Facts) -> None:
    trials = Trials(facts)
    start = {name: value.clone() for name, value in trials.trained()}
    first = [result.loss for result in trials.train([1e-2] * 3, 4)]
    assert any(not torch.equal(value, start[name]) for name, value in trials.trained())
    again = [result.loss for result in trials.train([1e-2] * 3, 4)]
    assert first == again
    trials.put_back()
    assert all(torch.equal(value, start[name]) for name, value in trials.trained())
    steps = [*trials.range_test(range_rates("adamw_torch", 12), 4)]
    assert steps[0].loss == first[0] == pytest.approx(steps[0].base_loss, rel=1e-5)


class Clock:
    """Seconds that go by with the rows that are computed, and not with this machine's load."""

    def __init__(self, row_s: float) -> None:
        self.row_s, self.seconds = row_s, 0.0

    def __call__(self) -> float:
        return self.seconds

    def after(self, function: Callable[..., Any], data_at: int, share: float) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            counted = arguments[data_at]
            rows = len(counted.lengths) if share < 1 else sum(len(batch["segment_lengths"]) for batch in counted)
            self.seconds += rows * self.row_s * share
            return function(*arguments)

        return timed


@pytest.mark.parametrize(("row_s", "budget_s"), [(0.5, 300), (1.0, 200)])
def test_it_keeps_to_its_time(facts: Facts, monkeypatch: pytest.MonkeyPatch, row_s: float, budget_s: float) -> None:
    clock = Clock(row_s)
    monkeypatch.setattr(trials_module, "train_step", clock.after(trials_module.train_step, 4, 1))
    monkeypatch.setattr(trials_module, "evaluate_examples", clock.after(trials_module.evaluate_examples, 2, 1 / 3))
    said: list[str] = []
    found = find_rate(facts, budget_s, said.append, clock)
    assert 0.5 * min(budget_s, 250 * row_s) < clock.seconds <= 1.05 * budget_s
    assert found.seconds == clock.seconds
    assert any(line.startswith(f"in {budget_s / 60:g} min: a range test of") for line in said)


def test_too_little_time_is_refused_before_anything_is_trained(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(10.0)
    monkeypatch.setattr(trials_module, "train_step", clock.after(trials_module.train_step, 4, 1))
    with pytest.raises(ConfigError, match=r"fix: --budget-minutes \d+"):
        find_rate(facts, 60, lambda _: None, clock)


def test_without_an_eval_set_there_is_nothing_to_judge_on(facts: Facts) -> None:
    with pytest.raises(ConfigError, match=r"fix: data\.eval_fraction"):
        find_rate(replace(facts, eval_data=None), 60, lambda _: None)


def test_the_command_holds_rows_out_writes_a_page_and_the_rate(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: demo.yaml\ntrain:\n  learning_rate: 5e-5  # to be found\n")
    given = [each for each in settings if not each.startswith("output_dir")]
    command = ["find-lr", "--cfg", "mine.yaml", *given, "data.eval_file=null", "output_dir=runs/mine"]
    assert main([*command, "--write", "mine.yaml"]) == 0
    said = capsys.readouterr().out
    assert "20% of the rows become one" in said
    rate = load_config("mine.yaml").train.learning_rate
    assert f"learning rate: {rate:g} (configured: 5e-05; by the formula:" in said
    assert (tmp_path / "mine.yaml").read_text().endswith("# to be found\n")
    page = (tmp_path / "runs/mine-find-lr.html").read_text()
    assert page.count("<svg") == 2
    assert "before training" in page


def test_the_command_refuses_what_it_cannot_do(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["find-lr", "--cfg", "demo", *settings, "--budget-minutes", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["find-lr", "--cfg", "demo", *settings]) == 2
    assert "find-lr runs in one process" in capsys.readouterr().err
