"""Confidence sequences: bounds of a mean difference that hold at every look together, so that anyone may stop early.

An interval for a fixed number of items fails more and more often if it is computed after each item. The bounds here
cover the true running mean at all looks at once with probability 1 - alpha. The running mean is the average, over the
units so far, of each unit's expected difference given the past. So the mean may drift with the traffic.

Let S be the sum of the values so far and V the sum of their squares. Both sequences bound S minus its expectation by
a boundary u(V), at each end with half of alpha:

- empirical-Bernstein: the gamma-exponential mixture of Howard, Ramdas, McAuliffe and Sekhon (2021, "Time-uniform,
  nonparametric, nonasymptotic confidence sequences", theorem 4 and proposition 9), valid for any bounded values. The
  theorem centres the squares at predictions; 0 is the prediction here. Most paired differences are 0, so V hardly
  grows by it, and values in [-1, 1] get the scale 1 instead of 2. The bets of Waudby-Smith and Ramdas (2024) are
  narrower for a constant mean, but they estimate a weighted mean if it drifts.
- asymptotic: the one-sided Gaussian mixture of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024, "Time-uniform
  central limit theory and asymptotic confidence sequences"). Its V is centred at the running mean.

The first looks use the empirical-Bernstein bounds, those from `FEWEST_UNITS` units and `FEWEST_LABELS` labels on the
asymptotic bounds. The first boundary is the wider one at every V. So a look that crosses it also crosses the second
boundary, and the change of boundary costs no second alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammainc, gammaln

from tunewright.evidence.common import Outcome
from tunewright.evidence.statistics import Floats, Integers

ALPHA = 0.05
FEWEST_UNITS = 100
"""The first look with asymptotic bounds."""
FEWEST_LABELS = 10
"""Labels by people that asymptotic bounds need: before, V says little of rare large values."""
TIGHTEST_AT = 50.0
"""The sum of squares at which the bounds are tightest: about 50 answers of which exactly one arm's is right.

It changes widths by a few percent and must be chosen before the first look.
"""


@dataclass(frozen=True)
class ConfidenceSequence:
    """A running mean and its bounds at every look; the last axis of each array is the looks."""

    means: Floats
    low: Floats
    high: Floats

    def outcome(self, look: int, margin: float) -> Outcome:
        """Return the statement that holds at a look; all statements at all looks are true together."""
        low, high = float(self.low[look]), float(self.high[look])
        if high < 0:
            return "worse"
        if low > 0:
            return "better"
        return "not worse" if low > -margin else "can't tell"


def confidence_sequence(
    values: Floats,
    *,
    largest: float = 1.0,
    labels: Integers | None = None,
    alpha: float = ALPHA,
    tightest_at: float = TIGHTEST_AT,
) -> ConfidenceSequence:
    """Return the running mean of units' differences with bounds at every unit.

    Args:
        values: one difference for each unit, in the order in which the units began; [..., units].
        largest: the bound of a value's size, known before the first look; see `largest_difference`.
        labels: the labels by people up to each unit; [..., units]. None: one for each difference that is not 0.
        alpha: probability that a bound at any look is wrong, both ends together.
        tightest_at: the sum of squares at which the bounds are tightest.
    """
    looks = np.arange(1, values.shape[-1] + 1)
    sums = np.cumsum(values, axis=-1)
    squares = np.cumsum(np.square(values), axis=-1)
    labels = np.cumsum(values != 0, axis=-1) if labels is None else labels
    few = (looks < FEWEST_UNITS) | (labels < FEWEST_LABELS)
    radius = np.empty_like(sums)
    radius[few] = empirical_bernstein_boundary(squares[few], alpha / 2, largest, tightest_at)
    radius[~few] = asymptotic_boundary((squares - np.square(sums) / looks)[~few], alpha / 2, tightest_at)
    # A mean of values within ±largest lies within ±largest.
    low, high = np.maximum((sums - radius) / looks, -largest), np.minimum((sums + radius) / looks, largest)
    return ConfidenceSequence(sums / looks, low, high)


def asymptotic_boundary(variance: Floats, alpha: float, tightest_at: float = TIGHTEST_AT) -> Floats:
    """Return the one-sided boundary of a sum with this variance, for values that are nearly normal in sum."""
    rho = _rho(tightest_at, alpha)
    total = variance + rho
    boundary: Floats = np.sqrt(2 * total * np.log1p(np.sqrt(total / rho) / (2 * alpha)))
    return boundary


def empirical_bernstein_boundary(
    squares: Floats, alpha: float, largest: float = 1.0, tightest_at: float = TIGHTEST_AT
) -> Floats:
    """Return the one-sided boundary of a sum of values within ±``largest`` whose squares have this sum.

    It solves log m(s, v) = log(1 / alpha) for s, where m is the gamma mixture over 0 <= x < 1 of
    exp(x s - (-log(1 - x) - x) v). log m is convex and increasing in s. So Newton's steps from the right never pass
    below the root, and the boundary is valid after any number of steps.
    """
    found, places = np.unique(squares / largest**2, return_inverse=True)
    rho = _rho(tightest_at / largest**2, alpha)
    shape = found + rho
    constant = rho * np.log(rho) - rho - gammaln(rho) - np.log(gammainc(rho, rho)) + np.log(alpha)
    # 2 u + 4 log(1 / alpha), where u is the normal boundary, lies to the right of the root.
    at = 2 * asymptotic_boundary(found, alpha, tightest_at / largest**2) - 4 * np.log(alpha)
    for _ in range(12):
        x = at + shape
        share = gammainc(shape, x)
        value = constant + gammaln(shape) + np.log(share) - shape * np.log(x) + x
        density = np.exp((shape - 1) * np.log(x) - x - gammaln(shape))
        at = at - value / (density / share - shape / x + 1)
    boundary: Floats = largest * at[places].reshape(squares.shape)
    return boundary


def _rho(tightest_at: float, alpha: float) -> float:
    """Return the mixture's parameter that makes the boundary tightest at this variance (Howard et al., section 3.5)."""
    log_term = -2 * np.log(2 * alpha)
    return float(tightest_at / (log_term + np.log1p(log_term)))


