"""A version's manifest (manifest.json, sealed) and members, and the manifest of a new version."""

from __future__ import annotations

import getpass
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.config import Duplicates, Overlap
from tunewright.core.clock import now
from tunewright.core.errors import UserError, first_fault
from tunewright.core.io import digest as json_digest
from tunewright.core.log import stated_author
from tunewright.core.processes import run
from tunewright.core.spill import repeated
from tunewright.core.text import first_of
from tunewright.data.examples import Example, in_conflict, normalised
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions.files import Place, lines_sha256, member_line
from tunewright.render.blocks import Table, table, words

MANIFEST = "manifest.json"
IMPORTS = "imports.jsonl"

_RESTORE = "Restore the dataset folder, from git for example."

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceFile(_Record):
    """A file that a version's new rows came from; ``rows`` counts the readable rows."""

    name: str
    sha256: str
    rows: int


class Counts(_Record):
    """Counts of a version (rows to conflicts, mixed) and of its import (the other fields).

    A family is a cluster with several inputs and several outputs (in versions of earlier releases,
    any cluster of several rows). A conflict is an input with several outputs. ``mixed`` rows belong
    to the generic mix-in and are also counted in rows, train and clusters. ``near_duplicates`` are
    the rows that ``data.duplicates: drop`` would leave out.
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
    mixed: int = 0
    near_duplicates: int = 0

    @property
    def domain(self) -> dict[Split, int]:
        """Rows of each split, without the mix-in."""
        return {"train": self.train - self.mixed, "dev": self.dev, "test": self.test}


class Settings(_Record):
    """Settings that decided clusters and splits, and whether inputs may have several outputs.

    ``conflicts`` is "accept" from the first import that accepted them; None in versions of earlier releases.
    """

    dedup_threshold: float
    val_size: float
    test_size: float
    seed: int
    group_by: tuple[str, ...] = ()
    conflicts: Literal["error", "accept"] | None = None
    split_by: Literal["input", "output_template"] = "input"
    duplicates: Duplicates = "drop"  # versions of earlier releases lack the setting, and dropped them


class Mix(_Record):
    """The generic mix-in of a version: its file, its share of the training rows, and the rows drawn.

    ``left_out`` rows were drawn and rejected: (nearly) held-out rows, benchmark items, rows with secrets.
    """

    source: SourceFile
    fraction: float
    drawn: int
    left_out: int


class SplitFrom(_Record):
    """The version whose split this version inherited: its project's folder, its digest, and the shared rows' number."""

    name: str
    digest: Digest
    rows: int


class GivenSplit(_Record):
    """The split that the authors of rows gave them: by a column, by files, or both.

    With ``on_overlap`` keep, clusters may have rows in several splits.
    """

    column: str | None
    sources: tuple[str, ...]
    on_overlap: Overlap

    @property
    def text(self) -> str:
        """The origin of the split, in words: ``column part of a.csv``."""
        return (f"column {self.column} of " if self.column else "") + first_of(self.sources, 4)


class Numbers(_Record):
    """The version's number, and the numbers of the first and last row that it was the first of its line to have.

    Numbers are given when the version is written and are never given again in the same dataset.
    """

    version: int
    first_row: int
    last_row: int


class Manifest(_Record):
    """A version's manifest. ``created`` is UTC, ISO 8601; ``splits`` maps each split to its digest.

    ``imports`` is the SHA-256 of imports.jsonl, ``seal`` the SHA-256 of the manifest's own canonical
    JSON without the seal. Versions of earlier releases have no author, no imports, no seal and no numbers.
    """

    digest: Digest
    parent: Digest | None
    created: str
    message: str
    sources: tuple[SourceFile, ...]
    counts: Counts
    splits: dict[Split, str]
    settings: Settings
    mix: Mix | None = None
    split_from: SplitFrom | None = None
    given_split: GivenSplit | None = None
    numbers: Numbers | None = None
    author: str | None = None
    imports: Digest | None = None
    seal: Digest | None = None


def short(digest: str) -> str:
    """Return the first 12 digits, used for folders and messages."""
    return digest[:12]


def version_table(versions: Sequence[Manifest], current: Manifest | None = None) -> Table:
    """Return the table of dataset versions; if there are several, the current one has a star."""
    numbered, mixed = any(v.numbers for v in versions), any(v.counts.mixed for v in versions)
    numbers = ("Rows", "Train", "Dev", "Test", *(["Mixed in"] if mixed else []), "Clusters", "Families", "Conflicts")
    rows = []
    for version in versions:
        c = version.counts
        counts = (c.rows, c.train, c.dev, c.test, *([c.mixed] if mixed else []), c.clusters, c.families, c.conflicts)
        star = "*" if len(versions) > 1 and current is not None and version.digest == current.digest else ""
        number = [str(version.numbers.version) if version.numbers else ""] if numbered else []
        texts = (*number, short(version.digest) + star, version.created[:16].replace("T", " "))
        rows.append((*texts, *(f"{n:,}" for n in counts), version.message))
    first = ("No.",) if numbered else ()
    return table("Versions", (*first, *words("Version", "Created (UTC)"), *numbers, *words("Message")), rows)


def manifest_seal(document: Mapping[str, Any]) -> str:
    """Return the seal of a manifest's JSON document: the digest of all other fields."""
    return json_digest({name: value for name, value in document.items() if name != "seal"})


