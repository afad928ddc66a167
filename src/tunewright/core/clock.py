"""Timestamps of stored files."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """Return the current UTC time in ISO 8601.

    Milliseconds order two files that were made in the same second.
    """
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def without_milliseconds(time: str) -> str:
    """Return a time of :func:`now` without its milliseconds."""
    return datetime.fromisoformat(time).isoformat(timespec="seconds")


def minute(seconds: float | None) -> str:
    """Return seconds since 1970 as a time in UTC to the minute, or a dash."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
