"""The time, as everything that is kept has it."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """This moment in UTC, ISO 8601, to the millisecond: the newest of two made in one second is told by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_the_second(time: str) -> str:
    """A time of ``now`` as people read it."""
    return datetime.fromisoformat(time).isoformat(timespec="seconds")


def seconds_since(time: str) -> float:
    """Return the seconds from a time of ``now`` to this moment."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
