"""A reviewer's session over the rows of a version."""

from __future__ import annotations

import getpass
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.pii import secret_kinds
from tunewright.data.readers.calls import edited_answer
from tunewright.data.readers.generated_rows import GENERATED, PASSAGE
from tunewright.data.readers.row_errors import RowError
from tunewright.data.review.acceptance import FixedPlan, Outcome, SequentialPlan
from tunewright.data.review.edits import unaccepted_keys
from tunewright.data.review.label_models import Suspect
from tunewright.data.review.reviews import (
    PURGED,
    DrawEvent,
    Event,
    NoteEvent,
    UndoEvent,
    Verdict,
    VerdictEvent,
    append_reviews,
    read_reviews,
    status_line,
)
from tunewright.data.review.samples import Sample, sample_of
from tunewright.data.versions import DatasetVersion, Member

_NO_METADATA: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True)
class ReviewItem:
    """A row to review: its number in the queue, from 1, and the reason if it is a suspect."""

    member: Member
    number: int
    why: str | None = None


class ReviewSession:
    """A session over the version's sample or suspects; each verdict is written before the next row is shown.

    Generated rows that nobody has accepted come before the sample. They are apart from it, like suspects, so that the
    sample stays random.

    Args:
        dataset: the project's dataset folder.
        version: the rows.
        reviewer: name of the reviewer.
        reporter: receives a message if a sample is drawn.
        plan: for the first sample or a redraw; None: the existing sample's plan, or the sequential one.
        redraw: draw another sample, which is recorded in the log.
        suspects: rows to review instead of the sample.
        second: review rows again that others have reviewed, blind.
        conflicts: judge rows again on which the reviewer and others disagree, with their verdicts in sight.
        allow: kinds of secrets that answers may contain (data.allow).
        metadata: of generated rows, by pair key, with their provenance.

    Raises:
        UserError: a plan other than the existing sample's, or mutually exclusive options.
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
        conflicts: bool = False,
        allow: Collection[str] = (),
        metadata: Mapping[str, Mapping[str, Any]] = _NO_METADATA,
    ) -> None:
        if not reviewer.strip():
            raise UserError("The reviewer's name is empty", where="--reviewer", fix="Pass a name.")
        if suspects is not None and (plan is not None or redraw):
            raise UserError("--suspects cannot be combined with options of the sample's plan or draw")
        if conflicts and (suspects is not None or second or plan is not None or redraw):
            raise UserError("--conflicts cannot be combined with other choices of rows")
        self.dataset = dataset
        self.version = version
        self.reviewer = reviewer
        self.second = second
        self.conflicts = conflicts
        self.allow = allow
        self.members = {m.key: m for m in version.domain}
        self._skipped: set[str] = set()  # not offered again in this session
        self.reviews = read_reviews(dataset)
        if self.reviews.torn:
            reporter.warn("The last review in reviews.jsonl was cut off by a crash and is ignored: review it again.")
        self.why = {s.key: f"{s.reason}: {s.detail}" for s in suspects or ()}
        self.drawn: DrawEvent | None = None
        if conflicts:
            self.drawn = self.reviews.latest_draw(version.digest)
        elif suspects is None:
            self.drawn = self._draw(plan, redraw, reporter)
        self._sample: Sample | None = None
        if self.drawn is not None:
            self._sample = sample_of(self.drawn, list(self.members))
        self.order = self._sample.asked if self._sample else [s.key for s in suspects or ()]
        self.generated: list[str] = []
        if self.drawn is not None and not second and not conflicts:
            written = {m.key for m in version.domain if m.generated}
            doubtful = unaccepted_keys(dataset, version.manifest, written)
            self.generated = [key for key in self.order if key in doubtful]
            self.why |= {key: written_by(metadata.get(key, {})) for key in self.generated}

    def _draw(self, plan: SequentialPlan | FixedPlan | None, redraw: bool, reporter: Reporter) -> DrawEvent:
        before = self.reviews.latest_draw(self.version.digest)
        if before is not None and not redraw:
            if plan is not None and plan != before.plan:
                raise UserError(
                    f"This version's sample has another plan ({before.plan.kind})",
                    fix="Omit the plan to continue, or draw another sample with --redraw, which is recorded.",
                )
            return before
        number = 0 if before is None else before.draw + 1
        chosen = plan or (before.plan if before else SequentialPlan())
        drawn = DrawEvent(draw=number, plan=chosen, version=self.version.digest, reviewer=self.reviewer, when=now())
        self._append(drawn)
        reporter.say(f"Drew sample {number + 1} of version {self.version.digest[:12]} (recorded in reviews.jsonl)")
        return drawn

    def _append(self, event: Event) -> None:
        append_reviews(self.dataset, [event])
        self.refresh()

    def refresh(self) -> None:
        """Read the log again: other reviewers, or this one elsewhere, may have judged rows meanwhile."""
        self.reviews = read_reviews(self.dataset)
        if not self.conflicts:  # a skip that was taken back elsewhere
            self._skipped = {key for key in self._skipped if self._verdict(key) == "skip"}

    def _verdict(self, key: str) -> Verdict | None:
        """Return this reviewer's verdict on a row."""
        mine = self.reviews.current_verdicts(key).get(self.reviewer)
        return None if mine is None else mine.verdict

    @property
    def outcome(self) -> Outcome | None:
        """State of the version's acceptance test; None for suspects, which are not a sample."""
        return None if self._sample is None else self._sample.outcome(self.reviews)

    @property
    def status(self) -> str:
        """State in one line; for suspects, the number reviewed; for second reviews and conflicts, the number left."""
        if self.conflicts:
            return f"conflicts: {self.needed:,} to settle"
        if self.second:
            return f"second review: {self.needed:,} left"
        found = self.outcome
        if self.drawn is not None and found is not None:
            line = status_line(found, self.drawn)
            done = sum(self.reviews.finding(key) is not None for key in self.generated)
            first = f"generated rows: {done:,} of {len(self.generated):,} reviewed; " if self.generated else ""
            return first + line
        done = sum(self.reviews.finding(key) is not None for key in self.order)
        return f"suspects: {done:,} of {len(self.order):,} reviewed"

    def next(self, leased: Collection[str] = ()) -> ReviewItem | None:
        """Return the next row to review; None if the sample has decided or the queue is empty.

        ``leased`` rows are on the screens of other people, and are left to them.
        """
        for number, key in enumerate(self.generated, start=1):
            if key not in leased and self._offered(key):
                return self._card(key, number)
        if self.drawn is not None and not self.second:
            found = self.outcome
            if found is not None and found.decision != "continue":
                return None
        for number, key in enumerate(self._queue(), start=1):
            if key not in leased and self._offered(key):
                return self._card(key, number)
        return None

    def card(self, key: str) -> ReviewItem | None:
        """Return a row that was shown earlier; None if it is not in the queue or was judged meanwhile."""
        queue = self.generated if key in self.generated else self._queue()
        return self._card(key, queue.index(key) + 1) if key in queue and self._offered(key) else None

    def _queue(self) -> list[str]:
        """Return the rows that may be open, in the order in which they are offered."""
        if self.conflicts:
            return [key for key in self.reviews.stacks if key in self.members]
        if self.second:
            return [key for key in self.order if key in self.reviews.stacks]
        return self.order

    @property
    def needed(self) -> int:
        """Generated rows left, and the fewest rows until the version can be accepted; else the number of rows left."""
        found = self.outcome
        if found is not None and not self.second and not self.conflicts:
            return found.needed + sum(map(self._open, self.generated))
        return sum(self._open(key) for key in self._queue())

    def upcoming(self, most: int) -> list[ReviewItem]:
        """Return at most ``most`` next rows, for review outside of this session."""
        there = set(self.generated)
        queue = [*self.generated, *(key for key in self._queue() if key not in there)]
        numbered = ((number, key) for number, key in enumerate(queue, start=1) if self._open(key))
        return [self._card(key, number) for (number, key), _ in zip(numbered, range(most), strict=False)]

    def _card(self, key: str, number: int) -> ReviewItem:
        return ReviewItem(self.members[key], number, self.why.get(key))

    def _offered(self, key: str) -> bool:
        return key not in self._skipped and self._open(key)

    def _open(self, key: str) -> bool:
        current = self.reviews.current_verdicts(key)
        mine = current.get(self.reviewer)
        if self.conflicts:
            return mine is not None and mine.verdict != "skip" and self.reviews.disputed(key)
        if self.second:
            judged = any(name != self.reviewer and other.verdict != "skip" for name, other in current.items())
            return judged and (mine is None or mine.verdict == "skip")
        # A row that was skipped or is disputed stays open for reviewers who have not judged it.
        unsettled = self.reviews.finding(key) in (None, "unsettled")
        return unsettled and (mine is None or mine.verdict == "skip")

    def judge(self, card: ReviewItem, verdict: Verdict, output: str | None = None) -> None:
        """Record a verdict; an edit needs the corrected answer. A conflict that is skipped keeps its verdicts."""
        assert (verdict == "edit") == (output is not None), "an edit, and only an edit, has an output"
        if self.conflicts:
            self._skipped.add(card.member.key)  # offered once, also if it is still disputed
            if verdict == "skip":
                return
        in_sample = self.drawn is not None and card.member.key not in self.generated
        draw = self.drawn.draw if self.drawn is not None and in_sample else None
        self._append(
            VerdictEvent(
                key=card.member.key,
                verdict=verdict,
                output=output,
                draw=draw,
                settles=True if self.conflicts else None,
                version=self.version.digest,
                reviewer=self.reviewer,
                when=now(),
            )
        )
        if verdict == "skip":
            self._skipped.add(card.member.key)

    def edit(self, card: ReviewItem, output: str | None) -> str:
        """Record an edit, unless ``output`` is unusable (None: the editor failed); return a message to show."""
        if output is None:
            return "The editor failed, or the text is not UTF-8: no verdict."
        if output == card.member.example.output:
            return "The answer is unchanged: no verdict."
        if found := secret_kinds(output, self.allow):
            return f"The answer contains a secret ({found}): no verdict."
        if not output.strip():
            return "The answer is empty: no verdict. If no answer is right, press w."
        try:
            edited_answer(card.member.example, output)
        except RowError as error:
            return f"{error}: no verdict. {error.fix}"
        self.judge(card, "edit", output)
        return ""

    def note(self, card: ReviewItem, text: str) -> str:
        """Store a note on the row, replacing this reviewer's earlier one; return a message to show."""
        text = text.strip()
        if text == self.note_on(card.member.key):
            return ""
        if found := secret_kinds(text, self.allow):
            return f"The note contains a secret ({found}) and was not stored."
        self._append(
            NoteEvent(key=card.member.key, text=text, version=self.version.digest, reviewer=self.reviewer, when=now())
        )
        return "Noted." if text else "The note was removed."

    def draft(self, card: ReviewItem) -> str:
        """Return the text that an edit starts from: the answer, or the reviewer's edit of it that was taken back."""
        edited = self.reviews.withdrawn_edit(card.member.key, self.reviewer)
        return card.member.example.output if edited in (None, PURGED) else edited

    def note_on(self, key: str) -> str:
        """Return this reviewer's note on a row, or an empty text."""
        return self.reviews.notes.get(key, {}).get(self.reviewer, "")

    def undo(self, key: str | None = None) -> ReviewItem | None:
        """Withdraw this reviewer's latest verdict on this version, also from an earlier session; return its row.

        ``key`` names the row of the verdict; None: the newest of all rows.
        """
        last = self.reviews.latest(self.version.digest, self.reviewer)
        if key is not None:
            judged = self.reviews.current_verdicts(key).get(self.reviewer)
            last = judged if judged is not None and judged.version == self.version.digest else None
        if last is None or last.key not in self.members:
            return None
        self._append(UndoEvent(key=last.key, version=self.version.digest, reviewer=self.reviewer, when=now()))
        self._skipped.discard(last.key)
        return self._card(last.key, self.order.index(last.key) + 1 if last.key in self.order else 0)


