"""Nested parts of a version's training rows: what an adapter would have learnt from less data."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from tunewright.core.errors import UserError
from tunewright.data.versions import DatasetVersion, Member, keys_digest, members_digest, short
from tunewright.data.versions.version import count_families


def subset_versions(version: DatasetVersion, shares: Sequence[float], seed: int) -> list[DatasetVersion]:
    """Return the version once for each share, with so much of its training rows; dev and test are unchanged.

    Clusters come in an order drawn from the seed and stay whole, and a smaller share's clusters are all in a larger
    one: each is as many from the front of the order as come nearest to the share of the rows. The generic mix-in is cut
    to the same share by itself, so that its part of the training rows stays what it is. These versions are made in
    memory, and their digests are theirs alone; the whole (share 1) is the version itself.

    Args:
        version: the rows.
        shares: rising, above 0, the last one 1.
        seed: decides the order of the clusters.

    Raises:
        UserError: too few clusters for the shares to differ.
    """
    assert shares[-1] == 1
    assert all(a < b for a, b in pairwise([0, *shares]))
    domain, mixed = _prefixes(version.domain_of("train"), shares, seed), _prefixes(_mixed(version), shares, seed)
    counts = [len(keys) for keys in domain]
    if any(a == b for a, b in pairwise([0, *counts])):
        told = ", ".join(f"{share:.0%}: {count}" for share, count in zip(shares, counts, strict=True))
        raise UserError(
            f"the training rows form too few independent clusters to take parts of: whole clusters would give {told}",
            fix="Add pairs with other inputs.",
        )
    parts = zip(shares, domain, mixed, strict=True)
    return [version if share == 1 else _version(version, share, seed, keys | more) for share, keys, more in parts]


def _mixed(version: DatasetVersion) -> list[Member]:
    return [member for member in version.examples("train") if member.mixed]


def _prefixes(members: Iterable[Member], shares: Sequence[float], seed: int) -> list[set[str]]:
    """Return the keys of each share's members."""
    clusters: dict[str, list[str]] = defaultdict(list)
    for member in members:
        clusters[member.cluster].append(member.key)
    order = sorted(clusters, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    rows = list(accumulate((len(clusters[name]) for name in order), initial=0))
    # Equally near ones: the first, so that a larger share never gets fewer.
    nearest = [min(range(len(rows)), key=lambda n: abs(rows[n] - share * rows[-1])) for share in shares]
    return [{key for name in order[:count] for key in clusters[name]} for count in nearest]


def _version(version: DatasetVersion, share: float, seed: int, keys: set[str]) -> DatasetVersion:
    members = tuple(m for m in version.members if m.split != "train" or m.key in keys)
    train = [m for m in members if m.split == "train"]
    manifest = version.manifest.model_copy(
        update={
            "digest": members_digest(members),
            "parent": version.digest,
            "message": f"{share:.0%} of the training rows of {short(version.digest)}, seed {seed}",
            "counts": version.manifest.counts.model_copy(
                update={
                    "rows": len(members),
                    "train": len(train),
                    "mixed": sum(m.mixed for m in train),
                    "clusters": len({m.cluster for m in members}),
                    "families": count_families(members),
                }
            ),
            "splits": {**version.manifest.splits, "train": keys_digest(m.key for m in train)},
            # Nothing on disk is sealed by these: the version is never saved.
            "imports": None,
            "seal": None,
        }
    )
    return DatasetVersion(manifest, members)
