"""Prompt, retrieve, fine-tune or can't tell: the table of docs/how-to/advise.md, line by line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.signals import arm, break_even, curve, doubling, gain, make_signals
from tunewright.advisor.advice import changes, expectations, measured
from tunewright.advisor.signals import Grounds, Signals, decide
from tunewright.evidence.common import Interval
from tunewright.evidence.incumbents import Drop
from tunewright.evidence.schema import FreeArms

FLAT = doubling(50, 100, 0, -1, 0)
"""A doubling of the rows that brought nothing: all rows reach what the pilot reaches."""
STEEP = doubling(50, 100, 6, 2, 10)
ENDLESS = break_even((45_000, 50_000, 56_000))
PAYS = break_even((45_000, 50_000, 56_000), per_month=10_000)
TOO_FEW_CALLS = break_even((45_000, 50_000, 56_000), per_month=1_000)
NEVER = break_even((None, None, None), saving=-0.001)

BEATS = gain(10, 5, 15, slope=STEEP)
AS_GOOD = gain(0, -1.5, 1.5, slope=FLAT)
WORSE = gain(-10, -15, -6, slope=FLAT)
MAYBE_WORSE = gain(-1, -4, 1.5, slope=FLAT, p_value=0.4)
UNCLEAR = gain(3, -3, 9, slope=FLAT, p_value=0.3)
BEHIND_BUT_RISING = gain(-10, -15, -6, slope=STEEP)


@pytest.mark.parametrize(
    ("measured_gain", "even", "expected"),
    [
        (BEATS, PAYS, "fine-tune"),
        (BEATS, NEVER, "fine-tune"),
        (BEATS, ENDLESS, "fine-tune"),
        (AS_GOOD, PAYS, "fine-tune"),
        (AS_GOOD, TOO_FEW_CALLS, "retrieve"),
        (AS_GOOD, NEVER, "retrieve"),
        (AS_GOOD, ENDLESS, "retrieve"),
        (MAYBE_WORSE, PAYS, "can't tell"),
        (MAYBE_WORSE, NEVER, "retrieve"),
        (WORSE, PAYS, "retrieve"),
        (WORSE, NEVER, "retrieve"),
        (UNCLEAR, PAYS, "can't tell"),
        (UNCLEAR, NEVER, "can't tell"),
        (BEHIND_BUT_RISING, NEVER, "can't tell"),
        # Without a smaller part nobody knows where more rows lead.
        (gain(-10, -15, -6, slope=None), NEVER, "can't tell"),
        (gain(-10, -15, -6, slope=None, rows=400), NEVER, "retrieve"),
    ],
)
def test_decision_follows_the_table(measured_gain: Any, even: Any, expected: str) -> None:
    decision = decide(make_signals(gain=measured_gain, break_even=even))
    assert decision.answer == expected
    assert decision.exit_code == {"fine-tune": 0, "retrieve": 3, "can't tell": 4}[expected]
    assert (decision.arm == "retrieved-4") == (expected == "retrieve")


def _drop(value: float, low: float, high: float) -> Drop:
    shown = Interval(low=low / 100, high=high / 100)
    return Drop(value=value / 100, interval=shown, method="t", items=200, clusters=150, left_out={}, margin=0.02)


NEARER, FARTHER = _drop(0, -1, 1), _drop(10, 5, 15)


@pytest.mark.parametrize(
    ("prompting", "pilot", "measured_gain", "score", "expected"),
    [
        (NEARER, NEARER, gain(0, -1.5, 1.5, slope=FLAT, rows=400), 60, True),
        (NEARER, NEARER, AS_GOOD, 60, True),  # a quarter of the rows, and more rows bring nothing
        (NEARER, NEARER, gain(0, -1.5, 1.5, slope=STEEP), 60, False),
        (NEARER, NEARER, gain(0, -1.5, 1.5, slope=None), 60, False),
        (NEARER, FARTHER, BEATS, 60, False),
        (FARTHER, NEARER, AS_GOOD, 60, False),
        (NEARER, None, None, 60, False),
        (NEARER, None, None, 99.5, True),  # no score exceeds 100%
    ],
)
def test_no_model_where_nothing_can_beat_the_best_free_arm_by_the_margin(
    prompting: Drop, pilot: Drop | None, measured_gain: Any, score: float, expected: bool
) -> None:
    best = arm("free-tfidf", "free", 0, score, 0, half=1)
    free = FreeArms(why="", dev=[best], best=best.name, left_out=(), prompting=prompting, tuned=pilot)
    signals = make_signals(gain=measured_gain, left_out={} if measured_gain else {"gain": "--no-pilot"})
    signals = signals.model_copy(update={"prompting": signals.prompting.model_copy(update={"free": free})})
    decision = decide(signals)
    assert (decision.answer == "no model") == expected
    assert measured(signals)["free arms"].startswith(f"Without a model, free-tfidf has {score:.1f}%")
    if expected:
        assert (decision.arm, decision.exit_code) == ("free-tfidf", 3)
        assert decision.why.startswith(f"No model is needed: neither {signals.prompting.best} nor an adapter")
        assert changes(signals, decision)
    elif decision.answer == "can't tell":
        told = f"free-tfidf is not worse than {signals.prompting.best} and needs no model."
        assert decision.why.endswith(told) == (prompting is NEARER)


def test_decision_names_the_cheapest_sufficient_arm() -> None:
    without = decide(make_signals(gain=WORSE, break_even=NEVER, cheapest="zero-shot"))
    assert (without.answer, without.arm, without.exit_code) == ("prompt", "zero-shot", 3)


def test_unconfirmed_gain_does_not_count() -> None:
    assert decide(make_signals(gain=gain(10, 5, 15, slope=STEEP, p_value=0.06))).answer == "can't tell"


def test_decision_is_unclear_below_six_clusters() -> None:
    for difference in (10, -10, 0):
        few = gain(difference, difference - 1, difference + 1, slope=FLAT, clusters=5)
        decision = decide(make_signals(gain=few, break_even=PAYS))
        assert (decision.answer, "5 independent dev clusters" in decision.why) == ("can't tell", True)


@pytest.mark.parametrize(
    ("rising", "most", "expected"),
    [
        ("yes", 8, "can't tell"),
        ("unclear", 8, "can't tell"),
        ("no", 8, "fine-tune"),
        ("yes", 7, "fine-tune"),  # eight do not fit
    ],
)
def test_demonstrations_that_fit_and_may_be_better_come_before_training(rising: Any, most: int, expected: str) -> None:
    context = make_signals().context
    message = context.model_copy(update={"curves": [curve(last=doubling(2, 4, 3.5, 1, 6), rising=rising, most=most)]})
    decision = decide(make_signals(context=message, gain=gain(10, 5, 15, slope=STEEP)))  # 5 <= 2 + 3.5
    assert decision.answer == expected
    if expected == "can't tell":
        assert "twice the demonstrations" in decision.why
        assert any(
            "add 8 to evaluate.num_fewshot" in c for c in changes(make_signals(context=message, gain=BEATS), decision)
        )


def test_decision_without_a_pilot_is_no_only_for_an_unbeatable_score() -> None:
    lacking = {"gain": None, "break_even": None, "left_out": {"gain": "--no-pilot", "break_even": "no pilot"}}
    decision = decide(make_signals(**lacking))
    assert (decision.answer, "--no-pilot" in decision.why) == ("can't tell", True)
    perfect = make_signals().prompting
    best = arm("retrieved-4", "retrieved", 4, 99.5, 160, half=1.0)
    perfect = perfect.model_copy(update={"arms": [*perfect.arms[:2], best]})
    assert decide(make_signals(**lacking, prompting=perfect)).answer == "retrieve"


def test_reach_of_all_rows_extrapolates_the_pilots_slope() -> None:
    # 100 of 400 rows: two doublings; interval's end 9, each doubling at most 10.
    assert Grounds(make_signals(gain=gain(3, -3, 9, slope=STEEP))).reach == pytest.approx(0.09 + 2 * 0.10)
    # Never more than what is missing to 1: the best prompting score is 40, at least 35.
    assert Grounds(make_signals(gain=gain(3, -3, 60, slope=STEEP))).reach == pytest.approx(0.65)
    assert Grounds(make_signals(gain=gain(3, -3, 9, slope=doubling(50, 100, -4, -9, -1)))).reach == pytest.approx(0.09)


points = st.floats(-60, 60)


@given(
    points, st.floats(0, 20), st.floats(0, 20), st.floats(0, 1), st.sampled_from([PAYS, TOO_FEW_CALLS, NEVER, ENDLESS])
)
def test_larger_gain_never_worsens_the_decision(
    difference: float, below: float, above: float, p_value: float, even: Any
) -> None:
    order = {"retrieve": 0, "can't tell": 1, "fine-tune": 2}
    answers = [
        decide(
            make_signals(
                gain=gain(d, d - below, d + above, slope=FLAT, p_value=p_value),
                break_even=even,
            )
        ).answer
        for d in (difference, difference + 1, difference + 30)
    ]
    assert [order[a] for a in answers] == sorted(order[a] for a in answers)


@given(points, st.floats(0, 20), st.floats(0, 20), st.sampled_from([PAYS, TOO_FEW_CALLS, NEVER, None]), st.booleans())
def test_stored_advice_gives_the_same_decision_and_text(
    difference: float, below: float, above: float, even: Any, steep: bool
) -> None:
    slope = STEEP if steep else FLAT
    signals = make_signals(
        gain=gain(difference, difference - below, difference + above, slope=slope),
        break_even=even,
        left_out={} if even else {"break_even": "left out"},
    )
    again = Signals.model_validate_json(signals.model_dump_json())
    decision = decide(again)
    assert decision == decide(signals)
    assert measured(again) == measured(signals)
    assert changes(again, decision) == changes(signals, decision)


# What would change the answer


def test_volume_and_price_at_which_a_pilot_that_is_as_good_pays_are_named() -> None:
    signals = make_signals(gain=AS_GOOD, break_even=TOO_FEW_CALLS)
    message = changes(signals, decide(signals))
    assert any("56,000 calls in 12 months (4,667 a month)" in line for line in message)
    # 12,000 calls at a saving of at least 0.0009 each.
    assert any("at most 10.80 in total; now 50.00" in line for line in message)


def test_unclear_gain_names_the_items_needed() -> None:
    signals = make_signals(gain=UNCLEAR, break_even=NEVER)
    message = " ".join(changes(signals, decide(signals)))
    # 3 points, 1 above the margin of 2, half width 6: (6 / 1)^2 * ((1.96 + 0.84) / 1.96)^2 * 200 items is out of reach.
    assert "Even 20 times as many may not settle it" in message
    near = make_signals(gain=gain(8, 1, 15, slope=FLAT), break_even=NEVER)
    # (7 / 6)^2 * 2.043 * 200 = 556, rounded up to two digits
    assert "About 560 (360 more)" in " ".join(changes(near, decide(near)))
    assert "8.0 points or more (80% power); the margin is 2" in " ".join(changes(near, decide(near)))


def test_decision_names_the_demonstrations_needed_to_catch_up() -> None:
    context = make_signals().context
    rising = context.model_copy(update={"curves": [curve(last=doubling(2, 4, 1.5, 0.5, 3), rising="no", most=40)]})
    signals = make_signals(context=rising, gain=gain(10, 5, 15, slope=STEEP))
    message = " ".join(changes(signals, decide(signals)))
    # 5 - 2 points at 1.5 a doubling are two doublings of four.
    assert "about k = 16 (retrieved by bm25), and 40 fit" in message


def test_decision_names_the_rows_needed_after_a_full_pilot() -> None:
    slope = doubling(200, 400, 4, 1, 7)
    signals = make_signals(gain=gain(-6, -14, 3, slope=slope, rows=400, p_value=0.2), break_even=NEVER)
    message = " ".join(changes(signals, decide(signals)))
    # 2 - (-6) points at 4 a doubling are two doublings of 400.
    assert "about 1,600 training rows are enough" in message
    flat = make_signals(gain=gain(-1, -9, 7, slope=FLAT, rows=400, p_value=0.4), break_even=NEVER)
    assert "training rows are enough" not in " ".join(changes(flat, decide(flat)))


def test_few_pairs_get_a_warning() -> None:
    assert expectations(make_signals(pairs=500)) == []
    message = " ".join(expectations(make_signals(pairs=499)))
    assert "499 pairs" in message and "8.0 points" in message and "crossval" in message


def test_stored_advice_is_decided_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    file.write_text(make_signals(gain=WORSE, break_even=NEVER).model_dump_json())
    code = (
        f"import sys\nsys.argv = ['tunewright', 'advise', {str(file)!r}, '--json']\n"
        "from tunewright.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 3, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"answer": "retrieve"' in done.stdout
