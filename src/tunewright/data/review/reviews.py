"""What people found when they checked rows: dataset/reviews.jsonl, one event a line, only ever appended to.

Verdicts are kept by pair key, so they outlive reordering and new versions, and die with the text they were given on.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tunewright.data.review.acceptance import Finding, FixedPlan, Outcome, Plan, SequentialPlan, judge, sample_order
from tunewright.data.versions import DatasetVersion
from tunewright.disk import canonical_json, writing
from tunewright.errors import UserError

REVIEWS_FILE = "reviews.jsonl"
Verdict = Literal["right", "wrong", "edit", "skip"]
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "edit", "skip")


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    reviewer: str
    when: str
    """UTC, ISO 8601."""


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


Event = Annotated[Judged | Undone | Drawn, Field(discriminator="event")]
_EVENT: TypeAdapter[Judged | Undone | Drawn] = TypeAdapter(Event)


def now() -> str:
    """This moment, as events have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Reviews:
    """All events in their order, and what stands of the verdicts: pair key, then reviewer, to verdicts, latest last."""

    events: tuple[Judged | Undone | Drawn, ...]
    stacks: dict[str, dict[str, list[Judged]]]
    lines: tuple[int, ...] = ()
    """The line of each event, from 1."""
    torn: bool = False
    """The file ends in half a line: a crash cut off the last event."""

    def standing(self, key: str) -> dict[str, Judged]:
        """The verdict of each reviewer on a row."""
        return {name: stack[-1] for name, stack in self.stacks.get(key, {}).items() if stack}

    def finding(self, key: str) -> Finding | None:
        """What reviewers say of a row together: unsettled if all skipped it or they disagree; None: not looked at."""
        verdicts = {judged.verdict for judged in self.standing(key).values()}
        said = {"right" if verdict == "right" else "wrong" for verdict in verdicts - {"skip"}}
        if len(said) == 1:
            return "right" if "right" in said else "wrong"
        return "unsettled" if verdicts else None

    def drawn(self, version: str) -> Drawn | None:
        """The latest sample of a version."""
        found = [e for e in self.events if isinstance(e, Drawn) and e.version == version]
        return found[-1] if found else None

    def line(self, event: Judged) -> int:
        """The line that an event is on."""
        return next(line for line, each in zip(self.lines, self.events, strict=True) if each is event)

    def latest(self, version: str, reviewer: str) -> Judged | None:
        """The verdict that ``reviewer`` gave last on this version, of those that stand."""
        theirs = [stack[-1] for names in self.stacks.values() if (stack := names.get(reviewer))]
        alive = {id(judged) for judged in theirs if judged.version == version}
        return next((e for e in reversed(self.events) if isinstance(e, Judged) and id(e) in alive), None)


def read_reviews(dataset: Path) -> Reviews:
    """All reviews of a dataset; there may be none.

    Raises:
        UserError: naming file and line: not an event.
    """
    path = dataset / REVIEWS_FILE
    events: list[Judged | Undone | Drawn] = []
    lines: list[int] = []
    data = path.read_bytes() if path.is_file() else b""
    whole, torn = _cut(data)
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip():
            events.append(_parse(line, f"{path}:{number}"))
            lines.append(number)
    return Reviews(tuple(events), _stacks(events), tuple(lines), torn)


def _parse(line: bytes, where: str) -> Judged | Undone | Drawn:
    try:
        event = _EVENT.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"not a review: {'.'.join(map(str, first['loc']))} {first['msg']}"
        raise UserError(what, where=where, fix="Restore the file, from git for example.") from None
    if isinstance(event, Judged) and (event.verdict == "edit") != (event.output is not None):
        raise UserError(
            "not a review: an edit, and only an edit, has an output",
            where=where,
            fix="Restore the file, from git for example.",
        )
    return event


def _cut(data: bytes) -> tuple[bytes, bool]:
    """The data without half a last line, and whether there was one; a whole line may lack its line end."""
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if not tail:
        return data, False
    try:
        _EVENT.validate_json(tail)
    except ValidationError:
        return data[:end], True
    return data + b"\n", False


def _stacks(events: Sequence[Judged | Undone | Drawn]) -> dict[str, dict[str, list[Judged]]]:
    stacks: dict[str, dict[str, list[Judged]]] = {}
    for event in events:
        if isinstance(event, Judged):
            stacks.setdefault(event.key, {}).setdefault(event.reviewer, []).append(event)
        elif isinstance(event, Undone) and stacks.get(event.key, {}).get(event.reviewer):
            stacks[event.key][event.reviewer].pop()
    return stacks


def append_reviews(dataset: Path, events: Sequence[Judged | Undone | Drawn]) -> None:
    """Add events to the end; what a crash left of half a line goes first. Writers take turns.

    Raises:
        UserError: the disk is full or refuses.
    """
    path = dataset / REVIEWS_FILE
    lines = "".join(canonical_json(e.model_dump(mode="json", exclude_none=True)) + "\n" for e in events)
    with writing(path), path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        data = file.read()
        whole, _ = _cut(data)
        if len(whole) < len(data):
            file.truncate(len(whole))
        missing = whole[len(data) :]  # the line end that an editor may have left out
        file.write(missing + lines.encode())
        file.flush()
        os.fsync(file.fileno())


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


def status(dataset: Path, version: DatasetVersion) -> str:
    """One line for people: whether this version has been accepted, and on what grounds."""
    reviews = read_reviews(dataset)
    drawn, found = reviews.drawn(version.digest), outcome(reviews, version)
    if drawn is None or found is None:
        return "not reviewed"
    return status_line(found, drawn.plan, drawn.draw)


def status_line(found: Outcome, plan: SequentialPlan | FixedPlan, draw: int = 0) -> str:
    """An outcome in words, such as "accepted: 0 of 72 wrong, under 5% at 95%"."""
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
