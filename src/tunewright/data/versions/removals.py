"""Rows taken out of a dataset on purpose: dataset/removed.jsonl, one event a line.

removed    the row is in no later version, and does not come back with its file
restored   it may come back
purged     its text is erased from all versions, for good; the digests that stay are tombstones

The log belongs to the dataset and not to a version, so that it holds whichever version is current. Two logs are united
by their lines. A purge is final, so the order of events does not matter to it; else the latest event of a key decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, write_text
from tunewright.core.io import digest as json_digest

REMOVED_FILE = "removed.jsonl"

_DIGITS = 16
_RESTORE = "Restore the file, from git for example."
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Removal(BaseModel):
    """One event; ``said`` is the row's :attr:`Example.said`, ``when`` is UTC, ISO 8601."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event: Literal["removed", "restored", "purged"]
    key: _Sha256
    said: _Sha256
    because: str
    when: str
    by: str | None = None

    @property
    def day(self) -> str:
        """The date of the event."""
        return self.when[:10]

    @property
    def line(self) -> str:
        """The event as a line of the log, with its digest."""
        facts: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return canonical_json({**facts, "digest": json_digest(facts)[:_DIGITS]}) + "\n"


@dataclass(frozen=True)
class Removals:
    """All events of a log, in its order."""

    events: tuple[Removal, ...] = ()

    @cached_property
    def purged(self) -> dict[str, Removal]:
        """The purge of each purged pair key; the first, where there are several."""
        found: dict[str, Removal] = {}
        for event in sorted(self.events, key=lambda e: (e.when, e.line)):
            if event.event == "purged":
                found.setdefault(event.key, event)
        return found

    @cached_property
    def out(self) -> dict[str, Removal]:
        """What keeps each pair key out: its purge, or its removal unless it was restored since."""
        latest = {event.key: event for event in sorted(self.events, key=lambda e: e.when)}
        return {key: event for key, event in latest.items() if event.event == "removed"} | self.purged

    @cached_property
    def _said(self) -> dict[str, Removal]:
        return {event.said: event for _, event in sorted(self.out.items())}

    def holding(self, key: str, said: str) -> Removal | None:
        """Return what keeps a row out: its own removal, or that of a row that says the same."""
        return self.out.get(key) or self._said.get(said)

    def lacking(self, others: Iterable[Removal]) -> list[Removal]:
        """Return those of other events that are not in this log, once each."""
        known = set(self.events)
        return [event for event in dict.fromkeys(others) if event not in known]


def read_removals(dataset: Path) -> Removals:
    """Return the log of a dataset; there may be none.

    Raises:
        UserError: naming the line: not an event, or it was changed.
    """
    path = dataset / REMOVED_FILE
    return Removals(tuple(events_in(path.read_bytes(), str(path)))) if path.is_file() else Removals()


def events_in(data: bytes, where: str) -> list[Removal]:
    """Return the events in the bytes of a log; ``where`` names it in errors.

    Raises:
        UserError: naming the line: not an event, or it was changed.
    """
    return [parse_removal(line, f"{where}:{n}") for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def parse_removal(line: bytes, where: str) -> Removal:
    """Return the event on a line.

    Raises:
        UserError: it is none, or it does not have its digest.
    """
    try:
        event = _Line.read(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"not a removal: {'.'.join(map(str, first['loc']))} {first['msg']}"
        raise UserError(what, where=where, fix=_RESTORE) from None
    if event.line.encode() != line + b"\n":
        raise UserError("the removal was changed: it does not have its digest", where=where, fix=_RESTORE)
    return event


class _Line(Removal):
    digest: str

    @classmethod
    def read(cls, line: bytes) -> Removal:
        return Removal(**cls.model_validate_json(line).model_dump(exclude={"digest"}))


def append_removals(dataset: Path, events: Sequence[Removal]) -> None:
    """Add events to the log, whole or not at all; the caller holds the dataset's lock."""
    if events:
        known = read_removals(dataset).events
        write_text(dataset / REMOVED_FILE, "".join(event.line for event in (*known, *events)))


def purge_told(purges: Collection[Removal]) -> str:
    """Return purges in words, such as "2 rows purged on 2026-11-27: ACME asked"."""
    by_reason: dict[tuple[str, str], int] = {}
    for purge in purges:
        by_reason[purge.day, purge.because] = by_reason.get((purge.day, purge.because), 0) + 1
    return "; ".join(
        f"{count:,} row{'' if count == 1 else 's'} purged on {day}: {because}"
        for (day, because), count in sorted(by_reason.items())
    )
