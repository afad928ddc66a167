"""The reviewers' journals: one event per line in ``human-eval/NAME.jsonl``, append-only.

Verdicts are stored for A and B. The sample's seed determines which arm is which; the file does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import quote, unquote

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tunewright.core.errors import UserError
from tunewright.core.log import extend, numbered_lines, parse_line, whole_lines

FOLDER = "human-eval"
"""Folder next to the evidence."""
_LONGEST_NAME = 200  # bytes, of the 255 that a file name may have

Side = Literal["A", "B", "both", "neither", "skip"]
SIDES: tuple[Side, ...] = get_args(Side)


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    reviewer: str
    when: Annotated[str, Field(description="UTC, ISO 8601.")]


class VerdictLine(_Event):
    """A verdict: the better answer, or both good, or neither."""

    event: Literal["verdict"] = "verdict"
    verdict: Side
    reference: Annotated[bool, Field(description="The reference was shown before the verdict.")]


class UndoLine(_Event):
    """The reviewer takes back the latest standing verdict on an item."""

    event: Literal["undo"] = "undo"


class ReferenceShownLine(_Event):
    """The reviewer saw the item's reference."""

    event: Literal["reference"] = "reference"


class NoteLine(_Event):
    """The reviewer's note on an item, replacing any earlier one; an empty one removes it."""

    event: Literal["note"] = "note"
    text: str


Event = VerdictLine | UndoLine | ReferenceShownLine | NoteLine
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


@dataclass(frozen=True)
class Journal:
    """A reviewer's events, and the resulting verdicts."""

    reviewer: str
    events: tuple[Event, ...] = ()
    torn: bool = False
    """The file ends in half a line: a crash cut off the last event."""
    stacks: dict[str, list[VerdictLine]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    shown: frozenset[str] = frozenset()

    @property
    def standing(self) -> dict[str, VerdictLine]:
        """The current verdict on each item, by pair key."""
        return {key: stack[-1] for key, stack in self.stacks.items() if stack}

    def latest(self) -> VerdictLine | None:
        """Return the most recent of the current verdicts."""
        alive = {id(judged) for judged in self.standing.values()}
        return next((e for e in reversed(self.events) if isinstance(e, VerdictLine) and id(e) in alive), None)


def journal_path(folder: Path, reviewer: str) -> Path:
    """Return the path of a reviewer's journal.

    Raises:
        UserError: the name is empty, or not valid as a file name.
    """
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
    """Return one reviewer's journal; it may be empty.

    Raises:
        UserError: a line is not an event; the message names file and line.
    """
    path = journal_path(folder, reviewer)
    return _parse(path) if path.is_file() else Journal(reviewer.strip())


def _parse(path: Path) -> Journal:
    whole, torn = whole_lines(path.read_bytes())
    events = [
        parse_line(_EVENT.validate_json, line, f"{path}:{number}", "Invalid verdict", "Restore the file.")
        for number, line in numbered_lines(whole)
    ]
    reviewer = unquote(path.stem)
    if other := next((e.reviewer for e in events if e.reviewer != reviewer), None):
        raise UserError(f"The file has verdicts of {reviewer} and of {other}", where=str(path), fix="Restore the file.")
    return _stood(reviewer, events, torn)


def _stood(reviewer: str, events: Sequence[Event], torn: bool) -> Journal:
    stacks: dict[str, list[VerdictLine]] = {}
    notes: dict[str, str] = {}
    for event in events:
        if isinstance(event, VerdictLine):
            stacks.setdefault(event.key, []).append(event)
        elif isinstance(event, UndoLine) and stacks.get(event.key):
            stacks[event.key].pop()
        elif isinstance(event, NoteLine):
            notes[event.key] = event.text
    shown = frozenset(e.key for e in events if isinstance(e, ReferenceShownLine))
    return Journal(reviewer, tuple(events), torn, stacks, {k: text for k, text in notes.items() if text}, shown)


def append_events(folder: Path, events: Sequence[Event]) -> None:
    """Append events to a reviewer's journal, first removing a partial line that a crash left.

    Raises:
        UserError: the file cannot be written, or another process keeps it locked.
    """
    lines = "".join(f"{event.model_dump_json()}\n" for event in events)
    extend(journal_path(folder, events[0].reviewer), lambda _: lines)
