"""One display over all answers, weighted by their tokens, and the time until the last one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tunewright.core.progress import LogReporter, LogTask, Task
from tunewright.evaluation import countdown as module
from tunewright.evaluation.countdown import Countdown, Work, tokens_each


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
