"""A measurement in words for people who do not know its test: what was compared, by how much, how sure."""

from __future__ import annotations

from tunewright.evidence.common import Interval
from tunewright.evidence.schema import Contrast, Evidence
from tunewright.metrics import metric_label, score_text

_NONE = 0.05
"""Points below which a rounded difference is zero."""


def plain_measurement(evidence: Evidence, contrast: Contrast) -> str:
    """Return the tuned arm's comparison with another arm in plain words."""
    tuned, other = (
        score_text(contrast.metric, evidence.arm(name).score(contrast.metric).value)
        for name in (contrast.treatment, contrast.control)
    )
    questions = f"{contrast.scored:,} {evidence.split} question{'' if contrast.scored == 1 else 's'}"
    if evidence.design == "cross-fitted":
        questions = questions.replace(f"{evidence.split} ", "")
    rival = f"the base with its best prompt ({contrast.control})"
    if evidence.metrics[contrast.metric].kind == "right or wrong":
        scored = f"The adapter answers {tuned} of {questions} right, and {rival} {other}"
    else:
        label = metric_label(contrast.metric)
        by = "" if label in tuned else f", by {label}"
        scored = f"On {questions} the adapter scores {tuned}, and {rival} {other}{by}"
    return f"{scored}: {_points(100 * contrast.difference)}. {_certainty(contrast.interval)}"


def _certainty(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    if low < -_NONE and high > _NONE:
        chance = ", so it may be chance"
    elif low <= _NONE and high >= -_NONE:
        chance = ""
    else:
        nearer, farther = sorted((abs(low), abs(high)))
        word = "more" if low > 0 else "less"
        return f"With 95% confidence, the true difference is {nearer:.1f} to {farther:.1f} points {word}."
    return f"With 95% confidence, the true difference is between {_points(low)} and {_points(high)}{chance}."


def _points(points: float) -> str:
    """Return a difference without a sign: ``8.2 points more``, ``no difference``."""
    if abs(points) < _NONE:
        return "no difference"
    return f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"
