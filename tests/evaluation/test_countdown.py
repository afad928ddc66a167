"""One display over all answers, weighted by tokens; the time until the last one, and the arms that a limit drops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from training_runs import Heard
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, LogTask, Task
from tunewright.evaluation import countdown as module
from tunewright.evaluation.countdown import Countdown, TimeLimit, Work, tokens_each


class _Seen(LogReporter):
    """Remembers what displays were opened, and the percent and note after each step."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int, str]] = []
        self.steps: list[tuple[int, str]] = []

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        self.opened.append((title, total, unit))
        seen, done = self.steps, 0

        class Counting(LogTask):
            def advance(self, steps: int = 1, note: str = "") -> None:
                nonlocal done
                done += steps
                seen.append((done, note))

        yield Counting()


def _arms() -> list[Work]:
    return [Work("zero-shot", "dev", 10, 0, 1.0), Work("retrieved-8", "dev", 10, 0, 9.0)]


def test_countdown_weights_slow_answers_more() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", _arms())
    with countdown.shown():
        for title, tokens in (("zero-shot on dev", 1.0), ("retrieved-8 on dev", 9.0)):
            with countdown.arm(title, 10, tokens) as task:
                for _ in range(10):
                    task.advance()
    assert reporter.opened == [("All answers", 100, "percent")]
    assert (10, "10 of 20 answers, zero-shot on dev") in reporter.steps
    assert (55, "15 of 20 answers, retrieved-8 on dev") in reporter.steps
    assert reporter.steps[-1] == (100, "20 of 20 answers, retrieved-8 on dev")


def test_countdown_counts_arms_that_are_answered_at_once() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", _arms())
    with countdown.shown():
        with (
            countdown.arm("zero-shot on dev", 10, 1.0) as fast,
            countdown.arm("retrieved-8 on dev", 10, 9.0) as slow,
        ):
            slow.advance(5)
            fast.advance(10)
            slow.advance(5)
        with countdown.arm("noise floor", 4, 1.0) as task:
            task.advance(4)
    assert (45, "5 of 20 answers, retrieved-8 on dev") in reporter.steps
    assert (55, "15 of 20 answers, zero-shot on dev") in reporter.steps
    assert (100, "20 of 20 answers, retrieved-8 on dev") in reporter.steps
    assert reporter.steps[-1] == (100, "24 of 24 answers, noise floor")


def test_countdown_starts_with_stored_answers_done() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("zero-shot", "dev", 5, 15, 2.0)])
    with countdown.shown():
        assert reporter.steps == [(75, "15 of 20 answers")]


def test_countdown_never_moves_backwards_when_a_stage_grows() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("a", "dev", 10, 0, 1.0)])
    countdown.plan("later", [Work("guess", "", 10, 0, 1.0)])
    with countdown.shown():
        with countdown.arm("a on dev", 10, 1.0) as task:
            task.advance(10)
        countdown.plan("later", [Work("b", "dev", 90, 0, 1.0)])
        with countdown.arm("b on dev", 90, 1.0) as task:
            for _ in range(90):
                task.advance()
    shown = [percent for percent, _ in reporter.steps]
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert reporter.steps[-1][1] == "100 of 100 answers, b on dev"


def test_countdown_expects_nothing_more_of_closed_stages() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("guess", "", 10, 0, 1.0), Work("zero-shot", "dev", 0, 20, 1.0)])
    countdown.plan("later", [Work("tuned", "dev", 20, 0, 1.0)])
    countdown.close("first", "never planned")
    with countdown.shown():
        assert reporter.steps == [(50, "20 of 40 answers")]


def test_countdown_shows_each_arm_without_a_plan() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    with countdown.shown(), countdown.arm("tuned on the fold", 7, 1.0) as task:
        task.advance()
    assert reporter.opened == [("tuned on the fold", 7, "answers")]


def test_tokens_of_an_answer_are_its_prompt_and_its_limit() -> None:
    assert tokens_each([(1, 2), (3, 4, 5, 6)], 10) == 13


class _Clock:
    """A clock that an arm's answers advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(module, "monotonic", found)
    return found


def test_time_of_missing_answers_follows_the_speed_of_the_answers_so_far(clock: _Clock) -> None:
    countdown = Countdown(LogReporter())
    short, long = Work("zero-shot", "dev", 10, 0, 10.0), Work("retrieved-8", "dev", 10, 0, 90.0)
    unknown = Work("the best prompting arm", "test", 5, 0, None)
    countdown.plan("first", [short, long])
    countdown.plan("contest", [unknown])
    assert countdown.expected() is None
    with countdown.shown(), countdown.arm("zero-shot on dev", 10, 10.0) as task:
        clock.now += 50.0
        task.advance(10)
    # 50 s for 100 tokens; the arm that is not known yet counts as much as the longest of those that are counted.
    assert countdown.expected() == pytest.approx(50 + 0.5 * (900 + 5 * 90))
    assert countdown.expected([long]) == pytest.approx(50 + 0.5 * 5 * 10)
    assert countdown.expected([long, unknown]) == pytest.approx(50)


def test_first_arm_which_loads_the_model_counts_until_another_is_answered(clock: _Clock) -> None:
    countdown = Countdown(LogReporter())
    for seconds in (60.0, 1.0):
        with countdown.arm("an arm", 10, 1.0):
            clock.now += seconds
    countdown.plan("later", [Work("tuned", "test", 20, 0, 1.0)])
    assert countdown.expected() == pytest.approx(61 + 2)


def test_interrupted_arm_does_not_count_for_the_speed(clock: _Clock) -> None:
    countdown = Countdown(LogReporter())
    with pytest.raises(KeyboardInterrupt), countdown.arm("an arm", 10, 1.0):
        raise KeyboardInterrupt
    assert countdown.expected() is None


# The time limit

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
