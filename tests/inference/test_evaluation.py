"""What is measured of a model, its table of examples, and two models on the same rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import XLNetConfig, XLNetLMHeadModel

from lora_core.configuration import load_config, with_overrides
from lora_core.errors import ConfigError
from lora_core.evaluation.evaluate import compare_examples
from lora_core.evaluation.replies import sample_reply
from lora_core.inference.evaluation import Evaluation, compare_evaluations, evaluate_loaded, load_eval_data, on_rows_of
from lora_core.inference.harness import run_tasks
from lora_core.inference.opened import LoadedModel, load_opened, open_base, open_model


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> LoadedModel:
    return load_opened(open_model(str(finished_run)))


@pytest.fixture(scope="module")
def trained(loaded: LoadedModel) -> Evaluation:
    return evaluate_loaded(loaded, None, 8, print)


@pytest.fixture(scope="module")
def base(finished_run: Path) -> Evaluation:
    config = load_config(finished_run / "config.yaml")
    return evaluate_loaded(load_opened(open_base(config)), 3, 8, print)


def test_the_losses_of_the_table_add_up_to_the_eval_loss(trained: Evaluation, finished_run: Path) -> None:
    rows = trained.rows()
    total = sum(row["num_tokens"] for row in rows)
    assert sum(row["loss"] * row["num_tokens"] for row in rows) / total == pytest.approx(trained.result.loss, abs=1e-6)
    assert total == trained.result.num_tokens
    assert [row["place"] for row in rows] == [f"{finished_run.parent / 'eval.jsonl'}:{line}" for line in range(1, 6)]


def test_the_replies_of_the_table_are_those_of_sample_reply(trained: Evaluation, loaded: LoadedModel) -> None:
    rows = trained.rows()
    assert [row["expected"] for row in rows] == ["stop", "go on", "wait", "x y", "z"]
    asked = ["red", "green", "amber", "blue", "grey"]
    for row, question in zip(rows, asked, strict=True):
        messages = [{"role": "user", "content": question}]
        assert row["reply"] == sample_reply(loaded.model, loaded.tokenizer, messages, None, 8)
        assert row["exact"] is (row["reply"] == row["expected"])
    assert [row["exact"] for row in rows] == [True, True, True, False, False]
    assert trained.num_exact == 3
    assert "exact replies: 3 of 5 (60.0%)" in str(trained)
    assert trained.to_dict()["num_exact"] == 3


def test_a_model_that_sees_later_tokens_is_not_measured(loaded: LoadedModel) -> None:
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=4, d_inner=48))
    with pytest.raises(ConfigError, match="XLNetLMHeadModel sees later tokens"):
        evaluate_loaded(replace(loaded, model=model), 0, 8, print)


def test_only_so_many_examples_are_asked(base: Evaluation) -> None:
    assert [("reply" in row) for row in base.rows()] == [True, True, True, False, False]
    assert "of 3 stopped at a limit or failed" in str(base)


def test_two_models_are_paired_by_example(trained: Evaluation, base: Evaluation) -> None:
    difference = compare_evaluations(trained, base)
    assert difference.loss is not None
    expected = compare_examples(base.losses.means(), trained.losses.means(), base.losses.num_tokens)
    assert difference.loss.difference == pytest.approx(trained.result.loss - base.result.loss, abs=1e-6)
    assert difference.loss.standard_error == expected.standard_error
    assert difference.exact is not None
    assert (difference.exact.num_questions, difference.exact.only_first, difference.exact.only_second) == (3, 3, 0)
    assert difference.exact.p_value == 0.25


def test_the_other_model_keeps_its_template_and_takes_the_rows(finished_run: Path, trained: Evaluation) -> None:
    config = trained.opened.config
    own = with_overrides(config, ["data.chat_template=zephyr", "data.eval_file=null", "train.seed=7"])
    opened = on_rows_of(open_base(own), config)
    assert opened.config.data.chat_template == "zephyr"
    assert (opened.config.data.eval_file, opened.config.train.seed) == (config.data.eval_file, config.train.seed)
    other = evaluate_loaded(load_opened(opened), 0, 8, print)
    difference = compare_evaluations(trained, other)
    assert (difference.loss, difference.exact) == (None, None)
    assert "losses are not compared" in str(difference)


def test_evaluations_of_other_rows_are_not_paired(trained: Evaluation) -> None:
    config = with_overrides(trained.opened.config, ["data.max_seq_length=16", "data.truncation=drop"])
    other = evaluate_loaded(load_opened(open_base(config)), 0, 8, print)
    with pytest.raises(ConfigError, match=r"the two cannot be compared: .* keeps 5 examples .*; fix: "):
        compare_evaluations(trained, other)


def test_a_share_of_the_training_rows_is_the_runs_own(finished_run: Path, loaded: LoadedModel) -> None:
    config = with_overrides(loaded.config, ["data.eval_file=null", "data.eval_fraction=0.4"])
    data = load_eval_data(config, loaded.tokenizer)
    assert 0 < len(data.lengths) < 24
    with pytest.raises(ConfigError, match=r"there is no eval set; fix: data\.eval_file=PATH"):
        load_eval_data(with_overrides(config, ["data.eval_fraction=0"]), loaded.tokenizer)


def test_without_the_package_of_lm_eval_a_sentence_says_so(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"lm-eval is not installed; fix: pip install 'lora-core\[lm-eval\]'"):
        run_tasks(loaded, "arc_easy")
