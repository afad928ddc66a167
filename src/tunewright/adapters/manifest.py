"""An adapter's manifest: the digest of every file in its folder, and the digests of its inputs.

``manifest.json`` is its canonical JSON (:func:`tunewright.core.io.canonical_json`), to the byte: signatures are over
it. These files may be next to it, and are not part of it:

  manifest.json.sig  signatures over the manifest, by ssh-keygen
  signature.json     signatures of an earlier tunewright (DSSE)
  local.json         what only this project knows of the adapter: its import, and other inputs with the same result
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunewright.core.errors import UserError, first_fault
from tunewright.core.io import canonical_json, file_digest
from tunewright.core.strict_json import strict_object

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
DSSE = "signature.json"
LOCAL = "local.json"

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
"""Name of an adapter: one spelling on every file system, and never a path."""


class Record(BaseModel):
    """A frozen document with strict keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


R = TypeVar("R", bound=Record)


def parse_record(kind: type[R], data: bytes, where: str) -> R:
    """Parse a record from strict JSON."""
    strict_object(data, where)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"Unexpected content: {first_fault(error)}", where=where) from None


class FileInfo(Record):
    """One file's size and digest."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class Sources(Record):
    """Digests of the adapter's inputs; None if its lineage lacks one."""

    base: Digest | None
    template: Digest | None
    dataset: Digest | None
    inputs: Digest | None
    """Digest of all inputs of the training."""


class Manifest(Record):
    """The signed document. ``files`` maps each file's path in the folder, with ``/``, to its content."""

    type: Literal["tunewright adapter, version 1"] = "tunewright adapter, version 1"
    name: Name
    digest: Digest
    sources: Sources
    files: dict[str, FileInfo]

    @property
    def text(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(self.model_dump(mode="json")).encode()


def make_manifest(folder: Path, name: str, lineage: Mapping[str, Any]) -> Manifest:
    """Return the manifest of the files now in ``folder``."""
    files = {path: file_info(folder / path) for path in covered_files(folder)}
    sources = {
        "base": _named(lineage, "base", "digest"),
        "template": _named(lineage, "template_digest"),
        "dataset": _named(lineage, "dataset", "digest"),
        "inputs": _named(lineage, "inputs_digest"),
    }
    try:
        return Manifest(name=name, digest=lineage["digest"], sources=Sources(**sources), files=files)
    except ValidationError as error:
        what = f"No manifest can be made for this adapter: {first_fault(error)}"
        raise UserError(what, where=str(folder)) from None


def _named(lineage: Mapping[str, Any], *keys: str) -> Any:
    """Return a lineage's value at nested keys; None if it is absent."""
    found: Any = lineage
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def file_info(path: Path) -> FileInfo:
    """Return a file's size and SHA-256."""
    return FileInfo(bytes=path.stat().st_size, sha256=file_digest(path))


def covered_files(folder: Path) -> list[str]:
    """Return every file in an adapter's folder that its manifest covers, sorted; refuse links and special files."""
    found = []
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        if stat.S_ISDIR(kind):
            continue
        if not stat.S_ISREG(kind):
            raise UserError("An adapter's folder may have only plain files", where=str(path))
        relative = path.relative_to(folder).as_posix()
        if relative not in (MANIFEST, SIGNATURE, DSSE, LOCAL):
            found.append(relative)
    return found


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in an adapter's folder; None if it has none, as for adapters of an earlier tunewright."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    data = path.read_bytes()
    manifest = parse_record(Manifest, data, str(path))
    if manifest.text != data:
        raise UserError("The manifest is not in canonical form", where=str(path))
    return manifest


def changed_files(folder: Path, manifest: Manifest, files: Iterable[str] | None = None) -> list[str]:
    """Return the differences between ``folder`` and its manifest, each in a few words; empty if both match.

    ``files`` are the files to check (None: all, and that no others exist).
    """
    changed = []
    checked = {*covered_files(folder), *manifest.files} if files is None else {*files}
    for name in sorted(checked):
        path, info = folder / name, manifest.files.get(name)
        if info is None:
            changed.append(f"{name} is not in the manifest")
        elif not path.is_file():
            changed.append(f"{name} is missing")
        elif file_info(path) != info:
            changed.append(f"{name} has changed")
    return changed
