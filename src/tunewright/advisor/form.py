"""Counts of answers in the format that a metric of the config requires, whatever their content."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.advisor.signals import Format
from tunewright.config import Metric
from tunewright.config.metrics import Choices, Json, Regex
from tunewright.data.examples import Example
from tunewright.metrics import Scorer, score_all
from tunewright.metrics.choices import accuracy
from tunewright.metrics.fields import json_valid
from tunewright.metrics.pattern import matches


def form(metrics: Sequence[Metric], texts: Sequence[str], examples: Sequence[Example]) -> Format | None:
    """Return the number of answers that are a declared choice, JSON, or match a pattern; None without such a metric.

    Args:
        metrics: the config's metrics; the first one that requires a format is used.
        texts: the answers.
        examples: the examples that were answered.
    """
    for metric in metrics:
        match metric:
            case Choices(choices=choices):
                outside = score_all(accuracy("choices", choices), texts, examples).outside
                return _told(f"one of {len(choices)} declared choices", texts, len(texts) - outside)
            case Json() | "json" | "json_valid":
                return _told("valid JSON", texts, _right(json_valid("json_valid"), texts, examples))
            case Regex(regex=pattern):
                return _told(f"matches {pattern}", texts, _right(matches("regex", pattern), texts, examples))
            case _:
                continue
    return None


def _right(scorer: Scorer, texts: Sequence[str], examples: Sequence[Example]) -> int:
    return int(score_all(scorer, texts, examples).values.sum())


def _told(what: str, texts: Sequence[str], valid: int) -> Format:
    return Format(what=what, items=len(texts), valid=valid)
