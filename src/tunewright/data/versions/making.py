"""From members to a new version's manifest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright.core.clock import now
from tunewright.data.examples import Example, in_conflict, normalised
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions.manifest import Counts, Manifest, Mix, Settings, Source, SplitFrom
from tunewright.data.versions.store import DatasetVersion, Member, keys_digest, members_digest


@dataclass(frozen=True)
class LeftOut:
    """How many rows an import left out as duplicates or as faulty, and how many changed their split."""

    duplicates: int = 0
    skipped: int = 0
    moved: int = 0


def new_manifest(
    members: Sequence[Member],
    parent: DatasetVersion | None,
    settings: Settings,
    *,
    message: str,
    sources: Sequence[Source],
    left_out: LeftOut,
    mix: Mix | None,
    near_duplicates: int = 0,
    split_from: SplitFrom | None = None,
) -> Manifest:
    """Return the manifest of a version of these members, made now; author, imports and seal come when it is saved."""
    return Manifest(
        digest=members_digest(members),
        parent=parent.digest if parent else None,
        created=now(),
        message=message,
        sources=tuple(sources),
        counts=_counts(members, left_out, near_duplicates),
        splits={split: keys_digest(m.key for m in members if m.split == split) for split in SPLITS},
        settings=settings,
        mix=mix,
        split_from=split_from,
    )


def _counts(members: Sequence[Member], left_out: LeftOut, near_duplicates: int) -> Counts:
    asked: dict[str, list[Example]] = defaultdict(list)
    for member in members:
        asked[member.example.asked].append(member.example)
    splits = Counter(m.split for m in members)
    return Counts(
        rows=len(members),
        **{split: splits[split] for split in SPLITS},
        clusters=len({m.cluster for m in members}),
        families=count_families(members),
        conflicts=sum(map(in_conflict, asked.values())),
        duplicates=left_out.duplicates,
        skipped=left_out.skipped,
        moved=left_out.moved,
        mixed=sum(m.mixed for m in members),
        near_duplicates=near_duplicates,
    )


def count_families(members: Sequence[Member]) -> int:
    """Count the clusters that have several inputs and several outputs, case and white space set aside."""
    inputs: dict[str, set[str]] = defaultdict(set)
    outputs: dict[str, set[str]] = defaultdict(set)
    for m in members:
        inputs[m.cluster].add(m.example.asked)
        outputs[m.cluster].add(normalised(m.example.output))
    return sum(len(inputs[cluster]) > 1 and len(outputs[cluster]) > 1 for cluster in inputs)


def clusters_by_split(members: Sequence[Member]) -> dict[Split, int]:
    """Count the clusters of each split, mix-in apart."""
    return {split: len({m.cluster for m in members if m.split == split and not m.mixed}) for split in SPLITS}


def cluster_sizes(members: Sequence[Member], split: Split) -> tuple[int, ...]:
    """Return the rows of each cluster of a split, mix-in apart, the largest first."""
    sizes = Counter(m.cluster for m in members if m.split == split and not m.mixed)
    return tuple(sorted(sizes.values(), reverse=True))


def renamed(members: Sequence[Member]) -> list[Member]:
    """Return the members, sorted, with each cluster called after the smallest key in it, after rows came or went."""
    names: dict[str, str] = {}
    for member in members:
        names[member.cluster] = min(names.get(member.cluster, member.key), member.key)
    return sorted((replace(m, cluster=names[m.cluster]) for m in members), key=lambda m: m.key)
