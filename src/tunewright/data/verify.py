"""Verification of a dataset folder: all rows, versions and reviews against their digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tunewright.config.project import OpenFolder
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, text_lines
from tunewright.core.log import numbered_lines, whole_lines
from tunewright.data.review.reviews import REVIEWS_FILE, parse_event
from tunewright.data.splits import SPLITS
from tunewright.data.versions import (
    IMPORTS,
    MANIFEST,
    Manifest,
    current_manifest,
    keys_digest,
    manifest_seal,
    no_version,
    read_manifest,
    short,
)
from tunewright.data.versions.files import MEMBERS, BadRow, places_of, read_members, scan_rows
from tunewright.data.versions.logs import (
    KEPT_PAIRS_FILE,
    REMOVED_FILE,
    KeptPair,
    Removal,
    Removals,
    erased_metadata,
)


@dataclass(frozen=True)
class IntegrityIssue:
    """An integrity issue: the file, with line if known, and the rows and versions concerned.

    ``rows`` are pair keys (for a damaged key, the stored and the expected one); ``versions`` are the digests of the
    versions that need them.
    """

    where: str
    what: str
    rows: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = f"; rows: {', '.join(map(short, self.rows))}" if self.rows else ""
        versions = f"; versions: {', '.join(map(short, self.versions))}" if self.versions else ""
        return f"{self.where}: {self.what}{rows}{versions}"


@dataclass(frozen=True)
class Verification:
    """Result of a verification.

    ``unsealed`` versions come from earlier releases: no digest covers manifest and imports. ``reviews`` counts review
    records, of which ``undigested`` come from earlier releases and have no digest.
    """

    rows: int
    versions: int
    reviews: int
    undigested: int
    damage: tuple[IntegrityIssue, ...]
    unsealed: tuple[str, ...]
    unneeded: int
    """Rows that no version needs, after an interrupted command or the loss of a version's folder: number."""
    purges: tuple[Removal, ...] = ()
    """Purges of rows that versions need."""

    @property
    def ok(self) -> bool:
        """True if there is no damage."""
        return not self.damage

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        document = {**asdict(self), "purges": [purge.model_dump(mode="json") for purge in self.purges]}
        return {"ok": self.ok, **document}


def verify(project: OpenFolder) -> Verification:
    """Check every row, version, review and kept pair against its digest, and collect all issues.

    Loading a version checks the same and stops at the first issue.

    Raises:
        UserError: there is no dataset, or a file cannot be read.
    """
    dataset = project.folder.dataset
    shards = sorted(dataset.glob("rows/[!.]*.jsonl"))
    folders = sorted(p for p in dataset.glob("versions/[!.]*") if p.is_dir())
    if not shards and not folders:
        raise no_version(dataset)
    damage: list[IntegrityIssue] = []
    removals = _parsed(dataset / REMOVED_FILE, lambda line, where: Removal.parse(line, where, "removal"), damage)
    store = _Store(Removals(tuple(removals)).purged)
    with project.reporter.task("verifying", len(shards) + len(folders), "files and versions") as task:
        for path in shards:
            store.read(path)
            task.advance()
        checks = []
        for folder in folders:
            checks.append(_VersionCheck(folder, store, {f.name for f in folders}))
            task.advance(note=folder.name)
    damage += [
        IntegrityIssue(where, bad.reason, bad.keys, tuple(sorted({d for key in bad.keys for d in store.needed[key]})))
        for where, bad in store.bad
    ]
    # An issue of a file that several versions build on is one issue, which names them all.
    versions: dict[IntegrityIssue, set[str]] = defaultdict(set)
    for each in (each for check in checks for each in check.damage):
        versions[replace(each, versions=())].update(each.versions)
    damage += [replace(each, versions=tuple(sorted(of_all))) for each, of_all in versions.items()]
    try:
        current_manifest(dataset)
    except UserError as error:
        # An unreadable manifest is reported above; a missing or invalid HEAD is not.
        if error.where == str(dataset / "HEAD"):
            damage.append(IntegrityIssue(error.where, error.what))
    reviews = _parsed(dataset / REVIEWS_FILE, parse_event, damage, tail="Half a review")
    _parsed(dataset / KEPT_PAIRS_FILE, lambda line, where: KeptPair.parse(line, where, "preference pair"), damage)
    return Verification(
        rows=len(store.good),
        versions=len(folders),
        reviews=len(reviews),
        undigested=sum(event.digest is None for event in reviews),
        damage=tuple(damage),
        unsealed=tuple(c.manifest.digest for c in checks if c.manifest is not None and c.manifest.seal is None),
        unneeded=len(store.good - store.needed.keys()),
        purges=tuple(purge for key, purge in sorted(store.purged.items()) if key in store.needed),
    )


_T = TypeVar("_T")


def _parsed(
    path: Path, parse: Callable[[bytes, str], _T], damage: list[IntegrityIssue], *, tail: str | None = None
) -> list[_T]:
    """Return the valid lines of a log, and add the others to ``damage``; a crash may leave half a ``tail``."""
    data = _read(path) if path.is_file() else b""
    whole, torn = whole_lines(data) if tail else (data, False)
    good = []
    for number, line in numbered_lines(whole):
        try:
            good.append(parse(line, f"{path}:{number}"))
        except UserError as error:
            damage.append(IntegrityIssue(error.where or str(path), error.what))
    if torn:
        last = whole.count(b"\n") + 1
        damage.append(IntegrityIssue(f"{path}:{last}", f"{tail}: ignored, and overwritten by the next review"))
    return good


