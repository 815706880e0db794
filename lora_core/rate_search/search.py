"""A learning rate for the user's own rows: a range test, then candidates that the eval set decides between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_core.errors import ConfigError, TrainingError
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
    plan = facts.plan
    run = Work(plan.rows_per_optimizer_step, plan.total_optimizer_steps, len(facts.eval_data.lengths))
    say(f"loading {facts.config.model.name_or_path} ...")
    trials = Trials(facts)
    speed = _measure(trials, facts, facts.eval_data, run, clock)
    used = clock() - began
    work = allot(budget_s - used, speed, run, used)
    say(f"in {budget_s / 60:g} min: {work}\n       (the run: {run.steps} steps, {run.rows_per_step} examples a step)")
    eval_data = first_examples(facts.eval_data, work.eval_examples, facts.config.train.seed)
    search = _Search(trials, facts, run, work, speed, eval_data, say, clock, ends=began + budget_s)
    trials.put_back()
    before, _ = trials.evaluate(eval_data)
    say(f"eval loss before: {before.loss:.4f}")
    range_steps = search.range_test()
    formula = formula_rate(facts)
    rates, why = candidates_after(range_steps, formula)
    search.remark(why)
    search.judge_all(rates)
    taken = search.take(rates[0])
    if taken.eval_loss >= before.loss:
        search.remark("no candidate lowers the eval loss: the rows do not teach what the eval set asks")
    return RateSearch(
        rate=taken.rate,
        candidates=tuple(compared(search.results)),
        range_steps=tuple(range_steps),
        loss_before=before.loss,
        asked=facts.config.train.peak_learning_rate,
        formula=formula,
        work=search.work,
        run=run,
        remarks=tuple(search.remarks),
        seconds=clock() - began,
    )


def _measure(trials: Trials, facts: Facts, eval_data: EncodedFile, run: Work, clock: Callable[[], float]) -> Speed:
    token_s = trials.seconds_per_token(run.rows_per_step, clock)
    eval_token_s = FORWARD_SHARE * token_s
    return Speed(
        token_s * float(facts.train_data.lengths.mean()),
        eval_token_s * float(eval_data.lengths.mean()),
    )


@dataclass
class _Search:
    """A search at work."""

    trials: Trials
    facts: Facts
    run: Work
    work: Work
    speed: Speed
    eval_data: EncodedFile
    """Or as much of it as there is time for."""
    say: Callable[[str], None]
    clock: Callable[[], float]
    ends: float
    """When the time is over, by the clock."""
    results: dict[float, ExampleLosses | None] = field(default_factory=dict)
    """Of each candidate that was trained: the losses of the eval examples; None where it did not survive."""
    remarks: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - self.clock()

    @property
    def share(self) -> float:
        """Of the examples that the run trains on, those that a candidate is."""
        return self.work.steps * self.work.rows_per_step / (self.run.steps * self.run.rows_per_step)

    def remark(self, line: str) -> None:
        self.say(line)
        self.remarks.append(line)

    def range_test(self) -> list[RangeStep]:
        """Its steps; and as many steps for the candidates as the time that it left allows."""
        began = self.clock()
        rates = range_rates(self.facts.config.train.optim, self.work.range_steps)
        seen: list[RangeStep] = []
        for step in self.trials.range_test(rates, self.work.rows_per_step):
            seen.append(step)
            if has_diverged(seen):
                break
        row_s = (self.clock() - began) / len(seen) / (self.work.rows_per_step * (1 + FORWARD_SHARE))
        self.speed = Speed(row_s, self.speed.eval_example_s * row_s / self.speed.row_s)
        # An evaluation is over already.
        left = self.left + self.speed.eval_example_s * self.work.eval_examples
        self.work = with_steps(left, self.speed, self.run, self.work)
        return seen

    def judge_all(self, rates: list[float]) -> None:
        """Train with each, as long as there is time for one more; then beyond the edge, where the best is there."""
        trial_s = 0.0
        for number, rate in enumerate(rates):
            if self.left < trial_s:
                self.remark(f"no time was left for {', '.join(f'{each:.1e}' for each in rates[number:])}")
                return
            began = self.clock()
            self.judge(rate)
            trial_s = self.clock() - began
        more = one_more(compared(self.results))
        if more is None or (more > rates[0] and self.share < LEAST_SHARE):  # so high a rate would not be taken
            return
        if self.left < trial_s:
            self.remark("the best candidate is at the edge, and no time is left to look beyond; fix: --budget-minutes")
            return
        self.remark(f"the best of three is at the edge, so {more:.1e} is tried too")
        self.judge(more)

    def judge(self, rate: float) -> None:
        """Train a candidate, and measure it on the eval set."""
        rates = shortened(self.facts.plan, self.work.steps, rate)
        steps = self.trials.train(rates, self.work.rows_per_step)
        survived = all(math.isfinite(result.loss) for result in steps)
        self.results[rate] = self.trials.evaluate(self.eval_data)[1] if survived else None
        self.say(f"{rate:.1e}: eval loss {_loss(self.results[rate]):.4f} after {self.work.steps} steps")

    def take(self, middle: float) -> Candidate:
        """The answer.

        Raises:
            TrainingError: no candidate survived.
        """
        candidates = compared(self.results)
        if not any(math.isfinite(candidate.eval_loss) for candidate in candidates):
            rates = ", ".join(f"{candidate.rate:.1e}" for candidate in candidates)
            raise TrainingError(f"every candidate diverged: {rates}; fix: model.dtype=float32, or other rows")
        taken, line = take(candidates, self.share, middle)
        if line is not None:
            self.remark(line)
        if self.share < LEAST_SHARE:
            enough = replace(self.work, steps=math.ceil(LEAST_SHARE * self.run.steps))
            enough = replace(enough, rows_per_step=self.run.rows_per_step)
            self.remark(
                f"a candidate saw {self.share:.0%} of the run's examples, which says little; fix: --budget-minutes "
                f"{math.ceil(1.2 * self.speed.seconds(enough) / 60) + 1}"
            )
        return taken


def formula_rate(facts: Facts) -> float:
    """What `train.learning_rate=auto` gives for this run."""
    model = facts.model
    return suggested_rate(facts.config, model.model_type, model.hidden_size, facts.plan.total_optimizer_steps).value


def first_examples(data: EncodedFile, number: int, seed: int) -> EncodedFile:
    """So many examples, chosen by the seed; all, where there are no more."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.lengths))[:number])
    return some(data, chosen)


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
