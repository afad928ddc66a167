"""What people found when they checked rows: dataset/reviews.jsonl, one event a line, only ever appended to.

Verdicts are kept by pair key, so they outlive reordering and new versions, and die with the text they were given on.

Two logs are united by adding to each the events that only the other has: lines stay where they are, for others cite
them, so the logs then hold the same events in different orders. What decides is therefore not the order of lines but
that of (when, nth), which ``append_reviews`` keeps rising for each reviewer, whatever the clock says.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, write_text, writing
from tunewright.core.io import digest as json_digest
from tunewright.data.review.acceptance import Finding, FixedPlan, Outcome, Plan, SequentialPlan, judge, sample_order
from tunewright.data.versions import DatasetVersion

REVIEWS_FILE = "reviews.jsonl"
Verdict = Literal["right", "wrong", "edit", "skip"]
PURGED = "[purged]"
"""What stands where a reviewer's answer was whose row was purged."""
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "edit", "skip")

_DIGITS = 16
_RESTORE = "Restore the file, from git for example."


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    reviewer: str
    when: str
    """UTC, ISO 8601, in whole seconds: so written, later is greater."""
    nth: Annotated[int, Field(ge=0)] | None = None
    """Its place among this reviewer's events of one second; None (earlier releases): as the file's lines count it."""
    digest: Annotated[str, Field(pattern=f"^[0-9a-f]{{{_DIGITS}}}$")] | None = None
    """The first digits of the SHA-256 of the rest; lines of earlier releases have none."""


class Judged(_Event):
    """A verdict on a row. ``draw`` is the sample's number; None: among the suspects, apart from any sample."""

    event: Literal["verdict"] = "verdict"
    key: str
    verdict: Verdict
    output: str | None = None
    """The better answer; there if, and only if, the verdict is ``edit``."""
    draw: int | None = None


class Undone(_Event):
    """The reviewer takes back the latest of their verdicts on a row that stands."""

    event: Literal["undo"] = "undo"
    key: str


class Drawn(_Event):
    """A sample of a version was drawn, under a plan. Number 0 is the first; more of them are there to be seen."""

    event: Literal["draw"] = "draw"
    draw: int
    plan: Plan


Event = Judged | Undone | Drawn
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


@dataclass(frozen=True)
class Reviews:
    """All events, by time, and what stands of the verdicts: pair key, then reviewer, to verdicts, latest last."""

    events: tuple[Event, ...]
    stacks: dict[str, dict[str, list[Judged]]]
    lines: tuple[int, ...] = ()
    """The line of each event, from 1."""
    torn: bool = False
    """The file ends in half a line: a crash cut off the last event."""

    def standing(self, key: str) -> dict[str, Judged]:
        """Return the verdict of each reviewer on a row."""
        return {name: stack[-1] for name, stack in self.stacks.get(key, {}).items() if stack}

    def finding(self, key: str) -> Finding | None:
        """What reviewers say of a row together: unsettled if all skipped it or they disagree; None: not looked at."""
        verdicts = {judged.verdict for judged in self.standing(key).values()}
        said = {"right" if verdict == "right" else "wrong" for verdict in verdicts - {"skip"}}
        if len(said) == 1:
            return "right" if "right" in said else "wrong"
        return "unsettled" if verdicts else None

    def drawn(self, version: str) -> Drawn | None:
        """The latest sample of a version; where two drew it apart from each other, under the plan that was first."""
        found = [e for e in self.events if isinstance(e, Drawn) and e.version == version]
        return max(found, key=lambda e: e.draw) if found else None

    def line(self, event: Judged) -> int:
        """Return the line that an event is on."""
        return next(line for line, each in zip(self.lines, self.events, strict=True) if each is event)

    def cited(self, record: Mapping[str, Any]) -> int | None:
        """Return the line of the verdict that an edit's record in imports.jsonl cites; None: it is not in this log.

        The record's own line is that of the log where the edit was applied, which another side's may be.
        """
        if not self.events:
            return int(record["line"])
        edits = [
            (line, event)
            for line, event in zip(self.lines, self.events, strict=True)
            if isinstance(event, Judged) and event.verdict == "edit" and event.key == record["before"]
        ]
        if "review" in record:
            return next((line for line, event in edits if event_digest(event) == record["review"]), None)
        theirs = [line for line, event in edits if event.reviewer in record["reviewers"]]
        return record["line"] if record["line"] in theirs else theirs[-1] if theirs else None

    def latest(self, version: str, reviewer: str) -> Judged | None:
        """Return the verdict that ``reviewer`` gave last on this version, of those that stand."""
        theirs = [stack[-1] for names in self.stacks.values() if (stack := names.get(reviewer))]
        alive = {id(judged) for judged in theirs if judged.version == version}
        return next((e for e in reversed(self.events) if isinstance(e, Judged) and id(e) in alive), None)


