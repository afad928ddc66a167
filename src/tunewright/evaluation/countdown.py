"""The rate of a command's answers so far: its progress display, and the arms that ``--minutes`` leaves out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import LogTask, Reporter, Task
from tunewright.evidence.common import RULE, Budget

_PARTS = 100


@dataclass(eq=False)
class Work:
    """One arm's answers to some items."""

    arm: str
    split: str
    """Empty where the arm's name says everything."""
    answers: int
    """Number of answers to compute."""
    kept: int
    """Number of answers that were in the journal before."""
    tokens: float | None
    """Work of each answer, see `tokens_each` (None: as much as the longest of the other arms)."""
    optional: bool = False
    """A time limit may leave the arm out."""
    needs: Work | None = None
    """The arm without which these answers are not needed."""
    done: int = 0
    """Number of computed answers."""

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

        Planned arms ``without`` are not counted, nor what needs them. The speed is that of the arms so far. The first
        one waits for the model to load, so it counts only while it is the only one.
        """
        timed = self._timed[1:] or self._timed
        if not timed:
            return None
        missing = sum((w.answers - w.done) * each for w, each in self._weighted(without))
        seconds_each = sum(seconds for _, seconds in timed) / sum(tokens for tokens, _ in timed)
        return monotonic() - self._began + missing * seconds_each

    def _weighted(self, without: Collection[Work] = ()) -> list[tuple[Work, float]]:
        """Return planned work, and the tokens of each of its answers."""
        works = [work for work in self.works if work not in without and work.needs not in without]
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


class TimeLimit:
    """The limit of ``--minutes``: the first arm by value that does not fit is left out, with all later ones.

    The file keeps the decision, so that a resumed command leaves out the same arms on a machine of another speed.
    """

    def __init__(self, minutes: float, file: Path, countdown: Countdown, reporter: Reporter) -> None:
        self.minutes = minutes
        self._file = file
        self._countdown = countdown
        self._reporter = reporter
        self._allowed: list[Work] = []
        self._some_fit = False
        self.decision: Budget | None = None
        """None: no arm was decided on yet."""
        if file.exists():
            self.decision = Budget.model_validate_json(file.read_text(encoding="utf-8"))

    @property
    def budget(self) -> Budget | None:
        """The evidence's entry; None while no arm is left out."""
        return self.decision if self.decision and self.decision.left_out else None

    @property
    def _undecided(self) -> list[Work]:
        """The arms that may be left out, in the order of answering."""
        return [work for work in self._countdown.works if work.optional and work.answers and work not in self._allowed]

    def allows(self, arm: str) -> bool:
        """Return whether an arm is answered.

        Raises:
            UserError: there is no time even for the arms that are never left out.
        """
        if self.decision is not None:
            return arm not in self.decision.left_out
        undecided = self._undecided
        if not undecided or undecided[0].arm != arm:
            return True
        expected = self._countdown.expected(undecided[1:])
        if expected is not None and expected > 60 * self.minutes:
            self._leave_out(undecided)
            return False
        self._some_fit = self._some_fit or expected is not None
        self._allowed.append(undecided[0])
        return True

    def _leave_out(self, arms: Sequence[Work]) -> None:
        works = self._countdown.works
        without = [work for work in works if work in arms or work.needs in arms]
        expected = self._countdown.expected(without) or 0.0
        if expected > 60 * self.minutes and not self._some_fit:
            needed = math.ceil(expected / 60)
            left = [work for work in works if work.done < work.answers and work not in without]
            raise UserError(
                f"{self.minutes:g} minutes are too few: the arms that are never left out take about {needed}, at the "
                f"speed of the answers so far; still to answer: {', '.join(dict.fromkeys(work.arm for work in left))}",
                where="--minutes",
                fix=f"Give --minutes {needed} or more. The answers so far are kept.",
            )
        left_out = tuple(work.arm for work in reversed(arms))
        for work in without:
            work.answers = 0
        self._decide(left_out, expected)
        self._reporter.warn(f"--minutes {self.minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")

    def settle(self) -> None:
        """Decide on the arms that follow the choice of a prompt; raises as :meth:`allows`."""
        for work in self._undecided:
            self.allows(work.arm)
        if self.decision is None:
            self._decide((), self._countdown.expected() or 0.0)

    def _decide(self, left_out: tuple[str, ...], expected: float) -> None:
        self.decision = Budget(minutes=self.minutes, expected=round(expected / 60, 2), left_out=left_out)
        write_json(self._file, self.decision.model_dump(mode="json"))
