"""Successive halving within a time budget: trials, rungs, and which trial trains next, advances or is left out."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

from tunewright.config import PRESETS, TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter, duration
from tunewright.training.monitoring import DivergedError
from tunewright.training.sweep.ledger import Entry, Event, Ledger, measured_text

RATES = 3
_STEP = math.sqrt(10)
"""Factor between neighbouring rates: three of them span a factor of ten."""


@dataclass(frozen=True)
class Trial:
    """One combination of settings that a sweep tries."""

    name: str
    """Preset and rate, such as all-linear-0.0013."""
    train: TrainConfig


def suggested_rate(hidden_size: int) -> float:
    """Return the learning rate that suits LoRA on a Llama of this width: 5e-5 x 10 x (2000 / width) ^ 0.781.

    The fit of Schulman et al. 2025, "LoRA Without Regret", with the constants of Tinker's documentation ("SL
    hyperparameters"). LoRA needs ten times the rate of full fine-tuning, nearly independent of its rank, and narrow
    models need a higher rate than wide models. It gives 2.9e-4 for Llama 3.1 8B, and 1.3e-3 for a width of 576.
    """
    return 5e-5 * 10 * math.pow(2000 / hidden_size, 0.781)


def default_rates(own: float, hidden_size: int) -> tuple[float, ...]:
    """Return three rates, a factor of sqrt(10) apart around the suggested rate, one of which is the config's own rate.

    The config's rate replaces the nearest one, so that the current config is always tried too. The
    others are rounded to two digits.
    """
    centre = suggested_rate(hidden_size)
    rates = [float(f"{centre * _STEP**place:.2g}") for place in (-1, 0, 1)]
    nearest = min(range(RATES), key=lambda place: abs(math.log(rates[place] / own)))
    rates[nearest] = own
    return tuple(sorted(rate for rate in rates if rate <= 1))


def make_trials(own: TrainConfig, rates: Sequence[float]) -> list[Trial]:
    """Return each preset with each rate, the most promising first: a small budget leaves out the last trials.

    The config's own combination comes first if it is one of them. Then all linear layers (attention alone loses even
    with as many parameters: LoRA Without Regret), and rates from the middle outwards.

    All but preset, targets and rate is taken from ``own``, the config's train section.
    """
    for rate in rates:
        if not 0 < rate <= 1 or not math.isfinite(rate):
            raise UserError(f"A learning rate must be above 0 and at most 1 (got {rate:g})", where="--rate")
    if len(set(rates)) < len(rates):
        raise UserError("A learning rate is given twice", where="--rate", fix="Give each rate once.")
    ordered = sorted(rates)
    middle = (len(ordered) - 1) / 2
    outwards = sorted(ordered, key=lambda rate: (abs(ordered.index(rate) - middle), rate))
    trials = []
    for preset in ("all-linear", "classic"):
        targets = PRESETS[preset]["target_modules"]
        for rate in outwards:
            changed = {"preset": preset, "target_modules": targets, "learning_rate": rate}
            trials.append(Trial(f"{preset}-{rate:g}", own.model_copy(update=changed)))
    return sorted(trials, key=lambda trial: trial.train != own)


def advancing_trials(trials: int) -> int:
    """Return the number of trials that advance: the better half, rounded down, and at least one."""
    return max(trials // 2, 1)


def halving_rungs(trials: int, steps: int) -> tuple[int, ...]:
    """Return the steps at which trials are compared, each half of the next: as many as leave one trial.

    Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943, figure 1): six trials are compared after a quarter
    of the steps, three after a half, and one trains to the end. Runs of very few steps have fewer rungs.
    """
    halvings = int(math.log2(trials))
    return tuple(sorted({math.ceil(steps / 2**left) for left in range(halvings + 1)}))


@dataclass(frozen=True)
class Progress:
    """A trial's results after it was trained up to a step."""

    steps: int
    """Steps made just now."""
    training_seconds: float
    """Time spent on these steps: for the ledger; the budget counts `Outcome.seconds`."""
    dev_loss: float
    dev_metric: float | None


@dataclass(frozen=True)
class Outcome:
    """The result of a trial that was trained up to a step."""

    result: Progress | DivergedError
    seconds: float
    """Time spent on the trial, including loading and evaluation."""


