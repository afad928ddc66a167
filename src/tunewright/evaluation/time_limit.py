"""The rate of a command's answers so far, and the arms that ``--minutes`` leaves out by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import monotonic

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter, Task
from tunewright.evidence.common import RULE, Budget


@dataclass(frozen=True)
class Work:
    """One arm's answers to some items."""

    arm: str
    answers: int
    """Number of answers to compute."""
    kept: int = 0
    """Number of answers that are in the journal already."""
    tokens: float | None = None
    """Work of each answer, see `tokens_each` (None: as much as in the longest of the other arms, answered or not)."""
    optional: bool = False
    """A time limit may leave the arm out."""


def tokens_each(prompts: Collection[Sequence[int]], limit: int) -> float:
    """Return a simple measure of the work of an answer: the mean length of its prompt plus the longest answer."""
    return fmean(map(len, prompts)) + limit


class AnswerRate:
    """The rate of a command's answers so far. Arms differ by their prompts' lengths, so it counts tokens."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._began = monotonic()
        self._timed: list[tuple[float, float]] = []
        """Tokens and seconds of each answered arm."""
        self._longest = 0.0
        self._whole: Task | None = None

    @contextmanager
    def together(self, answers: int) -> Iterator[None]:
        """Show the progress of several arms, of at most this many answers, above that of each arm."""
        with self._reporter.task("All answers", answers, "answers") as self._whole:
            try:
                yield
            finally:
                self._whole = None

    def advance(self, answers: int = 1) -> None:
        """Show further answers of several arms, computed or kept from before."""
        if self._whole is not None:
            self._whole.advance(answers)

    @contextmanager
    def arm(self, title: str, answers: int, tokens: float) -> Iterator[Task]:
        """Show the progress of an arm's answers, and time them; ``tokens`` are the work of each."""
        began = monotonic()
        self._longest = max(self._longest, tokens)
        with self._reporter.task(title, answers, "answers") as task:
            yield _ArmTask(task, self)
        self._timed.append((answers * tokens, monotonic() - began))

    def seconds_with(self, works: Collection[Work]) -> float | None:
        """Return the seconds from the command's start to the end of this work; None before an arm was answered."""
        # The first arm waits for the model to load, so it counts only while it is the only one.
        timed = self._timed[1:] or self._timed
        if not timed:
            return None
        longest = max([self._longest, *(work.tokens or 0 for work in works)])
        missing = sum(work.answers * (work.tokens or longest) for work in works)
        seconds_each = sum(seconds for _, seconds in timed) / sum(tokens for tokens, _ in timed)
        return monotonic() - self._began + missing * seconds_each


@dataclass(frozen=True)
class _ArmTask:
    """The progress of an arm, which is a part of that of all arms."""

    task: Task
    rate: AnswerRate

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.task.advance(steps, note)
        self.rate.advance(steps)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        self.task.measured(step, numbers)


class TimeLimit:
    """The limit of ``--minutes``: the first arm by value that does not fit is left out, with all later ones.

    The file keeps the decision, so that a resumed command leaves out the same arms on a machine of another speed.
    ``remaining`` returns the work that the command still has to do, without the arms of these names; the flag says if
    the best prompting arm is chosen.
    """

    def __init__(
        self,
        minutes: float,
        file: Path,
        rate: AnswerRate,
        remaining: Callable[[Collection[str], bool], list[Work]],
        reporter: Reporter,
    ) -> None:
        self._minutes = minutes
        self._file = file
        self._rate = rate
        self._remaining = remaining
        self._reporter = reporter
        self._allowed: set[str] = set()
        self._some_fit = False
        self._chosen = False
        self._decision: Budget | None = None
        if file.exists():
            self._decision = Budget.model_validate_json(file.read_text(encoding="utf-8"))

    @property
    def budget(self) -> Budget | None:
        """The evidence's entry; None while no arm is left out."""
        return self._decision if self._decision and self._decision.left_out else None

    def allows(self, arm: str) -> bool:
        """Return whether an arm is answered.

        Raises:
            UserError: there is no time even for the arms that are never left out.
        """
        if self._decision is not None:
            return arm not in self._decision.left_out
        undecided = self._undecided()
        if undecided[:1] != [arm]:
            return True  # never left out, or its answers are all there
        expected = self._rate.seconds_with(self._remaining(undecided[1:], self._chosen))
        if expected is not None and expected > 60 * self._minutes:
            self._leave_out(undecided)
            return False
        self._some_fit = self._some_fit or expected is not None
        self._allowed.add(arm)
        return True

    def settle(self) -> None:
        """Decide on the arms that follow the choice of a prompt; raises as :meth:`allows`."""
        self._chosen = True
        for arm in self._undecided():
            self.allows(arm)
        if self._decision is None:
            self._decide((), self._rate.seconds_with(self._remaining((), self._chosen)) or 0.0)

    def warn_of_no_speed(self) -> None:
        """Warn that no arm is left out, because the prompt was chosen before and nothing has been timed."""
        self._chosen = True
        if self._decision is None and self._undecided():
            self._reporter.warn(
                f"--minutes {self._minutes:g} leaves no arm out: the best prompting arm was chosen before, and without "
                "an answer of this command the speed is unknown."
            )

    def _undecided(self) -> list[str]:
        """Return the arms that may be left out, in the order of answering."""
        works = self._remaining((), self._chosen)
        return [work.arm for work in works if work.optional and work.answers and work.arm not in self._allowed]

    def _leave_out(self, arms: Sequence[str]) -> None:
        works = self._remaining(arms, self._chosen)
        expected = self._rate.seconds_with(works) or 0.0
        if expected > 60 * self._minutes and not self._some_fit:
            needed = math.ceil(expected / 60)
            left = ", ".join(dict.fromkeys(work.arm for work in works if work.answers))
            raise UserError(
                f"{self._minutes:g} minutes are too few: the arms that are never left out take about {needed}, at the "
                f"speed of the answers so far; still to answer: {left}",
                where="--minutes",
                fix=f"Give --minutes {needed} or more. The answers so far are kept.",
            )
        left_out = tuple(reversed(arms))
        self._decide(left_out, expected)
        self._reporter.warn(f"--minutes {self._minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")

    def _decide(self, left_out: tuple[str, ...], expected: float) -> None:
        self._decision = Budget(minutes=self._minutes, expected=round(expected / 60, 2), left_out=left_out)
        write_json(self._file, self._decision.model_dump(mode="json"))