@dataclass
class _Store:
    """Valid and invalid rows, and the versions that need each."""

    purged: dict[str, Removal]
    good: set[str] = field(default_factory=set)
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)
    needed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def read(self, path: Path) -> None:
        for row in scan_rows(_read(path)):
            if isinstance(row, BadRow):
                self.bad.append((f"{path}:{row.line}", row))
                self.bad_keys |= set(row.keys)
            elif row.key[:2] != path.stem:
                bad = BadRow(row.line, (row.key,), f"The row {row.key} belongs in another file")
                self.bad.append((f"{path}:{row.line}", bad))
            elif row.key in self.purged:
                reason = f"The row {row.key} was purged on {self.purged[row.key].day}, but its text is still here"
                self.bad.append((f"{path}:{row.line}", BadRow(row.line, (row.key,), reason)))
            else:
                self.good.add(row.key)


class _VersionCheck:
    """Check of one version's folder."""

    def __init__(self, folder: Path, store: _Store, folders: set[str]) -> None:
        self.folder = folder
        self.damage: list[IntegrityIssue] = []
        self.manifest: Manifest | None = None
        try:
            self.manifest = read_manifest(folder)
        except UserError as error:
            self._add(error.where or str(folder / MANIFEST), error.what)
        else:
            path = folder / MANIFEST
            if self.manifest.seal is not None and self.manifest.seal != manifest_seal(json.loads(_read(path))):
                self._add(path, "The manifest was changed: its seal does not match")
            if self.manifest.parent is not None and short(self.manifest.parent) not in folders:
                self._add(path, f"The parent version {short(self.manifest.parent)} is missing")
        self._check_members(store)
        self._check_imports(store)

    def _add(self, where: str | Path, what: str, *rows: str) -> None:
        versions = (self.manifest.digest,) if self.manifest else ()
        self.damage.append(IntegrityIssue(str(where), what, rows, versions))

    def _check_members(self, store: _Store) -> None:
        if self.manifest is None:
            return  # the expected digest is unknown
        dataset = self.folder.parent.parent
        path = self.folder / MEMBERS
        try:
            places = places_of(read_members(dataset, self.manifest.digest))
        except UserError as error:
            # The error may concern a version that this one builds on.
            self._add_members(error, store)
            return
        there = store.good | store.bad_keys
        for key in places:
            store.needed[key].append(self.manifest.digest)
            if key not in there and key not in store.purged:
                self._add(path, f"A row is missing in rows/{key[:2]}.jsonl", key)
        for split in SPLITS:
            if self.manifest.splits.get(split) != keys_digest(k for k, place in places.items() if place.split == split):
                self._add(self.folder / MANIFEST, f"The digest of the {split} split does not match its rows")

    def _add_members(self, error: UserError, store: _Store) -> None:
        file, _, line = (error.where or "").rpartition(":")
        if file.endswith(MEMBERS) and line.isdecimal():
            text = _read(Path(file)).decode(errors="replace").split("\n")[int(line) - 1]
            self._add(error.where or "", error.what, *re.findall("[0-9a-f]{64}", text)[:1])
            return
        path = Path(error.where or "")
        odd = list(_inconsistent_lines(_read(path), store)) if path.is_file() else []
        for number, what, key in odd:
            self._add(f"{path}:{number}", what, key)
        if not odd:
            self._add(path, error.what)

    def _check_imports(self, store: _Store) -> None:
        path = self.folder / IMPORTS
        if not path.is_file():
            self._add(path, "The file is missing")
            return
        data = _read(path)
        if self.manifest is not None and store.purged:
            left = erased_metadata(data, _read(self.folder / MANIFEST), store.purged.keys())
            if left:
                what = "Metadata of purged rows is still here: the next command that changes the dataset erases it"
                self._add(path, what)
                data = (
                    data if MANIFEST in left else left[IMPORTS]
                )  # the manifest expects this after an interrupted erasure
        expected = self.manifest.imports if self.manifest else None
        if expected is not None and hashlib.sha256(data).hexdigest() == expected:
            return
        found = False
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                record = json.loads(line)
                fine = isinstance(record, dict) and canonical_json(record).encode() == line
            except ValueError:
                fine = False
            if not fine:
                found = True
                self._add(f"{path}:{number}", "Invalid import record")
        if expected is not None and not found:
            self._add(path, "The import records were changed: their digest does not match")


def _inconsistent_lines(data: bytes, store: _Store) -> Iterator[tuple[int, str, str]]:
    """Yield the inconsistent lines of a changed members.tsv: number, issue and key."""
    rows = [line.split("\t") for line in text_lines(data.decode(errors="replace"))]
    whole = not rows or rows[0][0] != "from"  # else a difference from another version
    splits = {row[2]: row[1] for row in rows if whole and row[0] == row[2]}  # by the row that names a cluster
    for number, row in enumerate(rows, start=1):
        if row[0] == "from":
            continue
        key, split, cluster = row[:3] if whole else row[1:4]
        if key not in store.good and key not in store.bad_keys and key not in store.purged:
            yield number, "no row has this key", key
        elif whole and cluster not in splits:
            yield number, "no member names this cluster", key
        elif whole and split != splits[cluster]:
            yield number, "not in the split of its cluster", key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path)) from None
