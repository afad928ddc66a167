"""Figure of scores by band, with a mark and an interval for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from tunewright.report.plots import INK, STYLE, WIDTH, inline

# heights of the axes, of the space below them, and of a legend line
_PANEL, _BELOW, _LEGEND, _MARKS = 180.0, 54.0, 20.0, "osD^vP"
_LETTERS = 44  # letters per legend line, next to the marks


@dataclass(frozen=True)
class Series:
    """One arm: the indices of the bands in which it is scored, with its values and interval ends."""

    name: str
    colour: str
    points: tuple[tuple[int, float, float, float], ...]


def bands_plot(name: str, title: str, bands: Sequence[str], series: Sequence[Series], *, axis: str, below: str) -> str:
    """Draw the bands next to each other, each with all its arms.

    Args:
        name: prefix of the SVG's ids, unique on the page.
        title: the accessible title, read by screen readers.
        bands: their labels.
        series: the arms, from 0 to 100.
        axis: the label of the scores.
        below: the label of the bands.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        columns = max((n for n in (4, 3, 2) if _fits(series, n)), default=1)
        height = _PANEL + _BELOW + 8 + _LEGEND * math.ceil(len(series) / columns)
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((0.11, _BELOW / height, 0.87, _PANEL / height))
        for place, each in enumerate(series):
            offset = (place - (len(series) - 1) / 2) * 0.6 / max(len(series), 1)
            mark = _MARKS[place % len(_MARKS)]
            for band, value, low, high in each.points:
                x = band + offset
                axes.plot([x, x], [low, high], each.colour, lw=2.5, solid_capstyle="round", clip_on=False)
                axes.plot([x], [value], each.colour, marker=mark, markersize=7, clip_on=False)
            axes.plot([], [], each.colour, label=each.name, marker=mark, markersize=7, linestyle="")
        axes.set_xlim(-0.5, len(bands) - 0.5)
        axes.set_ylim(0, 100)
        axes.set_xticks(range(len(bands)), bands)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel(below)
        axes.set_ylabel(axis)
        axes.grid(axis="y", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, labelcolor=INK, handletextpad=0.3)
        return inline(figure, name, title)


def _fits(series: Sequence[Series], columns: int) -> bool:
    """Return whether the names fit into legend lines of ``columns`` columns, each as wide as its longest name."""
    rows = math.ceil(len(series) / columns)
    widths = [max(len(each.name) + 3 for each in series[at : at + rows]) for at in range(0, len(series), rows)]
    return sum(widths) <= _LETTERS + 3 * columns
