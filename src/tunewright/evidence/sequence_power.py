"""Requests and labels that a shadow needs until its confidence sequence finds a difference, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunewright.evidence.confidence_sequences import confidence_sequence
from tunewright.evidence.power import two_digits

RUNS = 400
_CHUNK = 50


@dataclass(frozen=True)
class ShadowNeeds:
    """Requests and labels after which half and 80% of simulated shadows have found a difference, rounded up.

    All four are None if too few answers differ for such a difference.
    """

    difference: float
    median_requests: int | None = None
    median_labels: int | None = None
    requests: int | None = None
    """For 80% of the shadows."""
    labels: int | None = None
    """For 80% of the shadows."""


def shadow_needs(units: Sequence[tuple[int, int]], difference: float, *, seed: int = 0) -> ShadowNeeds:
    """Simulate shadows whose candidate is worse by a difference, with a look at every unit.

    A candidate that is better by as much needs the same. Each unit is drawn from the known ones. All of its differing
    answers favour one adapter, which is the worst case: they are then one piece of evidence.

    Args:
        units: the requests of each unit, and how many of them have differing answers.
        difference: of the mean over units, above 0.
        seed: decides the draws.
    """
    sizes, differing = np.array(units).T
    shares = differing / sizes
    mean, square = float(shares.mean()), float(np.square(shares).mean())
    if difference > mean + 1e-9:
        return ShadowNeeds(difference)
    # Half of the shadows stop after about 10 variances over the squared difference, and nearly all by four times that.
    length = int(40 * square / difference**2) + 400
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RUNS // _CHUNK):
        drawn = rng.integers(len(shares), size=(_CHUNK, length))
        side = np.where(rng.random(drawn.shape) * 2 < 1 - difference / mean, 1.0, -1.0)
        worse = confidence_sequence(side * shares[drawn]).high < 0
        # A shadow that never stops counts with its whole length, beyond the quantiles.
        stop = np.where(worse.any(axis=1), worse.argmax(axis=1), length - 1)[:, None]
        found.append([np.take_along_axis(np.cumsum(of[drawn], axis=1), stop, axis=1) for of in (sizes, differing)])
    requests, labels = np.concatenate(found, axis=1)
    rounded = (two_digits(float(np.quantile(of, at))) for at in (0.5, 0.8) for of in (requests, labels))
    return ShadowNeeds(difference, *rounded)
