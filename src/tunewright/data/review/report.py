"""State of a version's review: acceptance, upper bound, agreement of reviewers, pending edits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tunewright.core.text import count_of
from tunewright.data.review.acceptance import Outcome
from tunewright.data.review.edits import pending_edits, unaccepted_keys
from tunewright.data.review.reviews import (
    VERDICTS,
    ContinuedSample,
    DrawEvent,
    ReviewLog,
    outcome,
    read_reviews,
    sample_of,
    status_line,
)
from tunewright.data.versions import DatasetVersion, current_manifest, short
from tunewright.data.versions.files import read_places

_Z = 1.959964  # the normal distribution's 97.5% point


@dataclass(frozen=True)
class Agreement:
    """Agreement of two reviewers on rows that both judged right or wrong (an edit counts as wrong).

    ``kappa`` is None if all verdicts are the same, since chance agreement is then 1. ``low`` and ``high`` are its 95%
    interval; None also if they agree on every row, since the large-sample variance is then 0.
    """

    reviewers: tuple[str, str]
    rows: int
    agreed: int
    kappa: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        text = f"{' and '.join(self.reviewers)} agree on {self.agreed:,} of {self.rows:,} rows"
        if self.kappa is None:
            return f"{text}; kappa is undefined, because all verdicts are the same"
        interval = "" if self.low is None else f" (95% interval {self.low:.2f} to {self.high:.2f})"
        return f"{text}; Cohen's kappa {self.kappa:.2f}{interval}"


def agreements(reviews: ReviewLog) -> list[Agreement]:
    """Return the agreement of each pair of reviewers with a row in common.

    Verdicts that settle a conflict were given with the other verdicts in sight, so the first verdicts count.
    """
    verdicts: dict[str, dict[str, bool]] = {}
    for key in reviews.stacks:
        for name, judged in reviews.independent_verdicts(key).items():
            verdicts.setdefault(name, {})[key] = judged.verdict == "right"
    found = []
    for a, b in combinations(sorted(verdicts), 2):
        both = sorted(verdicts[a].keys() & verdicts[b].keys())
        if both:
            found.append(agreement((a, b), [verdicts[a][key] for key in both], [verdicts[b][key] for key in both]))
    return found


def agreement(reviewers: tuple[str, str], first: Sequence[bool], second: Sequence[bool]) -> Agreement:
    """Return Cohen's kappa (1960) of two reviewers' verdicts on the same rows, with its large-sample 95% interval.

    The variance follows Fleiss, Cohen and Everitt 1969, "Large sample standard errors of kappa and
    weighted kappa", equation 13; the interval is clipped to [-1, 1].
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


def _carried(before: ContinuedSample) -> str:
    kept = count_of(before.checked, "judgement")
    text = f"{kept} of the sample {'carries' if before.checked == 1 else 'carry'} over from an earlier version."
    if before.wrong:
        rows = count_of(len(before.wrong), "row")
        text += f" {rows} edited after that still {'counts' if len(before.wrong) == 1 else 'count'} as wrong."
    return text


_EXIT_CODES = {"accepted": 0, "rejected": 3, "continue": 4}


@dataclass(frozen=True)
class ReviewerCounts:
    """One reviewer's current verdicts on a version's rows."""

    name: str
    right: int
    wrong: int
    edit: int
    leave_out: int
    skip: int