def unit_differences(
    units: Sequence[str] | Integers,
    human: Floats,
    judge: Floats | None = None,
    labelled: Floats | float = 1.0,
    sampled: Floats | float = 1.0,
) -> Floats:
    """Return the mean difference of each unit's answers, in the order of the units' first answers.

    A unit counts once, by the mean of its answers: requests of one person are alike, so each of them is no new
    evidence. The mean stays within ±1 however many requests there are, which the empirical-Bernstein bounds need, and
    one busy person cannot decide. A unit must be complete before it enters a sequence.

    Each answer's difference is x = w j + (h - w j) / p if a person labelled it, and w j otherwise. Its expectation is
    the person's h whatever the judge's j is worth, because p is known (prediction-powered inference, Angelopoulos et
    al. 2023). The weight w minimises the variance if it is E[h j] / E[j j]. It is estimated from the units before, so
    that a unit's value has the right expectation given the past.

    Args:
        units: the unit of each answer, in the order of time.
        human: candidate minus live by a person, from -1 to 1; 0 for equal answers and NaN without a label; [answers].
        judge: the same by a judge; 0 for equal answers; [answers].
        labelled: probability with which the answer was sent to a person; 1 for equal answers.
        sampled: probability with which the request was sent to the shadow. With one probability for all requests,
            leave it at 1 and pass the sampled requests. Otherwise pass the other requests as well, with NaN and 0.
    """
    _, first, codes = np.unique(np.asarray(units), return_index=True, return_inverse=True)
    codes = np.argsort(np.argsort(first))[codes]
    judged: Floats = np.zeros_like(human) if judge is None else judge
    known = ~np.isnan(human)
    label = np.where(known, human, 0.0)

    def before(values: Floats) -> Floats:
        """Return the sum over all units before each unit."""
        sums = np.bincount(codes, values).astype(np.float64)
        return np.cumsum(sums) - sums

    # The 1 makes the weight begin at 0: a judge counts as far as people's labels have confirmed it.
    weight = np.clip(before(known * label * judged / labelled) / (1 + before(judged**2)), 0, 1)[codes] * judged
    corrected = (weight + known * (label - weight) / labelled) / sampled
    means: Floats = np.bincount(codes, corrected) / np.bincount(codes)
    return means


def largest_difference(labelled: float, *, judge: bool, sampled: float = 1.0) -> float:
    """Return the bound of `unit_differences` for the smallest probabilities of a label and of the sample."""
    return ((2 - labelled) if judge else 1.0) / labelled / sampled
