"""Erasing the text and metadata of rows from a dataset for good, and finding what else in the project has the text.

Digests stay: pair keys are in the members of old versions, whose own digests are made of them. What a key was is in no
file of the dataset any more; that it was purged, when and why, is in the log of removals.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunewright.core.progress import Reporter
from tunewright.data.examples import Example
from tunewright.data.notices import listed
from tunewright.data.review.kept import forget_suspects
from tunewright.data.review.reviews import redact_reviews
from tunewright.data.selecting import Origins, read_origins
from tunewright.data.versions import Member, erase_purged
from tunewright.data.versions.removals import Removal, append_removals, purge_told, read_removals
from tunewright.data.versions.rows import has_rows, read_rows

FEWEST_CHARACTERS = 12
"""Shorter texts are not searched for: they stand in files that have nothing to do with the row."""

_LONGEST = 400  # characters of a text that are searched for
_ANCHOR = 8  # bytes
_CHUNK = 1 << 20
_MOST = 20
_GROUPS = 5
_SAME_NAME = re.compile(r"@[0-9a-f]{8}$")  # after the name of an added file, where two had the same
_WEIGHTS = (".safetensors", ".gguf", ".pt", ".bin")
_COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"BZh", b"\xfd7zXZ")


@dataclass(frozen=True)
class Holder:
    """A file that has text of purged rows, of how many; None: it was not searched, and ``note`` says why."""

    path: str
    rows: int | None
    note: str = ""

    def __str__(self) -> str:
        what = f"text of {self.rows:,} row{'' if self.rows == 1 else 's'}" if self.rows is not None else "not searched"
        return f"{self.path}: {what}{f' ({self.note})' if self.note else ''}"


def purge(
    root: Path, dataset: Path, events: Sequence[Removal], rows: Mapping[str, Member], reporter: Reporter
) -> tuple[Holder, ...]:
    """Erase the text of rows from the dataset, and list what else in the project has it; the caller holds the lock.

    Killed at any moment, the dataset is valid: the log of removals is written before the rows are erased, and whoever
    takes the lock next erases what it names.

    Args:
        root: the project's folder.
        events: the purges of these rows.
        rows: the rows by pair key.

    Returns:
        The files that still have some of the text.
    """
    return _erase(root, dataset, events, {key: m.example for key, m in rows.items()}, _grouped(rows), reporter)


def _grouped(rows: Mapping[str, Member]) -> tuple[Holder, ...]:
    """Return the groups of purged rows stay: the digests of versions are made of them."""
    values = sorted({value for m in rows.values() for value in m.groups})
    if not values:
        return ()
    named = ", ".join(values[:_GROUPS]) + (f" and {len(values) - _GROUPS:,} more" if len(values) > _GROUPS else "")
    note = f"only their groups, of which the versions' digests are made: {named}"
    return (Holder("dataset/versions/*/members.tsv", sum(bool(m.groups) for m in rows.values()), note),)


def take_over(dataset: Path, events: Sequence[Removal], reporter: Reporter) -> tuple[Holder, ...]:
    """Add another side's removals to the log, and purge here what was purged there; the caller holds the lock."""
    new = read_removals(dataset).lacking(events)
    purged = [event.key for event in new if event.event == "purged"]
    there = has_rows(dataset / "rows", purged)
    if new:
        told = purge_told([event for event in new if event.event == "purged"])
        reporter.say(f"{len(new):,} records of removals are new here{f'; {told}' if told else ''}.")
    return _erase(dataset.parent, dataset, new, read_rows(dataset / "rows", there), (), reporter)


def _erase(
    root: Path,
    dataset: Path,
    events: Sequence[Removal],
    rows: Mapping[str, Example],
    grouped: tuple[Holder, ...],
    reporter: Reporter,
) -> tuple[Holder, ...]:
    purged = {event.key for event in events if event.event == "purged"}
    redact_reviews(dataset, purged)
    if purged and (forgotten := forget_suspects(root)):
        reporter.say(f"Removed {forgotten:,} kept lists of suspects: they quote rows.")
    # Looked for while the text is still known, and told before it is erased: after that nobody could.
    holders = (*grouped, *_holders(root, dataset, rows, reporter)) if rows else ()
    if holders:
        told = listed(map(str, holders), len(holders), _MOST, "--json lists all")
        reporter.warn(f"The purge does not reach these files, which are yours to erase or to keep:\n{told}")
    append_removals(dataset, read_removals(dataset).lacking(events))
    erase_purged(dataset)
    return holders


