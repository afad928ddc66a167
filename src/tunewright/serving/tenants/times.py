"""Times of the state as text, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from tunewright.core.errors import UserError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def iso(seconds: float | None) -> str | None:
    """Return seconds since 1970 as ISO 8601 in UTC; None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def duration(text: str, where: str) -> float:
    """Return the seconds of a duration like 30d, 12h, 90m or 45s.

    Raises:
        UserError: the text is not a duration.
    """
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match is None:
        raise UserError(f"Invalid duration {text!r}", where=where, fix="Use a duration like 30d, 12h, 90m or 45s.")
    return float(int(match[1]) * _UNITS[match[2]])


def parse_time(text: str, where: str) -> float:
    """Return seconds since 1970 of a date or time in ISO 8601, in UTC unless it names a zone.

    Raises:
        UserError: the text is not a date.
    """
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"Invalid date {text!r}", where=where, fix="Use a date like 2026-11-25.") from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
