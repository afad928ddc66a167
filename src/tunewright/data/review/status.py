"""Whether the current version has been accepted, in a line: cheap enough to say it with every command."""

from __future__ import annotations

from pathlib import Path

from tunewright.data.review.acceptance import judge, sample_order
from tunewright.data.review.reviews import findings, read_reviews, status_line
from tunewright.data.versions import current_manifest, short
from tunewright.data.versions.members import read_places


def standing(dataset: Path) -> str | None:
    """Such as "Version 1f3a… accepted: 0 of 72 wrong, under 5% at 95%"; None where there is no version.

    Rows are not read, only which there are.

    Raises:
        UserError: the version's files or the log of reviews were changed.
    """
    manifest = current_manifest(dataset)
    if manifest is None:
        return None
    reviews = read_reviews(dataset)
    drawn = reviews.drawn(manifest.digest)
    if drawn is None:
        return f"Version {short(manifest.digest)} not reviewed"
    keys = sorted(key for key, place in read_places(dataset, manifest.digest).items() if not place.mixed)
    found = judge(drawn.plan, findings(reviews, sample_order(keys, manifest.digest, drawn.draw)), len(keys))
    return f"Version {short(manifest.digest)} {status_line(found, drawn.plan, drawn.draw)}"
