"""Erasing the text and metadata of rows from a dataset, and finding other files of the project with the text.

Digests stay, because the digests of old versions are computed from pair keys. The log of removals says which keys were
purged, when and why.
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
from tunewright.core.text import count_of, listed
from tunewright.data.examples import INSTRUCTIONS, Example
from tunewright.data.pii import message_texts
from tunewright.data.review.reviews import redact_reviews
from tunewright.data.review.suspects import remove_cached_suspects
from tunewright.data.selection import Origins, read_origins
from tunewright.data.versions import Member, erase_purged
from tunewright.data.versions.files import has_rows, read_rows
from tunewright.data.versions.logs import (
    Removal,
    append_removals,
    describe_purges,
    erase_kept_pairs,
    read_removals,
)

FEWEST_CHARACTERS = 12
"""Shorter texts are not searched for: they occur in unrelated files."""

_LONGEST = 400  # characters of a text that are searched for
_ANCHOR = 8  # bytes
_CHUNK = 1 << 20
_MOST = 20
_GROUPS = 5
_SAME_NAME = re.compile(r"@[0-9a-f]{8}$")  # after the name of an added file, where two had the same
_WEIGHTS = (".safetensors", ".gguf", ".pt", ".bin")
_COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"BZh", b"\xfd7zXZ")


@dataclass(frozen=True)
class RemainingCopy:
    """A file with text of purged rows. ``rows`` is None if it was not searched; ``note`` says why."""

    path: str
    rows: int | None
    note: str = ""

    def __str__(self) -> str:
        what = f"text of {self.rows:,} row{'' if self.rows == 1 else 's'}" if self.rows is not None else "not searched"
        return f"{self.path}: {what}{f' ({self.note})' if self.note else ''}"


def purge_rows(
    dataset: Path, rows: Mapping[str, Member], because: str, reporter: Reporter
) -> tuple[RemainingCopy, ...]:
    """Erase the text of rows from the dataset, and return other files with it; the caller holds the lock."""
    examples = {key: m.example for key, m in rows.items()}
    events = Removal.of_rows("purged", examples, because, dataset.parent)
    grouped: tuple[RemainingCopy, ...] = ()
    # Group values remain, because the digests of versions are computed from them.
    if values := sorted({value for m in rows.values() for value in m.groups}):
        named = ", ".join(values[:_GROUPS]) + (f" and {len(values) - _GROUPS:,} more" if len(values) > _GROUPS else "")
        note = f"only their groups, which are part of the versions' digests: {named}"
        count = sum(bool(m.groups) for m in rows.values())
        grouped = (RemainingCopy("dataset/versions/*/members.tsv", count, note),)
    return _erase(dataset, events, examples, grouped, reporter)


def merge_removals(dataset: Path, events: Sequence[Removal], reporter: Reporter) -> None:
    """Add a remote's removals to the log, and purge the rows that were purged there; the caller holds the lock."""
    new = read_removals(dataset).lacking(events)
    purged = [event.key for event in new if event.event == "purged"]
    there = has_rows(dataset / "rows", purged)
    if new:
        purges = describe_purges([event for event in new if event.event == "purged"])
        reporter.say(f"Received {count_of(len(new), 'removal record')}{f': {purges}' if purges else ''}.")
    _erase(dataset, new, read_rows(dataset / "rows", there), (), reporter)


def _erase(
    dataset: Path,
    events: Sequence[Removal],
    rows: Mapping[str, Example],
    grouped: tuple[RemainingCopy, ...],
    reporter: Reporter,
) -> tuple[RemainingCopy, ...]:
    """Apply removals to the dataset's logs, reviews and rows.

    The dataset stays valid if the process is killed: the log of removals is written before the rows are erased, and the
    next holder of the lock erases the rows that it names.
    """
    root = dataset.parent
    purged = {event.key for event in events if event.event == "purged"}
    redact_reviews(dataset, purged)
    if purged and (pairs := erase_kept_pairs(dataset, purged)):
        reporter.say(f"Deleted {count_of(pairs, 'kept preference pair')} of purged rows.")
    if purged and (forgotten := remove_cached_suspects(root)):
        reporter.say(f"Deleted {count_of(forgotten, 'cached list')} of suspects, because they quote rows.")
    # The search needs the text, so it comes before the erasure.
    holders = (*grouped, *_remaining_copies(root, dataset, rows, reporter)) if rows else ()
    if holders:
        lines = listed(map(str, holders), len(holders), _MOST, "--json lists all")
        reporter.warn(f"The purge does not change these files. Delete or keep them yourself:\n{lines}")
    append_removals(dataset, read_removals(dataset).lacking(events))
    erase_purged(dataset)
    return holders