def changed_files(imports: bytes, manifest: bytes) -> list[str]:
    """Return which of a version's two files do not match the digests in the manifest; earlier releases wrote none."""
    document = json.loads(manifest)
    expected = {IMPORTS: hashlib.sha256(imports).hexdigest(), MANIFEST: manifest_seal(document)}
    stated = {IMPORTS: document.get("imports"), MANIFEST: document.get("seal")}
    return [name for name, digest in expected.items() if stated[name] not in (None, digest)]


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a version's folder."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read the manifest: {error.strerror}", where=str(path), fix=_RESTORE) from None
    except ValidationError as error:
        raise UserError(f"Invalid manifest: {first_fault(error)}", where=str(path), fix=_RESTORE) from None
    if short(manifest.digest) != folder.name:
        raise UserError(f"The manifest belongs to version {short(manifest.digest)}", where=str(path), fix=_RESTORE)
    return manifest


def current_author(folder: Path) -> str | None:
    """Return the stated author, else git's user.name for this folder, else the login name, else None."""
    if stated := stated_author():
        return stated
    # A folder that is missing has no git either; what is opened next names it.
    git = folder.is_dir() and shutil.which("git")
    if git and (name := " ".join(run(["git", "config", "user.name"], cwd=folder).stdout.split())):
        return name
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a process whose user has no name, in a container for example
        return None


@dataclass(frozen=True, slots=True)
class Member:
    """An example with its place in a version."""

    example: Example
    key: str
    split: Split
    cluster: str
    groups: tuple[str, ...] = ()
    """Values of data.group_by that the row shares with others, such as "customer=ACME"; sorted."""
    mixed: bool = False
    """True for rows of the generic mix-in, which are trained on but are not domain rows."""
    generated: bool = False
    """True for rows whose answer a model wrote: they are held out only if a person has accepted them."""
    given: Split | None = None
    """The split that a column or a source gave the row; None: it was drawn."""


@dataclass(frozen=True)
class DatasetVersion:
    """A loaded and verified version; members are sorted by pair key."""

    manifest: Manifest
    members: tuple[Member, ...]
    purged: tuple[str, ...] = ()
    """Pair keys of rows whose text was purged since, and which are not among the members."""

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted members, 64 hex digits."""
        return self.manifest.digest

    @cached_property
    def domain(self) -> tuple[Member, ...]:
        """Members without the generic mix-in, which are reviewed, retrieved and measured."""
        return tuple(member for member in self.members if not member.mixed)

    def examples(self, split: Split) -> list[Member]:
        """Return the members of one split, sorted by pair key; the training split includes the generic mix-in."""
        return [member for member in self.members if member.split == split]

    def domain_of(self, split: Split) -> list[Member]:
        """Return the members of one split without the generic mix-in, sorted by pair key."""
        return [member for member in self.domain if member.split == split]

    def split_digest(self, split: Split) -> str:
        """Return the SHA-256 of the split's sorted pair keys: equal digests mean the same examples."""
        return keys_digest(member.key for member in self.members if member.split == split)


