"""Verification of a dataset folder: all rows, versions and reviews against their digests."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tunewright.config.project import OpenFolder
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.log import numbered_lines, whole_lines
from tunewright.core.text import count_of
from tunewright.data.review.reviews import REVIEWS_FILE, parse_event
from tunewright.data.splits import SPLITS
from tunewright.data.versions import (
    IMPORTS,
    MANIFEST,
    Manifest,
    current_manifest,
    keys_digest,
    no_version,
    read_manifest,
    short,
)
from tunewright.data.versions.files import MEMBERS, BadRow, Places, StoredRow, read_places, scan_rows
from tunewright.data.versions.logs import (
    KEPT_PAIRS_FILE,
    REMOVED_FILE,
    KeptPair,
    Removal,
    Removals,
    erased_metadata,
)
from tunewright.data.versions.version import changed_files, straddling_clusters


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
    straddling: dict[str, int] = field(default_factory=dict)
    """Digest of each version with data.on_overlap: keep, to its clusters with rows in several splits."""

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

    Loading a version checks its rows and members in the same way and stops at the first issue.

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
    purged = Removals(tuple(removals)).purged
    good: set[str] = set()
    bad: list[tuple[str, BadRow]] = []
    needed: dict[str, list[str]] = defaultdict(list)  # key to the versions that need the row
    versions: dict[IntegrityIssue, set[str]] = defaultdict(set)  # several build on one file
    unsealed: list[str] = []
    straddling: dict[str, int] = {}
    with project.reporter.task("verifying", len(shards) + len(folders), "files and versions") as task:
        for path in shards:
            for row in _checked_rows(path, purged):
                if isinstance(row, BadRow):
                    bad.append((f"{path}:{row.line}", row))
                else:
                    good.add(row.key)
            task.advance()
        there = {*good, *purged, *(key for _, row in bad for key in row.keys)}
        for folder in folders:
            manifest, issues = _check_version(folder, purged, there, needed, straddling)
            if manifest is not None and manifest.seal is None:
                unsealed.append(manifest.digest)
            for issue in issues:
                versions[issue].update({manifest.digest} if manifest else ())
            task.advance(note=folder.name)
    damage += [
        IntegrityIssue(where, row.reason, row.keys, tuple(sorted({d for key in row.keys for d in needed[key]})))
        for where, row in bad
    ]
    damage += [replace(issue, versions=tuple(sorted(of_all))) for issue, of_all in versions.items()]
    try:
        current_manifest(dataset)
    except UserError as error:
        # An unreadable manifest is reported above; a missing or invalid HEAD is not.
        if error.where == str(dataset / "HEAD"):
            damage.append(IntegrityIssue(error.where, error.what))
    reviews = _parsed(dataset / REVIEWS_FILE, parse_event, damage, tail="Half a review")
    _parsed(dataset / KEPT_PAIRS_FILE, lambda line, where: KeptPair.parse(line, where, "preference pair"), damage)
    return Verification(
        rows=len(good),
        versions=len(folders),
        reviews=len(reviews),
        undigested=sum(event.digest is None for event in reviews),
        damage=tuple(damage),
        unsealed=tuple(unsealed),
        unneeded=len(good - {key for key, of_all in needed.items() if of_all}),
        purges=tuple(purge for key, purge in sorted(purged.items()) if needed.get(key)),
        straddling=straddling,
    )


_T = TypeVar("_T")


def _parsed(
    path: Path, parse: Callable[[bytes, str], _T], damage: list[IntegrityIssue], *, tail: str | None = None
) -> list[_T]:
    """Return the valid lines of a log, and add the invalid ones to ``damage``; a crash may leave half a ``tail``."""
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


def _checked_rows(path: Path, purged: Mapping[str, Removal]) -> Iterator[StoredRow | BadRow]:
    for row in scan_rows(_read(path)):
        if isinstance(row, BadRow):
            yield row
        elif row.key[:2] != path.stem:
            yield BadRow(row.line, (row.key,), f"The row {row.key} belongs in another file")
        elif row.key in purged:
            reason = f"The row {row.key} was purged on {purged[row.key].day}, but its text is still here"
            yield BadRow(row.line, (row.key,), reason)
        else:
            yield row


def _check_version(
    folder: Path,
    purged: Mapping[str, Removal],
    there: Collection[str],
    needed: dict[str, list[str]],
    straddling: dict[str, int],
) -> tuple[Manifest | None, list[IntegrityIssue]]:
    """Return a version's manifest, unless it is damaged, and the issues; add the version to the rows that it needs.

    ``straddling`` gets its number of clusters in several splits, if data.on_overlap kept them.
    """
    issues: list[IntegrityIssue] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(folder)
        if manifest.parent is not None and not (folder.parent / short(manifest.parent)).is_dir():
            what = f"The parent version {short(manifest.parent)} is missing"
            issues.append(IntegrityIssue(str(folder / MANIFEST), what))
        places = read_places(folder.parent.parent, manifest.digest)
        for key in places:
            needed[key].append(manifest.digest)
        issues += _place_issues(folder, manifest, places, there)
        if torn := len(straddling_clusters(places.values())):
            if manifest.given_split is None or manifest.given_split.on_overlap != "keep":
                what = f"{count_of(torn, 'cluster')} with rows in several splits, without data.on_overlap: keep"
                issues.append(IntegrityIssue(str(folder / MEMBERS), what))
            else:
                straddling[manifest.digest] = torn
    except UserError as error:
        issues.append(IntegrityIssue(error.where or str(folder), error.what))
    return manifest, [*issues, *_import_issues(folder, manifest, purged.keys())]


def _place_issues(folder: Path, manifest: Manifest, places: Places, there: Collection[str]) -> Iterator[IntegrityIssue]:
    for key in places:
        if key not in there:
            yield IntegrityIssue(str(folder / MEMBERS), f"A row is missing in rows/{key[:2]}.jsonl", (key,))
    for split in SPLITS:
        if manifest.splits.get(split) != keys_digest(key for key, place in places.items() if place.split == split):
            what = f"The digest of the {split} split does not match its rows"
            yield IntegrityIssue(str(folder / MANIFEST), what)


def _import_issues(folder: Path, manifest: Manifest | None, purged: Collection[str]) -> Iterator[IntegrityIssue]:
    """Check the import records, and the manifest that has their digest; without a manifest, each record's form."""
    path, wrong = folder / IMPORTS, []
    files = {IMPORTS: _read(path) if path.is_file() else b""}
    if manifest is not None:
        files[MANIFEST] = _read(folder / MANIFEST)
        if left := erased_metadata(files[IMPORTS], files[MANIFEST], purged):
            what = "Metadata of purged rows is still here: the next command that changes the dataset erases it"
            yield IntegrityIssue(str(path), what)
            if MANIFEST not in left:  # an interrupted erasure: the manifest expects the erased imports
                files |= left
        wrong = changed_files(files[IMPORTS], files[MANIFEST])
        if MANIFEST in wrong:
            yield IntegrityIssue(str(folder / MANIFEST), "The manifest was changed: its seal does not match")
        if manifest.imports is not None and path.is_file() and IMPORTS not in wrong:
            return
    if not path.is_file():
        yield IntegrityIssue(str(path), "The file is missing")
        return
    named = False
    for number, line in enumerate(files[IMPORTS].splitlines(), start=1):
        try:
            record = json.loads(line)
            fine = isinstance(record, dict) and canonical_json(record).encode() == line
        except ValueError:
            fine = False
        if not fine:
            named = True
            yield IntegrityIssue(f"{path}:{number}", "Invalid import record")
    if IMPORTS in wrong and not named:
        yield IntegrityIssue(str(path), "The import records were changed: their digest does not match")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the file: {error.strerror}", where=str(path)) from None
