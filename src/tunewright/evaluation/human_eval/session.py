"""Human evaluation: a reviewer's journal, and the blind pass over pairs of answers, by keys or through a spreadsheet.

A journal is ``human-eval/NAME.jsonl``, one event per line, append-only. Verdicts are stored for A and B. The sample's
seed determines which arm is which; the file does not say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import quote, unquote

from pydantic import Field, TypeAdapter

from tunewright.annotation import AnnotationLog, AnnotationSession, Mark, NoteMark, UndoMark, VerdictMark
from tunewright.core.csv import one_line_end, write_sheet
from tunewright.core.errors import UserError
from tunewright.core.log import extend, numbered_lines, parse_line, whole_lines
from tunewright.core.progress import Reporter
from tunewright.evaluation.human_eval.sample import (
    ReviewSample,
    comparison,
    keep_sample,
    load_sample,
    open_sample,
    treatment_is_a,
)
from tunewright.evidence.files import load_evidence, load_items
from tunewright.evidence.schema import Evidence, Item

COLUMNS = ("evaluation", "item", "input", "A", "B", "verdict", "note")
REFERENCE = "reference"
"""An optional additional column."""
_LONGEST_NAME = 200  # bytes, of the 255 that a file name may have

Side = Literal["A", "B", "both", "neither", "skip"]
SIDES: tuple[Side, ...] = get_args(Side)
_SIDE_OF: Mapping[str, Side] = {side.lower(): side for side in SIDES}


class VerdictLine(VerdictMark):
    """A verdict: the better answer, or both good, or neither."""

    verdict: Side
    reference: Annotated[bool, Field(description="The reference was shown before the verdict.")]


class ReferenceShownLine(Mark):
    """The reviewer saw the item's reference."""

    event: Literal["reference"] = "reference"


Event = VerdictLine | UndoMark | ReferenceShownLine | NoteMark
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


@dataclass(frozen=True)
class Journal(AnnotationLog[VerdictLine]):
    """One reviewer's events, and the resulting verdicts."""

    events: tuple[Event, ...] = ()
    reviewer: str = ""

    @cached_property
    def standing(self) -> dict[str, VerdictLine]:
        """The current verdict on each item, by pair key."""
        return {key: said[self.reviewer] for key in self.stacks if (said := self.current_verdicts(key))}

    @cached_property
    def shown(self) -> frozenset[str]:
        """Keys of the items whose reference the reviewer saw."""
        return frozenset(event.key for event in self.events if isinstance(event, ReferenceShownLine))


def journal_path(folder: Path, reviewer: str) -> Path:
    """Return the path of a reviewer's journal."""
    name = reviewer.strip()
    if not name or not name.isprintable():
        raise UserError("The reviewer's name is empty", where="--reviewer", fix="Pass a name.")
    file = quote(name, safe=" ")
    if len(file) > _LONGEST_NAME:
        raise UserError("The reviewer's name is too long for a file name", where="--reviewer", fix="Shorten it.")
    return folder / f"{file}.jsonl"


def read_journals(folder: Path) -> list[Journal]:
    """Return the journals of all reviewers, by name."""
    return [_parse(path) for path in sorted(folder.glob("*.jsonl"))]


def read_journal(folder: Path, reviewer: str) -> Journal:
    """Return one reviewer's journal; it may be empty."""
    path = journal_path(folder, reviewer)
    return _parse(path) if path.is_file() else Journal(reviewer=reviewer.strip())


def _parse(path: Path) -> Journal:
    whole, torn = whole_lines(path.read_bytes())
    events = [
        parse_line(_EVENT.validate_json, line, f"{path}:{number}", "Invalid verdict", "Restore the file.")
        for number, line in numbered_lines(whole)
    ]
    reviewer = unquote(path.stem)
    if other := next((e.reviewer for e in events if e.reviewer != reviewer), None):
        raise UserError(f"The file has verdicts of {reviewer} and of {other}", where=str(path), fix="Restore the file.")
    return Journal(tuple(events), torn, reviewer)


def append_events(folder: Path, events: Sequence[Event]) -> None:
    """Append events to a reviewer's journal, first removing a partial line that a crash left."""
    lines = "".join(f"{event.model_dump_json()}\n" for event in events)
    extend(journal_path(folder, events[0].reviewer), lambda _: lines)


