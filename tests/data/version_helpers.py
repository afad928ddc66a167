"""Versions that `data add` alone does not make: with rows edited, removed or moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_helpers import Listener

from tunewright.config.project import ProjectFolder
from tunewright.data.examples import Example
from tunewright.data.splits import SPLITS
from tunewright.data.versions import (
    DatasetVersion,
    Member,
    keys_digest,
    load_version,
    locked,
    members_digest,
    save_version,
)


def with_output(member: Member, output: str) -> Member:
    """The row with another ideal output."""
    example = Example((*member.example.prompt, replace(member.example.messages[-1], content=output)))
    return replace(member, example=example, key=example.pair_key)


def next_version(
    project: ProjectFolder,
    change: Callable[[Member], Member | None],
    imports: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> DatasetVersion:
    """Make a version of the current one by changing each row, or leaving it out (None), and make it current."""
    parent = load_version(project.dataset)
    members = [changed for m in parent.members if (changed := change(m)) is not None]
    names = {m.cluster: m.cluster for m in members}
    for member in members:
        names[member.cluster] = min(m.key for m in members if m.cluster == member.cluster)
    members = [replace(m, cluster=names[m.cluster]) for m in members]
    manifest = parent.manifest.model_copy(
        update={
            "digest": members_digest(members),
            "parent": parent.digest,
            "splits": {split: keys_digest(m.key for m in members if m.split == split) for split in SPLITS},
            **facts,
        }
    )
    with locked(project.dataset):
        save_version(project.dataset, manifest, members, imports, Listener())
    return load_version(project.dataset)
