"""Folds: splits of a dataset version in which every row is a test row once, and their adapters."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from tunewright.adapters.registry import Adapter, list_adapters
from tunewright.chat import ChatFormat
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.splits import SPLITS, Split
from tunewright.data.versions import DatasetVersion, Member, keys_digest, members_digest, short
from tunewright.models.bases import Base


def fold_versions(version: DatasetVersion, folds: int, seed: int) -> list[DatasetVersion]:
    """Return one version per fold: its test rows are the fold, its dev and train rows the rest.

    The generic mix-in, which resembles no row of the domain, is in every fold's training part. So are generated rows,
    accepted or not, except in folds that hold out a row of their cluster: there they are left out.

    Clusters stay whole, so no row has a near-duplicate on another side. Folds are as equal in size as whole clusters
    allow (the largest first, each into the smallest fold). Dev gets the version's own share of all rows. These versions
    exist in memory only, with their own digests.

    Args:
        version: the rows, of all splits.
        folds: number of folds, at least 2.
        seed: decides the fold of each cluster.

    Raises:
        UserError: too few clusters.
    """
    assert folds >= 2
    clusters: dict[str, list[Member]] = defaultdict(list)
    people = [member for member in version.domain if not member.generated]
    for member in people:
        clusters[member.cluster].append(member)
    dealt = _assign_folds({name: len(rows) for name, rows in clusters.items()}, folds, seed)
    share = version.manifest.settings.val_size
    made = []
    for number, held_out in enumerate(dealt, start=1):
        rest = {name: len(rows) for name, rows in clusters.items() if name not in held_out}
        if not held_out or len(rest) < 2:
            raise UserError(
                f"{len(clusters)} independent clusters are too few for {folds} folds: in fold {number} they do not "
                "make a train, a dev and a test part",
                where="--folds",
                fix="Add pairs with other inputs, or choose another number of folds.",
            )
        dev = _choose(_shuffled(rest, f"{seed}:{number}"), rest, round(share * len(people)))
        made.append(_version(version, number, folds, held_out, dev))
    return made


def _shuffled(names: Iterable[str], salt: str) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt}:{name}".encode()).digest())


def _assign_folds(sizes: Mapping[str, int], folds: int, seed: int) -> list[set[str]]:
    """Assign clusters to folds, the largest first, each into the smallest; the seed orders equal ones."""
    dealt: list[set[str]] = [set() for _ in range(folds)]
    smallest = [(0, fold) for fold in range(folds)]
    for name in sorted(_shuffled(sizes, str(seed)), key=lambda name: -sizes[name]):
        rows, fold = heapq.heappop(smallest)
        dealt[fold].add(name)
        heapq.heappush(smallest, (rows + sizes[name], fold))
    return dealt


def _choose(order: Sequence[str], sizes: Mapping[str, int], room: int) -> set[str]:
    """Choose clusters for dev: in order, each that fits; at least one and never all."""
    taken: set[str] = set()
    for name in order:
        if sizes[name] <= room and len(taken) < len(order) - 1:
            taken.add(name)
            room -= sizes[name]
    return taken or {min(order, key=lambda name: sizes[name])}


def _version(version: DatasetVersion, number: int, folds: int, test: set[str], dev: set[str]) -> DatasetVersion:
    def split(member: Member) -> Split:
        if member.mixed:
            return "train"
        return "test" if member.cluster in test else "dev" if member.cluster in dev else "train"

    placed = (replace(member, split=split(member)) for member in version.members)
    members = tuple(member for member in placed if not member.generated or member.split == "train")
    counts = Counter(member.split for member in members)
    manifest = version.manifest.model_copy(
        update={
            "digest": members_digest(members),
            "parent": version.digest,
            "message": f"fold {number} of {folds} of {short(version.digest)}",
            "counts": version.manifest.counts.model_copy(update={name: counts[name] for name in SPLITS}),
            "splits": {name: keys_digest(m.key for m in members if m.split == name) for name in SPLITS},
            # These versions are never saved, so they seal nothing on disk.
            "imports": None,
            "seal": None,
        }
    )
    return DatasetVersion(manifest, members)


def out_of_fold(
    project: ProjectFolder, version: DatasetVersion, base: Base, chat: ChatFormat
) -> list[tuple[Adapter, list[Member]]]:
    """Return each fold's adapter with its held-out rows, from the version's newest complete cross-fit.

    Empty if no cross-fit has this base and chat format.
    """
    runs: dict[str, dict[int, Adapter]] = defaultdict(dict)
    for adapter in list_adapters(project.fold_adapters):
        lineage = adapter.lineage
        fits = (lineage["base"]["digest"], lineage["template_digest"]) == (base.digest, chat.digest)
        if fits and lineage["fold"]["of"] == version.digest:
            runs[lineage["fold"]["crossval"]][lineage["fold"]["number"]] = adapter
    complete = [run for run in runs.values() if len(run) == run[min(run)].lineage["fold"]["folds"]]
    if not complete:
        return []
    newest = max(complete, key=lambda run: max(str(a.lineage["created"]) for a in run.values()))
    lineage = newest[1].lineage
    versions = fold_versions(version, lineage["fold"]["folds"], lineage["seed"])
    pairs = [(newest[number], fold) for number, fold in enumerate(versions, start=1)]
    # An earlier release may have split the rows otherwise: then each adapter's held-out rows are unknown here.
    if any(adapter.lineage["dataset"]["digest"] != fold.digest for adapter, fold in pairs):
        return []
    for adapter, _ in pairs:
        adapter.verify()
    return [(adapter, fold.examples("test")) for adapter, fold in pairs]
