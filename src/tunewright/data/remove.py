"""Removing rows from a dataset: a new version, a log that keeps them out, and optionally a purge.

A purge erases text and metadata of rows, and finds other files of the project with the text. Digests stay, because the
digests of old versions are computed from pair keys. The log of removals says which keys were purged, when and why.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.core.text import count_of, listed
from tunewright.data.dedup import count_near_repeats
from tunewright.data.examples import INSTRUCTIONS, Example
from tunewright.data.options import RemoveOptions
from tunewright.data.pii import message_texts
from tunewright.data.review.edits import require_enough, superseded_keys, without_unaccepted
from tunewright.data.review.reviews import redact_reviews
from tunewright.data.review.suspects import remove_cached_suspects
from tunewright.data.selection import count_rows_of_earlier_files, row_document, select
from tunewright.data.splits import SPLITS, Split
from tunewright.data.trace import AdapterExposure, Origins, adapter_exposure, read_origins
from tunewright.data.versions import (
    DatasetVersion,
    Manifest,
    Member,
    current_manifest,
    erase_purged,
    list_versions,
    load_version,
    locked,
    no_version,
    save_version,
)
from tunewright.data.versions.files import Place, has_rows, read_places, read_rows
from tunewright.data.versions.logs import (
    Removal,
    append_removals,
    describe_purges,
    erase_kept_pairs,
    read_removals,
)
from tunewright.data.versions.version import new_manifest, rename_clusters

FEWEST_CHARACTERS = 12
"""Shorter texts are not searched for: they occur in unrelated files."""

_LONGEST = 400  # characters of a text that are searched for
_ANCHOR = 8  # bytes
_CHUNK = 1 << 20
_MOST = 20  # files and rows named in a message
_GROUPS = 5
_SAME_NAME = re.compile(r"@[0-9a-f]{8}$")  # after the name of an added file, if two files had the same name
_WEIGHTS = (".safetensors", ".gguf", ".pt", ".bin")
_COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b", b"(\xb5/\xfd", b"PAR1", b"BZh", b"\xfd7zXZ")
_ITEM_KEY = re.compile(rb'^\{"key": ?"([0-9a-f]{64})"', re.MULTILINE)


@dataclass(frozen=True)
class RemainingCopy:
    """A file with text of purged rows. ``rows`` is None if it was not searched; ``note`` says why."""

    path: str
    rows: int | None
    note: str = ""

    def __str__(self) -> str:
        what = f"text of {count_of(self.rows, 'row')}" if self.rows is not None else "not searched"
        return f"{self.path}: {what}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Removed:
    """A removed row: its place, and its document as ``--where`` sees it (empty after a purge)."""

    key: str
    split: Split
    source: str | None
    line: int | None
    document: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoveResult:
    """The rows removed, or to be removed (``dry_run``), and the adapters and evaluations that used them.

    ``version`` is current afterwards. ``created`` is false if a version of the remaining rows exists
    already, or if a purge names only rows of earlier versions. ``rows`` are rows of the current
    version; ``earlier`` counts rows that only earlier versions have and whose text is also purged.
    """

    version: Manifest
    created: bool
    dry_run: bool
    because: str
    rows: tuple[Removed, ...]
    earlier: int
    adapters: tuple[AdapterExposure, ...]
    evaluations: dict[str, int]
    """Evaluation to the number of these rows that it measured on."""
    same_input: tuple[str, ...]
    """Keys of remaining rows with the same input as a removed one."""
    purged: int
    """Number of rows whose text was erased from all versions; 0 without a purge."""
    holders: tuple[RemainingCopy, ...]
    """Files of the project that still contain text of purged rows."""

    @property
    def splits(self) -> dict[Split, int]:
        """Number of removed rows by split."""
        counts = Counter(row.split for row in self.rows)
        return {split: counts[split] for split in SPLITS}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {**asdict(self), "version": self.version.model_dump(mode="json"), "splits": self.splits}


def remove(project: OpenFolder, options: RemoveOptions = RemoveOptions()) -> RemoveResult:
    """Remove the rows that match all given conditions, which creates a new version.

    Adding a file does not bring them back without ``restore``. Other files of the project with the text of purged rows
    are listed.

    Raises:
        UserError: no reason, no matching row, or too few rows left in the dataset or in a split. Nothing has changed.
    """
    dataset, reporter = project.folder.dataset, project.reporter
    because, purge = " ".join(options.because.split()), options.purge
    if not because and not options.dry_run:
        raise UserError("--because is missing: a removal needs a reason", fix='For example --because "mislabelled".')
    if current_manifest(dataset) is None:
        raise no_version(dataset)
    with locked(dataset):
        parent = load_version(dataset)
        origins = read_origins(dataset)
        current = {m.key: m for m in parent.members}
        members = _all_members(dataset, parent) if purge else current
        purged_before = read_removals(dataset).purged if purge else {}
        chosen = select(options, members, purged_before, origins, dataset)
        if not chosen:
            before = [e for e in purged_before.values() if e.because == because]
            if not before:
                place = "any version" if purge else f"version {parent.digest[:12]}"
                raise UserError(
                    f"No row of {place} matches {options.selection}",
                    where="data remove",
                    fix="`tunewright data show ROW --json` shows a row's fields.",
                )
            reporter.say(f"Nothing more to purge: {describe_purges(before)}")
        if stay := count_rows_of_earlier_files(options, current.values(), origins, dataset):
            reporter.warn(
                f"{stay:,} rows of {options.source} stay, because another file had them first. Name that file too, "
                "or name the rows with --keys."
            )
        going = {m.key: m for m in chosen if m.key in current}
        left = [m for m in parent.members if m.key not in going]
        family = _with_former_rows(dataset, parent, chosen, members, {m.key for m in left}) if purge else {}
        if going:
            require_enough(left, "data remove")
        result = _result(project.folder, parent, list(going.values()), family, left, origins, because)
        if options.dry_run:
            return replace(result, dry_run=True)
        there = {manifest.digest for manifest in list_versions(dataset)}
        version, holders = parent.manifest, tuple[RemainingCopy, ...]()
        if going:
            version = _save(dataset, parent, going, left, origins, because, reporter)
        if family:
            holders = purge_rows(dataset, family, because, reporter)
            # The purge may have rewritten the manifest, without metadata.
            version = current_manifest(dataset) or version
    rows = tuple(replace(row, document={}) if purge else row for row in result.rows)
    created = bool(going) and version.digest not in there
    return replace(result, version=version, created=created, rows=rows, purged=len(family), holders=holders)


def _all_members(dataset: Path, parent: DatasetVersion) -> dict[str, Member]:
    """Return the rows of all versions that still have text, each with its place in the latest version."""
    places: dict[str, Place] = {}
    for manifest in list_versions(dataset):
        places |= read_places(dataset, manifest.digest)
    keys = places.keys() - read_removals(dataset).purged.keys()
    members = {key: Member(row, key, *places[key]) for key, row in read_rows(dataset / "rows", keys).items()}
    return members | {m.key: m for m in parent.members}


def _with_former_rows(
    dataset: Path,
    parent: DatasetVersion,
    chosen: Sequence[Member],
    members: Mapping[str, Member],
    left: Collection[str],
) -> dict[str, Member]:
    """Return the chosen rows, with former rows that they were edited from or that have their input."""
    family = {m.key for m in chosen}
    became = superseded_keys(dataset, parent.manifest)
    family |= {old for old, now in became.items() if now in family and old in members}
    questions = {members[key].example.question_key for key in family}
    family |= {key for key, m in members.items() if m.example.question_key in questions}
    return {key: members[key] for key in sorted(family) if key not in left}


def _result(
    project: ProjectFolder,
    parent: DatasetVersion,
    going: Sequence[Member],
    family: Mapping[str, Member],
    left: Sequence[Member],
    origins: Origins,
    because: str,
) -> RemoveResult:
    keys = {m.key for m in going} | family.keys()
    former = {old for old, now in superseded_keys(project.dataset, parent.manifest).items() if now in keys}
    questions = {m.example.question_key for m in (*going, *family.values())}
    documents = [row_document(m, origins) for m in going]
    return RemoveResult(
        version=parent.manifest,
        created=False,
        dry_run=False,
        because=because,
        rows=tuple(Removed(m.key, m.split, d["source"], d["line"], d) for m, d in zip(going, documents, strict=True)),
        earlier=len(family.keys() - {m.key for m in going}),
        adapters=adapter_exposure(project.dataset, project.adapters, sorted(keys | former)),
        evaluations=count_measured(project.evaluations, keys | former),
        same_input=tuple(m.key for m in left if m.example.question_key in questions),
        purged=0,
        holders=(),
    )


def _save(
    dataset: Path,
    parent: DatasetVersion,
    going: Mapping[str, Member],
    left: Sequence[Member],
    origins: Origins,
    because: str,
    reporter: Reporter,
) -> Manifest:
    # The log comes first. After a crash, a row that is logged but still present is removed by the
    # same command again; a row that is gone but not logged would come back with its file.
    examples = {key: m.example for key, m in going.items()}
    append_removals(dataset, Removal.of_rows("removed", examples, because, dataset.parent))
    members = rename_clusters(without_unaccepted(dataset, parent.manifest, left, reporter))
    settings = parent.manifest.settings
    near = parent.manifest.counts.near_duplicates
    mix = parent.manifest.mix
    version = new_manifest(
        members,
        parent,
        settings,
        message=f"{count_of(len(going), 'row')} removed: {because}",
        mix=mix and mix.model_copy(update={"drawn": sum(m.mixed for m in members)}),
        near_duplicates=count_near_repeats(members, settings.dedup_threshold, reporter) if near else 0,
    )
    places = [(origins.first.get(key, ("unknown", 0)), key) for key in going]
    imports = [
        {"source": source, "line": line, "fate": "removed", "key": key, "reason": because}
        for (source, line), key in sorted(places)
    ]
    return save_version(dataset, version, members, imports, reporter)


def count_measured(evaluations: Path, keys: Collection[str]) -> dict[str, int]:
    """Count the rows that each evaluation measured on, by its folder's name."""
    found: dict[str, int] = {}
    for path in sorted(evaluations.glob("[!.]*/items.jsonl")):
        if count := sum(key.decode() in keys for key in _ITEM_KEY.findall(path.read_bytes())):
            found[path.parent.name] = count
    return found