def written_by(metadata: Mapping[str, Any]) -> str:
    """Return who wrote a generated row, and how many of its samples agree, from the row's metadata."""
    about = metadata.get(GENERATED, {})
    passage = metadata.get(PASSAGE, {})
    text = f"generated: by {about.get('teacher', 'a model')}"
    if about.get("samples", 1) > 1:
        text += f", agreement {about['agreement']:.0%} of {about['samples']} samples"
    if "quote" in passage:
        text += f'; {passage.get("name")}, {passage.get("at")}: "{passage["quote"]}"'
    return text


def check_options(actions: Mapping[str, bool], choices: Mapping[str, bool], message: bool) -> None:
    """Refuse options that would be ignored: several actions, or a choice of rows with an action that takes none.

    Args:
        actions: --status, --export, --import, --apply, and whether each is set.
        choices: the options that choose rows, and whether each is set; --conflicts is for a review on the screen.
        message: whether --message is set, which requires --apply.

    Raises:
        UserError: naming the options.
    """
    given = [name for name, there in actions.items() if there]
    chosen = [name for name, there in choices.items() if there]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are mutually exclusive", fix="Use one at a time.")
    if given and chosen and (given != ["--export"] or "--conflicts" in chosen):
        raise UserError(f"{given[0]} cannot be combined with {' '.join(chosen)}", fix="Leave it out.")
    if "--adapter" in chosen and "--suspects" not in chosen:
        raise UserError("--adapter requires --suspects", fix="Add --suspects.")
    if message and given != ["--apply"]:
        raise UserError("--message requires --apply", fix="Add --apply, or leave it out.")


def default_reviewer() -> str:
    """Return the login name.

    Raises:
        UserError: the user has no login name, as in some containers.
    """
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # KeyError: before Python 3.13
        raise UserError("Found no login name", where="--reviewer", fix="Pass a name.") from None
