"""Sentences that the page and the comment share."""

from __future__ import annotations

from tunewright.config import MetricName
from tunewright.evidence.base import Interval
from tunewright.evidence.benchmarks import Suite
from tunewright.evidence.noise import NoiseFloor
from tunewright.evidence.schema import Evidence
from tunewright.evidence.verdict import Decision, Reason, Verdict
from tunewright.metrics import points_text

HEADLINES: dict[Decision, str] = {"ship": "Ship", "don't ship": "Don’t ship", "can't tell": "Can’t tell"}


def headline(found: Verdict) -> str:
    """Return the decision in large print; one on the dev split is marked."""
    told = HEADLINES[found.decision]
    return f"{told} (on dev)" if found.split == "dev" else told


def cause_text(cause: Reason) -> str:
    """Return a cause of a *don't ship*, what shows it, and what to do."""
    return f"{cause.what}: {cause.evidence}. Next: {cause.next_command}."


def metric_order(evidence: Evidence) -> list[MetricName]:
    """Return the metrics, the deciding one first; the evidence's file has them by name."""
    return sorted(evidence.metrics, key=lambda name: name != evidence.metric)


def suite_result(suite: Suite) -> str:
    """Return what came of a suite, or why it does not decide."""
    if suite.margin is None:
        return "no margin: decides nothing"
    return suite.result if suite.gates else f"decides nothing: {suite.failed[0].name} failed"


def percent_interval(interval: Interval) -> str:
    """Return an interval of shares in hundredths: ``51.0 to 73.2``."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def points_interval(interval: Interval) -> str:
    """Return an interval of a difference, in points: ``-1.2 to +3.4``."""
    return f"{points_text(interval.low)} to {points_text(interval.high)}"


def noise_line(noise: NoiseFloor) -> str:
    """Return what changes when nothing is changed."""
    return (
        f"Noise floor: {noise.changed:,} of {noise.items:,} answers changed when the base gave them again "
        f"({noise.how}), and its score by {points_text(noise.score_difference)} points."
    )


def capitalised(text: str) -> str:
    """With a capital first letter, and the others as they are."""
    return text[:1].upper() + text[1:]


def counted(number: int, noun: str) -> str:
    """Return a number of things: ``1 item``, ``1,200 items``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
