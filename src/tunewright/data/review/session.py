"""Label review: a reviewer's session over the rows of a version, and its rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunewright.annotation import AnnotationSession, Mark, MarkT
from tunewright.core.clock import now
from tunewright.core.csv import one_line_end, write_sheet
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.data.options import ReviewOptions
from tunewright.data.pii import secret_kinds
from tunewright.data.readers import GENERATED, PASSAGE
from tunewright.data.readers.row_errors import RowError
from tunewright.data.readers.validate import edited_answer
from tunewright.data.review.acceptance import FixedPlan, Outcome, SequentialPlan
from tunewright.data.review.edits import unaccepted_keys
from tunewright.data.review.label_models import Suspect
from tunewright.data.review.reviews import (
    PURGED,
    VERDICTS,
    DrawEvent,
    Event,
    NoteEvent,
    ReviewLog,
    Sample,
    UndoEvent,
    Verdict,
    VerdictEvent,
    append_reviews,
    read_reviews,
    sample_of,
    status_line,
)
from tunewright.data.versions import DatasetVersion, Member
from tunewright.data.versions.version import current_author

SAMPLE = ReviewOptions()
SHEET_COLUMNS = ("row", "from", "draw", "why", "input", "answer", "verdict", "new_output")


@dataclass(frozen=True)
class ReviewItem:
    """A row to review: its number in the queue, from 1; for a suspect also the reason and the answer suggested."""

    member: Member
    number: int
    why: str | None = None
    suggested: str = ""

    @property
    def key(self) -> str:
        """The row's pair key."""
        return self.member.key


