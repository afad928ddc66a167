"""Verbs on stored adapters: ``tunewright adapters …``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.adapters import signing
from tunewright.adapters.import_options import ImportOptions
from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import read_manifest
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters, write_manifest
from tunewright.adapters.trust import TrustStatus, trust_status
from tunewright.core.errors import UserError
from tunewright.data.versions.version import current_author
from tunewright.open_project import OpenProject

if TYPE_CHECKING:
    from tunewright.adapters.foreign.importer import AdapterImporter, ImportResult
    from tunewright.adapters.remote import PushedAdapter


def list_all(project: OpenProject) -> Sequence[Adapter]:
    """Return the stored adapters, newest last."""
    return list_adapters(project.folder.adapters)


def verify(project: OpenProject, names: Sequence[str] = ()) -> Sequence[TrustStatus]:
    """Check every file, weight and signature of the named adapters (all by default).

    Raises:
        UserError: no adapter with such a name.
    """
    folder = project.folder.adapters
    chosen = [find_adapter(folder, name) for name in names] or _folders(project.folder.adapters)
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
        UserError: no such adapter, files that differ from the stored ones, or the remote refuses.
    """
    from tunewright.adapters.remote import push_adapters

    chosen = [find_adapter(project.folder.adapters, name) for name in names or (None,)]
    return push_adapters(chosen, url, TrustedKeys(project.folder.keys), project.reporter)


def import_(project: OpenProject, source: str | Path, options: ImportOptions = ImportOptions()) -> ImportResult:
    """Import a foreign adapter from a folder or a URL, if it passes all checks.

    Args:
        source: the folder, or the URL of an adapter that `push` copied (s3://bucket/NAME-DIGEST).
        options: what you state about an adapter that does not state it.

    Raises:
        UserError: the adapter fails a check; nothing is stored.
    """
    from tunewright.core.remote_files import RemoteFiles

    found = RemoteFiles(str(source)) if "://" in str(source) else Path(source)
    if isinstance(found, Path) and not found.exists():
        raise UserError("No such folder", where=str(source))
    return adapter_importer(project).import_adapter(found, options, current_author(project.folder.root))


def adapter_importer(project: OpenProject) -> AdapterImporter:
    """Return the importer of foreign adapters into a project."""
    from tunewright.adapters.foreign.importer import AdapterImporter

    folder = project.folder
    return AdapterImporter(folder.adapters, TrustedKeys(folder.keys), project.base, project.chat, project.reporter)


def _folders(adapters: Path) -> Sequence[Adapter]:
    """Return every adapter folder, including those whose lineage is missing, so that they are reported too."""
    return [Adapter(folder) for folder in sorted(adapters.glob("[!.]*")) if folder.is_dir()]
