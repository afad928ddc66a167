"""Number of items needed to settle an unclear result."""

from __future__ import annotations

import math

from tunewright.evidence.common import Interval

# A sample just large enough for the interval's end to touch the margin would succeed every other time. This factor
# gives 80% power: ((z_0.975 + z_0.8) / z_0.975) squared.
_POWER_FACTOR = ((1.95996 + 0.84162) / 1.95996) ** 2
_HOPELESS = 20


def items_to_settle(difference: float, interval: Interval, margin: float, items: int) -> int | None:
    """Return the total items needed to move the 95% interval off the margin, with 80% power at this difference.

    Returns:
        None if even 20 times as many would hardly suffice.
    """
    gap = difference - margin
    half = difference - interval.low if gap > 0 else interval.high - difference
    if half * math.sqrt(_POWER_FACTOR / _HOPELESS) >= abs(gap):
        return None
    return _two_digits(items * max(_POWER_FACTOR * (half / gap) ** 2, 1.1))


def _two_digits(number: float) -> int:
    """Round up to two significant digits, since more would be false precision."""
    step = int(10 ** max(math.floor(math.log10(number)) - 1, 0))
    return math.ceil(number / step) * step
