"""The verdict is a function of what was measured: a table of outcomes and what is said of each."""

from __future__ import annotations

from typing import Any

import pytest

from lora_core.report.verdict import Outcome, OverFitting, TrainingLoss, judge
from lora_core.report.words import rate_text

HEALTHY: dict[str, Any] = {
    "eval_before": 3.42,
    "eval_after": 2.36,
    "eval_error": 0.06,
    "num_examples": 26,
    "num_better": 26,
    "num_worse": 0,
    "training": TrainingLoss(3.4, 2.1, 5),
    "learning_rate": 1e-4,
    "peak_learning_rate": 1e-4,
    "warmup_steps": 5,
    "planned_steps": 50,
    "steps": 50,
    "num_loss_tokens": 12_320,
    "adapter_norm": 2.0,
}
LEARNED = "learned: eval loss 3.42 -> 2.36 (-31.0% ± 1.8%), better on 26 of 26 examples"
SAME = {"eval_after": 3.4166, "eval_error": 0.01, "num_better": 14, "num_worse": 12}
NOTHING = "this run learned next to nothing (-0.1%): "
OVER_FITTED = OverFitting(20, 2.0, 50, 2.36, 2.0, 1.0, False)
SINCE = "it over-fitted after step 20, where eval loss was lowest (2.00); fix: train.keep_adapter=best, or "
NO_SET = {"eval_before": None, "eval_after": None, "eval_error": None, "num_examples": None, "num_better": None}
CANNOT = (
    "without an eval set it cannot be said whether it learned more than its training rows; fix: data.eval_fraction=0.1"
)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({}, "good", LEARNED),
        ({"eval_error": None}, "good", LEARNED.replace(" ± 1.8%", "")),
        ({"num_better": None}, "good", LEARNED.partition(",")[0]),
        ({"over_fitting": OVER_FITTED}, "poor", f"{LEARNED}; {SINCE}train.max_steps=20"),
        (
            {"num_skipped_steps": 1},
            "good",
            f"{LEARNED}; 1 of 50 optimizer steps were not applied: loss or gradient was",
        ),
        (
            {"warmup_steps": 100, "peak_learning_rate": 5e-5},
            "good",
            f"{LEARNED}; the learning rate peaked at 5e-5, 50% of the 1e-4 asked for (100 warmup steps in a run of 50)",
        ),
        # The mistake that the project was born from.
        (
            {**SAME, "peak_learning_rate": 9e-6, "warmup_steps": 100, "planned_steps": 10, "steps": 10},
            "bad",
            f"{NOTHING}the learning rate peaked at 9e-6, 9% of the 1e-4 asked for (100 warmup steps in a run of 10); "
            "10 optimizer steps on 12,320 loss tokens rarely change an adapter",
        ),
        (
            {**SAME, "learning_rate": 1e-6, "peak_learning_rate": 1e-6},
            "bad",
            f"{NOTHING}a learning rate of 1e-6 is low",
        ),
        ({**SAME, "adapter_norm": 0.0}, "bad", f"{NOTHING}the adapter did not move: its norm is 0"),
        ({**SAME, "num_skipped_steps": 12}, "bad", f"{NOTHING}12 of 50 optimizer steps were not applied"),
        ({**SAME, "over_fitting": OVER_FITTED}, "bad", f"{NOTHING}{SINCE}"),
        (
            SAME,
            "bad",
            f"{NOTHING}training loss fell (3.40 -> 2.10), so the training rows do not teach what the eval set",
        ),
        ({**SAME, "training": None}, "bad", f"{NOTHING}the run's own figures do not say why"),
        (
            {"eval_after": 3.32, "eval_error": 0.01, "num_better": 20, "training": None},
            "poor",
            "learned a little: eval loss 3.42 -> 3.32 (-2.9% ± 0.3%), better on 20 of 26 examples",
        ),
        (
            {"eval_after": 3.0, "eval_error": 0.3, "num_examples": 3},
            "open",
            "this run may have learned: eval loss 3.42 -> 3.00 (-12.3% ± 8.8%): too few examples (3) to tell it from "
            "chance; fix: a larger eval set",
        ),
        (
            {"eval_after": 4.0, "num_worse": 24, "learning_rate": 5e-3, "peak_learning_rate": 5e-3},
            "bad",
            "this run made it worse: eval loss 3.42 -> 4.00 (+17.0% ± 1.8%), worse on 24 of 26 examples: a "
            "learning rate of 5e-3 is high for LoRA",
        ),
        (NO_SET, "open", f"training loss 3.40 -> 2.10 (-38.2%, means of the first and last 5 steps); {CANNOT}"),
        (
            {**NO_SET, "training": TrainingLoss(3.4, 3.39, 5), "steps": 8},
            "bad",
            "this run seems to have learned next to nothing: training loss 3.4000 -> 3.3900 (-0.3%, means of the first "
            "and last 5 steps): 8 optimizer steps on 12,320 loss tokens rarely change an adapter; without an eval set",
        ),
        (
            {**NO_SET, "training": None},
            "open",
            "no loss was recorded, so it cannot be said what this run learned; fix:",
        ),
        ({"eval_before": 0.0, "training": None}, "open", "no loss was recorded"),
        (
            {"is_finished": False, "steps": 1200, "planned_steps": 5000, "tokens_per_s": 1234.5, "training": None},
            "open",
            "not finished: 1,200 of 5,000 optimizer steps seen; eval loss so far 3.42 -> 2.36; 1,234 tokens/s",
        ),
    ],
)
def test_what_is_said_of_an_outcome(changes: dict[str, Any], kind: str, said: str) -> None:
    verdict = judge(Outcome(**{**HEALTHY, **changes}))
    assert verdict.sentence[: len(said)] == said
    assert verdict.kind == kind


def test_of_an_outcome_of_which_nothing_is_known_nothing_is_claimed() -> None:
    assert judge(Outcome()).kind == "open"


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (1e-3, "1e-3"), (0.02, "2e-2"), (0, "0")]
)
def test_learning_rates_are_written_as_people_write_them(rate: float, text: str) -> None:
    assert rate_text(rate) == text