def _remaining_copies(
    root: Path, dataset: Path, rows: Mapping[str, Example], reporter: Reporter
) -> Iterator[RemainingCopy]:
    """Find the files with text of rows; the files that the rows were read from are always listed."""
    sources = {holder.path: holder for holder in _sources(root, read_origins(dataset), rows)}
    for holder in find_copies(root, dataset, rows.values(), reporter):
        source = sources.get(holder.path)
        if source is None or (holder.rows or 0) >= (source.rows or 0):
            sources.pop(holder.path, None)
            yield holder
    yield from sources.values()


def _sources(root: Path, origins: Origins, keys: Iterable[str]) -> Iterator[RemainingCopy]:
    """Yield the existing files that rows were read from, since templates may have changed the text."""
    read: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        for name in origins.again.get(key, ()):
            read[name].add(key)
    for name, there in sorted(read.items()):
        path = _SAME_NAME.sub("", name)
        if not (root / path).exists():
            path = path.rpartition(":")[0]  # of a sheet of a workbook
        if path and (root / path).exists():
            lines = sorted(origins.first[key][1] for key in there if origins.first[key][0] == name)
            shown = f"{', '.join(map(str, lines[:_GROUPS]))}{' …' if len(lines) > _GROUPS else ''}"
            places = f" at line{'' if len(lines) == 1 else 's'} {shown}" if lines else ""
            yield RemainingCopy(path, len(there), f"read from it{places}, with other text")


def find_copies(root: Path, dataset: Path, rows: Iterable[Example], reporter: Reporter) -> Iterator[RemainingCopy]:
    """Find the files below a folder that contain an input or output of these rows, except the dataset's own rows.

    The first 400 characters of each text are searched for, plain and as JSON, CSV and HTML; texts of fewer than 12
    characters are skipped. Weights are not searched; compressed files are listed.
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
        yield RemainingCopy(str(repository / ".git"), None, "git history keeps it; git filter-repo rewrites history")


def _files(root: Path, apart: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name != ".git" and Path(folder, name) != apart]
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.suffix not in _WEIGHTS:
                yield path


def _needles(rows: Iterable[Example]) -> dict[bytes, set[int]]:
    """Map each byte string to search for to the numbers of the rows that have it."""
    needles: dict[bytes, set[int]] = defaultdict(set)
    for number, example in enumerate(rows):
        turns = (m for m in example.messages if m.role not in INSTRUCTIONS)
        for whole in (text.strip() for m in turns for _, text in message_texts(m)):
            if len(whole) >= FEWEST_CHARACTERS:
                text = whole[:_LONGEST]
                as_json = {json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)}
                as_html = {html.escape(text), html.escape(text, quote=False)}
                for spelled in {text, text.replace('"', '""'), *as_html, *as_json}:
                    needles[spelled.encode(errors="replace")].add(number)
    return needles


def _search(path: Path, name: str, needles: Mapping[bytes, set[int]]) -> RemainingCopy | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        return RemainingCopy(name, None, f"unreadable: {error.strerror}")
    if data.startswith(_COMPRESSED):
        return RemainingCopy(name, None, "compressed")
    found = set().union(*(needles[needle] for needle in _found(data, needles)))
    return RemainingCopy(name, len(found)) if found else None


def _found(data: bytes, needles: Iterable[bytes]) -> set[bytes]:
    """Return the needles in the data, indexed by their first bytes, so that time does not grow with their number."""
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
