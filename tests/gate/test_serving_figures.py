"""Figures of the serving check: what fails, and what few answers cannot show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunewright.data.examples import Example, Message, ToolCall
from tunewright.gate.results import ServingFigures
from tunewright.gate.serving_check import ComparedAnswer, serving_figures, shortcomings, well_formed

GOOD = ComparedAnswer(
    "a", [1e-7, 1e-7], [0.5, 0.5], same=True, shortfall=0.0, trained_well_formed=True, well_formed=True
)


def _figures(broken: int, of: int, changed: ComparedAnswer) -> ServingFigures:
    answers = [replace(changed if number < broken else GOOD, cluster=str(number)) for number in range(of)]
    return serving_figures("adapter", answers, "bfloat16", 0.75, seed=0)


def test_check_passes_when_all_answers_are_the_same() -> None:
    figures = _figures(0, 32, GOOD)
    assert shortcomings([figures]) == ()
    # Wilson's interval of 32 of 32 and 0 of 32.
    assert (figures.same.value, round(figures.same.low, 3), figures.same.high) == (1.0, 0.893, 1.0)
    assert figures.wrong.high == pytest.approx(1 - figures.same.low)
    assert figures.change is not None
    assert figures.change.low < -0.048, "32 answers do not exclude a loss of 4.8%"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (replace(GOOD, divergences=[0.2, 0.2]), "KL from the trained model"),
        (replace(GOOD, same=False, shortfall=3.0), "go another way where no tie explains it"),
        (replace(GOOD, well_formed=False), "no well-formed JSON or calls"),
    ],
    ids=["distributions", "answers", "forms"],
)
def test_check_fails_when_the_whole_interval_is_beyond_its_limit(changed: ComparedAnswer, reason: str) -> None:
    (found,) = shortcomings([_figures(16, 32, changed)])
    assert reason in found
    assert found.startswith("the adapter: ")
    assert shortcomings([_figures(1, 32, changed)]) == (), "one answer of 32 proves nothing"


def test_check_ignores_another_answer_that_a_tie_explains() -> None:
    tie = replace(GOOD, same=False, shortfall=0.1)
    figures = _figures(32, 32, tie)
    assert (figures.same.value, figures.wrong.value) == (0.0, 0.0)
    assert shortcomings([figures]) == ()


def test_check_fails_when_the_engine_reports_no_probability() -> None:
    figures = _figures(32, 32, replace(GOOD, divergences=[], effects=[]))
    assert (figures.kl, figures.places) == (None, 0)
    assert shortcomings([figures]) == ("the adapter: the engine reported no probability of any answer's token",)


def test_merged_model_decides_nothing() -> None:
    assert shortcomings([replace(_figures(32, 32, replace(GOOD, divergences=[9.0])), served="merged")]) == ()


def test_interval_is_wider_when_answers_share_clusters() -> None:
    changed = replace(GOOD, same=False, shortfall=3.0)
    answers = [changed] * 8 + [GOOD] * 24
    apart = serving_figures("adapter", [replace(a, cluster=str(n)) for n, a in enumerate(answers)], "float32", 0.05, 0)
    together = serving_figures(
        "adapter", [replace(a, cluster=str(n // 8)) for n, a in enumerate(answers)], "float32", 0.05, 0
    )
    assert together.wrong.high - together.wrong.low > apart.wrong.high - apart.wrong.low


_DECLARED = Message(
    "tools",
    '[{"type":"function","function":{"name":"weather","description":"",'
    '"parameters":{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}}}]',
)
_CALL = Message("assistant", "", calls=(ToolCall("weather", '{"city":"Oslo"}', "call00000"),))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "weather", "arguments": {"city":"Rome"}}', True),
        ('{"name": "weather", "arguments": {"town":"Rome"}}', False),
        ('{"name": "wether", "arguments": {"city":"Rome"}}', False),
        ("It rains.", False),
    ],
)
def test_well_formed_call_names_a_declared_function_and_satisfies_its_schema(answer: str, expected: bool) -> None:
    example = Example((_DECLARED, Message("user", "Oslo?"), _CALL))
    assert well_formed(example, answer) is expected


@pytest.mark.parametrize(
    ("ideal", "answer", "expected"),
    [
        ('{"a": 1}', '{"b": 2}', True),
        ('{"a": 1}', '{"b": 2', False),
        ("[1, 2]", "NaN", False),
        ("42", "forty-two", None),
        ("Adair Cir. Ct.", "Adair", None),
    ],
)
def test_well_formed_json_is_asked_where_the_ideal_answer_is_an_object_or_array(
    ideal: str, answer: str, expected: bool | None
) -> None:
    assert well_formed(Example((Message("user", "?"), Message("assistant", ideal))), answer) is expected
