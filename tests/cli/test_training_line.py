"""The line that `tunewright train` ends with."""

from __future__ import annotations

import pytest

from tunewright.cli.train import _evaluated
from tunewright.config import MetricName


@pytest.mark.parametrize(
    ("metric", "score", "line"),
    [
        ("bleu", 0.094, "1.993 (BLEU 9.4)"),
        ("exact_match", 0.514, "1.993 (exact match 51.4%)"),
        ("exact_match", None, "1.993"),
    ],
)
def test_training_line_names_the_metric_of_the_dev_score(metric: MetricName, score: float | None, line: str) -> None:
    assert _evaluated({"dev_loss": 1.993, "dev_metric": score}, metric) == line
