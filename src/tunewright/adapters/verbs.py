"""Verbs on stored adapters: ``tunewright adapters …``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters import signing
from tunewright.adapters.foreign import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import DSSE, MANIFEST, SIGNATURE, read_manifest
from tunewright.adapters.registry import Adapter, TrustStatus, find_adapter, list_adapters, trust_status, write_manifest
from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.adapters.foreign.importer import ImportResult
    from tunewright.core.remote_files import RemoteFiles


@dataclass(frozen=True)
class PushedAdapter:
    """An adapter at a URL."""

    adapter: str
    url: str
    new: bool
    """False if it was there already; its signatures were copied again."""
    bytes: int
    """The size of the files copied."""


def list_all(project: OpenProject) -> Sequence[Adapter]:
    """Return the stored adapters, newest last."""
    return list_adapters(project.folder.adapters)


def verify(project: OpenProject, names: Sequence[str] = ()) -> Sequence[TrustStatus]:
    """Check every file, weight and signature of the named adapters (all by default).

    Raises:
        UserError: no adapter with such a name.
    """
    folder = project.folder.adapters
    # Without names every folder, also one whose lineage is missing, which is reported then.
    stored = [Adapter(place) for place in sorted(folder.glob("[!.]*")) if place.is_dir()]
    chosen = [find_adapter(folder, name) for name in names] or stored
    trusted = TrustedKeys(project.folder.keys)
    with project.reporter.task("checking", len(chosen), "adapters") as task:
        found = []
        for adapter in chosen:
            found.append(trust_status(adapter, trusted))
            task.advance()
    return found


def sign(project: OpenProject, adapter: str | None = None, *, key: str | None = None) -> tuple[Adapter, str, bool]:
    """Sign an adapter with one of the user's keys that the project trusts.

    Args:
        adapter: a name or its beginning (None: the newest).
        key: file of the user's key, or its name in the project (None: the only one that the project trusts).

    Returns:
        The adapter, the key's name, and True if the signature is new.

    Raises:
        UserError: no such adapter, files that differ from the stored ones, no key to sign with, or no ``ssh-keygen``.
    """
    found = find_adapter(project.folder.adapters, adapter)
    trusted = TrustedKeys(project.folder.keys)
    signer = signing.signing_key(trusted, key)
    before = trust_status(found, trusted)
    if before.state == "tampered":
        raise UserError(f"The adapter is not signed: {'; '.join(before.reasons)}", where=found.name)
    if read_manifest(found.folder) is None:
        write_manifest(found.folder, found.name)
    new = signing.sign(found.folder, signer, prompt=True)
    own = [each for each in signing.verify_signatures(found.folder, trusted) if signer.name in each.key.split(",")]
    if all(each.status != "signed" for each in own):
        raise UserError(f"The signature does not count: {'; '.join(each.why for each in own)}", where=found.name)
    return found, signer.name, new


def push(project: OpenProject, url: str, names: Sequence[str] = ()) -> Sequence[PushedAdapter]:
    """Copy adapters to a folder, a bucket or any other URL of fsspec, for `import_` and `serve.adapter_store`.

    Args:
        url: for example s3://bucket/adapters.
        names: names or their beginnings (none: the newest).

    Raises:
        UserError: no such adapter, files that differ from the stored ones, another adapter has that name there, or the
            remote refuses. The adapters after that one are not copied.
    """
    from tunewright.core.remote_files import RemoteFiles

    chosen = [find_adapter(project.folder.adapters, name) for name in names or (None,)]
    there, trusted = RemoteFiles(url), TrustedKeys(project.folder.keys)
    for adapter in chosen:
        status = trust_status(adapter, trusted)
        if status.state == "tampered":
            raise UserError(f"The adapter is not copied: {'; '.join(status.reasons)}", where=adapter.name)
    with project.reporter.task("pushing", len(chosen), "adapters") as task:
        pushed = []
        for adapter in chosen:
            pushed.append(_push(adapter, there))
            task.advance(note=adapter.name)
    return pushed


def import_(project: OpenProject, source: str | Path, options: ImportOptions = ImportOptions()) -> ImportResult:
    """Import a foreign adapter from a folder or a URL, if it passes all checks.

    Args:
        source: the folder, or the URL of an adapter that `push` copied (s3://bucket/NAME-DIGEST).
        options: what you state about an adapter that does not state it.

    Raises:
        UserError: the adapter fails a check; nothing is stored.
    """
    from tunewright.adapters.foreign.importer import import_adapter
    from tunewright.core.remote_files import RemoteFiles

    found = RemoteFiles(str(source)) if "://" in str(source) else Path(source)
    if isinstance(found, Path) and not found.exists():
        raise UserError("No such folder", where=str(source))
    return import_adapter(project, found, options, current_author(project.folder.root))


def _push(adapter: Adapter, there: RemoteFiles) -> PushedAdapter:
    """Copy one adapter: URL/NAME-DIGEST12/ has the files that the manifest names, each as it was stored.

    The manifest is written last, so an adapter with one is complete.
    """
    if read_manifest(adapter.folder) is None:
        write_manifest(adapter.folder, adapter.name)
    manifest = (adapter.folder / MANIFEST).read_bytes()
    known = there.read_if_there(f"{adapter.name}/{MANIFEST}")
    if known not in (None, manifest):
        raise UserError(
            "Another adapter with the same weights and other records is there",
            where=f"{there}/{adapter.name}",
            fix="Remove it there, or push to another URL.",
        )
    files = read_manifest(adapter.folder)
    assert files is not None
    names = sorted(files.files) if known is None else []
    names += [name for name in (SIGNATURE, DSSE) if (adapter.folder / name).exists()]
    for name in names:
        there.copy(adapter.folder / name, f"{adapter.name}/{name}")
    if known is None:
        there.write(f"{adapter.name}/{MANIFEST}", manifest)
    size = sum((adapter.folder / name).stat().st_size for name in names)
    return PushedAdapter(adapter.name, f"{there}/{adapter.name}", known is None, size)
