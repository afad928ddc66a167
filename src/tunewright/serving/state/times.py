"""Times of the state, for people and from them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from tunewright.core.errors import UserError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def iso(seconds: float | None) -> str | None:
    """UTC, ISO 8601, of seconds since 1970; None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def duration(text: str, where: str) -> float:
    """Seconds of a duration like 30d, 12h, 90m or 45s.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match is None:
        raise UserError(f"{text!r} is no duration", where=where, fix="Write it like 30d, 12h, 90m or 45s.")
    return float(int(match[1]) * _UNITS[match[2]])


def moment(text: str, where: str) -> float:
    """Seconds since 1970 of a date or time in ISO 8601, in UTC where it names no zone.

    Raises:
        UserError: it is none.
    """
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no date", where=where, fix="Write it like 2026-11-25.") from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def percent(text: str, where: str) -> float:
    """Return a share, of a text like 10% or 0.5%.

    Raises:
        UserError: it is none above 0% and below 100%.
    """
    match = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,4})?)%", text)
    if match is None or not float(match[1]):
        raise UserError(f"{text!r} is no share of the traffic", where=where, fix="Write it like 10% or 0.5%.")
    return float(match[1]) / 100
