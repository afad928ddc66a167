"""An evaluation on disk whose answers people can be asked about."""

from __future__ import annotations

from pathlib import Path

from factories import make_evidence, make_items
from tunewright.core.progress import LogReporter
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.human_eval.sample import treatment_is_a
from tunewright.evaluation.human_eval.session import BlindReview, Pair
from tunewright.evidence.schema import EVIDENCE_FILE, ITEMS_FILE, Evidence, Item


def save(folder: Path, items: list[Item], evidence: Evidence | None = None) -> Path:
    """Write an evaluation's folder, and its line in the access log."""
    made = make_evidence(items) if evidence is None else evidence
    access_log = AccessLog(folder.parent)
    access_log.write(folder / EVIDENCE_FILE, made.model_dump_json())
    lines = "".join(f"{item.model_dump_json(exclude_none=True)}\n" for item in items)
    access_log.write(folder / ITEMS_FILE, lines)
    return folder


def evaluation(folder: Path, count: int = 120) -> Path:
    """Fixed, broken and both wrong items, and some with equal answers."""
    return save(folder, make_items(count, tuned=0.7, retrieved=0.3))


def begin(folder: Path, reviewer: str = "ada", items: int | None = None) -> BlindReview:
    """A reviewer's pass."""
    return BlindReview(folder, reviewer, LogReporter(), items=items)


def side_of_treatment(review: BlindReview, pair: Pair) -> str:
    """A or B: what the reviewer must not be able to tell."""
    return "A" if treatment_is_a(review.sample.seed, pair.key) else "B"
