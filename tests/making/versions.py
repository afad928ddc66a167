"""Dataset versions made in memory, of clusters of given sizes."""

from __future__ import annotations

from collections.abc import Sequence

from tunewright.data.examples import Example, Message
from tunewright.data.versions import Counts, DatasetVersion, Manifest, Member, Settings, members_digest


def version_of(sizes: Sequence[int]) -> DatasetVersion:
    """A version of clusters of these sizes, all of it for training."""
    members = []
    for cluster, size in enumerate(sizes):
        examples = [Example((Message("user", f"{cluster} {n}"), Message("assistant", "x"))) for n in range(size)]
        name = min(example.pair_key for example in examples)
        members += [Member(example, example.pair_key, "train", name) for example in examples]
    members.sort(key=lambda member: member.key)
    counts = dict.fromkeys(Counts.model_fields, 0) | {"rows": len(members), "train": len(members)}
    manifest = Manifest(
        digest=members_digest(members),
        parent=None,
        created="2026-01-01T00:00:00+00:00",
        message="",
        sources=(),
        counts=Counts(**counts),
        splits={},
        settings=Settings(dedup_threshold=0.8, val_size=0.1, test_size=0.1, seed=0),
    )
    return DatasetVersion(manifest, tuple(members))
