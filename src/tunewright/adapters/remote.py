"""Adapters at a URL, for other projects and for servers: URL/NAME-DIGEST12/ has the files that the manifest names.

The manifest is written last, so an adapter with one is complete. ``adapters import`` reads them, with its checks of
foreign adapters: others may have written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.adapters.keys import TrustedKeys
from tunewright.adapters.manifest import DSSE, MANIFEST, SIGNATURE, read_manifest
from tunewright.adapters.registry import Adapter, write_manifest
from tunewright.adapters.trust import trust_status
from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
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


def push_adapters(
    adapters: Sequence[Adapter], url: str, trusted: TrustedKeys, reporter: Reporter
) -> Sequence[PushedAdapter]:
    """Copy adapters to a URL, each file as it was stored.

    Raises:
        UserError: files differ from the stored ones, another adapter has that name there, or the remote refuses. The
            adapters after that one are not copied.
    """
    there = RemoteFiles(url)
    for adapter in adapters:
        status = trust_status(adapter, trusted)
        if status.state == "tampered":
            raise UserError(f"The adapter is not copied: {'; '.join(status.reasons)}", where=adapter.name)
    with reporter.task("pushing", len(adapters), "adapters") as task:
        pushed = []
        for adapter in adapters:
            pushed.append(_push(adapter, there))
            task.advance(note=adapter.name)
    return pushed


def _push(adapter: Adapter, there: RemoteFiles) -> PushedAdapter:
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