def read_reviews(dataset: Path) -> Reviews:
    """Return all reviews of a dataset; there may be none.

    Raises:
        UserError: naming file and line: not an event, or it was changed.
    """
    path = dataset / REVIEWS_FILE
    data = path.read_bytes() if path.is_file() else b""
    whole, torn = whole_lines(data)
    read = sorted(events_in(whole, str(path)), key=lambda each: _order(each[1]))
    events = [event for _, event in read]
    return Reviews(tuple(events), _stacks(events), tuple(line for line, _ in read), torn)


def events_in(data: bytes, where: str) -> list[tuple[int, Event]]:
    """The events of a log and the lines that they are on, from 1; each event has its ``nth``, and no digest any more.

    Two events that are equal then are one and the same, in whichever logs they are. One that is there twice, as a merge
    by git may leave it, counts once.

    Raises:
        UserError: naming the line: not an event, or it was changed.
    """
    found: dict[Event, int] = {}
    counts = Counter[tuple[str, str]]()
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
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
    """Return what names an event in every log that has it: the first 16 digits of the SHA-256 of its canonical JSON."""
    return json_digest(event.model_dump(mode="json", exclude_none=True, exclude={"digest"}))[:_DIGITS]


def event_line(event: Event) -> str:
    """Return an event as a line of the log, with its digest."""
    facts = event.model_dump(mode="json", exclude_none=True, exclude={"digest"})
    return canonical_json({**facts, "digest": event_digest(event)}) + "\n"


def parse_event(line: bytes, where: str) -> Event:
    """Return the event on a line.

    Raises:
        UserError: it is none, or it does not have its digest.
    """
    try:
        event = _EVENT.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"not a review: {'.'.join(map(str, first['loc']))} {first['msg']}"
        raise UserError(what, where=where, fix=_RESTORE) from None
    if isinstance(event, Judged) and (event.verdict == "edit") != (event.output is not None):
        raise UserError("not a review: an edit, and only an edit, has an output", where=where, fix=_RESTORE)
    if event.digest is not None and event_line(event).encode() != line + b"\n":
        raise UserError("the review was changed: it does not have its digest", where=where, fix=_RESTORE)
    return event


def whole_lines(data: bytes) -> tuple[bytes, bool]:
    """A log without half a last line, and whether there was one; to a whole one that lacks its line end it is added."""
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if not tail:
        return data, False
    try:
        _EVENT.validate_json(tail)
    except ValidationError:
        return data[:end], True
    return data + b"\n", False


def _stacks(events: Sequence[Event]) -> dict[str, dict[str, list[Judged]]]:
    stacks: dict[str, dict[str, list[Judged]]] = {}
    for event in events:
        if isinstance(event, Judged):
            stacks.setdefault(event.key, {}).setdefault(event.reviewer, []).append(event)
        elif isinstance(event, Undone) and stacks.get(event.key, {}).get(event.reviewer):
            stacks[event.key][event.reviewer].pop()
    return stacks


