"""One progress display over all answers of a command, weighted by the expected time of each arm's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tunewright.core.progress import Reporter, Task

_PARTS = 100


@dataclass(frozen=True)
class Work:
    """One arm's answers to some items.

    Args:
        title: title of the arm's own progress display, such as ``retrieved-8 on dev``.
        answers: number of answers still to compute.
        kept: number of answers already in the journal.
        seconds: expected time of each answer.
    """

    title: str
    answers: int
    kept: int
    seconds: float

    @property
    def left(self) -> float:
        """Seconds that the missing answers are expected to take."""
        return self.answers * self.seconds


class Countdown:
    """Completed answers among all answers, as a share of the expected time.

    Arms differ in speed by their prompts' lengths, so counting answers alone would mislead. The display counts percent
    of the expected seconds. Its own extrapolation then corrects a wrongly measured speed.

    Args:
        reporter: shows the display.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stages: dict[str, list[Work]] = {}
        self._done: list[Work] = []
        self._answered: dict[Work, int] = {}
        """Answers of the arms in progress."""
        self._task: Task | None = None
        self._shown = 0

    def plan(self, stage: str, works: Sequence[Work]) -> None:
        """Set the expected work of a stage, replacing any earlier expectation."""
        self._stages[stage] = list(works)

    def close(self, *stages: str) -> None:
        """Drop the remaining work of stages that ended early; journalled answers stay counted."""
        for stage in stages:
            self._stages[stage] = [work for work in self._stages.get(stage, ()) if not work.answers]

    @property
    def works(self) -> list[Work]:
        """All planned work that is not finished."""
        return [work for works in self._stages.values() for work in works]

    @property
    def counts(self) -> tuple[int, int]:
        """The number of completed answers and of all answers."""
        planned, done = self.works, self._done
        kept = sum(work.kept for work in [*planned, *done])
        finished = sum(work.answers for work in done)
        return kept + finished + sum(self._answered.values()), kept + finished + sum(work.answers for work in planned)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show one display for all arms answered inside, or one per arm where nothing is planned."""
        if self._task is not None or not any(work.answers for work in self.works):
            yield
            return
        with self._reporter.task("All answers", _PARTS, "percent") as task:
            self._task, self._shown = task, 0
            self._advance("")
            try:
                yield
            finally:
                self._task = None

    def arm(self, title: str, missing: int) -> AbstractContextManager[Task]:
        """Show the progress of one arm's answers, as a part of the whole display where there is one.

        Several arms may be in progress at once.
        """
        return self._reporter.task(title, missing, "answers") if self._task is None else self._within(title, missing)

    @contextmanager
    def _within(self, title: str, missing: int) -> Iterator[Task]:
        stage, planned = self._find(title)
        work = Work(title, missing, planned.kept, planned.seconds) if planned else Work(title, missing, 0, 0.0)
        if planned is not None:  # the number is exact now
            self._stages[stage][self._stages[stage].index(planned)] = work
        else:
            self._stages.setdefault(stage, []).append(work)
        self._answered[work] = 0
        try:
            yield _ArmTask(self, work)
        finally:
            del self._answered[work]
        self._stages[stage].remove(work)
        self._done.append(work)
        self._advance(title)

    def _find(self, title: str) -> tuple[str, Work | None]:
        for stage, works in self._stages.items():
            for work in works:
                if work.title == title and work.answers:
                    return stage, work
        return "", None

    def answered(self, work: Work, steps: int) -> None:
        """Count answers of an arm in progress."""
        self._answered[work] += steps
        self._advance(work.title)

    def _advance(self, title: str) -> None:
        assert self._task is not None
        done = sum(work.left + work.kept * work.seconds for work in self._done)
        done += sum(count * work.seconds for work, count in self._answered.items())
        done += sum(work.kept * work.seconds for work in self.works)
        whole = sum((work.answers + work.kept) * work.seconds for work in [*self.works, *self._done])
        percent = min(int(_PARTS * done / whole), _PARTS) if whole else 0
        there, all_answers = self.counts
        note = f"{there:,} of {all_answers:,} answers" + (f", {title}" if title else "")
        # Never backwards: a stage that turns out larger than expected slows the display down instead.
        self._task.advance(max(percent - self._shown, 0), note)
        self._shown = max(percent, self._shown)


class _ArmTask:
    """The part of one arm in the whole display."""

    def __init__(self, countdown: Countdown, work: Work) -> None:
        self._countdown = countdown
        self._work = work

    def advance(self, steps: int = 1, note: str = "") -> None:  # noqa: ARG002
        """Count steps as done; the whole display has its own note."""
        self._countdown.answered(self._work, steps)

    def measured(self, step: int, numbers: object) -> None:
        """Ignore measurements: answers have no curves."""
