"""An adapter's manifest: the digest of every file in its folder, and by digest what it was made of.

``manifest.json`` is the canonical JSON (:func:`tunewright.core.io.canonical_json`) of this, to the byte: it is what
signatures are over. Beside it may lie, and is no part of it:

  signature.json    who stands for the manifest
  local.json        what only this project knows of the adapter: how it was imported, and which other inputs came to it
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.adapters.strict_json import strict_object
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, file_digest

MANIFEST = "manifest.json"
SIGNATURE = "signature.json"
LOCAL = "local.json"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""Of adapters and keys: one spelling on every file system, and never a path."""


class Record(BaseModel):
    """A frozen document whose keys and types are taken to the letter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=Record)


def parse_record(kind: type[R], data: bytes, where: str) -> R:
    """Return the record that ``data`` spells as JSON.

    Raises:
        UserError: JSON of two meanings (:func:`strict_json`), or another document than such a record.
    """
    strict_object(data, where)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"not what is expected here: {key}: {first['msg']}", where=where) from None


class FileFacts(Record):
    """One file's content."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class Sources(Record):
    """What the adapter was made of, by digest; None where its lineage does not say."""

    base: Digest | None
    template: Digest | None
    dataset: Digest | None
    inputs: Digest | None
    """Of all that decided the training."""


class Manifest(Record):
    """What a signature is over. ``files`` maps each file's path in the folder, with ``/``, to its content."""

    type: Literal["tunewright adapter, version 1"] = "tunewright adapter, version 1"
    name: Name
    digest: Digest
    sources: Sources
    files: dict[str, FileFacts]

    @property
    def text(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(self.model_dump(mode="json")).encode()


def make_manifest(folder: Path, name: str, lineage: Mapping[str, Any]) -> Manifest:
    """Return the manifest of what is in ``folder`` now.

    Raises:
        UserError: a link or another thing that is no plain file, or a lineage that names no digests.
    """
    files = {path: file_facts(folder / path) for path in covered_files(folder)}
    sources = {
        "base": _named(lineage, "base", "digest"),
        "template": _named(lineage, "template_digest"),
        "dataset": _named(lineage, "dataset", "digest"),
        "inputs": _named(lineage, "inputs_digest"),
    }
    try:
        return Manifest(name=name, digest=lineage["digest"], sources=Sources(**sources), files=files)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"no manifest can be made of it: {told}", where=str(folder)) from None


def _named(lineage: Mapping[str, Any], *keys: str) -> Any:
    """Return what a lineage has at a key within a key; None where it has nothing there."""
    found: Any = lineage
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def file_facts(path: Path) -> FileFacts:
    """Return a file's size and SHA-256."""
    return FileFacts(bytes=path.stat().st_size, sha256=file_digest(path))


def covered_files(folder: Path) -> list[str]:
    """Return every file in an adapter's folder that its manifest speaks of, sorted.

    Raises:
        UserError: a link or another thing that is no plain file.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        if stat.S_ISDIR(kind):
            continue
        if not stat.S_ISREG(kind):
            raise UserError("it is no plain file, and an adapter's folder holds nothing else", where=str(path))
        relative = path.relative_to(folder).as_posix()
        if relative not in (MANIFEST, SIGNATURE, LOCAL):
            found.append(relative)
    return found


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that ``data`` spells.

    Raises:
        UserError: it is none, or not its canonical spelling.
    """
    manifest = parse_record(Manifest, data, where)
    if manifest.text != data:
        raise UserError("not the canonical spelling of a manifest", where=where)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in an adapter's folder; None where there is none, as with adapters of an earlier tunewright.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return parse_manifest(path.read_bytes(), str(path))


def changes(folder: Path, manifest: Manifest, files: Iterable[str] | None = None) -> list[str]:
    """Return how ``folder`` differs from its manifest, each in a few words; empty where it is as it was stored.

    Args:
        files: those to look at (None: all, and that there is no other).
    """
    told = []
    looked_at = {*covered_files(folder), *manifest.files} if files is None else {*files}
    for name in sorted(looked_at):
        path, facts = folder / name, manifest.files.get(name)
        if facts is None:
            told.append(f"{name} is not in the manifest")
        elif not path.is_file():
            told.append(f"{name} is missing")
        elif file_facts(path) != facts:
            told.append(f"{name} has changed")
    return told
