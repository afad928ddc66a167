"""Logs of a dataset that belong to no version: rows removed, restored and purged, and kept preference pairs.

dataset/removed.jsonl, one event per line, which any current version obeys:

removed    the row is in no later version, and is skipped when its file is added again
restored   the row may be added again
purged     the row's text is erased from all versions; the remaining digests are tombstones

Two logs are merged by line. A purge is final, regardless of the order of events; otherwise the latest event of a key
decides. Replaced and edited rows are not here: the imports.jsonl of the version that replaced them names both keys.

dataset/preferences.jsonl, one pair a line: preference pairs of known rows, from files and from judged answers.
Rejected answers of new rows are in the metadata of their version. A pair belongs to its input, regardless of the
ideal output in a later version. The split of that input in the current version decides if the pair may be trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, json_document, write_text
from tunewright.core.log import SealedLine, numbered_lines
from tunewright.core.text import count_of, listed
from tunewright.data.examples import Example
from tunewright.data.readers import SourceRow
from tunewright.data.versions.version import IMPORTS, MANIFEST, current_author, manifest_seal

REMOVED_FILE = "removed.jsonl"
KEPT_PAIRS_FILE = "preferences.jsonl"

_MOST = 10  # rows named in a message

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Removal(SealedLine):
    """An event; ``said`` is the row's :attr:`Example.content_key`, ``when`` is UTC, ISO 8601."""

    event: Literal["removed", "restored", "purged"]
    key: _Sha256
    said: _Sha256
    because: str
    when: str
    by: str | None = None

    @classmethod
    def of_rows(
        cls, event: Literal["removed", "purged"], rows: Mapping[str, Example], because: str, root: Path
    ) -> list[Self]:
        """Return an event of each row, given by pair key, that happens now in a project."""
        by, when = current_author(root), now()
        return [
            cls(event=event, key=key, said=row.content_key, because=because, when=when, by=by)
            for key, row in sorted(rows.items())
        ]

    def restored(self, root: Path) -> Removal:
        """Return the event that ends this removal now."""
        return self.model_copy(update={"event": "restored", "when": now(), "by": current_author(root)})

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
        """Return the event that keeps a row out: its own event, or the event of a row with the same content."""
        return self.out.get(key) or self._said.get(said)

    def lacking(self, others: Iterable[Removal]) -> list[Removal]:
        """Return the events that this log lacks, without duplicates."""
        known = set(self.events)
        return [event for event in dict.fromkeys(others) if event not in known]


def read_removals(dataset: Path) -> Removals:
    """Return the log of a dataset, which may be empty."""
    path = dataset / REMOVED_FILE
    return Removals(tuple(events_in(path.read_bytes(), str(path)))) if path.is_file() else Removals()


def events_in(data: bytes, where: str) -> list[Removal]:
    """Return the events in the bytes of a log; ``where`` names it in errors."""
    return [Removal.parse(line, f"{where}:{number}", "removal") for number, line in numbered_lines(data)]


def append_removals(dataset: Path, events: Sequence[Removal]) -> None:
    """Append events to the log atomically; the caller holds the dataset's lock."""
    if events:
        known = read_removals(dataset).events
        write_text(dataset / REMOVED_FILE, "".join(event.line for event in (*known, *events)))


def describe_purges(purges: Collection[Removal]) -> str:
    """Return purges as text, such as "2 rows purged on 2026-11-27: ACME asked"."""
    by_reason = Counter((purge.day, purge.because) for purge in purges)
    return "; ".join(
        f"{count_of(count, 'row')} purged on {day}: {because}" for (day, because), count in sorted(by_reason.items())
    )


def exclude_removed(
    dataset: Path,
    rows: Sequence[SourceRow],
    known: Collection[str],
    replacing: Mapping[str, str],
    *,
    restore: bool,
) -> tuple[list[SourceRow], dict[str, Removal]]:
    """Separate the rows that may be added from rows that were removed earlier, with their removals by pair key.

    A row stays out if it was removed itself, if its edited version (``replacing``) was, or if a row with the same
    content was; ``known`` rows of the version never do. Content is compared without system turns, and without case and
    white space of the input. ``restore`` adds removed rows, and refuses purged ones.
    """
    log = read_removals(dataset)
    if not log.out:
        return list(rows), {}
    coming: list[SourceRow] = []
    held: dict[str, Removal] = {}
    purged: list[SourceRow] = []
    for row in rows:
        key = row.example.pair_key
        removal = (
            None if key in known else log.holding(replacing.get(key, key), row.example.content_key) or log.out.get(key)
        )
        if removal is None or (restore and removal.event == "removed"):
            coming.append(row)
        else:
            held[key] = removal
            if restore:
                purged.append(row)
    if purged:
        places = listed((f"{r.source}:{r.line}" for r in purged), len(purged), _MOST, "leave out --restore to see all")
        raise UserError(
            f"Nothing was added: {len(purged):,} rows of the files were purged and cannot be restored\n{places}",
            where="--restore",
            fix="Delete the rows from the file, or add it without --restore, which skips them.",
        )
    return coming, held


def removed_rows_notice(rows: Sequence[SourceRow], held: Mapping[str, Removal]) -> str:
    """Return the warning for rows that stay out because they were removed earlier."""
    found = [(row, held[row.example.pair_key]) for row in rows if row.example.pair_key in held]
    entries = (f"{row.source}:{row.line} ({e.event} on {e.day}: {e.because})" for row, e in found)
    lines = listed(entries, len(found), _MOST, "the version's imports.jsonl lists all")
    back = " --restore adds those that were not purged." if any(e.event == "removed" for _, e in found) else ""
    return f"{count_of(len(found), 'row')} left out, removed earlier.{back}\n{lines}"