class ReviewSession(AnnotationSession[VerdictEvent, ReviewItem, Verdict]):
    """A session over the version's sample or suspects.

    Generated rows that nobody has accepted come before the sample. They are apart from it, like suspects, so that the
    sample stays random. With ``suspects``, the session is over them. ``allow`` are the kinds of secrets that answers
    may contain, and ``metadata`` has the provenance of generated rows by pair key.
    """

    log: ReviewLog
    verdict_keys = (
        ("r", "right", "right"),
        ("w", "wrong", "wrong"),
        ("l", "leave-out", "leave out"),
        ("s", "skip", "skip"),
    )
    sheet_columns = ("row", "draw", "answer", "verdict", "new_output")
    sheet_command = "tunewright data review --export"
    note_kind = NoteEvent
    undo_kind = UndoEvent

    def __init__(
        self,
        dataset: Path,
        version: DatasetVersion,
        reviewer: str,
        reporter: Reporter,
        options: ReviewOptions = SAMPLE,
        *,
        suspects: Sequence[Suspect] | None = None,
        allow: Collection[str] = (),
        metadata: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        if not reviewer.strip():
            raise UserError("The reviewer's name is empty", where="--reviewer", fix="Pass a name.")
        of_sample = options.fixed is not None or options.redraw
        if suspects is not None and of_sample:
            raise UserError("--suspects cannot be combined with options of the sample's plan or draw")
        if options.conflicts and (suspects is not None or options.second or of_sample):
            raise UserError("--conflicts cannot be combined with other choices of rows")
        self.dataset = dataset
        self.version = version
        self.second = options.second
        self.conflicts = options.conflicts
        self.allow = allow
        self._offered_again: set[str] = set()
        self.members = {m.key: m for m in version.domain}
        super().__init__(reviewer)
        if self.log.torn:
            reporter.warn("The last review in reviews.jsonl was cut off by a crash and is ignored: review it again.")
        self.why = {s.key: f"{s.reason}: {s.detail}" for s in suspects or ()}
        self.suggested = {s.key: s.suggested for s in suspects or ()}
        self.drawn: DrawEvent | None = None
        if self.conflicts:
            self.drawn = self.log.latest_draw(version.digest)
        elif suspects is None:
            plan = None if options.fixed is None else FixedPlan(allowed=options.fixed)
            self.drawn = self._draw(plan, options.redraw, reporter)
        self._sample: Sample | None = None
        if self.drawn is not None:
            self._sample = sample_of(self.drawn, list(self.members))
        self.order = self._sample.asked if self._sample else [s.key for s in suspects or ()]
        self.generated: list[str] = []
        if self.drawn is not None and not self.second and not self.conflicts:
            written = {m.key for m in version.domain if m.generated}
            doubtful = unaccepted_keys(dataset, version.manifest, written)
            self.generated = [key for key in self.order if key in doubtful]
            self.why |= {key: written_by(metadata.get(key, {})) for key in self.generated}

    def _draw(self, plan: FixedPlan | None, redraw: bool, reporter: Reporter) -> DrawEvent:
        before = self.log.latest_draw(self.version.digest)
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
        self.append([drawn])
        self.refresh()
        reporter.say(f"Drew sample {number + 1} of version {self.version.digest[:12]} (recorded in reviews.jsonl)")
        return drawn

    def read_log(self) -> ReviewLog:
        return read_reviews(self.dataset)

    def append(self, events: Sequence[Event]) -> None:
        append_reviews(self.dataset, events)

    @property
    def outcome(self) -> Outcome | None:
        """State of the version's acceptance test; None for suspects, which are not a sample."""
        return None if self._sample is None else self._sample.outcome(self.log)

    @property
    def ahead(self) -> int:
        """Judged rows of an undecided sample that count once the rows before them are judged: number."""
        found = self.outcome
        if self._sample is None or found is None or self.second or self.conflicts or found.decision != "continue":
            return 0
        return self._sample.ahead(self.log)

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
            done = sum(self.log.finding(key) is not None for key in self.generated)
            first = f"generated rows: {done:,} of {len(self.generated):,} reviewed; " if self.generated else ""
            return first + line
        done = sum(self.log.finding(key) is not None for key in self.order)
        return f"suspects: {done:,} of {len(self.order):,} reviewed"

    def next(self, leased: Collection[str] = ()) -> ReviewItem | None:
        """Return the next row to review; None if the sample has decided or the queue is empty.

        A skipped row is offered once more when only unsettled rows keep the sample from its verdict.
        """
        found = self.outcome
        if found is not None and not self.second and found.decision == "continue" and not found.needed:
            skipped = next((key for key in self._rows() if key in self._skipped - self._offered_again), None)
            if skipped is not None and skipped not in leased:
                self._skipped.remove(skipped)
                self._offered_again.add(skipped)
        card = super().next(leased)
        decided = found is not None and not self.second and found.decision != "continue"
        return None if card is not None and decided and card.key not in self.generated else card

    def queue(self) -> list[str]:
        if not self.generated:
            return self._rows()
        return list(dict.fromkeys([*self.generated, *self._rows()]))

    def _rows(self) -> list[str]:
        if self.conflicts:
            return [key for key in self.log.stacks if key in self.members]
        if self.second:
            return [key for key in self.order if key in self.log.stacks]
        return self.order

    @property
    def needed(self) -> int:
        """Generated rows left, and the fewest rows until the version can be accepted; else the number of rows left."""
        found = self.outcome
        if found is not None and not self.second and not self.conflicts:
            return found.needed + sum(map(self.is_open, self.generated))
        return len(self.open_keys())

    def item(self, key: str) -> ReviewItem:
        """Return a row with its number among the generated rows or in the sample; 0: it is in neither."""
        rows = self.generated if key in self.generated else self._rows()
        number = rows.index(key) + 1 if key in rows else 0
        return ReviewItem(self.members[key], number, self.why.get(key), self.suggested.get(key, ""))

    def is_open(self, key: str) -> bool:
        mine = self.verdict(key)
        if self.conflicts:
            return mine is not None and mine.verdict != "skip" and self.log.disputed(key)
        if self.second:
            said = self.log.current_verdicts(key).items()
            judged = any(name != self.reviewer and other.verdict != "skip" for name, other in said)
            return judged and (mine is None or mine.verdict == "skip")
        # A row that was skipped or is disputed stays open for reviewers who have not judged it.
        unsettled = self.log.finding(key) in (None, "unsettled")
        return unsettled and (mine is None or mine.verdict == "skip")

    def counts(self, judged: VerdictEvent) -> bool:
        return judged.version == self.version.digest and judged.key in self.members

    def _stays_skipped(self, key: str) -> bool:
        return self.conflicts or super()._stays_skipped(key)

    def mark(self, kind: type[MarkT], key: str, **facts: Any) -> MarkT:
        return super().mark(kind, key, version=self.version.digest, **facts)

    def judge(self, card: ReviewItem, verdict: Verdict, output: str | None = None) -> None:
        """Record a verdict; an edit needs the corrected answer. A conflict that is skipped keeps its verdicts."""
        assert (verdict == "edit") == (output is not None), "an edit, and only an edit, has an output"
        if self.conflicts:
            self._skipped.add(card.key)  # offered once, also if it is still disputed
            if verdict == "skip":
                return
        self.judge_together([card.key], verdict, output)

    def judge_together(self, keys: Sequence[str], verdict: Verdict, output: str | None = None) -> None:
        """Record one verdict on several rows at one time, by which they can be taken back together."""
        facts = {"verdict": verdict, "output": output, "settles": True if self.conflicts else None, "when": now()}
        self.record([self.mark(VerdictEvent, key, draw=self._draw_of(key), **facts) for key in keys])

    def undo_together(self, when: str) -> int:
        """Take back this reviewer's changes of the newest time, if it is ``when``; return their number."""
        newest, keys = self.log.changed_together(self.reviewer, self.version.digest)
        if newest != when:
            return 0
        self.record([self.mark(UndoEvent, key) for key in keys])
        return len(keys)

    def _draw_of(self, key: str) -> int | None:
        """Return the number of the sample that a row is judged for; None for suspects and generated rows."""
        return None if self.drawn is None or key in self.generated else self.drawn.draw

    def edit(self, card: ReviewItem, output: str | None) -> str:
        """Record an edit, unless ``output`` is unusable (None: the editor failed); return a message to show."""
        refused = self.edit_fault(card, output)
        if not refused:
            self.judge(card, "edit", output)
        return refused

    def edit_fault(self, card: ReviewItem, output: str | None) -> str:
        """Return the reason why an edited answer cannot be recorded; empty if it can."""
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
        return ""

    def note(self, item: ReviewItem, text: str) -> str:
        """Store a note on the row, unless it contains a secret."""
        if text.strip() != self.note_on(item.key) and (found := secret_kinds(text, self.allow)):
            return f"The note contains a secret ({found}) and was not stored."
        return super().note(item, text)

    def draft(self, card: ReviewItem) -> str:
        """Return the text that an edit starts from: the answer, or the reviewer's edit of it, also if taken back."""
        mine = self.verdict(card.key)
        edited = mine.output if mine is not None else self.log.withdrawn_edit(card.key, self.reviewer)
        return card.member.example.output if edited in (None, PURGED) else edited

    def export_sheet(self, path: Path, most: int, places: Mapping[str, str]) -> int:
        """Write at most ``most`` next rows as CSV, with their ``places`` by pair key, and return their number."""
        if not self.order and self.drawn is None:
            raise UserError(
                "There are no suspects to export: no row is suspicious, or no row could be judged",
                where="--suspects",
                fix="Free-text answers are ranked by a model's loss: add --adapter base or --adapter NAME.",
            )
        keys = self.open_keys(most)
        if not keys:
            raise UserError(
                "No row is left to review", fix="`tunewright data review --status` shows the state of the review."
            )
        rows = []
        for key in keys:
            example, why = self.members[key].example, self.why.get(key, "")
            turns = example.prompt
            prompt = turns[0].content if len(turns) == 1 else "\n\n".join(f"{m.role}: {m.text}" for m in turns)
            draw = self._draw_of(key)
            rows.append(
                [key, places.get(key, ""), "" if draw is None else str(draw), why, prompt, example.output, "", ""]
            )
        write_sheet(path, SHEET_COLUMNS, rows)
        return len(rows)

    def sheet_fault(
        self,
        cells: Mapping[str, str],
        where: str,  # noqa: ARG002 - no fault of a row is one of the whole sheet
    ) -> str | None:
        verdict, output = cells["verdict"].strip().lower(), cells["new_output"]
        member = self.members.get(cells["row"])
        if member is None:
            return (
                f"the version has no row {cells['row'][:12]!r}: its text changed, or the export is of another version"
            )
        if verdict not in ("", *VERDICTS):
            return f"invalid verdict {cells['verdict']!r}: use {', '.join(VERDICTS)} or leave it empty"
        if (verdict == "edit") != bool(output.strip()):
            return "verdict edit requires new_output" if verdict == "edit" else "new_output requires the verdict edit"
        if cells["answer"] != one_line_end(member.example.output):
            return "the answer was changed: keep it, and write the corrected one in new_output"
        if output and output == one_line_end(member.example.output):
            return "new_output equals the present answer"
        if found := secret_kinds(output, self.allow):
            return f"new_output contains a secret ({found})"
        if output.strip():
            try:
                edited_answer(member.example, output)
            except RowError as error:
                return f"new_output: {error}. {error.fix}"
        if cells["draw"].strip() and not cells["draw"].strip().isdecimal():
            return f"invalid draw {cells['draw']!r}: keep the column as exported"
        return None

    def sheet_marks(self, cells: Mapping[str, str]) -> list[Mark]:
        verdict, draw = cells["verdict"].strip().lower(), cells["draw"].strip()
        output = cells["new_output"] if verdict == "edit" else None
        known = self.verdict(cells["row"])
        if not verdict or (known is not None and (known.verdict, known.output) == (verdict, output)):
            return []
        facts = {"verdict": verdict, "output": output, "draw": int(draw) if draw else None}
        return [self.mark(VerdictEvent, cells["row"], **facts)]


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


def reviewer_name(name: str | None, folder: Path) -> str:
    """Return a reviewer's name, by default the name of the author of versions; some containers have neither."""
    found = current_author(folder) if name is None else name
    if found is None:
        raise UserError("Found neither a git user name nor a login name", where="--reviewer", fix="Pass a name.")
    return found
