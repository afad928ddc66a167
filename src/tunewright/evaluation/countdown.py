"""Progress over all answers of a command, weighted by their tokens, and the time until the last one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from time import monotonic

from tunewright.core.progress import LogTask, Reporter, Task

_PARTS = 100


@dataclass(eq=False)
class Work:
    """One arm's answers to some items.

    Args:
        arm: name of the arm.
        split: name of the items' split; empty where the arm's name says everything.
        answers: number of answers to compute.
        kept: number of answers that were in the journal before.
        tokens: work of each answer, see `tokens_each` (None: as much as the longest of the other arms).
        optional: a time limit may leave the arm out.
        done: number of computed answers.
    """

    arm: str
    split: str
    answers: int
    kept: int
    tokens: float | None
    optional: bool = False
    done: int = 0

    @property
    def title(self) -> str:
        """Title of the arm's own progress display, such as ``retrieved-8 on dev``."""
        return f"{self.arm} on {self.split}" if self.split else self.arm


def tokens_each(prompts: Collection[Sequence[int]], limit: int) -> float:
    """Return a simple measure of the work of an answer: the mean length of its prompt plus the longest answer."""
    return fmean(map(len, prompts)) + limit


class Countdown:
    """Completed answers among all answers, as a share of their tokens.

    Arms differ in speed by their prompts' lengths, so counting answers alone would mislead. The display extrapolates
    from the share.

    Args:
        reporter: shows the display.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._began = monotonic()
        self._stages: dict[str, list[Work]] = {}
        self._timed: list[tuple[float, float]] = []
        """Tokens and seconds of each answered arm."""
        self._task: Task | None = None
        self._shown = 0

    def plan(self, stage: str, works: Sequence[Work]) -> None:
        """Set the expected work of a stage, replacing any earlier expectation."""
        self._stages[stage] = list(works)

    def close(self, *stages: str) -> None:
        """Expect no more answers of stages that ended early."""
        for stage in stages:
            for work in self._stages.get(stage, ()):
                work.answers = work.done

    @property
    def works(self) -> list[Work]:
        """All planned work."""
        return [work for works in self._stages.values() for work in works]

    def expected(self, without: Collection[Work] = ()) -> float | None:
        """Return the seconds from the command's start to its last answer; None before an arm was answered.

        The speed is that of the arms so far. The first one waits for the model to load, so it counts only while it is
        the only one.

        Args:
            without: planned work that is not to be counted.
        """
        timed = self._timed[1:] or self._timed
        if not timed:
            return None
        missing = sum((w.answers - w.done) * each for w, each in self._weighted(without))
        seconds_each = sum(seconds for _, seconds in timed) / sum(tokens for tokens, _ in timed)
        return monotonic() - self._began + missing * seconds_each

    def _weighted(self, without: Collection[Work] = ()) -> list[tuple[Work, float]]:
        """Return planned work, and the tokens of each of its answers."""
        works = [work for work in self.works if work not in without]
        longest = max((work.tokens or 0 for work in works), default=0)
        return [(work, work.tokens or longest) for work in works]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show one display for all arms answered inside, or one per arm where nothing is planned."""
        if self._task is not None or all(work.done >= work.answers for work in self.works):
            yield
            return
        with self._reporter.task("All answers", _PARTS, "percent") as task:
            self._task, self._shown = task, 0
            self.advance()
            try:
                yield
            finally:
                self._task = None

    @contextmanager
    def arm(self, title: str, answers: int, tokens: float) -> Iterator[Task]:
        """Show the progress of one arm's answers, as a part of the whole display where there is one.

        Several arms may be in progress at once.

        Args:
            title: the title of its planned work, if any.
            answers: number of answers to compute.
            tokens: work of each answer, see `tokens_each`.
        """
        began = monotonic()
        if self._task is None:
            with self._reporter.task(title, answers, "answers") as task:
                yield task
        else:
            work = next((w for w in self.works if w.title == title and w.answers and not w.done), None)
            if work is None:
                work = Work(title, "", answers, 0, tokens)
                self._stages.setdefault("", []).append(work)
            work.answers, work.tokens = answers, tokens  # exact now
            yield _ArmTask(self, work)
        self._timed.append((answers * tokens, monotonic() - began))

    def advance(self, title: str = "") -> None:
        """Show the answers that are there, and the arm of the newest one."""
        assert self._task is not None
        works = self._weighted()
        whole = sum((work.kept + work.answers) * tokens for work, tokens in works)
        done = sum((work.kept + work.done) * tokens for work, tokens in works)
        percent = min(int(_PARTS * done / whole), _PARTS) if whole else 0
        there = sum(work.kept + work.done for work, _ in works)
        note = f"{there:,} of {sum(work.kept + work.answers for work, _ in works):,} answers"
        # Never backwards: a stage that turns out larger than expected slows the display down instead.
        self._task.advance(max(percent - self._shown, 0), f"{note}, {title}" if title else note)
        self._shown = max(percent, self._shown)


class _ArmTask(LogTask):
    """The part of one arm in the whole display."""

    def __init__(self, countdown: Countdown, work: Work) -> None:
        self._countdown = countdown
        self._work = work

    def advance(self, steps: int = 1, note: str = "") -> None:  # noqa: ARG002
        """Count steps as done; the whole display has its own note."""
        self._work.done += steps
        self._countdown.advance(self._work.title)
