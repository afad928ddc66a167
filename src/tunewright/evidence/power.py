"""Statistical power: what a number of items can show, and how many items settle a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.splits import Split
from tunewright.evidence.common import Interval

POWER = 0.8
ALPHA = 0.05
FEWEST_CLUSTERS = 6
"""Minimum clusters: a test that swaps c clusters has a smallest two-sided p of 2 / 2**c, below 0.05 from six on."""
ASSUMED = (0.1, 0.2, 0.3)
"""Assumed shares of items that exactly one of two arms gets right: low, usual (used for estimates) and high."""


def power(items: float, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the power of a paired two-sided test on right and wrong items (Miettinen 1968).

    With q (``discordant``) the share of items that exactly one arm gets right, and a true difference
    d of at most q, it is Phi((d sqrt(n) - z_(1-alpha/2) sqrt(q)) / sqrt(q - d^2)). Clustered items
    count as `effective_items`.
    """
    spread = max(discordant - difference**2, 0.0) ** 0.5
    excess = difference * items**0.5 - float(norm.ppf(1 - alpha / 2)) * discordant**0.5
    return float(norm.cdf(excess / spread)) if spread else float(excess >= 0)


def minimum_detectable_effect(items: float, discordant: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest true difference in accuracy that a paired two-sided test finds with this power.

    Solves Miettinen's (1968) n = (z_(1-alpha/2) sqrt(q) + z_power sqrt(q - d^2))^2 / d^2 for d. A difference is never
    larger than the share of items that changed. So with few changes q (``discordant``) grows with d: all items change
    the same way. It is 1.0 if no difference can be found.
    """
    z_alpha, z_power = norm.ppf(1 - alpha / 2), norm.ppf(power)

    def excess(d: float) -> float:
        q = max(discordant, d)
        return float(np.sqrt(items) * d - z_alpha * np.sqrt(q) - z_power * np.sqrt(max(q - d * d, 0.0)))

    if excess(1.0) <= 0:
        return 1.0
    return float(brentq(excess, 1e-12, 1.0))


def detectable(standard_error: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest true difference found with this power, from the standard error of the measured one."""
    return min(float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * standard_error, 1.0)


@dataclass(frozen=True)
class DetectableEffects:
    """Differences that a split can show, computed before anything is measured on it."""

    split: str
    items: int
    clusters: int

    @cached_property
    def effects(self) -> dict[float, float]:
        """Assumed share of items that change to the smallest detectable difference; a cluster counts as one item."""
        return {q: minimum_detectable_effect(self.clusters, q) for q in ASSUMED}

    def as_dict(self) -> dict[str, Any]:
        """Return the effects as ``--json`` prints it."""
        effects = [{"changed": q, "minimum_detectable_effect": d} for q, d in self.effects.items()]
        return {"split": self.split, "items": self.items, "clusters": self.clusters, "assumed": effects}


# A sample just large enough for the interval's end to touch the margin would succeed every other time. This factor
# gives 80% power: ((z_0.975 + z_0.8) / z_0.975) squared.
_POWER_FACTOR = ((1.95996 + 0.84162) / 1.95996) ** 2
_HOPELESS = 20


def items_to_settle(difference: float, interval: Interval, margin: float, items: int) -> int | None:
    """Return the total items needed to move the 95% interval off the margin, with 80% power at this difference.

    None if even 20 times as many would hardly suffice.
    """
    gap = difference - margin
    half = difference - interval.low if gap > 0 else interval.high - difference
    if half * math.sqrt(_POWER_FACTOR / _HOPELESS) >= abs(gap):
        return None
    # An interval's half width falls with the root of the items.
    needed = items * max(_POWER_FACTOR * (half / gap) ** 2, 1.1)
    return two_digits(needed)


def two_digits(needed: float) -> int:
    """Round a positive number up to two significant digits: more would be false precision."""
    step = int(10 ** max(math.floor(math.log10(needed)) - 1, 0))
    return math.ceil(needed / step) * step


USUAL = ASSUMED[1]
TOO_BLUNT = 0.3
"""A test split that cannot show less than this gets a warning: few fine-tunes gain more over a good prompt."""
_SHOWN = 5
AIM = 0.2
"""The difference that the suggested number of rows would show."""


@dataclass(frozen=True)
class SplitPower:
    """Differences that a test split can show, and estimated rows to add to show any, or `AIM`.

    ``effect`` is the smallest one found with 80% power if 20% of the items change; 1.0: none.
    """

    clusters: dict[Split, int]
    effect: float
    significant: bool
    rows_to_significant: int
    rows_to_aim: int


def split_power(rows: Mapping[Split, int], clusters: Mapping[Split, int], share: float) -> SplitPower:
    """Return the test split's power, by rows without mix-in and clusters of each split, and its share of the rows."""
    tests = clusters.get("test", 0)

    def more(needed: int) -> int:
        """Return rows to add, each its own cluster, so that the test split's share has ``needed`` clusters."""
        missing = needed - tests
        if missing <= 0:
            return 0
        # New rows are split too: the whole has to grow until the test's share is enough.
        return max(missing, math.ceil((missing + rows.get("test", 0)) / share) - sum(rows.values()))

    return SplitPower(
        clusters={split: clusters.get(split, 0) for split in ("train", "dev", "test")},
        effect=minimum_detectable_effect(tests, USUAL) if tests else 1.0,
        significant=tests >= FEWEST_CLUSTERS,
        rows_to_significant=more(FEWEST_CLUSTERS),
        rows_to_aim=more(_CLUSTERS_TO_AIM),
    )


# Miettinen's n, as in `minimum_detectable_effect`, for a difference of AIM if USUAL items change.
_CLUSTERS_TO_AIM = math.ceil(
    ((norm.ppf(1 - ALPHA / 2) * USUAL**0.5 + norm.ppf(POWER) * (USUAL - AIM**2) ** 0.5) / AIM) ** 2
)


def split_power_text(power: SplitPower) -> str:
    """Return a line about the test split's power."""
    tests = _count(power.clusters["test"], "test cluster")
    aim = f"about {_count(power.rows_to_aim, 'more distinct row')} would show {100 * AIM:.0f} points."
    if not power.significant:
        return (
            f"{tests}: no difference can be significant with fewer than {FEWEST_CLUSTERS}. About "
            f"{_count(power.rows_to_significant, 'more distinct row')} are needed for any verdict, and {aim}"
        )
    shown = (
        f"{tests}: a comparison finds a true difference of {100 * power.effect:.0f} points or more ({POWER:.0%} power"
    )
    if power.effect > TOO_BLUNT:
        return f'{shown}). Smaller gains stay "can\'t tell"; {aim}'
    return f"{shown}, if {USUAL:.0%} of the items change)."


def report_split_power(power: SplitPower, reporter: Reporter) -> None:
    """Report the clusters of each split and their power, as a warning if that is low."""
    counts = ", ".join(f"{count:,} {split}" for split, count in power.clusters.items())
    reporter.say(f"Independent clusters: {counts}.")
    (reporter.warn if power.effect > TOO_BLUNT else reporter.say)(split_power_text(power))


def warn_of_few_dev_clusters(sizes: Sequence[int], reporter: Reporter) -> None:
    """Warn of a dev split with too few effective clusters.

    Clusters with shares p of the rows are worth 1 / sum(p²) clusters of equal size (Kish's effective sample size).
    Below `FEWEST_CLUSTERS` no difference can be significant, even if all clusters agree on it.
    """
    effective = sum(sizes) ** 2 / sum(size**2 for size in sizes) if sizes else 0.0
    if effective >= FEWEST_CLUSTERS:
        return
    held = f"{', '.join(f'{size:,}' for size in sizes[:_SHOWN])}{', …' if len(sizes) > _SHOWN else ''}"
    reporter.warn(
        f"{_count(len(sizes), 'dev cluster')} of {held} rows: dev is worth "
        f"{_count(round(effective, 1), 'cluster')} of equal size, and it takes at least {FEWEST_CLUSTERS} to show a "
        "difference. Dev chooses the prompt and the epoch, so both choices may only suit these few clusters. Add "
        "distinct rows, or start a new dataset with a larger data.val_size or another seed."
    )


def require_significance(power: SplitPower, *, force: bool, reporter: Reporter) -> None:
    """Refuse a pipeline whose verdict can only be "can't tell"; with ``force``, warn instead."""
    if power.significant:
        return
    if force:
        reporter.warn(f'{split_power_text(power)} Continuing because of --force: the verdict will be "can\'t tell".')
        return
    raise UserError(
        split_power_text(power),
        where="test split",
        fix="Add distinct rows. With the present rows, `tunewright crossval` measures on all of them, and "
        "`tunewright advise` compares prompts. --force runs the pipeline anyway.",
    )


def _count(number: float, thing: str) -> str:
    return f"{number:,g} {thing}{'' if number == 1 else 's'}"
