"""The limit of ``--minutes``: the arms that there is no time for, by the speed of the answers so far."""

from __future__ import annotations

import math
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.evaluation.countdown import Countdown, Work
from tunewright.evidence.common import RULE, Budget


class TimeLimit:
    """A command's time limit. Arms are answered by value; the first that does not fit is left out with all later ones.

    Args:
        minutes: the limit, above 0.
        file: keeps the decision, so that a resumed command leaves out the same arms on a machine of another speed.
        countdown: the command's answers.
        reporter: names the arms that are left out.
    """

    def __init__(self, minutes: float, file: Path, countdown: Countdown, reporter: Reporter) -> None:
        self.minutes = minutes
        self.undecided: list[list[Work]] = []
        """The arms that may be left out, in the order of answering; each with what follows only if it is answered."""
        self._file = file
        self._countdown = countdown
        self._reporter = reporter
        self._some_fit = False
        self.decision: Budget | None = None
        """None: no arm was decided on yet."""
        if file.exists():
            self.decision = Budget.model_validate_json(file.read_text(encoding="utf-8"))

    @property
    def budget(self) -> Budget | None:
        """The evidence's entry; None while no arm is left out."""
        return self.decision if self.decision and self.decision.left_out else None

    def allows(self, arm: str) -> bool:
        """Return whether an arm is answered.

        Raises:
            UserError: there is no time even for the arms that are never left out.
        """
        if self.decision is not None:
            return arm not in self.decision.left_out
        if not self.undecided or self.undecided[0][0].arm != arm:
            return True
        later = self.undecided[1:]
        expected = self._countdown.expected([work for works in later for work in works])
        if expected is not None and expected > 60 * self.minutes:
            self._leave_out()
            return False
        self._some_fit = self._some_fit or expected is not None
        self.undecided = later
        return True

    def _leave_out(self) -> None:
        without = [work for works in self.undecided for work in works]
        expected = self._countdown.expected(without) or 0.0
        if expected > 60 * self.minutes and not self._some_fit:
            needed = math.ceil(expected / 60)
            left = [work for work in self._countdown.works if work.done < work.answers and work not in without]
            raise UserError(
                f"{self.minutes:g} minutes are too few: the arms that are never left out take about {needed}, at the "
                f"speed of the answers so far; still to answer: {', '.join(dict.fromkeys(work.arm for work in left))}",
                where="--minutes",
                fix=f"Give --minutes {needed} or more. The answers so far are kept.",
            )
        left_out = tuple(works[0].arm for works in reversed(self.undecided))
        for work in without:
            work.answers = 0
        self._decide(left_out, expected)
        self._reporter.warn(f"--minutes {self.minutes:g}: left out {', '.join(left_out)}. The rule: {RULE}.")

    def settle(self) -> None:
        """Decide on the arms that follow the choice of a prompt.

        Raises:
            UserError: as :meth:`allows`.
        """
        for works in tuple(self.undecided):
            self.allows(works[0].arm)
        if self.decision is None:
            self._decide((), self._countdown.expected() or 0.0)

    def _decide(self, left_out: tuple[str, ...], expected: float) -> None:
        self.decision = Budget(minutes=self.minutes, expected=round(expected / 60, 2), left_out=left_out)
        write_json(self._file, self.decision.model_dump(mode="json"))
