"""Verbs on the rows and versions of a project's dataset: ``tunewright data …``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewright.config.project import OpenFolder
from tunewright.data import dedup, trace, versions
from tunewright.data.dedup.leakage import LeakageReport, measure_leakage
from tunewright.data.splits import Split
from tunewright.data.trace import RowOrigin, RowUse
from tunewright.data.versions import DatasetVersion, Manifest, Member, list_versions, load_version
from tunewright.data.versions import diff as differences
from tunewright.data.versions import export as exporting
from tunewright.data.versions.diff import Diff
from tunewright.data.versions.export import Exported, Format


def version(project: OpenFolder, digest: str | None = None) -> DatasetVersion:
    """Return a dataset version (None: the current one)."""
    return load_version(project.folder.dataset, digest)


def log(project: OpenFolder) -> list[Manifest]:
    """Return the dataset's versions, newest last."""
    return list_versions(project.folder.dataset)


def show(project: OpenFolder, row: str) -> Member:
    """Return one row of the current version, by the beginning of its key or by ``FILE:LINE``."""
    return trace.find_row(project.folder.dataset, load_version(project.folder.dataset), row)


def metadata(project: OpenFolder, key: str) -> dict[str, Any]:
    """Return a current row's metadata from its source file, by the row's full key."""
    manifest = load_version(project.folder.dataset).manifest
    return trace.metadata_by_key(project.folder.dataset, manifest).get(key, {})


def cluster_counts(project: OpenFolder, member: Member) -> tuple[int, int]:
    """Return the number of rows in a row's cluster, and how many of them share its output."""
    return dedup.cluster_counts(load_version(project.folder.dataset), member)


def leakage(project: OpenFolder) -> LeakageReport:
    """Return the similarity of held-out rows to training rows, compared with that under a random split."""
    return measure_leakage(load_version(project.folder.dataset), project.folder.config.seed, project.reporter)


def diff(project: OpenFolder, a: str, b: str | None = None) -> Diff:
    """Return the differences between two versions (the second: the current one by default)."""
    before, after = (load_version(project.folder.dataset, digest, without_purged=True) for digest in (a, b))
    return differences.diff(before, after)


def blame(project: OpenFolder, row: str) -> RowOrigin:
    """Return a current row's origin: its file and the version that added it; ``row`` as in :meth:`show`."""
    dataset, current = project.folder.dataset, load_version(project.folder.dataset)
    return trace.blame(dataset, current, trace.find_row(dataset, current, row).key)


def trained_by(project: OpenFolder, row: str) -> tuple[str, tuple[RowUse, ...]]:
    """Return a row's key and its use in each adapter's training.

    Args:
        row: as in :meth:`show`; also the key of an earlier version's row, since adapters may have seen it there.
    """
    key = trace.find_key(project.folder.dataset, load_version(project.folder.dataset), row)
    return key, trace.uses_of_row(project.folder.dataset, project.folder.adapters, key)


def checkout(project: OpenFolder, version: str) -> Manifest:
    """Make an existing version the current one, by its digest or the beginning of it."""
    return versions.checkout(project.folder.dataset, version)


def export(
    project: OpenFolder,
    out: str | Path,
    form: Format = "chat",
    *,
    split: Split | None = None,
    version: str | None = None,
    metadata: bool = False,
) -> Exported:
    """Export a version (the current one by default), or one of its splits, as a file for other tools.

    ``metadata`` adds the source files' other keys to chat rows.
    """
    chosen = load_version(project.folder.dataset, version)
    dataset = project.folder.dataset
    extra = trace.metadata_by_key(dataset, chosen.manifest) if metadata else None
    rejected = trace.rejected_answers(dataset, chosen.manifest) if form == "preference" else None
    return exporting.export(chosen, Path(out), form, project.reporter, split=split, metadata=extra, rejected=rejected)
