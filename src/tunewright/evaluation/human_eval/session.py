"""Human evaluation: a reviewer's blind pass over pairs of answers, by keys or through a spreadsheet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.annotation import AnnotationSession, Mark, NoteMark, SheetImport, checked_rows
from tunewright.core.csv import one_line_end, write_sheet
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evaluation.human_eval.journal import (
    SIDES,
    Event,
    Journal,
    ReferenceShownLine,
    Side,
    VerdictLine,
    append_events,
    read_journal,
    read_journals,
)
from tunewright.evaluation.human_eval.sample import (
    Sample,
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
_SIDE_OF: Mapping[str, Side] = {side.lower(): side for side in SIDES}


def check_options(given: Mapping[str, bool]) -> None:
    """Refuse options of ``tunewright human-eval`` that would be ignored; ``given`` has all of them."""
    actions = [name for name in ("--results", "--export", "--import", "--keep-preferences") if given[name]]
    if len(actions) > 1:
        raise UserError("These options are mutually exclusive", where=" ".join(actions), fix="Choose one.")
    if given["--reference"] and not given["--export"]:
        raise UserError("--reference requires --export", where="--reference", fix="Add --export.")
    unused = {
        "--results": ("--items", "--reviewer"),
        "--keep-preferences": ("--items", "--reviewer", "--against"),
        "--import": ("--items",),
    }
    for action in actions:
        if idle := [name for name in unused.get(action, ()) if given[name]]:
            raise UserError(f"{action} does not use {', '.join(idle)}", where=action, fix="Leave it out.")


@dataclass(frozen=True)
class Pair:
    """Two answers to one input, from two unnamed arms."""

    key: str
    number: int
    """Its position in the review order, from 1."""
    input: str
    a: str
    b: str
    reference: str | None
    """None until the reviewer has asked for it."""
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


def progress_of(journal: Journal, sample: Sample) -> Progress:
    """Return the progress of a reviewer on a sample."""
    standing = journal.standing
    said = [standing[key].verdict for key in sample.order if key in standing]
    skipped = said.count("skip")
    return Progress(len(said) - skipped, skipped, len(sample.order), sample.same)


@dataclass(frozen=True)
class ComparisonProgress:
    """The progress of all reviewers on a comparison; it says nothing about the verdicts."""

    against: str | None
    """Name of the incumbent; None: the best prompting arm."""
    reviewers: dict[str, Progress]
    """By name."""


def reviewers_progress(folder: Path) -> list[ComparisonProgress]:
    """Return the progress on each comparison of an evaluation that people can make.

    Raises:
        UserError: there is no evaluation, or a file of the review was changed.
    """
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


class BlindReview(AnnotationSession[VerdictLine, Pair, Side]):
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

    def next(self, leased: Collection[str] = ()) -> Pair | None:
        """Return the pair to judge now: one that was taken back, or the next of the sample."""
        return super().next(leased) if self._back is None else self.item(self._back)

    def item(self, key: str) -> Pair:
        """Return an item of the sample in the form that the reviewer may see."""
        item, sample = self._items[key], self.sample
        answers = [item.answers[sample.treatment], item.answers[sample.control]]
        a, b = answers if treatment_is_a(sample.seed, key) else reversed(answers)
        said = self.verdict(key)
        return Pair(
            key=key,
            number=sample.order.index(key) + 1,
            input=item.input,
            a=a,
            b=b,
            reference=item.reference if key in self.log.shown else None,
            note=self.note_on(key),
            verdict=None if said is None else said.verdict,
        )

    def reference(self, key: str) -> str:
        """Return an item's reference, for a sheet: there nobody can record when it is viewed."""
        return self._items[key].reference

    def judge(self, item: Pair, verdict: Side) -> None:
        self.record([self.judged(item.key, verdict)])
        self._back = None

    answer = judge  # the name in earlier releases

    def show_reference(self, pair: Pair) -> Pair:
        """Return the pair with its reference, and record that it was shown."""
        if pair.reference is None:
            self.record([self.mark(ReferenceShownLine, pair.key)])
        return self.item(pair.key)

    def undo(self, key: str | None = None) -> Pair | None:
        """Take back this reviewer's latest verdict, also from an earlier pass; its pair is shown next."""
        pair = super().undo(key)
        self._back = self._back if pair is None else pair.key
        return pair

    def keep_sample(self) -> None:
        """Record the sample, as the first verdict also does: from then on it stays the same."""
        keep_sample(self.folder, self.evidence, self.sample)

    def judged(self, key: str, verdict: Side) -> VerdictLine:
        """Return a verdict in the journal's form."""
        return self.mark(VerdictLine, key, verdict=verdict, reference=key in self.log.shown)


