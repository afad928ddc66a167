"""Counts of answers in the form that a metric requires."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright.advisor.specificity import form
from tunewright.config import EvaluateConfig
from tunewright.data.examples import Example, Message

TEXTS = ["granted", " denied ", "The motion is granted.", '{"outcome": "granted"}', "[1"]
EXAMPLES = [Example((Message("user", "what?"), Message("assistant", "granted")))] * len(TEXTS)


@pytest.mark.parametrize(
    ("metric", "also", "what", "valid"),
    [
        ({"choices": ["granted", "denied"]}, (), "one of 2 declared choices", 2),
        ("json_valid", (), "valid JSON", 1),
        ({"json": {"fields": ["outcome"]}}, (), "valid JSON", 1),
        ({"regex": "[a-z]+"}, (), "matches [a-z]+", 2),
        # One that decides nothing may ask for a form too.
        ("exact_match", ("json_valid",), "valid JSON", 1),
    ],
)
def test_form_counts_valid_answers(metric: Any, also: Any, what: str, valid: int) -> None:
    settings = EvaluateConfig.model_validate({"metric": metric, "extra_metrics": also})
    message = form(settings.metrics, TEXTS, EXAMPLES)
    assert message is not None
    assert (message.what, message.items, message.valid) == (what, len(TEXTS), valid)


def test_form_is_none_for_a_metric_without_a_form() -> None:
    assert form(EvaluateConfig(metric="exact_match").metrics, TEXTS, EXAMPLES) is None
