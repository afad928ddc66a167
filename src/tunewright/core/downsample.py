"""Curves with fewer points."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

_MOST_POINTS = 200


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points: means of neighbours, where there are more."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if points else []
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]
