"""The log of row reviews, dataset/reviews.jsonl, one event per line, append-only; and the sample that it judges.

Verdicts are stored by pair key, so that they survive reordering and new versions, and end with the text they judge.

Two logs are merged by appending to each the events that only the other has. Lines keep their places, because
other files cite them, so the merged logs have the same events in different orders. Events are therefore
ordered by (when, nth), which ``append_reviews`` keeps increasing for each reviewer, regardless of the clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tunewright.annotation import AnnotationLog, NoteMark, UndoMark, VerdictMark
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import write_text, writing
from tunewright.core.log import (
    RESTORE,
    extend,
    held,
    line_digest,
    numbered_lines,
    parse_line,
    require_seal,
    sealed_line,
    whole_lines,
)
from tunewright.data.review.acceptance import Finding, Outcome, SamplingPlan, judge, sample_order

REVIEWS_FILE = "reviews.jsonl"
Verdict = Literal["right", "wrong", "edit", "leave-out", "skip"]
PURGED = "[purged]"
"""Text that replaces the reviewer's answer if the row was purged."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CHANGES = ("edit", "leave-out")
"""Verdicts that change the row in the next version."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    reviewer: str
    when: str
    """UTC, ISO 8601, in whole seconds, so that strings sort by time."""
    nth: Annotated[int, Field(ge=0)] | None = None
    """Number among this reviewer's events of one second; None (earlier releases): in the order of lines."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """First digits of the SHA-256 of the other fields; lines of earlier releases have no digest."""


class VerdictEvent(_Event, VerdictMark):
    """A verdict on a row. ``draw`` is the sample's number; None means that the row was reviewed as a suspect."""

    verdict: Verdict
    output: str | None = None
    """The corrected answer; set if and only if the verdict is ``edit``."""
    draw: int | None = None
    settles: Literal[True] | None = None
    """True if the other reviewers' verdicts were in sight. Such a verdict is no sign that two people agree."""


class NoteEvent(_Event, NoteMark):
    """A note on a row."""


class UndoEvent(_Event, UndoMark):
    """Withdrawal of a verdict on a row."""


class ContinuedSample(BaseModel):
    """The sample of an earlier version that an edited version continues."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    """The earlier version's digest and draw decide the order."""
    draw: int
    checked: int
    """Rows of the sample that had been checked: number."""
    edited: tuple[tuple[str, str], ...] = ()
    """Pair key of that version to pair key now: edited rows, and rows that an edited one has become."""
    wrong: tuple[str, ...] = ()
    """Pair keys of that version: rows edited after they were checked, which stay wrong."""


class DrawEvent(_Event):
    """The draw of a version's sample under a plan, numbered from 0; every redraw stays in the log."""

    event: Literal["draw"] = "draw"
    draw: int
    plan: SamplingPlan
    continues: ContinuedSample | None = None
    """Set if the version was made by edits, and continues the previous version's sample."""


Event = VerdictEvent | NoteEvent | UndoEvent | DrawEvent
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


