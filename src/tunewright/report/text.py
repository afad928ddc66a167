"""Sentences that several sections share."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.config import MetricName
from tunewright.evidence.common import Interval
from tunewright.evidence.schema import Advice, Evidence
from tunewright.evidence.verdict import Decision, Reason, Verdict
from tunewright.metrics import points_text
from tunewright.render.blocks import Block, Lead, Notes

HEADLINES: dict[Decision, str] = {"ship": "Ship", "don't ship": "Don’t ship", "can't tell": "Can’t tell"}


def headline(found: Verdict) -> str:
    """Return the verdict's headline, with a mark if it is on the dev split."""
    text = HEADLINES[found.decision]
    return f"{text} (on dev)" if found.split == "dev" else text


def verdict_blocks(found: Verdict, reasons: Sequence[str]) -> tuple[Block, ...]:
    """Return these reasons of a verdict, and the causes of a *don't ship*."""
    causes = tuple(map(cause_text, found.causes))
    return (Notes(tuple(reasons)), *((Lead("Likely causes:"), Notes(causes)) if causes else ()))


def cause_text(cause: Reason) -> str:
    """Return a cause of a *don't ship* with its evidence and remedy."""
    return f"{cause.what}: {cause.evidence}. Next: {cause.next_command}."


def metric_order(measured: Evidence | Advice) -> list[MetricName]:
    """Return the metrics, the deciding one first; the files sort them by name."""
    return sorted(measured.metrics, key=lambda name: name != measured.metric)


def percent_interval(interval: Interval) -> str:
    """Return an interval of shares in hundredths: ``51.0 to 73.2``."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def points_interval(interval: Interval) -> str:
    """Return an interval of a difference, in points: ``-1.2 to +3.4``."""
    return f"{points_text(interval.low)} to {points_text(interval.high)}"


def capitalised(text: str) -> str:
    """Return a text with its first letter capitalised and the rest unchanged."""
    return text[:1].upper() + text[1:]
