"""Agreement of two raters on preferences, beyond chance, with an interval that keeps clusters whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunewright.evidence.base import Interval
from tunewright.evidence.human_eval import RaterAgreement
from tunewright.evidence.statistics import RESAMPLES, bootstrap_sums, cluster_sums, percentiles

_KINDS = (-1, 0, 1)
_DEFINED = 0.5  # share of the resamples: with fewer, an interval would describe something else.


def agreement(
    raters: tuple[str, str],
    first: Sequence[int],
    second: Sequence[int],
    clusters: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> RaterAgreement:
    """Return Cohen's kappa (1960) of two raters on the same items, with a 95% percentile bootstrap over clusters.

    Resamples in which both raters give all items the same verdict have no kappa and are left out. If these are half of
    them or more, there is no interval.

    Args:
        raters: their names.
        first, second: preferences -1, 0 or 1, [items]; at least one.
        clusters: the items' clusters.
        seed: decides the resamples.
        resamples: number of resamples.
    """
    cells = np.zeros((len(first), len(_KINDS) ** 2), dtype=np.int64)
    places = [(_KINDS.index(a), _KINDS.index(b)) for a, b in zip(first, second, strict=True)]
    cells[np.arange(len(first)), [len(_KINDS) * a + b for a, b in places]] = 1
    agreed = sum(a == b for a, b in places)
    kappa = float(kappas(cells.sum(axis=0)[None, :])[0])
    interval: Interval | None = None
    if agreed < len(first) and not np.isnan(kappa):
        drawn = kappas(bootstrap_sums(cluster_sums(cells, clusters), seed, resamples))
        drawn = drawn[~np.isnan(drawn)]
        interval = percentiles(drawn) if len(drawn) > _DEFINED * resamples else None
    return RaterAgreement(
        raters=raters,
        items=len(first),
        agreed=agreed,
        kappa=None if np.isnan(kappa) else kappa,
        interval=interval,
    )


def kappas(tables: NDArray[Any]) -> NDArray[np.float64]:
    """Return Cohen's kappa of each table of counts, [tables, kinds * kinds]; NaN where chance agreement is full."""
    kinds = len(_KINDS)
    shares = tables.reshape(-1, kinds, kinds) / tables.sum(axis=1)[:, None, None]
    observed = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
    alike = chance > 1 - 1e-12
    return np.asarray(np.where(alike, np.nan, (observed - chance) / np.where(alike, 1.0, 1 - chance)))