@dataclass(frozen=True)
class ReviewLog(AnnotationLog[VerdictEvent]):
    """All events by time, and the reviewers' joint findings; keys are pair keys."""

    events: tuple[Event, ...]
    lines: tuple[int, ...] = ()
    """Line of each event, from 1."""

    def independent_verdicts(self, key: str) -> dict[str, VerdictEvent]:
        """Return each reviewer's latest verdict on a row, except skips, given without seeing the others' verdicts."""
        alone = {
            name: [judged for judged in stack if judged.settles is None and judged.verdict != "skip"]
            for name, stack in self.stacks.get(key, {}).items()
        }
        return {name: stack[-1] for name, stack in alone.items() if stack}

    def disputed(self, key: str) -> bool:
        """Return whether reviewers disagree on a row: right against wrong, or different changes of it."""
        said = [judged for judged in self.current_verdicts(key).values() if judged.verdict != "skip"]
        outputs = {judged.output for judged in said if judged.verdict in CHANGES}
        return len({judged.verdict == "right" for judged in said}) > 1 or len(outputs) > 1

    def finding(self, key: str) -> Finding | None:
        """Return the reviewers' joint finding: unsettled if all skipped or they disagree; None: not reviewed."""
        verdicts = {judged.verdict for judged in self.current_verdicts(key).values()}
        said = {"right" if verdict == "right" else "wrong" for verdict in verdicts - {"skip"}}
        if len(said) == 1:
            return "right" if "right" in said else "wrong"
        return "unsettled" if verdicts else None

    def latest_draw(self, version: str) -> DrawEvent | None:
        """Return the latest sample of a version; of two independent draws of one number, the first."""
        found = [e for e in self.events if isinstance(e, DrawEvent) and e.version == version]
        return max(found, key=lambda e: e.draw) if found else None

    def line(self, event: VerdictEvent) -> int:
        """Return the line of an event."""
        return next(line for line, each in zip(self.lines, self.events, strict=True) if each is event)

    def cited_line(self, record: Mapping[str, Any]) -> int | None:
        """Return the line of the verdict that an edit in imports.jsonl cites; None means not in this log.

        The record has the line in the log where the edit was applied, which may be another copy.
        """
        if not self.events:
            return int(record["line"])
        edits = [
            (line, event)
            for line, event in zip(self.lines, self.events, strict=True)
            if isinstance(event, VerdictEvent) and event.verdict == "edit" and event.key == record["before"]
        ]
        if "review" in record:
            return next((line for line, event in edits if event_digest(event) == record["review"]), None)
        theirs = [line for line, event in edits if event.reviewer in record["reviewers"]]
        return record["line"] if record["line"] in theirs else theirs[-1] if theirs else None

    def changed_together(self, reviewer: str, version: str) -> tuple[str, list[str]]:
        """Return the newest time at which a reviewer changed several rows of a version, and the rows' keys."""
        groups: dict[str, list[str]] = {}
        for key, stacks in self.stacks.items():
            mine = stacks[reviewer][-1] if stacks.get(reviewer) else None
            if mine is not None and mine.verdict in CHANGES and mine.version == version:
                groups.setdefault(mine.when, []).append(key)
        return max(((when, keys) for when, keys in groups.items() if len(keys) > 1), default=("", []))

    def withdrawn_edit(self, key: str, reviewer: str) -> str | None:
        """Return the answer that the reviewer edited and took back, unless the row was judged after that.

        None also for an edit of several rows together, whose answer nobody typed on this row.
        """
        stack: list[VerdictEvent] = []
        last = None
        for event in self.events:
            if isinstance(event, VerdictEvent | UndoEvent) and (event.key, event.reviewer) == (key, reviewer):
                last = stack.pop() if isinstance(event, UndoEvent) and stack else None
                if isinstance(event, VerdictEvent):
                    stack.append(event)
        if last is None or any(
            isinstance(event, VerdictEvent)
            and (event.reviewer, event.when, event.output) == (reviewer, last.when, last.output)
            and event.key != key
            for event in self.events
        ):
            return None
        return last.output


def read_reviews(dataset: Path) -> ReviewLog:
    """Return the reviews of a dataset; the log may be empty."""
    path = dataset / REVIEWS_FILE
    data = path.read_bytes() if path.is_file() else b""
    whole, torn = whole_lines(data)
    read = sorted(events_in(whole, str(path)), key=lambda each: _order(each[1]))
    return ReviewLog(tuple(event for _, event in read), torn, tuple(line for line, _ in read))


def events_in(data: bytes, where: str) -> list[tuple[int, Event]]:
    """Return the events of a log with their lines, from 1; each has its ``nth``, and no digest.

    Equal events in different logs are the same event. A duplicate, which a merge by git may leave, counts once.
    """
    found: dict[Event, int] = {}
    counts = Counter[tuple[str, str]]()
    for number, line in numbered_lines(data):
        event = parse_event(line, f"{where}:{number}")
        nth = event.nth
        if nth is None:
            nth = counts[event.reviewer, event.when]
            counts[event.reviewer, event.when] += 1
        found.setdefault(event.model_copy(update={"nth": nth, "digest": None}), number)
    return [(number, event) for event, number in found.items()]


def _order(event: Event) -> tuple[str, int | None, str, str]:
    return event.when, event.nth, event.reviewer, event_line(event)


def event_digest(event: Event) -> str:
    """Return the identifier of an event in all logs: 16 digits of the SHA-256 of its canonical JSON."""
    return line_digest(_facts(event))


def _facts(event: Event) -> dict[str, Any]:
    return event.model_dump(mode="json", exclude_none=True, exclude={"digest"})


def event_line(event: Event) -> str:
    """Return an event as a line of the log, with digest."""
    return sealed_line(_facts(event))


