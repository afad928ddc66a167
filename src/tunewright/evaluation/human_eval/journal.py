"""The reviewers' journals: one event per line in ``human-eval/NAME.jsonl``, append-only.

Verdicts are stored for A and B. The sample's seed determines which arm is which; the file does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import quote, unquote

from pydantic import Field, TypeAdapter

from tunewright.annotation import AnnotationLog, Mark, NoteMark, UndoMark, VerdictMark
from tunewright.core.errors import UserError
from tunewright.core.log import extend, numbered_lines, parse_line, whole_lines

FOLDER = "human-eval"
"""Folder next to the evidence."""
_LONGEST_NAME = 200  # bytes, of the 255 that a file name may have

Side = Literal["A", "B", "both", "neither", "skip"]
SIDES: tuple[Side, ...] = get_args(Side)


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
    """Append events to a reviewer's journal, first removing a partial line that a crash left.

    Raises:
        UserError: the file cannot be written, or another process keeps it locked.
    """
    lines = "".join(f"{event.model_dump_json()}\n" for event in events)
    extend(journal_path(folder, events[0].reviewer), lambda _: lines)
