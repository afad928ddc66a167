"""Statistical power and the minimum detectable effect of a number of items."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from tunewright.metrics import Kind

POWER = 0.8
ALPHA = 0.05
FEWEST_CLUSTERS = 6
"""Minimum clusters: a test that swaps c clusters has a smallest two-sided p of 2 / 2**c, below 0.05 from six on."""
ASSUMED = (0.1, 0.2, 0.3)
"""Assumed shares of items that exactly one of two arms gets right: low, usual (used for estimates) and high."""


def power(items: float, discordant: float, difference: float, alpha: float = ALPHA) -> float:
    """Return the power of a paired two-sided test on right and wrong items (Miettinen 1968).

    Args:
        items: number of independent items (`effective_items` of clustered ones).
        discordant: q, the share of items that exactly one arm gets right; at least the difference.
        difference: d, the true one, as a share above 0.
        alpha: level of the test.

    Returns:
        Phi((d sqrt(n) - z_(1-alpha/2) sqrt(q)) / sqrt(q - d^2)).
    """
    spread = max(discordant - difference**2, 0.0) ** 0.5
    excess = difference * items**0.5 - float(norm.ppf(1 - alpha / 2)) * discordant**0.5
    return float(norm.cdf(excess / spread)) if spread else float(excess >= 0)


def minimum_detectable_effect(items: float, discordant: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Return the smallest true difference in accuracy that a paired two-sided test finds with this power.

    Solves Miettinen's (1968) n = (z_(1-alpha/2) sqrt(q) + z_power sqrt(q - d^2))^2 / d^2 for d. A difference is never
    larger than the share of items that changed. So with few changes q grows with d: all items change the same way.

    Args:
        items: number of independent items (`effective_items` of clustered ones).
        discordant: q, the share of items that exactly one arm gets right.
        power: chance of finding the difference.
        alpha: level of the two-sided test.

    Returns:
        A share; 1.0 if no difference can be found.
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


def detectable_effects_text(found: DetectableEffects, kind: Kind, margin: float) -> str:
    """Return the effects in plain sentences, with their assumptions.

    Args:
        found: the effects.
        kind: the deciding metric's kind.
        margin: the config's margin.
    """
    place = f"The {found.split} split's {found.items:,} items in {found.clusters:,} clusters"
    if found.clusters < FEWEST_CLUSTERS:
        return (
            f"{place} are too few: no difference can be shown, because that takes {FEWEST_CLUSTERS} clusters or more."
        )
    low, middle, high = (f"{100 * effect:.1f}" for effect in found.effects.values())
    few, usual, many = (f"{q:.0%}" for q in found.effects)
    text = (
        f"{place} show a true difference of {middle} points or more (80% power), if {usual} of the items change "
        f"between two arms: an assumption. {low} points if {few} change, {high} if {many}."
    )
    if kind == "corpus":
        text += " This assumes right or wrong answers; for a corpus metric it is a rough guide."
    elif kind == "mean":
        text += " This assumes right or wrong answers, the worst case: graded scores vary less."
    if found.split != "test":
        return text
    expected = 100 * (margin + found.effects[ASSUMED[1]])
    if expected >= 100:
        return f"{text} With a margin of {100 * margin:g} points no gain would be enough to ship."
    return f"{text} With a margin of {100 * margin:g} points a fine-tune has to gain about {expected:.0f} to ship."
