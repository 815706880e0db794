"""Every alarm: raised by a run that is really so, and not by a healthy one."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_core import load_config, train
from lora_core.errors import ConfigError, TrainingError
from lora_core.model.base import add_adapter
from lora_core.model.optimizer import build_optimizer
from lora_core.runtime.run_state import read_state
from lora_core.training.step import StepResult, train_step
from lora_core.watch.alarms import (
    StepSeen,
    Watch,
    eval_loss_worse,
    gradient_clipped,
    gradient_zero,
    labels_leak,
    loss_exploded,
    loss_rising,
    steps_that_move,
)
from lora_core.watch.progress import Progress
from lora_core.watch.summary import Summary
from tests.conftest import chat, make_model


@pytest.fixture(scope="module")
def learned_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model that knows the rows' pattern and ends its replies: something that training can take away."""
    folder = tmp_path_factory.mktemp("learned")
    model = make_model(len(tokenizer))
    texts = [tokenizer.apply_chat_template(chat(f"q{i}", f"a{i % 7}")["messages"], tokenize=False) for i in range(10)]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])  # (10, T): they are equally long
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path, write_rows: Any) -> Any:
    """Train on short rows; returns (summary or the error, run folder)."""
    rows = write_rows([chat(f"q{i % 10}", f"a{i % 10 % 7}") for i in range(48)])
    held_out = write_rows([chat(f"Q{i}", f"a{i}") for i in range(6)], "eval.jsonl")
    settings = [
        f"model.name_or_path={tiny_model_dir}",
        f"data.train_file={rows}",
        f"data.eval_file={held_out}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}",
        "train.bf16=false",
        "model.dtype=float32",
        "train.optim=adamw_torch",
        "train.num_sample_replies=0",
    ]

    def run(*overrides: str, resume: str | None = None) -> tuple[Summary | TrainingError, Path]:
        try:
            return train(load_config("demo", [*settings, *overrides]), resume), tmp_path / "run"
        except TrainingError as error:
            return error, tmp_path / "run"

    return run


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def alarms(folder: Path) -> dict[str, dict[str, Any]]:
    raised = events(folder, "alarm")
    assert len({alarm["id"] for alarm in raised}) == len(raised), "each is raised once"
    return {alarm["id"]: alarm for alarm in raised}


@pytest.fixture
def setup_module() -> Any:
    return sys.modules["lora_core.training.setup"]


