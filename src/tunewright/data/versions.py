"""Dataset versions: immutable sets of examples with their splits, named by a digest that no row order changes.

dataset/HEAD                           the current version's digest
dataset/rows/AB.jsonl                  the rows of all versions (see ``rows``)
dataset/versions/DIGEST12/members.tsv  pair key, split, cluster; sorted; its SHA-256 is the version's digest
                          manifest.json  where the version came from, what is in it, under which settings
                          imports.jsonl  what became of every row of the files that were added
"""

from __future__ import annotations

import fcntl
import graphlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.data.examples import Example
from tunewright.data.rows import read_rows, write_rows
from tunewright.data.splits import SPLITS, Split
from tunewright.disk import canonical_json, new_folder, write_json, write_text, writing
from tunewright.errors import UserError
from tunewright.progress import Reporter

_RESTORE = "Restore the dataset folder, from git for example."


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """A file that a version's new rows came from; ``rows`` are those that could be read."""

    name: str
    sha256: str
    rows: int


class Counts(_Record):
    """What is in a version (rows to conflicts), and what its import left out or moved (the last three).

    A family is a cluster of several rows; a conflict is one input with several outputs.
    """

    rows: int
    train: int
    dev: int
    test: int
    clusters: int
    families: int
    conflicts: int
    duplicates: int
    skipped: int
    moved: int


class Settings(_Record):
    """The settings that decided clusters and splits."""

    similarity: float
    dev: float
    test: float
    seed: int


class Manifest(_Record):
    """What a version says of itself. ``created`` is UTC, ISO 8601; ``splits`` maps each split to its digest."""

    digest: str
    parent: str | None
    created: str
    message: str
    sources: tuple[Source, ...]
    counts: Counts
    splits: dict[Split, str]
    settings: Settings


@dataclass(frozen=True)
class Member:
    """An example's place in a version."""

    example: Example
    key: str
    split: Split
    cluster: str