def keys_digest(keys: Iterable[str]) -> str:
    """Return the SHA-256 of a set of pair keys."""
    return lines_sha256(f"{key}\n" for key in sorted(keys))


def members_lines(members: Iterable[Member]) -> Iterator[str]:
    """Yield the members as sorted lines, whose SHA-256 is the version's digest."""
    for m in sorted(members, key=lambda m: m.key):
        yield member_line(m.key, Place(m.split, m.cluster, m.groups, m.mixed, m.generated, m.given))


def members_digest(members: Iterable[Member]) -> str:
    """Return the version digest of these members, in any order."""
    return lines_sha256(members_lines(members))


def new_manifest(
    members: Sequence[Member],
    parent: DatasetVersion | None,
    settings: Settings,
    *,
    message: str,
    mix: Mix | None,
    sources: Iterable[SourceFile] = (),
    split_from: SplitFrom | None = None,
    given_split: GivenSplit | None = None,
    **of_import: int,
) -> Manifest:
    """Return the manifest of a new version; author, imports and seal are set when it is saved.

    ``of_import`` are counts of the import: duplicates, skipped, moved, near_duplicates.
    """
    same_prompt = repeated(m.example.prompt_digest for m in members)
    splits = Counter(m.split for m in members)
    counts = Counts(
        rows=len(members),
        train=splits["train"],
        dev=splits["dev"],
        test=splits["test"],
        clusters=len({m.cluster for m in members}),
        families=count_families(members),
        conflicts=sum(in_conflict([members[i].example for i in places]) for places in same_prompt),
        mixed=sum(m.mixed for m in members),
        **{"duplicates": 0, "skipped": 0, "moved": 0, **of_import},
    )
    return Manifest(
        digest=members_digest(members),
        parent=parent.digest if parent else None,
        created=now(),
        message=message,
        sources=tuple(sources),
        counts=counts,
        splits={split: keys_digest(m.key for m in members if m.split == split) for split in SPLITS},
        settings=settings,
        mix=mix,
        split_from=split_from,
        given_split=given_split or (parent.manifest.given_split if parent else None),
    )


def straddling_clusters(members: Iterable[Member | Place]) -> set[str]:
    """Return the names of the clusters with rows in several splits: only data.on_overlap: keep allows them."""
    splits: dict[str, set[Split]] = defaultdict(set)
    for member in members:
        splits[member.cluster].add(member.split)
    return {name for name, several in splits.items() if len(several) > 1}


def count_families(members: Sequence[Member]) -> int:
    """Count the clusters that have several inputs and several outputs, ignoring case and white space."""
    inputs: dict[str, set[bytes]] = defaultdict(set)
    outputs: dict[str, set[str]] = defaultdict(set)
    sizes = Counter(m.cluster for m in members)
    for m in members:
        if sizes[m.cluster] > 1:
            inputs[m.cluster].add(m.example.prompt_digest)
            outputs[m.cluster].add(normalised(m.example.output))
    return sum(len(inputs[cluster]) > 1 and len(outputs[cluster]) > 1 for cluster in inputs)


def clusters_by_split(members: Sequence[Member]) -> dict[Split, int]:
    """Count the clusters of each split, without the mix-in."""
    return {split: len({m.cluster for m in members if m.split == split and not m.mixed}) for split in SPLITS}


def cluster_sizes(members: Sequence[Member], split: Split) -> tuple[int, ...]:
    """Return the sizes of a split's clusters, without the mix-in, largest first."""
    sizes = Counter(m.cluster for m in members if m.split == split and not m.mixed)
    return tuple(sorted(sizes.values(), reverse=True))


def rename_clusters(members: Sequence[Member]) -> list[Member]:
    """Return the sorted members, with each cluster named after its smallest key, after rows were added or removed."""
    names: dict[str, str] = {}
    for member in members:
        names[member.cluster] = min(names.get(member.cluster, member.key), member.key)
    return sorted((replace(m, cluster=names[m.cluster]) for m in members), key=lambda m: m.key)