def parse_event(line: bytes, where: str) -> Event:
    """Parse a line of the log."""
    event = parse_line(_EVENT.validate_json, line, where, "Not a review")
    if isinstance(event, VerdictEvent) and (event.verdict == "edit") != (event.output is not None):
        raise UserError("Invalid review: `output` belongs to an edit, and only to an edit", where=where, fix=RESTORE)
    if event.digest is not None:
        require_seal(event_line(event), line, where, "review")
    return event


def append_reviews(dataset: Path, events: Sequence[Event]) -> None:
    """Append events, after removing half a line that a crash left; the file is locked.

    An event that is not later than its reviewer's last one (same second, or a slow clock) gets the
    last event's time and the next number.
    """

    def stamped(known: Sequence[Event]) -> list[Event]:
        last: dict[str, tuple[str, int]] = {}
        for event in known:
            assert event.nth is not None, "an event was read without its place"
            last[event.reviewer] = max(last.get(event.reviewer, ("", 0)), (event.when, event.nth))
        done = []
        for event in events:
            when, nth = last.get(event.reviewer, ("", 0))
            moment = (event.when, 0) if event.when > when else (when, nth + 1)
            last[event.reviewer] = moment
            done.append(event.model_copy(update={"when": moment[0], "nth": moment[1]}))
        return done

    _extend(dataset, stamped)


def merge_reviews(dataset: Path, events: Sequence[Event]) -> list[Event]:
    """Append the events of other logs (from ``events_in``) that this one lacks."""
    if not events:
        return []
    return _extend(dataset, lambda known: lacking(events, known))


def lacking(events: Sequence[Event], known: Sequence[Event]) -> list[Event]:
    """Return the events that are not known, without duplicates, by time."""
    there = {event_digest(event) for event in known}
    new = {event_digest(event): event for event in events}
    return sorted((event for name, event in new.items() if name not in there), key=_order)


def _extend(dataset: Path, news: Callable[[Sequence[Event]], list[Event]]) -> list[Event]:
    """Append the events that ``news`` returns for the events in the log, while the file is locked."""
    path = dataset / REVIEWS_FILE
    added: list[Event] = []

    def lines(existing: bytes) -> str:
        added.extend(news([event for _, event in events_in(existing, str(path))]))
        return "".join(map(event_line, added))

    extend(path, lines)
    return added


def without_purged(event: Event, purged: Collection[str]) -> Event:
    """Return the event as stored after a purge of these pair keys: an edit or a note loses its text."""
    if isinstance(event, VerdictEvent) and event.output is not None and event.key in purged:
        return event.model_copy(update={"output": PURGED, "digest": None})
    if isinstance(event, NoteEvent) and event.text and event.key in purged:
        return event.model_copy(update={"text": PURGED, "digest": None})
    return event


def redact_reviews(dataset: Path, purged: Collection[str]) -> None:
    """Remove the answers and notes that reviewers wrote for purged rows; each event keeps its line."""
    path = dataset / REVIEWS_FILE
    if not purged or not path.is_file():
        return
    with writing(path), held(path) as file:
        lines, torn = whole_lines(file.read())
        done = []
        for number, line in enumerate(lines.split(b"\n")[:-1], start=1):
            event = parse_event(line, f"{path}:{number}") if line.strip() else None
            kept = event and without_purged(event, purged)
            done.append(line.decode() + "\n" if kept is None or kept == event else event_line(kept))
        text = "".join(done)
        if torn or text.encode() != lines:
            write_text(path, text)


def status_line(found: Outcome, drawn: DrawEvent) -> str:
    """Return an outcome as text, such as "accepted: 0 of 72 wrong, under 5% at 95%"."""
    plan, before = drawn.plan, drawn.continues
    begun = found.checked or found.unsettled
    count = f"{found.wrong:,} of {found.checked:,} wrong" if begun else "no row checked yet"
    promise = f"under {100 * plan.limit:g}%"
    extra = [f"{found.unsettled:,} unsettled"] if found.unsettled else []
    extra += [f"draw {drawn.draw + 1}"] if drawn.draw else []
    extra += [f"{before.checked:,} checked in an earlier version"] if before else []
    if found.whole:
        grounds = "all rows checked"
    elif found.decision == "accepted":
        grounds = f"{promise} at {100 * plan.confidence:g}%"
    elif found.decision == "rejected":
        grounds = f"not {promise}"
    elif found.needed:
        grounds = f"at least {found.needed:,} more to check"
    else:
        grounds = "a skipped or disputed row has to be settled"
    name = {"accepted": "accepted", "rejected": "rejected", "continue": "under review"}[found.decision]
    return f"{name}: {', '.join([count, grounds, *extra])}"


