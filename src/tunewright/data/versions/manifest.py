"""What a version says of itself: manifest.json, sealed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.config import Duplicates
from tunewright.core.errors import UserError
from tunewright.core.io import digest as json_digest
from tunewright.data.splits import Split

MANIFEST = "manifest.json"

_RESTORE = "Restore the dataset folder, from git for example."

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """A file that a version's new rows came from; ``rows`` are those that could be read."""

    name: str
    sha256: str
    rows: int


class Counts(_Record):
    """What is in a version (rows to conflicts, mixed), and what its import left out or moved (the others).

    A family is a cluster with several inputs and several outputs, in versions of earlier releases any cluster of
    several rows; a conflict is one input with several outputs. ``mixed`` rows are of the
    generic mix-in: they are counted in rows, train and clusters too. ``near_duplicates`` are rows of the version with
    nearly the input and the output of another one: what ``data.duplicates: drop`` leaves out.
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
        """How many rows each split has, mix-in apart."""
        return {"train": self.train - self.mixed, "dev": self.dev, "test": self.test}


class Settings(_Record):
    """The settings that decided clusters and splits, and whether inputs may have several outputs.

    ``conflicts`` is "accept" from the first import on that accepted them; None in versions of earlier releases.
    """

    dedup_threshold: float
    val_size: float
    test_size: float
    seed: int
    group_by: tuple[str, ...] = ()
    conflicts: Literal["error", "accept"] | None = None
    split_by: Literal["input", "output_template"] = "input"
    duplicates: Duplicates = "drop"  # versions of earlier releases have no such setting: they dropped them


class Mix(_Record):
    """The generic mix-in of a version: its file, how many rows were drawn of it, as which share of the training rows.

    ``left_out`` rows came up in the draw, but are (nearly) held-out rows, or benchmark items, or hold secrets.
    """

    source: Source
    fraction: float
    drawn: int
    left_out: int


class SplitFrom(_Record):
    """The version whose split this one inherited: its project's folder, its digest, and how many rows had it there."""

    name: str
    digest: Digest
    rows: int


class Manifest(_Record):
    """What a version says of itself. ``created`` is UTC, ISO 8601; ``splits`` maps each split to its digest.

    ``imports`` is the SHA-256 of imports.jsonl, ``seal`` that of the manifest's own canonical JSON without the seal.
    Versions of earlier releases have no author, no imports and no seal.
    """

    digest: Digest
    parent: Digest | None
    created: str
    message: str
    sources: tuple[Source, ...]
    counts: Counts
    splits: dict[Split, str]
    settings: Settings
    mix: Mix | None = None
    split_from: SplitFrom | None = None
    author: str | None = None
    imports: Digest | None = None
    seal: Digest | None = None


def short(digest: str) -> str:
    """Return the first 12 digits: what folders are called and people read."""
    return digest[:12]


def manifest_seal(document: Mapping[str, Any]) -> str:
    """Return the seal of a manifest as JSON has it: any other value of any field gives another."""
    return json_digest({name: value for name, value in document.items() if name != "seal"})


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in a version's folder."""
    path = folder / MANIFEST
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
