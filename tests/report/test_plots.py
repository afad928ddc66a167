"""Figures: marks stand where the numbers are."""

import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from tunewright.report.plots import PLAIN, TUNED, Bar, forest_plot, loss_plot


def _ends(svg: str, colour: str) -> list[tuple[float, float]]:
    """First and last x of every horizontal line drawn in ``colour``."""
    paths = re.findall(rf'd="M ([\d.]+) [\d.]+ ?\s*L ([\d.]+) [\d.]+ ?\s*" [^>]*stroke: {re.escape(colour)}', svg)
    return [(float(a), float(b)) for a, b in paths]


def test_intervals_are_drawn_to_scale() -> None:
    bars = [Bar("a", 50, 0, 100, "50", TUNED), Bar("b", 30, 25, 50, "30", PLAIN)]
    svg = forest_plot("f", "title", bars, axis="%", limits=(0, 100))
    (whole,) = _ends(svg, "var(--tuned)")
    (part,) = _ends(svg, "var(--plain)")
    width = whole[1] - whole[0]
    assert (part[0] - whole[0]) / width == pytest.approx(0.25, abs=1e-4)
    assert (part[1] - whole[0]) / width == pytest.approx(0.5, abs=1e-4)


def test_labels_are_real_text_whatever_they_hold() -> None:
    svg = forest_plot("f", "a <title> & more", [Bar("$x^2$ <b>", 1, 0, 2, "1.0", TUNED)], axis="points", margin=2.5)
    texts = [
        "".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"$x^2$ <b>", "1.0", "points", "margin +2.5"} <= set(texts)
    assert ElementTree.fromstring(svg)[0].text == "a <title> & more"


def test_drawing_leaves_the_callers_style_alone() -> None:
    before = dict(mpl.rcParams)
    loss_plot("l", "loss", [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}])
    assert dict(mpl.rcParams) == before