# The sample of a version
#
# An edited version keeps the order of draw: an edited row takes the place of the row that it replaces.
# Rows drawn before the edit keep their finding, so an edited row stays wrong: sampled rows are mended
# more often than other rows, and would otherwise make the version look better than it is. The reasons,
# and why the promise of the plan still holds, are in docs/decisions/0082-edits-continue-the-sample.md.


@dataclass(frozen=True)
class Sample:
    """All rows of a version in the order in which they are checked."""

    drawn: DrawEvent
    slots: tuple[str, ...]
    """Pair keys in the version of the draw."""
    order: tuple[str, ...]
    """Pair keys in the version; one key twice if an edit made two rows one."""

    @property
    def asked(self) -> list[str]:
        """Pair keys that people judge, in order: each once, without rows that stay wrong."""
        wrong = set(self.drawn.continues.wrong) if self.drawn.continues else ()
        return list(dict.fromkeys(key for slot, key in zip(self.slots, self.order, strict=True) if slot not in wrong))

    def findings(self, reviews: ReviewLog) -> Iterator[Finding]:
        """Yield the findings in order, up to the first row without a finding."""
        wrong = set(self.drawn.continues.wrong) if self.drawn.continues else ()
        for slot, key in zip(self.slots, self.order, strict=True):
            found = "wrong" if slot in wrong else reviews.finding(key)
            if found is None:
                return
            yield found

    def ahead(self, reviews: ReviewLog) -> int:
        """Return how many rows have a finding that does not count yet, because a row before them has none."""
        counted = sum(1 for _ in self.findings(reviews))
        judged = {key for key in reviews.stacks if reviews.finding(key) is not None}
        return sum(key in judged for key in self.order[counted:])

    def outcome(self, reviews: ReviewLog) -> Outcome:
        """Return the state of the acceptance test."""
        return judge(self.drawn.plan, self.findings(reviews), len(self.order))


def sample_of(drawn: DrawEvent, keys: Sequence[str]) -> Sample:
    """Return the sample of a version with these pair keys."""
    before = drawn.continues
    if before is None:
        order = sample_order(tuple(keys), drawn.version, drawn.draw)
        return Sample(drawn, order, order)
    edited = dict(before.edited)
    new = set(edited.values())
    former = (*edited, *(key for key in keys if key not in new))
    slots = sample_order(former, before.version, before.draw)
    return Sample(drawn, slots, tuple(edited.get(slot, slot) for slot in slots))


def outcome(reviews: ReviewLog, version: str, keys: Sequence[str]) -> Outcome | None:
    """Return the state of a version's acceptance test; None if no sample was drawn."""
    drawn = reviews.latest_draw(version)
    return None if drawn is None else sample_of(drawn, keys).outcome(reviews)


def continued_draw(
    reviews: ReviewLog, parent: tuple[str, Sequence[str]], version: tuple[str, Sequence[str]], edits: Mapping[str, str]
) -> DrawEvent | None:
    """Return the draw with which an edited version continues its parent's sample; None if there is nothing to continue.

    That is the case if no row of the sample was checked, the sample rejected the parent, the
    version has a draw of its own, or rows were added or left out.
    """
    drawn = reviews.latest_draw(parent[0])
    if drawn is None or reviews.latest_draw(version[0]) is not None:
        return None
    sample = sample_of(drawn, parent[1])
    found = sample.outcome(reviews)
    if not found.checked or found.decision == "rejected":
        return None
    before = drawn.continues or ContinuedSample(version=drawn.version, draw=drawn.draw, checked=0)
    places = {slot: edits.get(key, key) for slot, key in zip(sample.slots, sample.order, strict=True)}
    moved = {key for slot, key in places.items() if key != slot}
    checked = list(zip(sample.slots, sample.order, strict=True))[: found.checked]
    event = DrawEvent(
        draw=0,
        plan=drawn.plan,
        continues=ContinuedSample(
            version=before.version,
            draw=before.draw,
            checked=found.checked,
            edited=tuple(sorted((slot, key) for slot, key in places.items() if key in moved)),
            wrong=tuple(sorted({*before.wrong, *(slot for slot, key in checked if key in edits)})),
        ),
        version=version[0],
        reviewer=drawn.reviewer,
        when=now(),
    )
    there = sample_of(event, version[1])
    same_rows = set(there.slots) == set(sample.slots) and set(there.order) == set(version[1])
    return event if same_rows else None
