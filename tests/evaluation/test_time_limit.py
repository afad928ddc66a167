"""The arms that a time limit leaves out, by the speed of the answers so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from preference_helpers import Heard
from tunewright.core.errors import UserError
from tunewright.evaluation import countdown as module
from tunewright.evaluation.countdown import Countdown, TimeLimit, Work

OPTIONAL = ("retrieved-2", "retrieved-8", "static-8-seed-1", "tuned+constrained", "tuned+retrieved")


class _Command:
    """A command on a machine that takes a second for each answer, and answers 60 for each arm: a minute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path, minutes: float) -> None:
        self.seconds = 0.0
        self.each = 1.0
        monkeypatch.setattr(module, "monotonic", lambda: self.seconds)
        self.heard = Heard()
        self.countdown = Countdown(self.heard)
        self.limit = TimeLimit(minutes, file, self.countdown, self.heard)
        works = [Work(arm, "dev", 60, 0, 1.0) for arm in ("zero-shot", "retrieved-1")]
        options = [Work(arm, "dev", 60, 0, 1.0, optional=True) for arm in OPTIONAL]
        self.countdown.plan("entrants", [*works, *options[:3]])
        self.countdown.plan("contest", [Work("tuned", "test", 60, 0, 1.0), *options[3:]])
        self.options = options

    def choose(self) -> list[str]:
        """Answer the arms on dev that the limit allows, and return them."""
        answered = []
        with self.countdown.shown():
            for arm in ("zero-shot", "retrieved-1", *OPTIONAL[:3]):
                if self.limit.allows(arm):
                    self.answer(f"{arm} on dev")
                    answered.append(arm)
            self.limit.settle()
        return answered

    def answer(self, title: str) -> None:
        with self.countdown.arm(title, 60, 1.0) as task:
            self.seconds += 60 * self.each
            task.advance(60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "budgets" / "decision.json"


@pytest.mark.parametrize("fitting", range(len(OPTIONAL) + 1))
def test_limit_leaves_out_the_last_arms_by_value(monkeypatch: pytest.MonkeyPatch, file: Path, fitting: int) -> None:
    command = _Command(monkeypatch, file, minutes=3 + fitting)
    assert command.choose() == ["zero-shot", "retrieved-1", *OPTIONAL[: min(fitting, 3)]]
    left_out = OPTIONAL[fitting:]
    assert [arm for arm in OPTIONAL if not command.limit.allows(arm)] == list(left_out)
    warnings = [line for line in command.heard.lines if "left out" in line]
    if not left_out:
        assert (command.limit.budget, warnings) == (None, [])
        return
    budget = command.limit.budget
    assert budget is not None
    # The first to be left out is named first.
    assert (budget.minutes, budget.expected, budget.left_out) == (3 + fitting, 3 + fitting, left_out[::-1])
    assert len(warnings) == 1 and ", ".join(left_out[::-1]) in warnings[0]


def test_limit_below_the_arms_that_are_never_left_out_is_refused(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    command = _Command(monkeypatch, file, minutes=2.9)
    with pytest.raises(UserError, match=r"2\.9 minutes are too few: .* about 3, .*; still to .*: tuned\n") as refused:
        command.choose()
    assert refused.value.where == "--minutes"
    assert refused.value.fix == "Give --minutes 3 or more. The answers so far are kept."
    assert not file.exists()


def test_limit_does_not_count_what_only_follows_arms_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    command = _Command(monkeypatch, file, minutes=3)
    finalists = [Work("a finalist", "dev", 60, 0, 1.0, needs=arm) for arm in command.options]
    command.countdown.plan("finalists", finalists)
    assert command.choose() == ["zero-shot", "retrieved-1"]
    assert command.limit.budget is not None and command.limit.budget.expected == 3


def test_slow_run_is_not_stopped(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    command = _Command(monkeypatch, file, minutes=4)
    with command.countdown.shown():
        command.answer("zero-shot on dev")
        command.answer("retrieved-1 on dev")
        assert command.limit.allows("retrieved-2")
        command.each = 10.0
        command.answer("retrieved-2 on dev")
        assert not command.limit.allows("retrieved-8")
    assert command.limit.budget is not None
    assert command.limit.budget.expected > 4


def test_resumed_command_leaves_out_the_same_arms_on_another_machine(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    _Command(monkeypatch, file, minutes=4).choose()
    faster = _Command(monkeypatch, file, minutes=4)
    faster.each = 0.01
    assert faster.choose() == ["zero-shot", "retrieved-1", "retrieved-2"]
    assert not faster.limit.allows("tuned+retrieved")


def test_resumed_command_leaves_out_no_arm_if_all_had_time(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    _Command(monkeypatch, file, minutes=8).choose()
    slower = _Command(monkeypatch, file, minutes=8)
    slower.each = 10.0
    assert slower.choose() == ["zero-shot", "retrieved-1", *OPTIONAL[:3]]
    assert slower.limit.budget is None


def test_arm_is_answered_while_the_speed_is_unknown(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    command = _Command(monkeypatch, file, minutes=0.01)
    assert command.limit.allows("retrieved-2")