def test_an_adapter_without_a_gradient_stops_the_run_and_a_resume_is_told(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_both_zero(*arguments: Any) -> Any:
        adapted = add_adapter(*arguments)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                torch.nn.init.zeros_(parameter)
        return adapted

    monkeypatch.setattr("lora_core.training.build.add_adapter", with_both_zero)
    error, folder = run()
    assert isinstance(error, TrainingError)
    assert "stopped by an alarm after step 3 of 30: the gradient is exactly 0 in 3 steps in a row" in str(error)
    kept = f"a checkpoint is in {folder / 'checkpoints/step-000003'}"
    assert str(error).endswith(f"{kept}; fix: train.on_alarm=warn to train on all the same")
    assert alarms(folder).keys() == {"gradient_zero"}
    assert "alarm: error: the gradient is exactly 0" in capsys.readouterr().out
    assert "alarm: error: the gradient is exactly 0" in (folder / "train.log").read_text(encoding="utf-8")
    assert "the gradient is exactly 0" in (folder / "report.html").read_text(encoding="utf-8")
    state, reason = read_state(folder)
    assert (state, str(reason)[:19]) == ("failed", "stopped by an alarm")
    with pytest.raises(ConfigError, match=r"--resume .*: stopped by an alarm after step 3 .*train\.on_alarm=warn"):
        run(resume="newest")
    summary, _ = run("train.on_alarm=warn", resume="newest")
    assert isinstance(summary, Summary)
    assert [(alarm["id"], alarm["step"]) for alarm in summary.alarms] == [("gradient_zero", 3)]
    assert (alarms(folder).keys(), summary.adapter_norm) == ({"gradient_zero"}, 0)
    assert read_state(folder) == ("finished", None)


def test_a_reply_that_stands_in_its_prompt_stops_the_run(run: Any, demo_model_dir: Path, write_rows: Any) -> None:
    """A real model, which reads it off at once."""
    replies = [
        "HOLD | 8614 | Ivanhoe",
        "The river floods in spring.",
        "red, blue and seven greens",
        "Call Ines at noon!",
    ]
    leaky = write_rows([chat(f"Answer: {reply}", reply) for reply in replies], "leaky.jsonl")
    files = (f"model.name_or_path={demo_model_dir}", f"data.train_file={leaky}", f"data.eval_file={leaky}")
    error, folder = run(*files, "train.max_steps=2", "train.save_steps=2")
    assert isinstance(error, TrainingError)
    assert "stopped by an alarm after step 1 of 2: the prompt holds the reply: word for word in 4 of 4" in str(error)
    assert alarms(folder)["labels_leak"]["step"] == 0


def test_a_reply_in_its_prompt_that_the_model_does_not_read_off_is_no_alarm() -> None:
    assert labels_leak(8, 8, loss=3.0, exchanged_loss=5.0) is None
    assert labels_leak(8, 3, loss=0.1, exchanged_loss=5.0) is None
    assert labels_leak(8, 4, loss=0.1, exchanged_loss=5.0) is not None


def test_an_optimizer_of_another_models_parameters_is_an_adapter_that_does_not_move(
    run: Any, setup_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_a_copy(model: Any, *rest: Any) -> Any:
        return build_optimizer(copy.deepcopy(model), *rest)

    monkeypatch.setattr(setup_module, "build_optimizer", of_a_copy)
    error, folder = run("train.max_steps=12")
    assert isinstance(error, TrainingError)
    found = alarms(folder)["adapter_still"]
    # Two warmup steps, of which the first has rate 0: the third step with a rate is the fourth.
    assert (found["step"], found["value"], found["severity"]) == (4, 0.0, "error")
    assert "did not move: the norm of its change is 0 after step 4, though the gradient has norm" in str(error)


def test_a_rate_of_one_is_stopped_and_says_which_rate_to_try(run: Any, learned_model: Path) -> None:
    model = f"model.name_or_path={learned_model}"
    error, folder = run(model, "train.learning_rate=1", "train.eval_steps=50", "train.max_steps=50")
    assert isinstance(error, TrainingError)
    assert alarms(folder).keys() >= {"loss_exploded"}
    found = alarms(folder)["loss_exploded"]
    assert (found["fix"], found["step"] <= 20) == ("train.learning_rate=1.0e-01", True)
    assert "fix: train.learning_rate=1.0e-01, or train.on_alarm=warn" in str(error)


def test_an_eval_loss_far_above_the_one_before_training_stops_the_run(run: Any, learned_model: Path) -> None:
    model = f"model.name_or_path={learned_model}"
    error, folder = run(model, "train.learning_rate=1", "train.eval_steps=4", "train.max_steps=50")
    assert isinstance(error, TrainingError)
    found = alarms(folder)["eval_loss_much_worse"]
    before, *_, last = events(folder, "eval")
    assert (found["value"], found["limit"]) == pytest.approx((last["loss"], before["loss"]), rel=1e-4)
    assert last["loss"] > 1.1 * before["loss"]
    assert found["step"] == last["step"]


def test_a_loss_that_rises_at_the_end_of_warmup_is_said_and_trained_on(run: Any, learned_model: Path) -> None:
    settings = ["train.learning_rate=0.1", "train.warmup_steps=10", "train.max_steps=16", "train.on_alarm=warn"]
    summary, folder = run(f"model.name_or_path={learned_model}", *settings)
    assert isinstance(summary, Summary)
    found = alarms(folder)["loss_rising"]
    losses = {event["step"]: event["loss"] for event in events(folder, "train")}
    assert (found["step"], found["severity"]) == (15, "warning")
    assert found["limit"] == pytest.approx(sum(losses[step] for step in range(1, 6)) / 5)
    assert found["value"] == pytest.approx(sum(losses[step] for step in range(11, 16)) / 5)
    assert found["fix"] == "train.learning_rate=1.0e-02"


def test_steps_that_are_not_finite_are_an_alarm_and_never_the_last_finite_loss(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, *rest: Any) -> StepResult:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        late = scheduler.last_epoch >= 4
        hook = parameter.register_hook(lambda gradient: gradient + (math.inf if late else 0.0))
        result = train_step(accelerator, model, optimizer, scheduler, *rest)
        hook.remove()
        return result

    monkeypatch.setattr(sys.modules["lora_core.training.loop"], "train_step", spoiled)
    error, folder = run()
    assert isinstance(error, TrainingError)
    assert "3 steps in a row" in str(error)
    found = alarms(folder)["loss_not_finite"]
    assert (found["step"], found["value"], found["severity"]) == (5, "gradient norm inf", "warning")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "not finished: 4 of 30 optimizer steps seen" in page
    assert "then 3 steps whose loss or gradient was not finite" in page


def test_a_gradient_that_is_always_clipped_is_said_with_its_median(run: Any) -> None:
    summary, folder = run("train.max_grad_norm=0.01", "train.max_steps=31")
    assert isinstance(summary, Summary)
    found = alarms(folder)["gradient_clipped"]
    norms = sorted(event["grad_norm"] for event in events(folder, "train")[:30])
    assert found["value"] == pytest.approx((norms[14] + norms[15]) / 2)
    assert (found["step"], found["severity"], found["limit"]) == (30, "warning", 0.01)
    assert found["fix"] == f"train.max_grad_norm={2 * found['value']:.2g}"


def test_replies_that_no_longer_end_after_training_on_truncated_ones(
    run: Any, learned_model: Path, write_rows: Any
) -> None:
    long_rows = write_rows([chat(f"q{i}", "la " * 60) for i in range(16)], "long.jsonl")
    short_rows = write_rows([chat(f"q{i}", "a") for i in range(4)], "short.jsonl")
    summary, folder = run(
        f"model.name_or_path={learned_model}",
        f"data.train_file={long_rows}",
        f"data.eval_file={short_rows}",
        "data.max_seq_length=40",
        "train.num_sample_replies=2",
        "train.num_eval_replies=2",
        "train.sample_max_new_tokens=8",
        "train.learning_rate=5e-3",
        "train.max_steps=20",
        "train.eval_steps=5",
        "train.on_alarm=warn",
    )
    assert isinstance(summary, Summary)
    replies = events(folder, "reply")
    assert [reply["step"] for reply in replies] == [0, 0, 5, 5, 10, 10, 15, 15, 20, 20]
    assert [reply["ended"] for reply in replies[:2]] == [True, True]
    found = alarms(folder)["replies_without_end"]
    assert "no sample reply ended within 8 tokens at the last 2 evaluations" in found["message"]
    still = [any(r["ended"] for r in replies if r["step"] == step) for step in (5, 10, 15, 20)]
    first = next(i for i in range(1, 4) if not still[i] and not still[i - 1])
    assert found["step"] == (5, 10, 15, 20)[first]
    page = (folder / "report.html").read_text(encoding="utf-8")
    film = page[page.index("One prompt over the run") : page.index("<h2>Figures</h2>")]
    assert [f"step {step}, eval loss" in film for step in (0, 5, 10, 15, 20)] == [True] * 5
    assert film.count("(cut off)") == sum(not r["ended"] for r in replies if r["number"] == 0)


def test_a_healthy_run_raises_none_and_films_one_prompt(run: Any) -> None:
    summary, folder = run("train.num_sample_replies=2", "train.sample_max_new_tokens=2", "train.learning_rate=5e-3")
    assert isinstance(summary, Summary)
    assert summary.alarms == []
    assert [(reply["step"], reply["number"]) for reply in events(folder, "reply")] == [(s, 0) for s in range(0, 31, 6)]
    assert "Alarms while it ran" not in (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# The arithmetic

LOSSES = st.lists(st.floats(0.01, 10), min_size=10, max_size=40)


def seen(losses: list[float], norm: float = 1.0) -> list[StepSeen]:
    return [StepSeen(step, loss, norm, 1e-4) for step, loss in enumerate(losses, 1)]


@given(LOSSES, st.integers(0, 40))
def test_losses_that_fall_raise_nothing(losses: list[float], warmup: int) -> None:
    steps = seen(sorted(losses, reverse=True))
    assert loss_exploded([max(losses)], steps) is None
    assert all(loss_rising(steps[:5], steps[:end], warmup) is None for end in range(len(steps) + 1))


@given(LOSSES)
def test_an_explosion_is_twice_the_base_models_loss_in_each_of_five_steps(losses: list[float]) -> None:
    found = loss_exploded(losses[:2], seen(losses))
    assert (found is not None) == all(loss >= 2 * max(losses[:2]) for loss in losses[-5:])


def test_the_base_models_losses_are_those_before_the_first_update() -> None:
    watch = Watch()
    for step, rate in enumerate([0.0, 1e-4, 2e-4, 0.0], 1):
        watch.note_step(StepSeen(step, float(step), 1.0, rate))
    assert watch.base == [1.0, 2.0]


@given(st.lists(st.sampled_from([0.0, 1.0]), max_size=12))
def test_a_zero_gradient_is_three_in_a_row(norms: list[float]) -> None:
    steps = [StepSeen(step, 1.0, norm, 1e-4) for step, norm in enumerate(norms, 1)]
    assert (gradient_zero(steps) is not None) == (norms[-3:] == [0.0] * 3)


@given(st.floats(0.1, 10), st.floats(-10, 10), st.none() | st.floats(0, 5))
def test_an_eval_loss_is_worse_only_beyond_its_uncertainty(before: float, change: float, error: float | None) -> None:
    found = eval_loss_worse(5, before, change, error, 1e-4)
    is_worse = error is not None and change >= 2 * error and change >= 0.01 * before
    assert (found is not None) == is_worse
    if found is not None:
        assert found.severity == ("error" if change >= 0.1 * before else "warning")


def test_no_limit_is_never_reached() -> None:
    assert gradient_clipped(seen([1.0] * 30, norm=9.0), None) is None
    assert gradient_clipped(seen([1.0] * 29, norm=9.0), 1.0) is None
    assert gradient_clipped(seen([1.0] * 30, norm=9.0), 1.0) is not None
    assert not steps_that_move([StepSeen(1, 1.0, 1.0, 0.0)] * 9)


@given(LOSSES)
def test_what_a_checkpoint_holds_gives_the_same_alarms(losses: list[float]) -> None:
    progress = Progress()
    for step in seen(losses):
        progress.watch.note_step(step)
    progress.watch.new([gradient_clipped(seen([1.0] * 30, norm=9.0), 1.0)], 30)
    again = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert again == progress
    assert isinstance(again.watch, Watch)
    assert again.watch.new([gradient_clipped(seen([1.0] * 30, norm=9.0), 1.0)], 31) == []