@dataclass(frozen=True)
class DatasetVersion:
    """A loaded and verified version; members are sorted by pair key."""

    manifest: Manifest
    members: tuple[Member, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted members, 64 hex digits."""
        return self.manifest.digest

    def examples(self, split: Split) -> list[Member]:
        """The members of one split, sorted by pair key."""
        return [member for member in self.members if member.split == split]

    def split_digest(self, split: Split) -> str:
        """SHA-256 of the split's sorted pair keys: equal digests mean the same examples."""
        return keys_digest(member.key for member in self.members if member.split == split)


def short(digest: str) -> str:
    """The first 12 digits: what folders are called and people read."""
    return digest[:12]


def keys_digest(keys: Iterable[str]) -> str:
    """SHA-256 of a set of pair keys."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()


def members_text(members: Iterable[Member]) -> str:
    """The text of members.tsv; its SHA-256 is the version's digest, so that `sha256sum` can check it."""
    return "".join(sorted(f"{m.key}\t{m.split}\t{m.cluster}\n" for m in members))


def members_digest(members: Iterable[Member]) -> str:
    """The version digest of these members, in any order."""
    return hashlib.sha256(members_text(members).encode()).hexdigest()


@contextmanager
def locked(dataset: Path) -> Iterator[None]:
    """Hold the dataset for one writer; the lock dies with its process.

    Raises:
        UserError: somebody else is writing, or the folder cannot be made.
    """
    with writing(dataset):
        dataset.mkdir(parents=True, exist_ok=True)
    handle = os.open(dataset, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another command is adding to this dataset", where=str(dataset), fix="Wait for it, then run this again."
            ) from None
        yield
    finally:
        os.close(handle)


def save_version(
    dataset: Path,
    manifest: Manifest,
    members: Sequence[Member],
    imports: Sequence[Mapping[str, Any]],
    reporter: Reporter,
) -> None:
    """Write a version and make it the current one: rows first, HEAD last, so a crash leaves the old one or the new.

    Raises:
        UserError: the disk is full or refuses; the former version stays current and whole.
    """
    write_rows(dataset / "rows", {m.key: m.example for m in members}, reporter)
    with new_folder(_folder(dataset, manifest.digest)) as folder:
        (folder / "members.tsv").write_text(members_text(members), encoding="utf-8", newline="\n")
        lines = "".join(canonical_json(line) + "\n" for line in imports)
        (folder / "imports.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    write_text(dataset / "HEAD", manifest.digest + "\n")


def load_version(dataset: Path, digest: str | None = None) -> DatasetVersion:
    """Load a version and verify it: every row against its key, all members against the digest.

    Args:
        dataset: the project's dataset folder.
        digest: a version's digest or the beginning of it; None: the current version.

    Raises:
        UserError: there is none, several begin so, or something in it was changed (naming file and key).
    """
    manifest = _current(dataset) if digest is None else _find(dataset, digest)
    if manifest is None:
        raise UserError(
            "there is no dataset version yet", where=str(dataset), fix="`tunewright data add FILE` makes one."
        )
    path = _folder(dataset, manifest.digest) / "members.tsv"
    places = _read_members(path)
    rows = read_rows(dataset / "rows", places)
    members = tuple(Member(rows[key], key, split, cluster) for key, (split, cluster) in sorted(places.items()))
    actual = members_digest(members)
    if actual != manifest.digest:
        raise UserError(f"the members were changed: their digest is {short(actual)}", where=str(path), fix=_RESTORE)
    return DatasetVersion(manifest, members)


def has_version(dataset: Path) -> bool:
    """Whether there is a current version."""
    return _current(dataset) is not None


def list_versions(dataset: Path) -> list[Manifest]:
    """The manifests of all versions, each after the one it was made from, else by age."""
    folder = dataset / "versions"
    paths = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    manifests = sorted((_read_manifest(path) for path in paths), key=lambda m: (m.created, m.digest))
    by_digest = {m.digest: m for m in manifests}
    order = graphlib.TopologicalSorter({m.digest: [m.parent] if m.parent in by_digest else [] for m in manifests})
    try:
        return [by_digest[digest] for digest in order.static_order()]
    except graphlib.CycleError as error:
        loop = ", ".join(short(d) for d in error.args[1])
        raise UserError(f"versions name each other as parents: {loop}", where=str(folder), fix=_RESTORE) from None


def import_files(dataset: Path, manifest: Manifest) -> list[Path]:
    """The imports.jsonl of a version and of all that it was made from, the newest first."""
    by_digest = {m.digest: m for m in list_versions(dataset)}
    files: list[Path] = []
    step: Manifest | None = manifest
    while step is not None:
        files.append(_folder(dataset, step.digest) / "imports.jsonl")
        step = by_digest.get(step.parent or "")
    return files


def _folder(dataset: Path, digest: str) -> Path:
    return dataset / "versions" / short(digest)


def _current(dataset: Path) -> Manifest | None:
    head = dataset / "HEAD"
    if not head.is_file():
        return None
    digest = head.read_text(encoding="utf-8", errors="replace").strip()
    folder = _folder(dataset, digest)
    manifest = _read_manifest(folder) if re.fullmatch("[0-9a-f]{64}", digest) and folder.is_dir() else None
    if manifest is None or manifest.digest != digest:
        raise UserError(f"the current version, {digest!r}, is not in {folder.parent}", where=str(head), fix=_RESTORE)
    return manifest


def _find(dataset: Path, digest: str) -> Manifest:
    versions = list_versions(dataset)
    found = [m for m in versions if digest and m.digest.startswith(digest)]
    if len(found) != 1:
        names = ", ".join(short(m.digest) for m in found or versions)
        raise UserError(
            f"{len(found) or 'no'} dataset version{'s begin' if found else ' begins'} with {digest!r}",
            where=str(dataset),
            fix=f"Versions: {names}" if names else "`tunewright data add FILE` makes one.",
        )
    return found[0]


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=_RESTORE) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"not a version's manifest: {key} {first['msg']}", where=str(path), fix=_RESTORE) from None
    if short(manifest.digest) != folder.name:
        raise UserError(f"the manifest is that of version {short(manifest.digest)}", where=str(path), fix=_RESTORE)
    return manifest


def _read_members(path: Path) -> dict[str, tuple[Split, str]]:
    places: dict[str, tuple[Split, str]] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), fix=_RESTORE) from None
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3 or fields[1] not in SPLITS:
            raise UserError("not a member: pair key, split and cluster", where=f"{path}:{number}", fix=_RESTORE)
        places[fields[0]] = (fields[1], fields[2])
    return places
