"""What a sweep tries, for how many steps, and whether there is time: plain arithmetic, no training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.config import PRESETS, TrainConfig
from tunewright.core.errors import UserError

RATES = 3
_STEP = math.sqrt(10)
"""Between neighbouring rates: three of them then span a factor of ten."""


@dataclass(frozen=True)
class Trial:
    """One way to train that a sweep tries."""

    name: str
    """Preset and rate, such as all-linear-0.0013."""
    train: TrainConfig


def fitting_rate(hidden_size: int) -> float:
    """Return the learning rate that suits LoRA on a Llama of this width: 5e-5 x 10 x (2000 / width) ^ 0.781.

    The fit of Schulman et al. 2025, "LoRA Without Regret", with the constants of Tinker's documentation ("SL
    hyperparameters"): LoRA wants ten times the rate of full fine-tuning, nearly whatever its rank, and narrow models
    want more than wide ones. 2.9e-4 for Llama 3.1 8B, 1.3e-3 for a width of 576.
    """
    return 5e-5 * 10 * math.pow(2000 / hidden_size, 0.781)


def default_rates(own: float, hidden_size: int) -> tuple[float, ...]:
    """Three rates a factor of the square root of 10 apart around the fitting one, of which one is the config's own.

    It takes the place of the one it is nearest to, so that what the config says now is always tried too. Others are
    rounded to two digits.
    """
    centre = fitting_rate(hidden_size)
    rates = [float(f"{centre * _STEP**place:.2g}") for place in (-1, 0, 1)]
    nearest = min(range(RATES), key=lambda place: abs(math.log(rates[place] / own)))
    rates[nearest] = own
    return tuple(sorted(rate for rate in rates if rate <= 1))


def make_trials(own: TrainConfig, rates: Sequence[float]) -> list[Trial]:
    """Each preset with each rate, most promising first, as far as that is known: what the budget leaves out is last.

    The config itself comes first, where it is one of them; then all linear layers (attention alone loses even with as
    many parameters: LoRA Without Regret), and rates from the middle outwards.

    Args:
        own: the config's train section; all but preset, targets and rate is taken from it.
        rates: at least one, all different.

    Raises:
        UserError: a rate that is none, or is there twice.
    """
    for rate in rates:
        if not 0 < rate <= 1 or not math.isfinite(rate):
            raise UserError(f"{rate:g} is no learning rate", where="--rate", fix="It is above 0 and at most 1.")
    if len(set(rates)) < len(rates):
        raise UserError("a rate is given twice", where="--rate")
    ordered = sorted(rates)
    middle = (len(ordered) - 1) / 2
    outwards = sorted(ordered, key=lambda rate: (abs(ordered.index(rate) - middle), rate))
    trials = [_trial(own, preset, rate) for preset in ("all-linear", "classic") for rate in outwards]
    return sorted(trials, key=lambda trial: trial.train != own)


def _trial(own: TrainConfig, preset: str, rate: float) -> Trial:
    changed = own.model_copy(
        update={"preset": preset, "target_modules": PRESETS[preset]["target_modules"], "learning_rate": rate},
    )
    return Trial(f"{preset}-{rate:g}", changed)


def survivors(trials: int) -> int:
    """Return how many of so many go on: the better half, rounded down, and at least one."""
    return max(trials // 2, 1)


@dataclass(frozen=True)
class Pace:
    """How long training takes, in seconds, as measured."""

    step: float
    """An optimizer step of the slowest kind of trial."""
    rung: float
    """What a rung costs besides its steps: loading the base, measuring on dev."""


@dataclass(frozen=True)
class Schedule:
    """When trials are compared, and what that takes."""

    rungs: tuple[int, ...]
    """Steps that a trial has behind it when it is compared; the last is the whole run."""
    evaluated: tuple[int, ...] = ()
    """Steps after which a run measures on dev by itself."""

    def seconds(self, trials: int, rung: int, pace: Pace) -> float:
        """What it takes to bring so many trials through this rung (from 0) and their better halves through the rest."""
        total = 0.0
        for number in range(rung, len(self.rungs)):
            total += trials * self._one(number, (0, *self.rungs)[number], pace)
            trials = survivors(trials)
        return total

    def seconds_with_one_more(self, through: int, rung: int, behind: int, pace: Pace) -> float:
        """Return what is still to be spent if one more trial goes through this rung, beside those that have.

        Args:
            through: trials that are through it already.
            rung: from 0.
            behind: steps that the next trial has behind it.
            pace: as measured.
        """
        return self._one(rung, behind, pace) + self.seconds(survivors(through + 1), rung + 1, pace)

    def _one(self, rung: int, behind: int, pace: Pace) -> float:
        """Return one trial's way through one rung."""
        end = self.rungs[rung]
        by_itself = sum(behind < step < end for step in self.evaluated)
        return (end - behind) * pace.step + (1 + by_itself) * pace.rung


def halving_schedule(trials: int, steps: int, evaluate_every: int) -> Schedule:
    """Rungs so many as it takes to halve ``trials`` down to one, each at half the steps of the next.

    Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943, figure 1): six trials are compared after a quarter
    of the steps, three after a half, and one goes on to the end. Runs of very few steps have fewer rungs.
    """
    halvings = int(math.log2(trials))
    rungs = sorted({math.ceil(steps / 2**left) for left in range(halvings + 1)})
    return Schedule(tuple(rungs), tuple(range(evaluate_every, steps, evaluate_every)))
