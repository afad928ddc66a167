"""How far two reviewers agree, beyond what chance alone would make them agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tunewright.data.review.reviews import Reviews

_Z = 1.959964  # the normal distribution's 97.5% point


@dataclass(frozen=True)
class Agreement:
    """Two reviewers on the rows that both judged right or wrong (an edit is a wrong one); skipped rows don't count.

    ``kappa`` is None where both said one and the same of all rows: chance alone would do that. ``low`` and ``high`` are
    its 95% interval; None too where they agree on every row, since the large-sample variance is then 0.
    """

    reviewers: tuple[str, str]
    rows: int
    agreed: int
    kappa: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        told = f"{' and '.join(self.reviewers)} agree on {self.agreed:,} of {self.rows:,} rows"
        if self.kappa is None:
            return f"{told}; kappa is not defined, since all their verdicts are the same"
        interval = "" if self.low is None else f" (95% interval {self.low:.2f} to {self.high:.2f})"
        return f"{told}; Cohen's kappa {self.kappa:.2f}{interval}"


def agreements(reviews: Reviews) -> list[Agreement]:
    """Return the agreement of each two reviewers that judged a row in common."""
    verdicts: dict[str, dict[str, bool]] = {}
    for key in reviews.stacks:
        for name, judged in reviews.standing(key).items():
            if judged.verdict != "skip":
                verdicts.setdefault(name, {})[key] = judged.verdict == "right"
    found = []
    for a, b in combinations(sorted(verdicts), 2):
        both = sorted(verdicts[a].keys() & verdicts[b].keys())
        if both:
            found.append(agreement((a, b), [verdicts[a][key] for key in both], [verdicts[b][key] for key in both]))
    return found


def agreement(reviewers: tuple[str, str], first: Sequence[bool], second: Sequence[bool]) -> Agreement:
    """Cohen's kappa (1960) of two reviewers' verdicts on the same rows, with its large-sample 95% interval.

    The variance is that of Fleiss, Cohen and Everitt 1969, "Large sample standard errors of kappa and weighted kappa",
    equation 13; the interval is cut at -1 and 1.
    """
    rows = len(first)
    counts = Counter(zip(first, second, strict=True))
    kinds = (True, False)
    share = {(i, j): counts[i, j] / rows for i in kinds for j in kinds}
    of_first = {i: share[i, True] + share[i, False] for i in kinds}
    of_second = {j: share[True, j] + share[False, j] for j in kinds}
    observed = share[True, True] + share[False, False]
    chance = sum(of_first[i] * of_second[i] for i in kinds)
    agreed = counts[True, True] + counts[False, False]
    if math.isclose(chance, 1):
        return Agreement(reviewers, rows, agreed, None, None, None)
    kappa = (observed - chance) / (1 - chance)
    if agreed == rows:
        return Agreement(reviewers, rows, agreed, kappa, None, None)
    same = sum(share[i, i] * (1 - (of_first[i] + of_second[i]) * (1 - kappa)) ** 2 for i in kinds)
    other = sum(share[i, j] * (of_second[i] + of_first[j]) ** 2 for i in kinds for j in kinds if i != j)
    spread = same + (1 - kappa) ** 2 * other - (kappa - chance * (1 - kappa)) ** 2
    half = _Z * math.sqrt(max(spread, 0) / rows) / (1 - chance)
    return Agreement(reviewers, rows, agreed, kappa, max(kappa - half, -1), min(kappa + half, 1))