@dataclass(frozen=True)
class BlindPair:
    """Two answers to one input, from two unnamed arms."""

    key: str
    number: int
    """The pair's position in the review order, from 1."""
    input: str
    a: str
    b: str
    reference: str | None
    """None until the reviewer has requested it."""
    note: str
    verdict: Side | None
    """The reviewer's verdict so far."""


@dataclass(frozen=True)
class Progress:
    """A reviewer's progress: items judged, skipped and to be reviewed, and equal answers that need no review."""

    answered: int
    skipped: int
    asked: int
    same: int


def progress_of(journal: Journal, sample: ReviewSample) -> Progress:
    """Return the progress of a reviewer on a sample."""
    standing = journal.standing
    said = [standing[key].verdict for key in sample.order if key in standing]
    skipped = said.count("skip")
    return Progress(len(said) - skipped, skipped, len(sample.order), sample.same)


@dataclass(frozen=True)
class ComparisonProgress:
    """The progress of all reviewers on a comparison; it says nothing about the verdicts."""

    against: str | None
    """Name of the incumbent; None means the best prompting arm."""
    reviewers: dict[str, Progress]
    """By name."""


def reviewers_progress(folder: Path) -> list[ComparisonProgress]:
    """Return the progress on each comparison of an evaluation that people can make."""
    evidence = load_evidence(folder)
    found = []
    incumbents = evidence.incumbents.compared if evidence.incumbents else ()
    for against in (None, *(each.name for each in incumbents)):
        place = comparison(folder, evidence, against).folder
        sample = load_sample(place, evidence)
        journals = [] if sample is None else read_journals(place)
        at = {journal.reviewer: progress_of(journal, sample) for journal in journals if sample is not None}
        found.append(ComparisonProgress(against, at))
    return found


