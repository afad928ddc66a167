"""The rate of a command's answers so far, and the arms that ``--minutes`` leaves out by this rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
    optional: bool = False
    """A time limit may leave the arm out."""


@dataclass(frozen=True)
class AnswersEstimate:
    """The number of answers that a command has to compute, at most."""

    text: str
    """The estimate in words."""
    answers: int
    """All answers, including kept ones."""
    kept: int
    """Answers that are already in the journal."""
    seconds: float | None = None
    """The expected time of the answers, by earlier ones of the project on this machine, with the suites that were timed
    here; None if no answer was timed."""

    @property
    def missing(self) -> int:
        """The number of answers to compute."""
        return self.answers - self.kept


class AnswerRate:
    """The rate of a command's answers so far."""

    def __init__(self, reporter: Reporter, keep: Callable[[str, int, float, bool], None] | None = None) -> None:
        self._reporter = reporter
        self._keep = keep
        """Called with each answered arm: its name, answers and seconds, and whether they contain loading the model."""
        self._began = monotonic()
        self._timed: list[tuple[int, float]] = []
        """Answers and seconds of each answered arm."""
        self._whole: Task | None = None

    @contextmanager
    def together(self, answers: int) -> Iterator[None]:
        """Show the progress of several arms, of at most this many answers, above the progress of each arm."""
        with self._reporter.task("All answers", answers, "answers") as self._whole:
            try:
                yield
            finally:
                self._whole = None

    def advance(self, answers: int = 1, *, kept: bool = False) -> None:
        """Show further answers of several arms, computed or kept from before."""
        if self._whole is not None:
            self._whole.advance(answers, kept=kept)

    @contextmanager
    def arm(self, title: str, answers: int) -> Iterator[Callable[[], None]]:
        """Time an arm's answers, and provide a function that shows one more of them."""
        began = monotonic()
        with self._reporter.task(title, answers, "answers") as task:

            def advance() -> None:
                task.advance()
                self.advance()

            yield advance
        seconds = monotonic() - began
        if self._keep is not None:
            self._keep(title.partition(" on ")[0], answers, seconds, not self._timed)
        self._timed.append((answers, seconds))

    def seconds_with(self, answers: int) -> float | None:
        """Return the seconds from the command's start to the end of further answers; None before an arm was timed."""
        # The first arm waits for the model to load, so it counts only while it is the only one.
        timed = self._timed[1:] or self._timed
        if not timed:
            return None
        each = sum(seconds for _, seconds in timed) / sum(count for count, _ in timed)
        return monotonic() - self._began + answers * each


class TimeLimit:
    """The limit of ``--minutes``: the first arm by value that does not fit is left out, with all later ones.

    The file keeps the decision, so that a resumed command leaves out the same arms on a machine of another
    speed. ``choice`` is the work of choosing the prompting arm, in order, and ``later`` the work after it.
    """

    def __init__(
        self,
        minutes: float,
        file: Path,
        rate: AnswerRate,
        choice: Sequence[Work],
        later: Sequence[Work],
        reporter: Reporter,
    ) -> None:
        self._minutes = minutes
        self._file = file
        self._rate = rate
        self._left = [*choice, *later]
        self._later = list(later)
        self._reporter = reporter
        self._some_fit = False
        self._decision: Budget | None = None
        if file.exists():
            self._decision = Budget.model_validate_json(file.read_text(encoding="utf-8"))

    @property
    def budget(self) -> Budget | None:
        """The evidence's entry; None while no arm is left out."""
        return self._decision if self._decision and self._decision.left_out else None

    def allows(self, arm: str) -> bool:
        """Return whether an arm is answered. Call it for the arms in the order of answering.

        Raises:
            UserError: there is no time even for the arms that are never left out.
        """
        # Only arms of the choice are passed; a comparison may have an arm of the same name.
        choice = [work.arm for work in self._left[: len(self._left) - len(self._later)]]
        if self._decision is None and arm in choice:
            del self._left[: choice.index(arm)]  # the arms before this arm are answered
            undecided = self._undecided()
            if undecided[:1] == [arm]:
                self._admit_first(undecided)
        return self._decision is None or arm not in self._decision.left_out

    def settle(self) -> None:
        """Decide on the arms that follow the choice of a prompt; raises as :meth:`allows`."""
        self._left = self._later
        undecided = self._undecided()
        while undecided and self._decision is None:
            self._admit_first(undecided)
            del undecided[0]
        if self._decision is None:
            self._decide((), self._seconds() or 0.0)

    def warn_of_no_speed(self) -> None:
        """Warn that no arm is left out, because the prompt was chosen before and nothing has been timed."""
        self._left = self._later
        if self._decision is None and self._undecided():
            self._reporter.warn(
                f"--minutes {self._minutes:g} leaves no arm out: the best prompting arm was chosen before, and without "
                "an answer of this command the speed is unknown."
            )

    def _undecided(self) -> list[str]:
        return [work.arm for work in self._left if work.optional and work.answers]

    def _seconds(self, without: Collection[str] = ()) -> float | None:
        return self._rate.seconds_with(sum(work.answers for work in self._left if work.arm not in without))

    def _admit_first(self, undecided: Sequence[str]) -> None:
        """Leave out all of these arms if there is no time for the first arm and the arms that are never left out."""
        most = 60 * self._minutes
        expected = self._seconds(without=undecided[1:])
        if expected is None or expected <= most:
            self._some_fit = self._some_fit or expected is not None
            return
        expected = self._seconds(without=undecided) or 0.0
        if expected > most and not self._some_fit:
            needed = math.ceil(expected / 60)
            left = dict.fromkeys(work.arm for work in self._left if work.answers and work.arm not in undecided)
            raise UserError(
                f"{self._minutes:g} minutes are too few: the arms that are never left out take about {needed}, at the "
                f"speed of the answers so far; still to answer: {', '.join(left)}",
                where="--minutes",
                fix=f"Give --minutes {needed} or more. The answers so far are kept.",
            )
        left_out = tuple(reversed(undecided))
        self._decide(left_out, expected)
        self._reporter.warn(f"--minutes {self._minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")

    def _decide(self, left_out: tuple[str, ...], expected: float) -> None:
        self._decision = Budget(minutes=self._minutes, expected=round(expected / 60, 2), left_out=left_out)
        write_json(self._file, self._decision.model_dump(mode="json"))
