"""Where the review of a version stands: acceptance, bound, agreement of reviewers, edits that wait."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunewright.data.review.acceptance import Outcome
from tunewright.data.review.agreement import Agreement, agreements
from tunewright.data.review.edits import waiting_edits
from tunewright.data.review.reviews import Drawn, outcome, read_reviews, status_line
from tunewright.data.versions import DatasetVersion

_EXIT_CODES = {"accepted": 0, "rejected": 3, "go on": 4}


@dataclass(frozen=True)
class ReviewReport:
    """The state of a version's review; ``outcome`` and ``drawn`` are None where no sample was drawn."""

    version: str
    outcome: Outcome | None
    drawn: Drawn | None
    agreements: tuple[Agreement, ...]
    edits: int
    """Edited rows that are not in a version yet."""
    disputed: int
    """Edited rows whose reviewers disagree: they stay as they are."""

    @property
    def status(self) -> str:
        """One line: accepted, rejected, under review or not reviewed."""
        if self.outcome is None or self.drawn is None:
            return "not reviewed"
        return status_line(self.outcome, self.drawn.plan, self.drawn.draw)

    @property
    def exit_code(self) -> int:
        """0 accepted, 3 rejected, 4 not decided."""
        return _EXIT_CODES[self.outcome.decision] if self.outcome else _EXIT_CODES["go on"]

    @property
    def lines(self) -> list[str]:
        """What people want to know besides."""
        told = [str(agreement) for agreement in self.agreements]
        if self.outcome is not None and self.drawn is not None and self.outcome.checked and not self.outcome.whole:
            level = f"{100 * self.drawn.plan.confidence:g}%"
            told.insert(0, f"At most {self.outcome.upper:.1%} of the rows are wrong, at {level} (Clopper-Pearson).")
        if self.edits:
            told.append(
                f"{self.edits:,} rows have an edit: `tunewright data review --apply` makes a version with them."
            )
        if self.disputed:
            told.append(f"{self.disputed:,} rows have edits that reviewers disagree on: they stay as they are.")
        return told

    def as_dict(self) -> dict[str, Any]:
        """Return the report as ``--json`` prints it."""
        return {
            "version": self.version,
            "status": self.status,
            "outcome": asdict(self.outcome) if self.outcome else None,
            "plan": self.drawn.plan.model_dump(mode="json") if self.drawn else None,
            "draw": self.drawn.draw if self.drawn else None,
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "edits": self.edits,
            "disputed": self.disputed,
        }


def review_report(dataset: Path, version: DatasetVersion) -> ReviewReport:
    """Read the log and say where the version stands."""
    reviews = read_reviews(dataset)
    return ReviewReport(
        version.digest,
        outcome(reviews, version),
        reviews.drawn(version.digest),
        tuple(agreements(reviews)),
        *waiting_edits(reviews, version),
    )
