"""How many answers have the form that a metric asks for."""

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
def test_the_answers_that_have_the_form_are_counted(metric: Any, also: Any, what: str, valid: int) -> None:
    settings = EvaluateConfig.model_validate({"metric": metric, "extra_metrics": also})
    told = form(settings.metrics, TEXTS, EXAMPLES)
    assert told is not None
    assert (told.what, told.items, told.valid) == (what, len(TEXTS), valid)


def test_a_metric_that_asks_for_no_form_has_none() -> None:
    assert form(EvaluateConfig(metric="exact_match").metrics, TEXTS, EXAMPLES) is None
