"""How many items would settle what these do not."""

from __future__ import annotations

import math

from tunewright.evidence.base import Interval

# Widening the sample until the interval's end just touches the margin would succeed every other time; this succeeds
# in 80% of the cases: ((z_0.975 + z_0.8) / z_0.975) squared.
_POWER_FACTOR = ((1.95996 + 0.84162) / 1.95996) ** 2
_HOPELESS = 20


def items_to_settle(difference: float, interval: Interval, margin: float, items: int) -> int | None:
    """How many items in all would bring the 95% interval off the margin, with 80% power and this true difference.

    Returns:
        None where even 20 times as many would hardly do.
    """
    gap = difference - margin
    half = difference - interval.low if gap > 0 else interval.high - difference
    if half * math.sqrt(_POWER_FACTOR / _HOPELESS) >= abs(gap):
        return None
    return _two_digits(items * max(_POWER_FACTOR * (half / gap) ** 2, 1.1))


def _two_digits(number: float) -> int:
    """Round up to two significant digits: more would pretend to know."""
    step = int(10 ** max(math.floor(math.log10(number)) - 1, 0))
    return math.ceil(number / step) * step
