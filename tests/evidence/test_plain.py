"""A measurement in plain words: right numbers, the right direction, and chance where it is possible."""

from __future__ import annotations

import pytest

from factories import make_evidence, make_items, with_contrast
from tunewright.evidence.verdict import plain_measurement

EVIDENCE = make_evidence(make_items(120, tuned=0.7, retrieved=0.3))


@pytest.mark.parametrize(
    ("difference", "low", "high", "expected"),
    [
        (0.4, 0.3, 0.5, "40.0 points more. With 95% confidence, the true difference is 30.0 to 50.0 points more."),
        (-0.2, -0.3, -0.1, "20.0 points less. With 95% confidence, the true difference is 10.0 to 30.0 points less."),
        (
            0.02,
            -0.031,
            0.082,
            "2.0 points more. With 95% confidence, the true difference is between 3.1 points less and 8.2 points more, "
            "so it may be chance.",
        ),
        (
            0.0,
            0.0,
            0.1,
            "no difference. With 95% confidence, the true difference is between no difference and 10.0 points more.",
        ),
    ],
)
def test_difference_and_its_interval_are_said_with_their_direction(
    difference: float, low: float, high: float, expected: str
) -> None:
    changed = with_contrast(EVIDENCE, difference=difference, low=low, high=high)
    assert plain_measurement(changed, changed.contrasts[0]).endswith(f": {expected}")


def test_scores_are_those_of_the_arms() -> None:
    tuned, other = (EVIDENCE.arm(name).score("exact_match").value for name in ("tuned", "retrieved-4"))
    begin = f"The adapter answers {tuned:.1%} of 120 test questions right, and the base with its best prompt "
    assert plain_measurement(EVIDENCE, EVIDENCE.contrasts[0]).startswith(f"{begin}(retrieved-4) {other:.1%}: ")


def test_metric_that_is_not_right_or_wrong_is_named() -> None:
    found = make_evidence(make_items(60), metric="chrf")
    text = plain_measurement(found, found.contrasts[0])
    assert text.startswith("On 60 test questions the adapter scores chrF ") and "right" not in text