@dataclass(frozen=True)
class ReviewReport:
    """The state of a version's review; ``outcome`` and ``drawn`` are None where no sample was drawn."""

    version: str
    outcome: Outcome | None
    drawn: DrawEvent | None
    agreements: tuple[Agreement, ...]
    edits: int
    """Rows that the next version changes or leaves out: number."""
    disputed: int
    """Rows with such verdicts whose reviewers disagree, which stay unchanged: number."""
    generated: int
    """Rows whose answer a model wrote: number."""
    accepted: int
    """Generated rows that a person accepted: number."""
    conflicts: tuple[str, ...]
    """Pair keys of the version's rows on which reviewers disagree."""
    reviewers: tuple[ReviewerCounts, ...]
    """By name."""

    @property
    def status(self) -> str:
        """State in one line: accepted, rejected, under review or not reviewed."""
        if self.outcome is None or self.drawn is None:
            return "not reviewed"
        return status_line(self.outcome, self.drawn)

    @property
    def exit_code(self) -> int:
        """Exit code: 0 accepted, 3 rejected, 4 undecided."""
        return _EXIT_CODES[self.outcome.decision] if self.outcome else _EXIT_CODES["continue"]

    @property
    def lines(self) -> list[str]:
        """Further lines of the report: bound, agreement, pending edits, with the commands that continue."""
        return [f"{fact.removesuffix('.')}: {command}" if command else fact for fact, command in self._continued()]

    @property
    def facts(self) -> list[str]:
        """The same lines without commands."""
        return [fact for fact, _ in self._continued()]

    def _continued(self) -> list[tuple[str, str]]:
        lines = [(str(agreement), "") for agreement in self.agreements]
        if self.outcome is not None and self.drawn is not None and self.outcome.checked and not self.outcome.whole:
            level = f"{100 * self.drawn.plan.confidence:g}%"
            lines.insert(
                0, (f"At most {self.outcome.upper:.1%} of the rows are wrong, at {level} (Clopper-Pearson).", "")
            )
        if self.drawn is not None and self.drawn.continues is not None:
            lines.append((_carried(self.drawn.continues), ""))
        if self.edits:
            have = f"{count_of(self.edits, 'row')} {'has' if self.edits == 1 else 'have'}"
            lines.append((f"{have} pending edits.", "`tunewright data review --apply` applies them."))
        if self.generated:
            others = "; the others are only trained on" if self.accepted < self.generated else ""
            lines.append((f"{self.accepted:,} of {self.generated:,} generated rows are accepted{others}.", ""))
        if self.conflicts:
            count = count_of(len(self.conflicts), "row")
            lines.append((f"Reviewers disagree on {count}.", "`tunewright data review --conflicts` settles them."))
        if self.disputed:
            lines.append((f"{self.disputed:,} rows have disputed edits and stay unchanged.", ""))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that ``--json`` prints."""
        return {
            "version": self.version,
            "status": self.status,
            "outcome": asdict(self.outcome) if self.outcome else None,
            "plan": self.drawn.plan.model_dump(mode="json") if self.drawn else None,
            "draw": self.drawn.draw if self.drawn else None,
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "edits": self.edits,
            "disputed": self.disputed,
            "generated": self.generated,
            "accepted": self.accepted,
            "conflicts": list(self.conflicts),
            "reviewers": [asdict(counts) for counts in self.reviewers],
        }


def review_report(dataset: Path, version: DatasetVersion) -> ReviewReport:
    """Return the state of a version's review."""
    reviews = read_reviews(dataset)
    domain = version.domain
    generated = {m.key for m in domain if m.generated}
    # Few rows are judged, and a page of the studio waits for this.
    judged = {m.key for m in domain if m.key in reviews.stacks}
    disputed = [pending.disputed for pending in pending_edits(reviews, version)]
    said: dict[str, Counter[str]] = {}
    for key in judged:
        for name, verdict in reviews.current_verdicts(key).items():
            said.setdefault(name, Counter())[verdict.verdict] += 1
    return ReviewReport(
        version.digest,
        outcome(reviews, version.digest, [m.key for m in domain]),
        reviews.latest_draw(version.digest),
        tuple(agreements(reviews)),
        edits=disputed.count(False),
        disputed=disputed.count(True),
        generated=len(generated),
        accepted=len(generated) - len(unaccepted_keys(dataset, version.manifest, generated)),
        conflicts=tuple(key for key in reviews.stacks if key in judged and reviews.disputed(key)),
        reviewers=tuple(ReviewerCounts(name, *(said[name][v] for v in VERDICTS)) for name in sorted(said)),
    )


def review_status(dataset: Path) -> str | None:
    """Return the review state of the current version in one line; None if there is no version.

    An example is "Version 1f3a… accepted: 0 of 72 wrong, under 5% at 95%". Only the list of members is read, not the
    rows, so that every command can print it.
    """
    manifest = current_manifest(dataset)
    if manifest is None:
        return None
    reviews = read_reviews(dataset)
    drawn = reviews.latest_draw(manifest.digest)
    if drawn is None:
        return f"Version {short(manifest.digest)} not reviewed"
    keys = sorted(key for key, place in read_places(dataset, manifest.digest).items() if not place.mixed)
    found = sample_of(drawn, keys).outcome(reviews)
    return f"Version {short(manifest.digest)} {status_line(found, drawn)}"
