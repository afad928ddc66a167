"""The part of an evaluation's items that authors gave to their split, and the contrast away from training rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunewright.data.versions import DatasetVersion, Member, ancestry
from tunewright.data.versions.files import read_places
from tunewright.evidence.authors_split import AuthorsSplit
from tunewright.evidence.schema import Contrast
from tunewright.evidence.scoring import ScoredArms, scored_contrast


def measure_authors_split(
    dataset: Path, version: DatasetVersion, rows: Sequence[Member], scored: ScoredArms, deciding: Contrast, seed: int
) -> AuthorsSplit | None:
    """Return whose split the rows are from, with the deciding contrast on rows that share no cluster with training."""
    about = version.manifest.given_split
    if about is None:
        return None
    trained = {member.cluster for member in version.domain_of("train")}
    far = np.array([row.cluster not in trained for row in rows])
    theirs = {
        key
        for each in ancestry(dataset, version.manifest)[1:]
        for key, place in read_places(dataset, each.digest).items()
        if place.given == rows[0].split
    }
    part, of = scored.among(far), deciding
    treated, control = (part.by_metric[of.metric][arm].scored for arm in (of.treatment, of.control))
    shown = not far.all() and (treated & control).any()
    return AuthorsSplit(
        source=about.text,
        on_overlap=about.on_overlap,
        items=len(rows),
        given=sum(row.given == row.split for row in rows),
        missing=len(theirs - {member.key for member in version.members}),
        near=int((~far).sum()),
        far=scored_contrast(part, of.metric, of.treatment, of.control, seed) if shown else None,
    )
