"""The search space of a sweep: trials, rungs and their estimated time. Plain arithmetic, no training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.config import PRESETS, TrainConfig
from tunewright.core.errors import UserError

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
    models need more than wide ones. It gives 2.9e-4 for Llama 3.1 8B, and 1.3e-3 for a width of 576.
    """
    return 5e-5 * 10 * math.pow(2000 / hidden_size, 0.781)


def default_rates(own: float, hidden_size: int) -> tuple[float, ...]:
    """Return three rates, a factor of sqrt(10) apart around the suggested rate, of which one is the config's own.

    The config's rate replaces the nearest one, so that the current config is always tried too. The others are rounded
    to two digits.
    """
    centre = suggested_rate(hidden_size)
    rates = [float(f"{centre * _STEP**place:.2g}") for place in (-1, 0, 1)]
    nearest = min(range(RATES), key=lambda place: abs(math.log(rates[place] / own)))
    rates[nearest] = own
    return tuple(sorted(rate for rate in rates if rate <= 1))


def make_trials(own: TrainConfig, rates: Sequence[float]) -> list[Trial]:
    """Return each preset with each rate, the most promising first: a small budget leaves out the last ones.

    The config's own combination comes first if it is one of them. Then all linear layers (attention alone loses even
    with as many parameters: LoRA Without Regret), and rates from the middle outwards.

    Args:
        own: the config's train section; all but preset, targets and rate is taken from it.
        rates: at least one, all different.

    Raises:
        UserError: an invalid or repeated rate.
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


@dataclass(frozen=True)
class TrainingSpeed:
    """Measured training time in seconds."""

    step: float
    """Seconds of an optimizer step of the slowest kind of trial."""
    rung: float
    """Seconds of a rung besides its steps: loading the base, evaluating dev."""


@dataclass(frozen=True)
class Schedule:
    """The steps at which trials are compared, and their estimated time."""

    rungs: tuple[int, ...]
    """Total steps of a trial at each comparison; the last is the full run."""
    evaluated: tuple[int, ...] = ()
    """Steps after which a run evaluates dev in any case."""

    def seconds(self, trials: int, rung: int, pace: TrainingSpeed) -> float:
        """Return the time to finish this rung (from 0) with ``trials`` trials, and the rest with the better halves."""
        total = 0.0
        for number in range(rung, len(self.rungs)):
            total += trials * self.seconds_of_one(number, (0, *self.rungs)[number], pace)
            trials = advancing_trials(trials)
        return total

    def seconds_with_one_more(self, through: int, rung: int, behind: int, pace: TrainingSpeed) -> float:
        """Return the remaining time if one more trial goes through this rung, besides those that have.

        Args:
            through: trials that have finished this rung.
            rung: from 0.
            behind: steps that the next trial has made already.
            pace: the measured pace.
        """
        return self.seconds_of_one(rung, behind, pace) + self.seconds(advancing_trials(through + 1), rung + 1, pace)

    def seconds_of_one(self, rung: int, behind: int, pace: TrainingSpeed) -> float:
        """Return the time of one trial through one rung."""
        end = self.rungs[rung]
        by_itself = sum(behind < step < end for step in self.evaluated)
        return (end - behind) * pace.step + (1 + by_itself) * pace.rung


def halving_schedule(trials: int, steps: int, evaluate_every: int) -> Schedule:
    """Return as many rungs as halving ``trials`` down to one takes, each at half the steps of the next.

    Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943, figure 1): six trials are compared after a quarter
    of the steps, three after a half, and one trains to the end. Runs of very few steps have fewer rungs.
    """
    halvings = int(math.log2(trials))
    rungs = sorted({math.ceil(steps / 2**left) for left in range(halvings + 1)})
    return Schedule(tuple(rungs), tuple(range(evaluate_every, steps, evaluate_every)))
