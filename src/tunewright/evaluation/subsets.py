"""Nested parts of a version's training rows, for training on less data."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from tunewright.core.errors import UserError
from tunewright.data.versions import DatasetVersion, Member, keys_digest, members_digest, short
from tunewright.data.versions.version import count_families


def subset_versions(version: DatasetVersion, shares: Sequence[float], seed: int) -> list[DatasetVersion]:
    """Return the version once per share, with that share of its training rows; dev and test are unchanged.

    The seed draws an order of whole clusters. Each part is the prefix of that order that comes nearest to its share of
    the rows, so larger parts include smaller ones. The generic mix-in is cut to the same share separately, so that its
    proportion of the training rows stays the same. These versions exist in memory only, with their own digests; the
    whole (share 1) is the version itself.

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
        sizes = ", ".join(f"{share:.0%}: {count}" for share, count in zip(shares, counts, strict=True))
        raise UserError(
            f"the training rows form too few independent clusters to take parts of: whole clusters would give {sizes}",
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
    # Ties go to the first, so that a larger share never gets fewer.
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
            # These versions are never saved, so they seal nothing on disk.
            "imports": None,
            "seal": None,
        }
    )
    return DatasetVersion(manifest, members)