def removals_ended_by(dataset: Path, rows: Sequence[SourceRow]) -> list[Removal]:
    """Return the removals that end because these rows were added."""
    log = read_removals(dataset)
    if not log.out:
        return []
    found = (log.holding(row.example.pair_key, row.example.content_key) for row in rows)
    return list(dict.fromkeys(removal for removal in found if removal is not None and removal.event == "removed"))


_METADATA = b'"metadata":'
_KEY_IN_RECORD = re.compile(rb'"([0-9a-f]{64})"')


def erased_metadata(imports: bytes, manifest: bytes, purged: Collection[str]) -> dict[str, bytes]:
    """Return the files to rewrite, in order, so that a version has no metadata of purged rows; may be empty.

    The manifest comes first: if writing stops between the two files, a second call returns the
    imports that it expects. A manifest without a valid digest of imports and seal is left unchanged,
    so that damage stays visible. No version's digest changes, since the digest covers only the
    members. Rows that duplicate a purged one, or that it replaced, also lose their metadata.
    """
    kept = _without_metadata(imports, purged)
    if kept == imports:
        return {}
    try:
        document = json.loads(manifest)
    except ValueError:
        document = None
    was_whole = (
        isinstance(document, dict)
        and document.get("imports") == hashlib.sha256(imports).hexdigest()
        and document.get("seal") == manifest_seal(document)
    )
    if not was_whole:
        return {IMPORTS: kept}
    document["imports"] = hashlib.sha256(kept).hexdigest()
    document["seal"] = manifest_seal(document)
    return {MANIFEST: json_document(document).encode(), IMPORTS: kept}


def _without_metadata(imports: bytes, purged: Collection[str]) -> bytes:
    if not purged or _METADATA not in imports:
        return imports
    wanted = {key.encode() for key in purged}
    lines = imports.split(b"\n")
    for number, line in enumerate(lines):
        if _METADATA not in line or wanted.isdisjoint(_KEY_IN_RECORD.findall(line)):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue  # changed by hand, which `data verify` reports
        if not {record.get("key"), record.get("of"), record.get("before"), *record.get("besides", ())} & {*purged}:
            continue
        record.pop("metadata", None)
        lines[number] = canonical_json(record).encode()
    return b"\n".join(lines)


JudgedBy = Literal["person", "judge", "file"]
PairAnswer = str | list[dict[str, Any]]
"""The text of an answer, or its turns if it is not one turn of text (`readers.validate.rejected_value`)."""


class KeptPair(SealedLine):
    """Two answers to one input, of which one is preferred."""

    spells_none: ClassVar[bool] = True

    key: _Sha256
    """Pair key of the judged row."""
    input: _Sha256
    """:attr:`Example.input_key` of the judged row."""
    chosen: PairAnswer
    rejected: PairAnswer
    kind: JudgedBy
    by: str
    """Name of the reviewer or of the judging model, who saw both answers blind, or FILE:LINE."""
    when: str
    """UTC, ISO 8601."""
    version: _Sha256
    """Digest of the dataset version that was evaluated, or that was current when the file was added."""
    evaluation: str | None = None
    arms: tuple[str, str] | None = None
    """The arms that wrote the chosen and the rejected answer; None for a pair from a file."""

    @property
    def said(self) -> tuple[str, str, str]:
        """The input and both answers, in a form to compare."""
        return self.input, canonical_json(self.chosen), canonical_json(self.rejected)


def read_kept_pairs(dataset: Path) -> list[KeptPair]:
    """Return the kept pairs of a dataset, in the order of the file."""
    path = dataset / KEPT_PAIRS_FILE
    if not path.is_file():
        return []
    lines = numbered_lines(path.read_bytes())
    return [KeptPair.parse(line, f"{path}:{number}", "preference pair") for number, line in lines]


def replace_kept_pairs(dataset: Path, evaluation: str, kind: JudgedBy, pairs: Sequence[KeptPair]) -> int:
    """Keep exactly these pairs of one evaluation's people or judge, and return the number of new ones.

    The caller holds the dataset's lock.
    """
    before = read_kept_pairs(dataset)
    others = [pair for pair in before if (pair.evaluation, pair.kind) != (evaluation, kind)]
    wanted = [*others, *pairs]
    if wanted != before:
        _write(dataset, wanted)
    return sum(pair not in before for pair in pairs)


def add_kept_pairs(dataset: Path, pairs: Sequence[KeptPair]) -> int:
    """Keep the pairs whose answers are not kept yet, and return their number; the caller holds the dataset's lock."""
    before = read_kept_pairs(dataset)
    known = {pair.said for pair in before}
    new = list({pair.said: pair for pair in pairs if pair.said not in known}.values())
    if new:
        _write(dataset, [*before, *new])
    return len(new)


def erase_kept_pairs(dataset: Path, purged: Collection[str]) -> int:
    """Erase the pairs of purged rows, given by pair key; return their number. The caller holds the dataset's lock."""
    before = read_kept_pairs(dataset) if purged else []
    kept = [pair for pair in before if pair.key not in purged]
    if len(kept) < len(before):
        _write(dataset, kept)
    return len(before) - len(kept)


def _write(dataset: Path, pairs: Sequence[KeptPair]) -> None:
    write_text(dataset / KEPT_PAIRS_FILE, "".join(pair.line for pair in pairs))
