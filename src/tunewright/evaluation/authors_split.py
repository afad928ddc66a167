"""The part of an evaluation's items that authors gave to their split, and the contrast away from training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunewright.data.versions import DatasetVersion, Member
from tunewright.evidence.authors_split import AuthorsSplit
from tunewright.evidence.schema import Contrast
from tunewright.evidence.scoring import ScoredArms, scored_contrast


def measure_authors_split(
    version: DatasetVersion, rows: Sequence[Member], scored: ScoredArms, deciding: Contrast, seed: int
) -> AuthorsSplit | None:
    """Return whose split the rows are from, with the deciding contrast on rows that share no cluster with training."""
    about = version.manifest.given_split
    if about is None:
        return None
    trained = {member.cluster for member in version.domain_of("train")}
    far = np.array([row.cluster not in trained for row in rows])
    part, of = scored.among(far), deciding
    ours, theirs = (part.by_metric[of.metric][arm].scored for arm in (of.treatment, of.control))
    shown = not far.all() and (ours & theirs).any()
    return AuthorsSplit(
        source=about.text,
        on_overlap=about.on_overlap,
        items=len(rows),
        given=sum(row.given == row.split for row in rows),
        near=int((~far).sum()),
        far=scored_contrast(part, of.metric, of.treatment, of.control, seed) if shown else None,
    )
