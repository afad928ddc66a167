"""Divergence checks: which runs are stopped, and what a normal run may do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.data.examples import Example, Message
from tunewright.data.versions import Member
from tunewright.training.monitoring import UnstableRunError, fault

VOCABULARY = 32_000
CHANCE = math.log(VOCABULARY)


def _member(number: int) -> Member:
    example = Example((Message("user", f"question {number}"), Message("assistant", "answer")))
    return Member(example, f"{number:064x}"[::-1], "train", str(number))


def _first_fault(losses: list[float]) -> int | None:
    """Return the step, from 1, at which a run with these losses is stopped."""
    steps = range(1, len(losses) + 1)
    return next((n for n in steps if fault(losses[n - 1], 1.0, losses[:n], VOCABULARY)), None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fault_reports_a_non_finite_loss_or_gradient_at_once(bad: float) -> None:
    assert fault(bad, 1.0, [bad], VOCABULARY) == f"the loss is {bad}"
    message = fault(0.5, bad, [0.5], VOCABULARY)
    assert message is not None
    assert "gradient" in message


def test_fault_reports_five_steps_worse_than_chance() -> None:
    assert _first_fault([2.0, 1.5, *[CHANCE + 2] * 6]) == 7
    assert _first_fault([2.0, 1.5, *[CHANCE + 2] * 4, 2.0]) is None


def test_fault_reports_ten_steps_above_all_of_the_first_ten() -> None:
    falling = [2.0 - 0.1 * n for n in range(10)]
    assert _first_fault([*falling, *[0.8] * 20, *[3.5] * 12]) == 40
    assert _first_fault([*falling, *[3.5] * 9, 1.0, *[3.5] * 9]) is None


def test_fault_tolerates_a_base_that_starts_above_chance() -> None:
    start = CHANCE + 4
    assert _first_fault([start - 0.1 * n for n in range(40)]) is None


@given(
    # With the worst noise and bump in a row still no nat above chance, which a model that learns never is for long.
    start=st.floats(0.5, 5.5),
    floor=st.floats(0.0, 0.9),
    noise=st.lists(st.floats(0.6, 1.7), min_size=60, max_size=60),
    bump=st.floats(1.0, 1.2),
    spikes=st.sets(st.integers(1, 59), max_size=3),
)
def test_fault_never_stops_a_run_that_learns(
    start: float, floor: float, noise: list[float], bump: float, spikes: set[int]
) -> None:
    """Noisy batches, a rise at the end of the warm-up (steps 4 to 9), single spikes."""
    losses = []
    for step, factor in enumerate(noise):
        mean = start * (floor + (1 - floor) * math.exp(-max(step - 9, 0) / 20))
        losses.append(mean * factor * (bump if 4 <= step <= 9 else 1) + (20 if step in spikes else 0))
    assert _first_fault(losses) is None


def test_diverged_error_names_the_rows_of_the_step() -> None:
    members = [_member(n) for n in range(30)]
    error = UnstableRunError("the loss is nan", 7, [3, *range(10, 20), 99]).as_user_error(members)
    assert "the loss is nan at step 7" in error.what
    assert members[3].key[:12] in error.what
    assert "'question 3'" in error.what
    assert "and 3 more" in error.what
    assert error.where == "train.learning_rate"
