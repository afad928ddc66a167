"""The soak's arithmetic: slopes after the warm-up, and the database's bytes by its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from soak_shown import FLAT, GROWING, Samples, draw, summary

PER_HOUR = 12.0


def taken(minutes: int = 40, page: float = 250e-6) -> Samples:
    """Return samples of a server that grows fast in the first quarter, and then in private memory alone."""
    samples, noise = Samples(), np.random.default_rng(0)
    for second in range(0, 60 * minutes, 10):
        warm = min(second / 60, minutes / 4)
        flat = {name: 100 + warm + noise.normal(0, 0.1) for name in FLAT}
        flat["private MB"] += PER_HOUR * second / 3600
        rows = {name: float(second) for name in GROWING}
        kinds = {"kinds": {"leaked": second, "kept": 5}} if second % 60 == 0 else {}
        size = {"database MB": 3 + page * sum(rows.values()), "processor seconds": second / 10}
        samples.add(float(second), {**flat, **rows, **size, **kinds})
    return samples


def test_slope_is_measured_after_the_warm_up() -> None:
    slopes = summary(taken())["slopes_per_hour"]
    assert slopes["private MB"]["low"] <= PER_HOUR <= slopes["private MB"]["high"]
    assert slopes["private MB"]["low"] > PER_HOUR / 2
    for name in set(FLAT) - {"private MB"}:
        assert slopes[name]["low"] <= 0 <= slopes[name]["high"]


def test_database_size_is_explained_by_its_rows() -> None:
    database = summary(taken())["database"]
    assert database["bytes_per_row"] == pytest.approx(250)
    assert database["unexplained"]["slope"] == pytest.approx(0, abs=1e-6)


def test_grown_objects_are_named() -> None:
    assert summary(taken())["grown_objects"].keys() == {"leaked"}


@pytest.mark.slow
def test_plot_has_a_panel_for_each_quantity(tmp_path: Path) -> None:
    draw(summary(taken()), tmp_path / "soak.svg")
    drawn = (tmp_path / "soak.svg").read_text()
    assert all(name in drawn for name in ("private MB", "descriptors", "threads", "write-ahead log MB"))
