"""The rate of the answers so far, and the arms that a time limit leaves out by it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from making.training_runs import Heard
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.evaluation import time_limit as module
from tunewright.evaluation.time_limit import AnswerRate, TimeLimit, Work

OPTIONAL = ("retrieved-2", "retrieved-8", "static-8-seed-1", "tuned+constrained", "tuned+retrieved")


class _Clock:
    """A clock that an arm's answers advance."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(module, "monotonic", found)
    return found


def test_time_of_missing_answers_follows_the_rate_of_the_answers_so_far(clock: _Clock) -> None:
    rate = AnswerRate(LogReporter())
    long, unknown = Work("retrieved-8", 10, tokens=90.0), Work("the best prompting arm", 5)
    assert rate.seconds_with([long]) is None
    with rate.arm("zero-shot on dev", 10, 10.0):
        clock.now += 50.0
    # 50 s for 100 tokens; an arm that is not known yet counts as much as the longest one.
    assert rate.seconds_with([long, unknown]) == pytest.approx(50 + 0.5 * (900 + 5 * 90))
    assert rate.seconds_with([]) == pytest.approx(50)
    with rate.arm("retrieved-8 on dev", 10, 90.0):
        clock.now += 9.0
    # The first arm loaded the model, so it counts only while it is the only one.
    assert rate.seconds_with([Work("tuned", 20, tokens=1.0)]) == pytest.approx(59 + 0.2)


def test_interrupted_arm_does_not_count_for_the_rate(clock: _Clock) -> None:
    rate = AnswerRate(LogReporter())
    with pytest.raises(KeyboardInterrupt), rate.arm("an arm", 10, 1.0):
        raise KeyboardInterrupt
    assert rate.seconds_with([]) is None


def test_answered_arm_still_counts_as_the_longest(clock: _Clock, file: Path) -> None:
    rate = AnswerRate(Heard())
    left = [Work("zero-shot", 10, tokens=1.0), Work("tuned+retrieved", 10, optional=True)]
    limit = TimeLimit(1, file, rate, lambda without, _: [work for work in left if work.arm not in without], Heard())
    with rate.arm("retrieved-8 on dev", 10, 5.0):
        clock.now += 50.0
    limit.settle()  # the other arms take 10 s at a second for each token, and 50 s with this one
    assert not limit.allows("tuned+retrieved")
    assert limit.budget is not None and limit.budget.expected == 1.0


class _Command:
    """A command on a machine that takes a second for each answer, and answers 60 for each arm: a minute."""

    def __init__(self, clock: _Clock, file: Path, minutes: float) -> None:
        self.clock, self.each = clock, 1.0
        self.heard, self.answered = Heard(), list[str]()
        self.rate = AnswerRate(self.heard)
        self.limit = TimeLimit(minutes, file, self.rate, self.remaining, self.heard)

    def remaining(self, without: Collection[str], chosen: bool) -> list[Work]:
        arms = ["zero-shot", "retrieved-1", *OPTIONAL[:3], "tuned", *OPTIONAL[3:]]
        left = [arm for arm in arms if arm not in (*self.answered, *without) and not (chosen and arm in arms[:5])]
        return [Work(arm, 60, tokens=1.0, optional=arm in OPTIONAL) for arm in left]

    def choose(self) -> list[str]:
        """Answer the arms on dev that the limit allows, and return them."""
        for arm in ("zero-shot", "retrieved-1", *OPTIONAL[:3]):
            if self.limit.allows(arm):
                self.answer(arm)
        self.limit.settle()
        return self.answered

    def answer(self, arm: str) -> None:
        with self.rate.arm(arm, 60, 1.0):
            self.clock.now += 60 * self.each
        self.answered.append(arm)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "budgets" / "decision.json"


@pytest.mark.parametrize("fitting", range(len(OPTIONAL) + 1))
def test_limit_leaves_out_the_last_arms_by_value(clock: _Clock, file: Path, fitting: int) -> None:
    command = _Command(clock, file, minutes=3 + fitting)
    assert command.choose() == ["zero-shot", "retrieved-1", *OPTIONAL[: min(fitting, 3)]]
    left_out = OPTIONAL[fitting:]
    assert [arm for arm in OPTIONAL if not command.limit.allows(arm)] == list(left_out)
    budget, warned = command.limit.budget, [line for line in command.heard.lines if "left out" in line]
    if not left_out:
        assert (budget, warned) == (None, [])
        return
    assert budget is not None
    # The first to be left out is named first.
    assert (budget.minutes, budget.expected, budget.left_out) == (3 + fitting, 3 + fitting, left_out[::-1])
    assert len(warned) == 1 and ", ".join(left_out[::-1]) in warned[0]


def test_limit_below_the_arms_that_are_never_left_out_is_refused(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=2.9)
    with pytest.raises(UserError, match=r"2\.9 .* 3, .*: tuned\n") as refused:
        command.choose()
    assert refused.value.where == "--minutes" and "--minutes 3" in str(refused.value.fix)
    assert not file.exists()


def test_slow_run_is_not_stopped(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=4)
    command.answer("zero-shot")
    command.answer("retrieved-1")
    assert command.limit.allows("retrieved-2")
    command.each = 10.0
    command.answer("retrieved-2")
    assert not command.limit.allows("retrieved-8")
    assert command.limit.budget is not None and command.limit.budget.expected > 4


@pytest.mark.parametrize(("minutes", "chosen"), [(4, OPTIONAL[:1]), (8, OPTIONAL[:3])])
def test_resumed_command_leaves_out_the_same_arms_on_another_machine(
    clock: _Clock, file: Path, minutes: int, chosen: tuple[str, ...]
) -> None:
    first = _Command(clock, file, minutes)
    first.choose()
    other = _Command(clock, file, minutes)
    other.each = 0.01 if minutes == 4 else 10.0
    assert other.choose() == ["zero-shot", "retrieved-1", *chosen]
    assert other.limit.budget == first.limit.budget
    assert other.limit.allows("tuned+retrieved") is (minutes == 8)


def test_no_arm_is_left_out_while_the_rate_is_unknown(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=0.01)
    assert command.limit.allows("retrieved-2")
    command.limit.warn_of_no_speed()
    assert any("--minutes 0.01" in line for line in command.heard.lines)
