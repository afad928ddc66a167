"""One reviewer's pass over the rows of a version: which row comes next, and what becomes of the verdict."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.pii import told_secrets
from tunewright.data.review.acceptance import FixedPlan, Outcome, SequentialPlan, judge, sample_order
from tunewright.data.review.reviews import (
    Drawn,
    Judged,
    Undone,
    Verdict,
    append_reviews,
    findings,
    read_reviews,
    status_line,
)
from tunewright.data.review.suspects import Suspect
from tunewright.data.versions import DatasetVersion, Member


@dataclass(frozen=True)
class Card:
    """A row to be judged: its number in the queue (from 1), and what made it a suspect."""

    member: Member
    number: int
    why: str | None = None


class Review:
    """A pass over the version's sample, or over its suspects; every verdict is on disk before the next row is shown.

    Args:
        dataset: the project's dataset folder.
        version: the rows.
        reviewer: whose verdicts these are.
        reporter: is told of a sample drawn.
        plan: for the first sample or a redraw; None: the plan of the sample there is, or the sequential one.
        redraw: draw another sample, for all to see in the log.
        suspects: review these in place of the sample.
        second: judge again, unseen, what others have judged.
        allow: kinds of secrets that answers may hold (data.allow).

    Raises:
        UserError: another plan than that of the sample there is, or options that exclude each other.
    """

    def __init__(
        self,
        dataset: Path,
        version: DatasetVersion,
        reviewer: str,
        reporter: Reporter,
        *,
        plan: SequentialPlan | FixedPlan | None = None,
        redraw: bool = False,
        suspects: Sequence[Suspect] | None = None,
        second: bool = False,
        allow: Collection[str] = (),
    ) -> None:
        if not reviewer.strip():
            raise UserError("the reviewer has no name", where="--reviewer", fix="Give a name.")
        if suspects is not None and (plan is not None or redraw):
            raise UserError("suspects are no sample: they have no plan and are not drawn", where="--suspects")
        self.dataset = dataset
        self.version = version
        self.reviewer = reviewer
        self.second = second
        self.allow = allow
        self.members = {m.key: m for m in version.domain}
        self._passed: set[str] = set()  # skipped in this pass: not offered again before the next one
        self.reviews = read_reviews(dataset)
        if self.reviews.torn:
            reporter.warn("The last review in reviews.jsonl was cut off by a crash and does not count: judge it again.")
        self.why = {s.key: f"{s.reason}: {s.detail}" for s in suspects or ()}
        self.drawn = None if suspects is not None else self._draw(plan, redraw, reporter)
        self.order = [s.key for s in suspects or ()] if self.drawn is None else self._order(self.drawn)

    def _order(self, drawn: Drawn) -> list[str]:
        return sample_order(list(self.members), self.version.digest, drawn.draw)

    def _draw(self, plan: SequentialPlan | FixedPlan | None, redraw: bool, reporter: Reporter) -> Drawn:
        before = self.reviews.drawn(self.version.digest)
        if before is not None and not redraw:
            if plan is not None and plan != before.plan:
                raise UserError(
                    f"this version's sample has another plan ({before.plan.kind})",
                    fix="Go on without naming a plan, or draw another sample with --redraw, which stays on record.",
                )
            return before
        number = 0 if before is None else before.draw + 1
        chosen = plan or (before.plan if before else SequentialPlan())
        drawn = Drawn(draw=number, plan=chosen, version=self.version.digest, reviewer=self.reviewer, when=now())
        self._append(drawn)
        reporter.say(f"Drew sample {number + 1} of version {self.version.digest[:12]}; it is recorded.")
        return drawn

    def _append(self, event: Judged | Undone | Drawn) -> None:
        append_reviews(self.dataset, [event])
        self.reviews = read_reviews(self.dataset)

    @property
    def outcome(self) -> Outcome | None:
        """Where the acceptance of the version stands; None over suspects, which tell nothing of it."""
        if self.drawn is None:
            return None
        return judge(self.drawn.plan, findings(self.reviews, self.order), len(self.order))

    @property
    def status(self) -> str:
        """The same in one line; over suspects, how many of them have been looked at."""
        found = self.outcome
        if self.drawn is not None and found is not None:
            return status_line(found, self.drawn.plan, self.drawn.draw)
        done = sum(self.reviews.finding(key) is not None for key in self.order)
        return f"suspects: {done:,} of {len(self.order):,} looked at"

    def next(self) -> Card | None:
        """Return the row to judge now; None where the sample has decided or the queue is empty."""
        if self.drawn is not None and not self.second:
            found = self.outcome
            if found is not None and found.decision != "go on":
                return None
        for number, key in enumerate(self.order, start=1):
            if key not in self._passed and self._open(key):
                return self._card(key, number)
        return None

    @property
    def needed(self) -> int:
        """How many rows it takes at the least to accept the version; of suspects, how many are open."""
        found = self.outcome
        if self.drawn is not None and found is not None:
            return found.needed
        return sum(self._open(key) for key in self.order)

    def coming(self, most: int) -> list[Card]:
        """Return the next rows to judge, up to so many, for those who judge them elsewhere."""
        numbered = ((number, key) for number, key in enumerate(self.order, start=1) if self._open(key))
        return [self._card(key, number) for (number, key), _ in zip(numbered, range(most), strict=False)]

    def _card(self, key: str, number: int) -> Card:
        return Card(self.members[key], number, self.why.get(key))

    def _open(self, key: str) -> bool:
        standing = self.reviews.standing(key)
        mine = standing.get(self.reviewer)
        if self.second:
            judged = any(name != self.reviewer and other.verdict != "skip" for name, other in standing.items())
            return judged and (mine is None or mine.verdict == "skip")
        # A row that is skipped or disputed stays open for those who may settle it: not for whoever has said their word.
        unsettled = self.reviews.finding(key) in (None, "unsettled")
        return unsettled and (mine is None or mine.verdict == "skip")

    def judge(self, card: Card, verdict: Verdict, output: str | None = None) -> None:
        """Record a verdict; an edit comes with the better answer."""
        assert (verdict == "edit") == (output is not None), "an edit, and only an edit, has an output"
        draw = self.drawn.draw if self.drawn is not None else None
        self._append(
            Judged(
                key=card.member.key,
                verdict=verdict,
                output=output,
                draw=draw,
                version=self.version.digest,
                reviewer=self.reviewer,
                when=now(),
            )
        )
        if verdict == "skip":
            self._passed.add(card.member.key)

    def edit(self, card: Card, output: str | None) -> str:
        """Record an edit, unless there is none in ``output`` (None: the editor failed); what the reviewer is told."""
        if output is None:
            return "The editor failed, or left no UTF-8 text: no verdict."
        if output == card.member.example.output:
            return "The answer is as it was: no verdict."
        if found := told_secrets(output, self.allow):
            return f"The answer holds a secret ({found}): no verdict."
        if not output.strip():
            return "The answer is empty: no verdict. If no answer would be right, press w."
        self.judge(card, "edit", output)
        return ""

    def undo(self) -> Card | None:
        """Take back this reviewer's latest verdict on this version, of an earlier pass too; the row that it was on."""
        last = self.reviews.latest(self.version.digest, self.reviewer)
        if last is None or last.key not in self.members:
            return None
        self._append(Undone(key=last.key, version=self.version.digest, reviewer=self.reviewer, when=now()))
        self._passed.discard(last.key)
        return self._card(last.key, self.order.index(last.key) + 1 if last.key in self.order else 0)


