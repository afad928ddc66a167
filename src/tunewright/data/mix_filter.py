"""Which rows that are not of the domain may be trained on beside it: the mix-in, and what the base writes itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tunewright.config import DataConfig
from tunewright.core.progress import Reporter
from tunewright.data import pii
from tunewright.data.dedup import comparison_texts
from tunewright.data.dedup.decontaminate import contaminated
from tunewright.data.dedup.similarity import near_pairs
from tunewright.data.dedup.sketches import Indices, Mask
from tunewright.data.examples import Example
from tunewright.data.versions import Member, short


def unfit(
    examples: Mapping[str, Example],
    domain: Sequence[Member],
    data: DataConfig,
    benchmarks: Mapping[str, Sequence[str]],
    reporter: Reporter,
    what: str,
) -> dict[str, str]:
    """Return the rows that may not be trained on, by key, and why.

    They are nearly equal to a row of the domain, hold a held-out row or a benchmark item, or have secrets in them.

    Args:
        examples: rows that are not of the domain, by pair key.
        domain: all rows of the domain with their splits.
        data: how alike is too alike, and which secrets are let through.
        benchmarks: file name to the texts of its items.
        reporter: shows the progress.
        what: what the rows are called there.
    """
    held_out = [m for m in domain if m.split != "train"]
    reasons = _near(examples, domain, data.dedup_threshold, reporter, what)
    against = {"held-out rows": [m.example.input_text for m in held_out], **benchmarks}
    for hit in contaminated(examples, against, reporter):
        reasons.setdefault(hit.row, f"{hit.how} with item {hit.item + 1} of {hit.source}")
    for place in pii.scan(list(examples.items()), reporter, allow=data.allow).of("secret"):
        reasons.setdefault(place.row, f"it holds a secret ({pii.LABELS[place.finding.kind]})")
    return reasons


def _near(
    examples: Mapping[str, Example], domain: Sequence[Member], similarity: float, reporter: Reporter, what: str
) -> dict[str, str]:
    keys = list(examples)
    texts = comparison_texts([*examples.values(), *(m.example for m in domain)])

    def wanted(first: Indices, second: Indices) -> Mask:
        mask: Mask = (np.minimum(first, second) < len(keys)) & (np.maximum(first, second) >= len(keys))
        return mask

    reasons: dict[str, str] = {}
    for pairs in near_pairs(texts, similarity, wanted, reporter, f"comparing {what} with the domain"):
        for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            row, other = sorted(pair)
            reasons.setdefault(keys[row], _near_to(domain[other - len(keys)]))
    return reasons


def _near_to(member: Member) -> str:
    held_out = "" if member.split == "train" else f"held-out ({member.split}) "
    return f"nearly equal to the {held_out}row {short(member.key)}"