def _holders(root: Path, dataset: Path, rows: Mapping[str, Example], reporter: Reporter) -> Iterator[Holder]:
    """Find the files with text of rows; those that the rows were read from are named whatever is found in them."""
    sources = {holder.path: holder for holder in _sources(root, read_origins(dataset), rows)}
    for holder in find_holders(root, dataset, rows.values(), reporter):
        source = sources.get(holder.path)
        if source is None or (holder.rows or 0) >= (source.rows or 0):
            sources.pop(holder.path, None)
            yield holder
    yield from sources.values()


def _sources(root: Path, origins: Origins, keys: Iterable[str]) -> Iterator[Holder]:
    """The files that rows were read from and that are still there: templates may have made the rows' text of them."""
    read: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        for name in origins.again.get(key, ()):
            read[name].add(key)
    for name, there in sorted(read.items()):
        path = _SAME_NAME.sub("", name)
        if (root / path).exists():
            lines = sorted(origins.first[key][1] for key in there if origins.first[key][0] == name)
            shown = f"{', '.join(map(str, lines[:_GROUPS]))}{' …' if len(lines) > _GROUPS else ''}"
            places = f" at line{'' if len(lines) == 1 else 's'} {shown}" if lines else ""
            yield Holder(path, len(there), f"read from it{places}, in another spelling")


def find_holders(root: Path, dataset: Path, rows: Iterable[Example], reporter: Reporter) -> Iterator[Holder]:
    """Find the files below a folder that have an input or output of these rows, the dataset's own rows apart.

    Texts are searched for as they are and as JSON, CSV and HTML spell them, to their first 400 characters; those of
    fewer than 12 characters are not. Weights are not searched; compressed files are named.
    """
    needles = _needles(rows)
    files = sorted(_files(root, dataset / "rows"))
    with reporter.task("looking for other copies", len(files), "files") as task:
        for path in files:
            holder = _search(path, path.relative_to(root).as_posix(), needles)
            if holder is not None:
                yield holder
            task.advance(note=path.name)
    repository = next((folder for folder in (root, *root.resolve().parents) if (folder / ".git").exists()), None)
    if repository is not None:
        yield Holder(str(repository / ".git"), None, "commits keep what was committed; git filter-repo rewrites them")


def _files(root: Path, apart: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != ".git" and Path(folder, name) != apart]
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.suffix not in _WEIGHTS:
                yield path


def _needles(rows: Iterable[Example]) -> dict[bytes, set[int]]:
    """Return what is searched for, to the numbers of the rows that have it."""
    needles: dict[bytes, set[int]] = defaultdict(set)
    for number, example in enumerate(rows):
        for message in example.messages:
            text = message.content.strip()
            if message.role == "system" or len(text) < FEWEST_CHARACTERS:
                continue
            for spelled in _spellings(text[:_LONGEST]):
                needles[spelled.encode(errors="replace")].add(number)
    return needles


def _spellings(text: str) -> set[str]:
    as_json = {json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)}
    return {text, text.replace('"', '""'), html.escape(text), html.escape(text, quote=False), *as_json}


def _search(path: Path, name: str, needles: Mapping[bytes, set[int]]) -> Holder | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Holder(name, None, f"it cannot be read: {error.strerror}")
    if data.startswith(_COMPRESSED):
        return Holder(name, None, "it is compressed")
    found = set().union(*(needles[needle] for needle in _found(data, needles)))
    return Holder(name, len(found)) if found else None


def _found(data: bytes, needles: Iterable[bytes]) -> set[bytes]:
    """Return the needles that are in the data, by their first bytes: the time does not grow with their number."""
    by_anchor: dict[int, list[bytes]] = defaultdict(list)
    for needle in needles:
        by_anchor[int.from_bytes(needle[:_ANCHOR], "little")].append(needle)
    anchors = np.array(sorted(by_anchor), dtype=np.uint64)
    found: set[bytes] = set()
    for start in range(0, max(0, len(data) - _ANCHOR + 1), _CHUNK):
        chunk = np.frombuffer(data[start : start + _CHUNK + _ANCHOR - 1], dtype=np.uint8)
        count = len(chunk) - _ANCHOR + 1
        words = np.zeros(count, dtype=np.uint64)  # [positions]: the 8 bytes from each on, as one number
        for byte in range(_ANCHOR):
            words |= chunk[byte : byte + count].astype(np.uint64) << np.uint64(8 * byte)
        for place in np.flatnonzero(np.isin(words, anchors)).tolist():
            candidates = by_anchor[int(words[place])]
            found.update(needle for needle in candidates if data.startswith(needle, start + place))
    return found