def check_options(actions: Mapping[str, bool], choices: Mapping[str, bool], message: bool) -> None:
    """Refuse options that would be ignored: one action at most, and no choice of rows beside one that takes none.

    Args:
        actions: --status, --export, --import, --apply: whether each is given.
        choices: the options that choose what is reviewed.
        message: whether a message is given, which belongs to --apply.

    Raises:
        UserError: naming the options.
    """
    given = [name for name, there in actions.items() if there]
    chosen = [name for name, there in choices.items() if there]
    if len(given) > 1:
        raise UserError("one at a time", where=" ".join(given))
    if given and chosen and given != ["--export"]:
        raise UserError(f"{' '.join(chosen)} changes nothing here", where=given[0], fix="Leave it out.")
    if "--adapter" in chosen and "--suspects" not in chosen:
        raise UserError("an adapter ranks suspects, and none are reviewed", where="--adapter", fix="Add --suspects.")
    if message and given != ["--apply"]:
        raise UserError("there is no version to keep a message with", where="--message", fix="It goes with --apply.")


def default_reviewer() -> str:
    """Return the login name.

    Raises:
        UserError: there is none, as in some containers.
    """
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # KeyError: before Python 3.13
        raise UserError("you have no login name", where="--reviewer", fix="Give a name.") from None