Train = Callable[[Sequence[Trial], int], Generator[Outcome, None, None]]
"""Trains trials up to a step and evaluates dev, and yields each one's outcome in order, on demand
or earlier. It raises KeyboardInterrupt once the state is saved."""


class SuccessiveHalving:
    """One sweep of trials, the most promising first. The ledger records every result; recorded work is not repeated.

    ``rungs`` are a trial's total steps at each comparison; the last is the full run. ``budget`` is
    seconds for the whole sweep, including the time in the ledger (None: unlimited).
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        rungs: tuple[int, ...],
        ledger: Ledger,
        train: Train,
        budget: float | None,
        reporter: Reporter,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = 1,
    ) -> None:
        self.trials = trials
        self.rungs = rungs
        self.ledger = ledger
        self.train = train
        self.budget = budget
        self.reporter = reporter
        self.clock = clock
        self.at_once = at_once
        self._estimate_reported = False

    def run(self) -> Trial | None:
        """Run all rungs; return the winner, trained to its end, or None if the budget or every trial ended before."""
        alive = list(self.trials)
        for rung, step in enumerate(self.rungs):
            self.reporter.say(
                f"Rung {rung + 1} of {len(self.rungs)}, to step {step:,} of {self.rungs[-1]:,}: "
                f"{len(alive)} trial{'' if len(alive) == 1 else 's'}"
            )
            through = self._run_rung(alive, rung)
            if not any(entry.event != "diverged" for entry in through.values()):
                return None
            alive = self._advancing(alive, through, rung)
        return alive[0]

    def _run_rung(self, alive: Sequence[Trial], rung: int) -> dict[str, Entry]:
        """Return this rung's results: results in the ledger, and results of trials that the budget allows."""
        through = {t.name: e for t in alive if (e := self.ledger.result(t.name, rung + 1)) is not None}
        waiting = [trial for trial in alive if trial.name not in through]
        while waiting:
            self._report_estimate()
            started = self._fitting(waiting, len(through), rung)
            if not started:
                self._leave_out(waiting, rung)
                break
            with closing(self.train(started, self.rungs[rung])) as outcomes:
                for trial in started:
                    through[trial.name] = self._train_trial(trial, rung, outcomes)
            waiting = [trial for trial in waiting if trial.name not in through]
        return through

    def _fitting(self, waiting: Sequence[Trial], through: int, rung: int) -> Sequence[Trial]:
        """Return the trials to start now: without a budget all of them, else as many as fit into it and train together.

        The budget counts the time of all trials, as if they were trained one after the other. Until a trial has passed
        its first rung, which shows how long a step takes, one trial starts at a time while any of the budget is left.
        """
        pace = self._pace()
        if self.budget is None:
            return waiting
        if pace is None:
            # One of the slowest kind: at the pace of a faster kind, trials would start that cannot finish.
            slowest = max(waiting, key=lambda trial: len(trial.train.target_modules))
            return [slowest] if self.ledger.seconds < self.budget else []
        started: list[Trial] = []
        steps, left = 0, (self.budget - self.ledger.seconds) / pace
        for trial in waiting[: self.at_once]:
            steps += self.rungs[rung] - min(self.ledger.steps_of(trial.name), self.rungs[rung])
            # A trial starts only if the better half of the trials that then finish the rung can still reach the end.
            if steps + self._steps(advancing_trials(through + len(started) + 1), rung + 1) > left:
                break
            started.append(trial)
        return started

    def _train_trial(self, trial: Trial, rung: int, outcomes: Generator[Outcome, None, None]) -> Entry:
        """Train a trial through one rung and record its result."""
        step, number = self.rungs[rung], rung + 1
        self._report_estimate()
        self.reporter.say(f"{trial.name}, rung {number}")
        began = self.clock()
        try:
            outcome = next(outcomes)
        except KeyboardInterrupt:
            self.ledger.add("stopped", trial.name, number, step, seconds=round(self.clock() - began, 3))
            raise
        result, seconds = outcome.result, round(outcome.seconds, 3)
        if isinstance(result, DivergedError):
            why = result.what.split("; ")[0]  # without the step's rows: all trials have the same rows
            self.reporter.warn(f"{trial.name} is out: {why}")
            return self.ledger.add("diverged", trial.name, number, step, seconds=seconds, why=why)
        entry = self.ledger.add(
            "finished" if number == len(self.rungs) else "measured",
            trial.name,
            number,
            step,
            seconds=seconds,
            steps=result.steps,
            training_seconds=round(result.training_seconds, 3),
            dev_loss=result.dev_loss,
            dev_metric=result.dev_metric,
        )
        self.reporter.say(f"{trial.name}, rung {number}: {measured_text(entry, self.ledger.head.metric)}")
        return entry

    def _advancing(self, alive: Sequence[Trial], through: dict[str, Entry], rung: int) -> list[Trial]:
        """Return the trials that advance; for the last rung, the winner."""
        last = rung + 1 == len(self.rungs)
        measured = [t for t in alive if t.name in through and through[t.name].event != "diverged"]
        # A stable sort: among equal trials the more promising comes first.
        ranked = sorted(measured, key=lambda t: through[t.name].rank, reverse=True)
        keep = 1 if last else advancing_trials(len(through))
        for place, trial in enumerate(ranked):
            event: Event = "out" if place >= keep else "winner" if last else "promoted"
            self.ledger.decide(event, trial.name, rung + 1, self.rungs[rung])
        return ranked[:keep]

    # Time

    def _pace(self) -> float | None:
        """Return the seconds of a step so far of the slowest kind of trial; None before the first result.

        It counts loading and evaluation. Early rungs do both after fewer steps than later ones, so it
        errs on the high side. Rung 0, five steps that an older version timed, would make it far too high.
        """
        kinds = {t.name: len(t.train.target_modules) for t in self.trials}
        spent: dict[int, list[Entry]] = defaultdict(list)
        for entry in self.ledger.entries:
            if entry.steps and entry.rung:
                spent[kinds[entry.trial]].append(entry)
        return max((sum(e.seconds for e in own) / sum(e.steps for e in own) for own in spent.values()), default=None)

    def _steps(self, trials: int, rung: int) -> int:
        """Return the steps of ``trials`` trials through this rung (from 0), and of the better halves to the end."""
        total = 0
        for begin, end in pairwise((0, *self.rungs)[rung:]):
            total += trials * (end - begin)
            trials = advancing_trials(trials)
        return total

    def _leave_out(self, trials: Sequence[Trial], rung: int) -> None:
        pace = self._pace()
        assert self.budget is not None
        begun = [made for trial in self.trials if (made := self.ledger.steps_of(trial.name))]
        left = self.rungs[-1] - sum(begun)
        if pace is not None and rung == 0 and len(begun) <= 1 and left > 0:
            needed = self.ledger.seconds + pace * left
            if needed > self.budget:
                raise UserError(
                    f"The budget of {duration(self.budget)} is too small for a single trial, which takes about "
                    f"{duration(needed)} in total",
                    where="--minutes",
                    fix=f"Use at least --minutes {needed / 60 + 0.5:.0f}. Finished steps count.",
                )
        names = ", ".join(trial.name for trial in trials)
        why = f"no time left in {duration(self.budget)}"
        for trial in trials:
            self.ledger.decide("left out", trial.name, rung + 1, self.rungs[rung], why)
        self.reporter.warn(f"Left out of rung {rung + 1}, {why}: {names}. A larger --minutes resumes from here.")

    def _report_estimate(self) -> None:
        """Report, once the pace is known, how long the sweep takes and how many trials the budget allows."""
        pace, trials = self._pace(), len(self.trials)
        if pace is None or self._estimate_reported:
            return
        self._estimate_reported = True
        estimate = f"{trials} trials take about {duration(pace * self._steps(trials, 0))} in total"
        estimate += f", {self.at_once} at a time" if self.at_once > 1 else ""
        if self.budget is None:
            self.reporter.say(f"{estimate}.")
            return
        count = max((k for k in range(1, trials + 1) if pace * self._steps(k, 0) <= self.budget), default=0)
        allowed = "all of them" if count == trials else f"{count} of them"
        self.reporter.say(f"{estimate}. The budget of {duration(self.budget)} is enough for {allowed}.")
