"""A learning rate for the user's own rows: a range test, then candidates that the eval set decides between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import ConfigError
from lora_core.evaluation.evaluate import ExampleLosses, compare_examples
from lora_core.preflight.plan import suggested_rate
from lora_core.rate_search.budget import FORWARD_SHARE, Speed, Work, allot, with_steps
from lora_core.rate_search.choice import (
    LEAST_SHARE,
    Candidate,
    RangeStep,
    candidates_after,
    has_diverged,
    one_more,
    range_rates,
    shortened,
    take,
)
from lora_core.rate_search.trials import Trials, some

if TYPE_CHECKING:
    from lora_core.data.counts import EncodedFile
    from lora_core.preflight.findings import Facts


@dataclass(frozen=True)
class RateSearch:
    """What was found, and how."""

    rate: float
    candidates: tuple[Candidate, ...]
    """By rate."""
    range_steps: tuple[RangeStep, ...]
    loss_before: float
    """Eval loss of the start."""
    asked: float
    """The configuration's own rate."""
    formula: float
    """What `train.learning_rate=auto` gives."""
    work: Work
    run: Work
    """What the run itself does."""
    remarks: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_rate(
    facts: Facts,
    budget_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> RateSearch:
    """Search in the time that there is.

    Args:
        facts: of the run, with an eval set, for one process.
        budget_s: seconds for all of it.
        say: is told what goes on.
        clock: gives seconds.
        started: what it gave when the time began to count; None is now.

    Raises:
        ConfigError: the time is too short, or the model or its adapter cannot be had.
    """
    if facts.eval_data is None:
        raise ConfigError("find-lr judges on an eval set; fix: data.eval_fraction=0.2")
    began = clock() if started is None else started

    def left() -> float:
        return budget_s - (clock() - began)

    plan = facts.plan
    run = Work(plan.rows_per_optimizer_step, plan.total_optimizer_steps, len(facts.eval_data.lengths))
    say(f"loading {facts.config.model.name_or_path} ...")
    trials = Trials(facts)
    token_s = trials.seconds_per_token(run.rows_per_step, clock)
    speed = Speed(
        token_s * float(facts.train_data.lengths.mean()),
        token_s * float(facts.eval_data.lengths.mean()) * FORWARD_SHARE,
    )
    work = allot(left(), speed, run, clock() - began)
    say(f"in {budget_s / 60:g} min: {work}\n       (the run: {run.steps} steps, {run.rows_per_step} examples a step)")

    eval_data = first_examples(facts.eval_data, work.eval_examples, facts.config.train.seed)
    trials.put_back()
    before, _ = trials.evaluate(eval_data)
    say(f"eval loss before: {before.loss:.4f}")
    seen: list[RangeStep] = []
    range_began = clock()
    for step in trials.range_test(range_rates(facts.config.train.optim, work.range_steps), work.rows_per_step):
        seen.append(step)
        if has_diverged(seen):
            break
    formula = formula_rate(facts)
    rates, why = candidates_after(seen, formula)
    say(why)
    measured = (clock() - range_began) / len(seen) / (work.rows_per_step * (1 + FORWARD_SHARE))
    speed = replace(speed, row_s=measured, eval_example_s=speed.eval_example_s * measured / speed.row_s)
    work = with_steps(left() + speed.eval_example_s * work.eval_examples, speed, run, work)
    remarks = [why]

    results: dict[float, ExampleLosses | None] = {}

    def judge(rate: float) -> None:
        results[rate] = _train_and_judge(trials, shortened(plan, work.steps, rate), work.rows_per_step, eval_data)
        say(f"{rate:.1e}: eval loss {_loss(results[rate]):.4f} after {work.steps} steps")

    for number, rate in enumerate(rates):
        trial_began = clock()
        judge(rate)
        if number + 1 < len(rates) and left() < clock() - trial_began:
            remarks.append(f"no time was left for {', '.join(f'{each:.1e}' for each in rates[number + 1 :])}")
            break
    share = work.steps * work.rows_per_step / (run.steps * run.rows_per_step)
    more = one_more(compared(results)) if len(results) == len(rates) else None
    if more is not None and more > rates[0] and share < LEAST_SHARE:
        more = None  # it would not be taken
    if more is not None and left() > clock() - trial_began:
        remarks.append(f"the best of three was at the edge, so {more:.1e} was tried too")
        judge(more)
    elif more is not None:
        remarks.append(
            "the best candidate is at the edge, and no time is left to look beyond; fix: a larger --budget-minutes"
        )
    taken, remark = take(compared(results), share, rates[0])
    if remark is not None:
        remarks.append(remark)
    if share < LEAST_SHARE:
        enough = replace(work, steps=math.ceil(LEAST_SHARE * run.steps), rows_per_step=run.rows_per_step)
        remarks.append(
            f"a candidate saw {share:.0%} of the run's examples, which says little; fix: --budget-minutes "
            f"{math.ceil((budget_s - left() - speed.seconds(work) + speed.seconds(enough)) / 60)}"
        )
    if taken.eval_loss >= before.loss:
        remarks.append("no candidate lowers the eval loss: the rows do not teach what the eval set asks")
    return RateSearch(
        rate=taken.rate,
        candidates=tuple(compared(results)),
        range_steps=tuple(seen),
        loss_before=before.loss,
        asked=facts.config.train.peak_learning_rate,
        formula=formula,
        work=work,
        run=run,
        remarks=tuple(remarks),
        seconds=clock() - began,
    )


def formula_rate(facts: Facts) -> float:
    """What `train.learning_rate=auto` gives for this run."""
    model = facts.model
    return suggested_rate(facts.config, model.model_type, model.hidden_size, facts.plan.total_optimizer_steps).value


def first_examples(data: EncodedFile, number: int, seed: int) -> EncodedFile:
    """So many examples, chosen by the seed; all, where there are no more."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.lengths))[:number])
    return some(data, chosen)


def _train_and_judge(
    trials: Trials, rates: list[float], rows_per_step: int, eval_data: EncodedFile
) -> ExampleLosses | None:
    """The loss of each eval example after training; None where the training did not survive."""
    for result in trials.train(rates, rows_per_step):
        if not math.isfinite(result.loss):
            return None
    _, losses = trials.evaluate(eval_data)
    return losses


def _loss(losses: ExampleLosses | None) -> float:
    if losses is None or not np.isfinite(losses.loss_sums).all():
        return math.inf
    return float(losses.loss_sums.sum() / losses.num_tokens.sum())


def compared(results: dict[float, ExampleLosses | None]) -> list[Candidate]:
    """The candidates by rate, each with its distance from the best one, paired over the eval examples."""
    best = results[min(results, key=lambda rate: _loss(results[rate]))]
    candidates = []
    for rate, losses in sorted(results.items()):
        if losses is None or best is None or not math.isfinite(_loss(losses)):
            candidates.append(Candidate(rate, math.inf, math.inf))
        elif losses is best:
            candidates.append(Candidate(rate, _loss(losses)))
        else:
            difference = compare_examples(best.means(), losses.means(), losses.num_tokens)
            candidates.append(Candidate(rate, _loss(losses), difference.change, difference.standard_error))
    return candidates
