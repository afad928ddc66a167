"""One display over all answers, weighted by what each is expected to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tunewright.core.progress import LogReporter, LogTask, Task
from tunewright.evaluation.eta import Countdown, Work
from tunewright.evaluation.speed import TimedBatch, fitted


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


def test_countdown_weights_slow_answers_more() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("zero-shot on dev", 10, 0, 1.0), Work("retrieved-8 on dev", 10, 0, 9.0)])
    with countdown.shown():
        for title in ("zero-shot on dev", "retrieved-8 on dev"):
            with countdown.arm(title, 10) as task:
                for _ in range(10):
                    task.advance()
    assert reporter.opened == [("All answers", 100, "percent")]
    assert (10, "10 of 20 answers, zero-shot on dev") in reporter.steps
    assert (55, "15 of 20 answers, retrieved-8 on dev") in reporter.steps
    assert reporter.steps[-1] == (100, "20 of 20 answers, retrieved-8 on dev")


def test_countdown_counts_arms_that_are_answered_at_once() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("zero-shot on dev", 10, 0, 1.0), Work("retrieved-8 on dev", 10, 0, 9.0)])
    with countdown.shown():
        with countdown.arm("zero-shot on dev", 10) as fast, countdown.arm("retrieved-8 on dev", 10) as slow:
            slow.advance(5)
            fast.advance(10)
            slow.advance(5)
        with countdown.arm("noise floor", 4) as task:
            task.advance(4)
    assert (45, "5 of 20 answers, retrieved-8 on dev") in reporter.steps
    assert (55, "15 of 20 answers, zero-shot on dev") in reporter.steps
    assert (100, "20 of 20 answers, retrieved-8 on dev") in reporter.steps


def test_countdown_starts_with_stored_answers_done() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("zero-shot on dev", 5, 15, 2.0)])
    with countdown.shown():
        assert reporter.steps == [(75, "15 of 20 answers")]


def test_countdown_never_moves_backwards_when_a_stage_grows() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    countdown.plan("first", [Work("a on dev", 10, 0, 1.0)])
    countdown.plan("later", [Work("guess", 10, 0, 1.0)])
    with countdown.shown():
        with countdown.arm("a on dev", 10) as task:
            task.advance(10)
        countdown.plan("later", [Work("b on dev", 90, 0, 1.0)])
        with countdown.arm("b on dev", 90) as task:
            for _ in range(90):
                task.advance()
    shown = [percent for percent, _ in reporter.steps]
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert reporter.steps[-1][1] == "100 of 100 answers, b on dev"


def test_countdown_drops_missing_answers_with_their_stage() -> None:
    countdown = Countdown(_Seen())
    countdown.plan("first", [Work("guess", 10, 0, 1.0), Work("zero-shot on dev", 0, 20, 1.0)])
    countdown.close("first", "never planned")
    assert countdown.counts == (20, 20)


def test_countdown_shows_each_arm_without_a_plan() -> None:
    reporter = _Seen()
    countdown = Countdown(reporter)
    with countdown.shown(), countdown.arm("tuned on the fold", 7) as task:
        task.advance()
    assert reporter.opened == [("tuned on the fold", 7, "answers")]


def test_speed_separates_prompt_and_answer_tokens_from_two_batches() -> None:
    read, write = fitted(
        [
            TimedBatch(rows=8, read=100, written=200, seconds=100 * 0.002 + 200 * 0.03),
            TimedBatch(rows=8, read=4000, written=150, seconds=4000 * 0.002 + 150 * 0.03),
        ]
    )
    assert read == pytest.approx(0.002)
    assert write == pytest.approx(0.03)


def test_speed_is_never_negative() -> None:
    read, write = fitted(
        [
            TimedBatch(rows=8, read=100, written=200, seconds=9.0),
            TimedBatch(rows=8, read=4000, written=150, seconds=5.0),
        ]
    )
    assert read >= 0
    assert write > 0
