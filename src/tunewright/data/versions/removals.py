"""The log of removed rows: dataset/removed.jsonl, one event per line, and the erasure of purged rows' metadata.

removed    the row is in no later version, and is skipped when its file is added again
restored   the row may be added again
purged     the row's text is erased from all versions; the remaining digests are tombstones

The log belongs to the dataset, not to a version, so that it holds for any current version. Two logs are merged by line.
A purge is final, whatever the order of events; otherwise the latest event of a key decides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tunewright.core.io import canonical_json, json_document, write_text
from tunewright.core.log import SealedLine, numbered_lines
from tunewright.data.versions.version import IMPORTS, MANIFEST, manifest_seal

REMOVED_FILE = "removed.jsonl"

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Removal(SealedLine):
    """An event; ``said`` is the row's :attr:`Example.content_key`, ``when`` is UTC, ISO 8601."""

    event: Literal["removed", "restored", "purged"]
    key: _Sha256
    said: _Sha256
    because: str
    when: str
    by: str | None = None

    @property
    def day(self) -> str:
        """Date of the event."""
        return self.when[:10]


@dataclass(frozen=True)
class Removals:
    """All events of a log, in order."""

    events: tuple[Removal, ...] = ()

    @cached_property
    def purged(self) -> dict[str, Removal]:
        """Pair key to its first purge."""
        found: dict[str, Removal] = {}
        for event in sorted(self.events, key=lambda e: (e.when, e.line)):
            if event.event == "purged":
                found.setdefault(event.key, event)
        return found

    @cached_property
    def out(self) -> dict[str, Removal]:
        """Pair key to the event that keeps it out: a purge, or a removal without a later restore."""
        latest = {event.key: event for event in sorted(self.events, key=lambda e: e.when)}
        return {key: event for key, event in latest.items() if event.event == "removed"} | self.purged

    @cached_property
    def _said(self) -> dict[str, Removal]:
        return {event.said: event for _, event in sorted(self.out.items())}

    def holding(self, key: str, said: str) -> Removal | None:
        """Return the event that keeps a row out: its own, or that of a row with the same content."""
        return self.out.get(key) or self._said.get(said)

    def lacking(self, others: Iterable[Removal]) -> list[Removal]:
        """Return the events that this log lacks, without duplicates."""
        known = set(self.events)
        return [event for event in dict.fromkeys(others) if event not in known]


def read_removals(dataset: Path) -> Removals:
    """Return the log of a dataset, which may be empty.

    Raises:
        UserError: a line is not an event, or was changed.
    """
    path = dataset / REMOVED_FILE
    return Removals(tuple(events_in(path.read_bytes(), str(path)))) if path.is_file() else Removals()


def events_in(data: bytes, where: str) -> list[Removal]:
    """Return the events in the bytes of a log; ``where`` names it in errors.

    Raises:
        UserError: a line is not an event, or was changed.
    """
    return [Removal.parse(line, f"{where}:{number}", "removal") for number, line in numbered_lines(data)]


def append_removals(dataset: Path, events: Sequence[Removal]) -> None:
    """Append events to the log atomically; the caller holds the dataset's lock."""
    if events:
        known = read_removals(dataset).events
        write_text(dataset / REMOVED_FILE, "".join(event.line for event in (*known, *events)))


def describe_purges(purges: Collection[Removal]) -> str:
    """Return purges as text, such as "2 rows purged on 2026-11-27: ACME asked"."""
    by_reason: dict[tuple[str, str], int] = {}
    for purge in purges:
        by_reason[purge.day, purge.because] = by_reason.get((purge.day, purge.because), 0) + 1
    return "; ".join(
        f"{count:,} row{'' if count == 1 else 's'} purged on {day}: {because}"
        for (day, because), count in sorted(by_reason.items())
    )


_METADATA = b'"metadata":'
_KEY_IN_RECORD = re.compile(rb'"([0-9a-f]{64})"')


def erased_metadata(imports: bytes, manifest: bytes, purged: Collection[str]) -> dict[str, bytes]:
    """Return the files to rewrite, in order, so that a version has no metadata of purged rows; may be empty.

    The manifest comes first: if writing stops between the two files, a second call returns the imports that it expects.
    A manifest without a valid digest of imports and seal is left unchanged, so that damage stays visible. No version's
    digest changes, since it is that of the members.

    Args:
        imports: the content of imports.jsonl.
        manifest: the content of manifest.json.
        purged: pair keys; rows that duplicate one of them, or that it replaced, lose their metadata too.
    """
    kept = _without_metadata(imports, purged)
    if kept == imports:
        return {}
    try:
        document = json.loads(manifest)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return {IMPORTS: kept}
    was_whole = document.get("imports") == _sha256(imports) and document.get("seal") == manifest_seal(document)
    if not was_whole:
        return {IMPORTS: kept}
    document["imports"] = _sha256(kept)
    document["seal"] = manifest_seal(document)
    return {MANIFEST: json_document(document).encode(), IMPORTS: kept}


def _without_metadata(imports: bytes, purged: Collection[str]) -> bytes:
    if not purged or _METADATA not in imports:
        return imports
    wanted = {key.encode() for key in purged}
    lines = imports.split(b"\n")
    for number, line in enumerate(lines):
        if _METADATA in line and not wanted.isdisjoint(_KEY_IN_RECORD.findall(line)):
            lines[number] = _line_without(line, purged)
    return b"\n".join(lines)


def _line_without(line: bytes, purged: Collection[str]) -> bytes:
    try:
        record = json.loads(line)
    except ValueError:
        return line  # changed by hand, which `data verify` reports
    about = {record.get("key"), record.get("of"), record.get("before"), *record.get("besides", ())}
    if about.isdisjoint(purged):
        return line
    return canonical_json({name: value for name, value in record.items() if name != "metadata"}).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
