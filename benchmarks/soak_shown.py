"""Output of `soak.py`: slopes with their intervals, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import theilslopes

WARM_UP = 1 / 4
"""The part of the run before slopes are measured."""
FLAT = (
    "private MB",
    "resident MB",
    "descriptors",
    "threads",
    "tasks",
    "objects",
    "resident adapters",
    "metric series",
    "unfinished requests",
    "rows: unmetered_requests",
    "write-ahead log MB",
)
"""Quantities that must not grow."""
GROWING = ("rows: requests", "rows: audit", "rows: releases", "rows: tenants", "rows: api_keys", "rows: shadow_answers")
"""Rows of recorded events: they grow by design until they are rolled up, and the database grows with them."""
EVENTS = "recorded rows"
PANELS = (
    *("private MB", "descriptors", "threads", "tasks", "objects", "resident adapters", "metric series"),
    *("write-ahead log MB", "database MB"),
)


class Samples:
    """Quantities at moments; not all of them in each sample."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._taken: list[Mapping[str, Any]] = []
        self._last: dict[str, Any] = {}

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.times)

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest value of each quantity."""
        return self._last

    def add(self, time: float, sample: Mapping[str, Any]) -> None:
        """Add a sample, taken ``time`` seconds after the beginning."""
        self.times.append(time)
        self._taken.append({**sample, EVENTS: sum(sample[name] for name in GROWING)})
        self._last |= sample

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the times in minutes and the values of a quantity."""
        pairs = [(time / 60, one[name]) for time, one in zip(self.times, self._taken, strict=True) if name in one]
        return np.array([time for time, _ in pairs]), np.array([value for _, value in pairs], dtype=float)

    def kinds(self) -> list[Mapping[str, int]]:
        """Return the counts of objects by type in each look."""
        return [one["kinds"] for one in self._taken if "kinds" in one]


def minutes(times: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the medians of whole minutes: samples within a minute depend on each other."""
    whole = np.floor(times)
    at = np.unique(whole)
    return at + 0.5, np.array([np.median(values[whole == minute]) for minute in at])


def slope(times: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return the slope per hour after the warm-up with its 95% interval, and the median."""
    found = theilslopes(values, times / 60, 0.95)
    low, high = sorted((found.low_slope, found.high_slope))
    return {"median": float(np.median(values)), "slope": float(found.slope), "low": float(low), "high": float(high)}


def summary(samples: Samples) -> dict[str, Any]:
    """Return slopes, and the medians of minutes that are plotted."""
    length = samples.times[-1] / 60
    after = WARM_UP * length
    slopes, plotted = {}, {}
    for name in (*FLAT, *GROWING, EVENTS, "database MB", "processor seconds"):
        times, values = minutes(*samples.series(name))
        plotted[name] = {"minutes": times.tolist(), "values": [round(float(value), 3) for value in values]}
        slopes[name] = slope(times[times >= after], values[times >= after])
    return {
        "minutes": length,
        "samples": samples.count,
        "warm_up_minutes": after,
        "slopes_per_hour": slopes,
        "database": _bytes_per_row(samples, after),
        "grown_objects": _grown(samples.kinds()),
        "medians": plotted,
    }


def _bytes_per_row(samples: Samples, after: float) -> dict[str, Any]:
    """Return the database's bytes for each recorded row, and the slope of what the rows do not explain."""
    times, size = minutes(*samples.series("database MB"))
    _, rows = minutes(*samples.series(EVENTS))
    late = times >= after
    fitted = theilslopes(size[late], rows[late], 0.95)
    rest = size[late] - (fitted.intercept + fitted.slope * rows[late])
    return {
        "bytes_per_row": 1e6 * fitted.slope,
        "interval": [1e6 * fitted.low_slope, 1e6 * fitted.high_slope],
        "unexplained": slope(times[late], rest),
    }


def _grown(kinds: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Return the types whose number grew most from the first third of the run to its end: both medians."""
    third = max(1, len(kinds) // 3)
    names = set().union(*kinds)

    def typical(looks: Sequence[Mapping[str, int]], name: str) -> int:
        return int(np.median([look.get(name, 0) for look in looks]))

    both = {name: [typical(kinds[:third], name), typical(kinds[-third:], name)] for name in names}
    most = sorted(both, key=lambda name: both[name][0] - both[name][1])
    return {name: both[name] for name in most[:12] if both[name][1] > both[name][0]}


def show(result: Mapping[str, Any]) -> None:
    """Print the slopes and what happened."""
    console = Console(width=120)
    table = Table("quantity", "median", "slope per hour", "95% interval", "must be flat")
    for name, one in result["slopes_per_hour"].items():
        digits = 0 if one["median"] > 1000 else 2
        interval = f"{one['low']:+,.{digits}f} to {one['high']:+,.{digits}f}"
        flat = "yes" if name in FLAT else ""
        table.add_row(name, f"{one['median']:,.{digits}f}", f"{one['slope']:+,.{digits}f}", interval, flat)
    console.print(table)
    database = result["database"]
    rest = database["unexplained"]
    console.print(
        f"{result['minutes']:.1f} minutes, {sum(result['requests'].values())} requests, "
        f"{sum(result['changes'].values())} changes, seed {result['settings']['seed']}. The database has "
        f"{database['bytes_per_row']:.0f} bytes for each recorded row; the rest of its size changes by "
        f"{rest['slope']:+.3f} MB per hour ({rest['low']:+.3f} to {rest['high']:+.3f})."
    )
    console.print("Requests:", result["requests"], "\nChanges:", result["changes"])
    console.print("Objects that grew:", result["grown_objects"])
    console.print("Faults:", result["faults"], *result["audit_faults"])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Plot the medians of minutes, a panel for each quantity; the warm-up is shaded."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "soak",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 6), facecolor="white", layout="constrained")
        for axes, name in zip(figure.subplots(3, 3, sharex=True).flat, PANELS, strict=True):
            one = result["medians"][name]
            axes.axvspan(0, result["warm_up_minutes"], color="#eeeeee", linewidth=0)
            axes.plot(one["minutes"], one["values"], color="#0b6e99", linewidth=1.2)
            axes.set_title(name, fontsize=9, loc="left")
            axes.set_ylim(0, 1.25 * max(*one["values"], 1e-9))
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        figure.supxlabel("minutes", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
