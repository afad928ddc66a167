"""A blind review in progress: the next pair and the recorded verdicts, independent of the user interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evaluation.human_eval.journal import (
    Event,
    Journal,
    NoteLine,
    ReferenceShownLine,
    Side,
    UndoLine,
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
from tunewright.evidence.schema import Evidence, Item, load_evidence, load_items


def check_options(
    *,
    results: bool,
    export: bool,
    sheet: bool,
    items: bool,
    reviewer: bool,
    reference: bool,
    keep_preferences: bool = False,
    against: bool = False,
) -> None:
    """Refuse options of ``tunewright human-eval`` that would be ignored; each argument is True if given.

    Raises:
        UserError: options conflict; the message names them.
    """
    named = {"--results": results, "--export": export, "--import": sheet, "--keep-preferences": keep_preferences}
    actions = [name for name, there in named.items() if there]
    if len(actions) > 1:
        raise UserError("These options are mutually exclusive", where=" ".join(actions), fix="Choose one.")
    if reference and not export:
        raise UserError("--reference requires --export", where="--reference", fix="Add --export.")
    idle = [name for name, there in (("--items", items), ("--reviewer", reviewer)) if there]
    if (results or keep_preferences) and idle:
        raise UserError(f"{actions[0]} does not use {', '.join(idle)}", where=actions[0], fix="Leave it out.")
    if keep_preferences and against:
        raise UserError("--keep-preferences does not use --against", where="--keep-preferences", fix="Leave it out.")
    if sheet and items:
        raise UserError("--import does not use --items", where="--import", fix="Leave it out.")


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


class BlindReview:
    """One reviewer's pass over an evaluation's sample; every event is on disk before the next pair is shown.

    Args:
        folder: the evaluation's.
        reviewer: the reviewer's name.
        reporter: reports a newly drawn sample, and lines that a crash cut off.
        items: number of items to review, if no sample has been drawn yet (None: 50).
        against: name of the incumbent to compare with (None: the deciding contrast's control).

    Raises:
        UserError: there is no evaluation or incumbent, the name is invalid, or an existing sample differs.
    """

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
        self.journal = read_journal(self.folder, reviewer)
        self.reviewer = self.journal.reviewer
        if self.journal.torn:
            reporter.warn(
                "The last line of the review was cut off by a crash and does not count: judge that pair again."
            )
        every = load_items(folder)
        if against is None:
            require_arms(self.evidence, every)
        every = compared.items(every)
        self.sample = open_sample(compared, self.evidence, every, items)
        self._items = {item.key: item for item in every}
        _require_items(self.sample.order, self._items, self.folder)
        if strangers := self.journal.standing.keys() - set(self.sample.order):
            reporter.warn(f"{len(strangers):,} verdicts are on items outside the sample and do not count.")
        self._passed: set[str] = set()  # skipped in this pass: not offered again before the next one
        self._back: str | None = None  # taken back: shown next

    def refresh(self) -> None:
        """Read the journal again: the reviewer may have judged pairs elsewhere meanwhile."""
        self.journal = read_journal(self.folder, self.reviewer)

    @property
    def progress(self) -> Progress:
        """Return this reviewer's progress."""
        return progress_of(self.journal, self.sample)

    def next(self) -> Pair | None:
        """Return the pair to judge now, or None if all are judged or skipped in this pass."""
        if self._back is not None:
            return self.pair(self._back)
        key = next((key for key in self.open_keys() if key not in self._passed), None)
        return None if key is None else self.pair(key)

    def open_keys(self) -> list[str]:
        """Return the items without a verdict, including skipped ones, in review order."""
        standing = self.journal.standing
        return [key for key in self.sample.order if key not in standing or standing[key].verdict == "skip"]

    def pair(self, key: str) -> Pair:
        """Return an item of the sample in the form that the reviewer may see."""
        item, sample = self._items[key], self.sample
        answers = [item.answers[sample.treatment], item.answers[sample.control]]
        a, b = answers if treatment_is_a(sample.seed, key) else reversed(answers)
        said = self.journal.standing.get(key)
        return Pair(
            key=key,
            number=sample.order.index(key) + 1,
            input=item.input,
            a=a,
            b=b,
            reference=item.reference if key in self.journal.shown else None,
            note=self.journal.notes.get(key, ""),
            verdict=None if said is None else said.verdict,
        )

    def reference(self, key: str) -> str:
        """Return an item's reference, for a sheet: there nobody can record when it is viewed."""
        return self._items[key].reference

    def answer(self, pair: Pair, verdict: Side) -> None:
        """Record a verdict, replacing any earlier one."""
        self._append(self.judged(pair.key, verdict))
        self._back = None
        if verdict == "skip":
            self._passed.add(pair.key)

    def show_reference(self, pair: Pair) -> Pair:
        """Return the pair with its reference, and record that it was shown."""
        if pair.reference is None:
            self._append(ReferenceShownLine(key=pair.key, reviewer=self.reviewer, when=now()))
        return self.pair(pair.key)

    def note(self, pair: Pair, text: str) -> Pair:
        """Store a note on the pair, replacing any earlier one."""
        if text.strip() != pair.note:
            self._append(NoteLine(key=pair.key, text=text.strip(), reviewer=self.reviewer, when=now()))
        return self.pair(pair.key)

    def undo(self) -> Pair | None:
        """Take back this reviewer's latest verdict, even from an earlier pass; its pair is shown next."""
        last = self.journal.latest()
        if last is None or last.key not in self.sample.order:
            return None
        self._append(UndoLine(key=last.key, reviewer=self.reviewer, when=now()))
        self._passed.discard(last.key)
        self._back = last.key
        return self.pair(last.key)

    def keep_sample(self) -> None:
        """Record the sample, as the first verdict also does: from then on it stays the same."""
        keep_sample(self.folder, self.evidence, self.sample)

    def judged(self, key: str, verdict: Side) -> VerdictLine:
        """Return a verdict in the journal's form."""
        shown = key in self.journal.shown
        return VerdictLine(key=key, verdict=verdict, reference=shown, reviewer=self.reviewer, when=now())

    def record(self, events: list[Event]) -> None:
        """Record several events at once."""
        if events:
            self.keep_sample()
            append_events(self.folder, events)
            self.refresh()

    def _append(self, event: Event) -> None:
        self.record([event])


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


def _require_items(order: tuple[str, ...], items: dict[str, Item], folder: Path) -> None:
    lost = [key for key in order if key not in items]
    if lost:
        what = f"{len(lost):,} items of the sample are no longer among the test items (first: {lost[0][:12]})"
        raise UserError(what, where=str(folder), fix="Restore items.jsonl.")
