"""The benchmark of the verdict's calibration, in small: chance rarely ships, and power is what the formula says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from tunewright.evidence.power import minimum_detectable_effect

ROOT = Path(__file__).parents[2]
PROJECTS = 300


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("verdict_calibration", ROOT / "benchmarks" / "verdict_calibration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CALIBRATION = _benchmark()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        CALIBRATION.Setting(kind, clusters, size, gain)
        for kind in ("exact match", "graded")
        for clusters, size, gain in ((100, 1, 0.0), (30, 4, 0.05))
    ],
    ids=str,
)
def test_verdict_ships_a_gain_of_the_margin_in_at_most_5_percent(setting: Any) -> None:
    """More than this would come of a true 5% once in a thousand times."""
    most = binom.ppf(0.999, PROJECTS, 0.05)
    assert CALIBRATION.shipped(setting, PROJECTS) <= most


@pytest.mark.parametrize("kind", ["exact match", "graded"])
def test_simulation_detects_a_verdict_that_ships_too_easily(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the margin's interval and the test, every other project would ship."""
    setting = CALIBRATION.Setting(kind, 100, 1, 0.0)
    monkeypatch.setattr(CALIBRATION, "verdict", lambda evidence: _greedy(evidence))
    assert CALIBRATION.shipped(setting, 100) > binom.ppf(0.999, 100, 0.05)


def _greedy(evidence: Any) -> Any:
    from tunewright.evidence.verdict import Verdict

    return Verdict("ship" if evidence.contrasts[0].difference > evidence.margin else "can't tell", ())


@pytest.mark.parametrize(("items", "changed"), [(100, 0.3), (1000, 0.2)])
def test_detectable_difference_is_found_as_often_as_the_formula_states(items: int, changed: float) -> None:
    """80% by the formula; the exact test is a little shy, and 500 runs scatter by 1.8 points."""
    gain = minimum_detectable_effect(items, changed)
    assert CALIBRATION.found(items, changed, gain, 500) / 500 == pytest.approx(0.78, abs=0.06)