# The purge


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
    """Add a remote's removals to the log, and purge the rows that it has purged; the caller holds the lock."""
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
    root, purged = dataset.parent, {event.key for event in events if event.event == "purged"}
    redact_reviews(dataset, purged)
    if purged and (pairs := erase_kept_pairs(dataset, purged)):
        reporter.say(f"Deleted {count_of(pairs, 'kept preference pair')} of purged rows.")
    if purged and (forgotten := remove_cached_suspects(root)):
        reporter.say(f"Deleted {count_of(forgotten, 'cached list')} of suspects, because they quote rows.")
    # The search needs the text, so it comes before the erasure.
    found: dict[str, RemainingCopy] = {}
    if rows:
        sources = {holder.path: holder for holder in _sources(root, read_origins(dataset), rows)}
        for holder in find_copies(root, dataset, rows.values(), reporter):
            source = sources.get(holder.path)
            if source is None or (holder.rows or 0) >= (source.rows or 0):
                found[holder.path] = holder
        found |= {path: holder for path, holder in sources.items() if path not in found}
    holders = (*grouped, *found.values())
    if holders:
        lines = listed(map(str, holders), len(holders), _MOST, "--json lists all")
        reporter.warn(f"The purge does not change these files. Delete or keep them yourself:\n{lines}")
    append_removals(dataset, read_removals(dataset).lacking(events))
    erase_purged(dataset)
    return holders


def _sources(root: Path, origins: Origins, keys: Iterable[str]) -> Iterator[RemainingCopy]:
    """Yield the existing files that rows were read from, since templates may have changed the text."""
    read: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        for name in origins.again.get(key, ()):
            read[name].add(key)
    for name, there in sorted(read.items()):
        path = _SAME_NAME.sub("", name)
        if not (root / path).exists():
            path = path.rpartition(":")[0]  # without the name of a workbook's sheet
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
    """Return the needles in the data. An index of first bytes keeps the time independent of their number."""
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