class BlindReview(AnnotationSession[VerdictLine, BlindPair, Side]):
    """One reviewer's pass over an evaluation's sample. Nothing in it reveals the arm of an answer.

    ``Project.human_eval`` describes the options.
    """

    log: Journal
    verdict_keys = (
        ("a", "A", "A is better"),
        ("b", "B", "B is better"),
        ("g", "both", "both good"),
        ("x", "neither", "neither"),
        ("s", "skip", "skip"),
    )
    sheet_columns = ("item", "evaluation", "input", "A", "B", "verdict", "note")
    sheet_command = "tunewright human-eval --export"

    def __init__(
        self,
        folder: Path,
        reviewer: str,
        reporter: Reporter,
        *,
        items: int | None = None,
        against: str | None = None,
    ) -> None:
        self.evidence = load_evidence(folder)
        compared = comparison(folder, self.evidence, against)
        self.folder = compared.folder
        super().__init__(reviewer.strip())
        if self.log.torn:
            reporter.warn(
                "The last line of the review was cut off by a crash and does not count: judge that pair again."
            )
        every = load_items(folder)
        if against is None:
            require_arms(self.evidence, every)
        every = compared.items(every)
        self.sample = open_sample(compared, self.evidence, every, items)
        self._items = {item.key: item for item in every}
        if lost := [key for key in self.sample.order if key not in self._items]:
            raise UserError(
                f"{len(lost):,} items of the sample are no longer among the test items (first: {lost[0][:12]})",
                where=str(self.folder),
                fix="Restore items.jsonl.",
            )
        if strangers := self.log.standing.keys() - set(self.sample.order):
            reporter.warn(f"{len(strangers):,} verdicts are on items outside the sample and do not count.")
        self._back: str | None = None  # taken back: shown next

    def read_log(self) -> Journal:
        return read_journal(self.folder, self.reviewer)

    def append(self, events: Sequence[Event]) -> None:
        self.keep_sample()
        append_events(self.folder, events)

    @property
    def progress(self) -> Progress:
        """Return this reviewer's progress."""
        return progress_of(self.log, self.sample)

    def queue(self) -> Sequence[str]:
        return self.sample.order

    def is_open(self, key: str) -> bool:
        said = self.verdict(key)
        return said is None or said.verdict == "skip" or key == self._back

    def next(self, leased: Collection[str] = ()) -> BlindPair | None:
        """Return the pair to judge now: one that was taken back, or the next of the sample."""
        return super().next(leased) if self._back is None else self.item(self._back)

    def item(self, key: str) -> BlindPair:
        """Return an item of the sample in the form that the reviewer may see."""
        item, sample = self._items[key], self.sample
        answers = [item.answers[sample.treatment], item.answers[sample.control]]
        a, b = answers if treatment_is_a(sample.seed, key) else reversed(answers)
        said = self.verdict(key)
        return BlindPair(
            key=key,
            number=sample.order.index(key) + 1,
            input=item.input,
            a=a,
            b=b,
            reference=item.reference if key in self.log.shown else None,
            note=self.note_on(key),
            verdict=None if said is None else said.verdict,
        )

    def judge(self, item: BlindPair, verdict: Side) -> None:
        self.record([self._judged(item.key, verdict)])
        self._back = None

    answer = judge  # the event's name in earlier releases

    def show_reference(self, pair: BlindPair) -> BlindPair:
        """Return the pair with its reference, and record that it was shown."""
        if pair.reference is None:
            self.record([self.mark(ReferenceShownLine, pair.key)])
        return self.item(pair.key)

    def undo(self, key: str | None = None) -> BlindPair | None:
        """Take back this reviewer's latest verdict, also from an earlier pass; its pair is shown next."""
        pair = super().undo(key)
        self._back = self._back if pair is None else pair.key
        return pair

    def keep_sample(self) -> None:
        """Record the sample, as the first verdict also does: from then on it stays the same."""
        keep_sample(self.folder, self.evidence, self.sample)

    def _judged(self, key: str, verdict: Side) -> VerdictLine:
        return self.mark(VerdictLine, key, verdict=verdict, reference=key in self.log.shown)

    def export_sheet(self, path: Path, *, reference: bool = False) -> int:
        """Write the pairs that the reviewer has not judged yet to a spreadsheet, and return their number.

        With ``reference`` it contains the references: nobody can record when one is viewed, so all count as seen.
        """
        keys = self.open_keys()
        if not keys:
            raise UserError(
                f"{self.reviewer} has judged all pairs", fix="Show the results: tunewright human-eval --results"
            )
        columns = [*COLUMNS[:3], REFERENCE, *COLUMNS[3:]] if reference else COLUMNS
        rows = []
        for key in keys:
            pair = self.item(key)
            cells = {"evaluation": self.evidence.id, "item": key, "input": pair.input, "A": pair.a, "B": pair.b}
            cells |= {REFERENCE: self._items[key].reference, "verdict": "", "note": pair.note}
            rows.append([cells[name] for name in columns])
        write_sheet(path, columns, rows)
        self.keep_sample()
        return len(rows)

    def sheet_fault(self, cells: Mapping[str, str], where: str) -> str | None:
        key, verdict, evaluation = cells["item"], cells["verdict"].strip(), cells["evaluation"].strip()
        if evaluation != self.evidence.id:
            raise UserError(
                f"The sheet belongs to evaluation {evaluation or 'unknown'}, not to {self.evidence.id}; "
                "no verdict was recorded",
                where=where,
                fix=f"Import it there: tunewright human-eval {evaluation} --import …" if evaluation else None,
            )
        if key not in self.sample.order:
            return f"the sample has no item {key[:12]!r}"
        if verdict and verdict.lower() not in _SIDE_OF:
            return f"the verdict is {verdict!r}; it can be {', '.join(SIDES)} or nothing"
        pair = self.item(key)
        for name, text in (("A", pair.a), ("B", pair.b)):
            if cells[name] != one_line_end(text):
                return f"answer {name} was changed: restore the exported text, and write comments into the column note"
        return None

    def sheet_marks(self, cells: Mapping[str, str]) -> list[Mark]:
        key, note = cells["item"], cells["note"].strip()
        marks: list[Mark] = []
        if note and note != self.note_on(key):
            marks.append(self.mark(NoteMark, key, text=note))
        side = _SIDE_OF.get(cells["verdict"].strip().lower())
        known = self.verdict(key)
        if side is None or (known is not None and known.verdict == side):
            return marks
        judged = self._judged(key, side)
        if REFERENCE in cells and not judged.reference:
            marks.append(self.mark(ReferenceShownLine, key))
            judged = judged.model_copy(update={"reference": True})
        return [*marks, judged]


def require_arms(evidence: Evidence, items: list[Item]) -> None:
    """Refuse items that lack an answer of the deciding contrast's arms."""
    first = evidence.contrasts[0]
    for arm in (first.treatment, first.control):
        lacking = sum(arm not in item.answers for item in items)
        if lacking:
            raise UserError(f"{lacking:,} test items have no answer of {arm}", fix="Evaluate again.")