def require_arms(evidence: Evidence, items: list[Item]) -> None:
    """Refuse items that lack an answer of the deciding contrast's arms.

    Raises:
        UserError: an arm has no answer; the message names it.
    """
    first = evidence.contrasts[0]
    for arm in (first.treatment, first.control):
        lacking = sum(arm not in item.answers for item in items)
        if lacking:
            raise UserError(f"{lacking:,} test items have no answer of {arm}", fix="Evaluate again.")


def export_sheet(review: BlindReview, path: Path, *, reference: bool = False) -> int:
    """Write the pairs that the reviewer has not judged yet to a spreadsheet, and return their number.

    Args:
        reference: include the references; the reviewer then counts as having seen them.

    Raises:
        UserError: nothing is left to judge, the file already exists, or it cannot be written.
    """
    keys = review.open_keys()
    if not keys:
        raise UserError(
            f"{review.reviewer} has judged all pairs", fix="Show the results: tunewright human-eval --results"
        )
    columns = [*COLUMNS[:3], REFERENCE, *COLUMNS[3:]] if reference else COLUMNS
    rows = []
    for key in keys:
        pair = review.item(key)
        cells = {"evaluation": review.evidence.id, "item": key, "input": pair.input, "A": pair.a, "B": pair.b}
        cells |= {REFERENCE: review.reference(key), "verdict": "", "note": pair.note}
        rows.append([cells[name] for name in columns])
    write_sheet(path, columns, rows)
    review.keep_sample()
    return len(rows)


def import_sheet(review: BlindReview, path: Path) -> SheetImport:
    """Record a filled-in sheet's verdicts and notes for this reviewer: all, or none if a row is faulty.

    Raises:
        UserError: the file cannot be read, is of another evaluation, or rows are faulty (the message names each line).
    """

    def fault(cells: Mapping[str, str], where: str) -> str | None:
        _require_evaluation(cells["evaluation"], review, where)
        return _fault(review, cells)

    rows = checked_rows(path, COLUMNS, "item", "tunewright human-eval --export", fault)
    noted = [(cells["item"], note) for cells in rows if (note := cells["note"].strip())]
    notes = [review.mark(NoteMark, key, text=note) for key, note in noted if note != review.note_on(key)]
    filled = [cells for cells in rows if cells["verdict"].strip()]
    new = [cells for cells in filled if review.item(cells["item"]).verdict != _side(cells)]
    events: list[Mark] = [*notes]
    for cells in new:
        key = cells["item"]
        judged = review.judged(key, _side(cells))
        if REFERENCE in cells and not judged.reference:
            events.append(review.mark(ReferenceShownLine, key))
            judged = judged.model_copy(update={"reference": True})
        events.append(judged)
    review.record(events)
    return SheetImport(len(new), len(filled) - len(new), len(rows) - len(filled), len(notes))


def _side(cells: Mapping[str, str]) -> Side:
    return _SIDE_OF[cells["verdict"].strip().lower()]


def _require_evaluation(found: str, review: BlindReview, where: str) -> None:
    if found.strip() != review.evidence.id:
        raise UserError(
            f"The sheet belongs to evaluation {found.strip() or 'unknown'}, not to {review.evidence.id}; "
            "no verdict was recorded",
            where=where,
            fix=f"Import it there: tunewright human-eval {found.strip()} --import …" if found.strip() else None,
        )


def _fault(review: BlindReview, cells: Mapping[str, str]) -> str | None:
    key, verdict = cells["item"], cells["verdict"].strip()
    if key not in review.sample.order:
        return f"the sample has no item {key[:12]!r}"
    if verdict and verdict.lower() not in _SIDE_OF:
        return f"the verdict is {verdict!r}; it can be {', '.join(SIDES)} or nothing"
    pair = review.item(key)
    for name, text in (("A", pair.a), ("B", pair.b)):
        if cells[name] != one_line_end(text):
            return f"answer {name} was changed: restore the exported text, and write comments into the column note"
    return None