def append_reviews(dataset: Path, events: Sequence[Event]) -> None:
    """Add events to the end; what a crash left of half a line goes first. Writers take turns.

    An event that is no later than its reviewer's last, by a clock that stands behind another machine's or within a
    second, gets that one's time and the next place in it.

    Raises:
        UserError: the disk is full or refuses, or the log was changed by hand.
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


def unite_reviews(dataset: Path, events: Sequence[Event]) -> list[Event]:
    """Add those events of other logs (as ``events_in`` reads them) that this one lacks, behind the lines that are here.

    Returns:
        The events that were added.

    Raises:
        UserError: the disk is full or refuses, or the log was changed by hand.
    """
    if not events:
        return []
    return _extend(dataset, lambda known: lacking(events, known))


def lacking(events: Sequence[Event], known: Sequence[Event]) -> list[Event]:
    """Return those of the events that are not known, once each, by time."""
    there = {event_digest(event) for event in known}
    new = {event_digest(event): event for event in events}
    return sorted((event for name, event in new.items() if name not in there), key=_order)


def _extend(dataset: Path, news: Callable[[Sequence[Event]], list[Event]]) -> list[Event]:
    """Add to the log what ``news`` makes of the events in it, before anybody else writes."""
    path = dataset / REVIEWS_FILE
    with writing(path), _held(path) as file:
        file.seek(0)
        data = file.read()
        whole, _ = whole_lines(data)
        added = news([event for _, event in events_in(whole, str(path))])
        if added:
            if len(whole) < len(data):
                file.truncate(len(whole))
            missing = whole[len(data) :]  # the line end that an editor may have left out
            file.write(missing + "".join(map(event_line, added)).encode())
            file.flush()
            os.fsync(file.fileno())
    return added


@contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """Open the log for reading and appending while nobody else writes it."""
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A purge may have put another file in its place while this one was waited for.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield file
                return


def without_purged(event: Event, purged: Collection[str]) -> Event:
    """Return an event as it is kept once these pair keys are purged: an edit of one keeps its place, not its text."""
    if isinstance(event, Judged) and event.output is not None and event.key in purged:
        return event.model_copy(update={"output": PURGED, "digest": None})
    return event


def redact_reviews(dataset: Path, purged: Collection[str]) -> None:
    """Take the answers that reviewers wrote for purged rows out of the log; every event stays on its line.

    Raises:
        UserError: the disk is full or refuses, or the log was changed by hand.
    """
    path = dataset / REVIEWS_FILE
    if not purged or not path.is_file():
        return
    with writing(path), _held(path) as file:
        file.seek(0)
        lines, torn = whole_lines(file.read())
        done = []
        for number, line in enumerate(lines.split(b"\n")[:-1], start=1):
            event = parse_event(line, f"{path}:{number}") if line.strip() else None
            kept = event and without_purged(event, purged)
            done.append(line.decode() + "\n" if kept is None or kept == event else event_line(kept))
        text = "".join(done)
        if torn or text.encode() != lines:
            write_text(path, text)


def outcome(reviews: Reviews, version: DatasetVersion) -> Outcome | None:
    """Where the acceptance of a version stands; None where no sample has been drawn."""
    drawn = reviews.drawn(version.digest)
    if drawn is None:
        return None
    order = sample_order([m.key for m in version.domain], version.digest, drawn.draw)
    return judge(drawn.plan, findings(reviews, order), len(order))


def findings(reviews: Reviews, order: Sequence[str]) -> Iterator[Finding]:
    """The findings of the first rows of a sample, up to the first row that nobody has looked at."""
    for key in order:
        found = reviews.finding(key)
        if found is None:
            return
        yield found


def status_line(found: Outcome, plan: SequentialPlan | FixedPlan, draw: int = 0) -> str:
    """Return an outcome in words, such as "accepted: 0 of 72 wrong, under 5% at 95%"."""
    count = f"{found.wrong:,} of {found.checked:,} wrong"
    promise = f"under {100 * plan.limit:g}%"
    extra = [f"{found.unsettled:,} unsettled"] if found.unsettled else []
    extra += [f"draw {draw + 1}"] if draw else []
    if found.whole:
        grounds = "all rows checked"
    elif found.decision == "accepted":
        grounds = f"{promise} at {100 * plan.confidence:g}%"
    elif found.decision == "rejected":
        grounds = f"not {promise}"
    else:
        grounds = f"at least {found.needed:,} more to check"
    name = {"accepted": "accepted", "rejected": "rejected", "go on": "under review"}[found.decision]
    return f"{name}: {', '.join([count, grounds, *extra])}"
