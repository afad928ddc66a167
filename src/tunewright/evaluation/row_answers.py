"""The adapter's stored answers to rows of the dataset: what evaluations on held-out rows have generated already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import UserError
from tunewright.core.progress import Reporter
from tunewright.evaluation.access_log import load_checked
from tunewright.evaluation.human_eval.journal import read_journal
from tunewright.evaluation.human_eval.sample import comparison, load_sample
from tunewright.evidence.files import (
    EVIDENCE_FILE,
    ITEMS_FILE,
    load_items,
)
from tunewright.evidence.schema import Evidence, Item


@dataclass(frozen=True)
class RowAnswer:
    """The deciding arm's answer to a row, and its score by the deciding metric; None if it has no score there."""

    evaluation: str
    arm: str
    text: str
    metric: str
    score: float | None


@dataclass(frozen=True)
class EvaluatedRows:
    """An evaluation's folder and evidence, and its items by pair key."""

    folder: Path
    evidence: Evidence
    items: dict[str, Item]

    def awaits_verdict(self, key: str, reviewer: str) -> bool:
        """Return whether the reviewer has this row's answers still to compare blind."""
        incumbents = self.evidence.incumbents.compared if self.evidence.incumbents else ()
        for against in (None, *(each.name for each in incumbents)):
            place = comparison(self.folder, self.evidence, against).folder
            sample = load_sample(place, self.evidence)
            if sample is not None and key in sample.order:
                said = read_journal(place, reviewer).standing.get(key)
                if said is None or said.verdict == "skip":
                    return True
        return False


@dataclass(frozen=True)
class RowAnswers:
    """The evaluations of a project, newest first, as a source of answers to its rows."""

    evaluations: tuple[EvaluatedRows, ...]

    def of(self, key: str, reviewer: str) -> RowAnswer | None:
        """Return the newest answer to a row; None without one, and while the reviewer has yet to compare it blind."""
        having = [rows for rows in self.evaluations if key in rows.items]
        if not having or any(rows.awaits_verdict(key, reviewer) for rows in having):
            return None
        evidence, item = having[0].evidence, having[0].items[key]
        arm = evidence.contrasts[0].treatment
        if arm not in item.answers:
            return None
        score = item.scores.get(evidence.metric, {}).get(arm)
        return RowAnswer(having[0].folder.name, arm, item.answers[arm], evidence.metric, score)


def evaluated_files(evaluations: Path) -> list[Path]:
    """Return the files of items that :func:`row_answers` reads, newest first."""
    files = [file.with_name(ITEMS_FILE) for file in evaluations.glob(f"[!.]*/{EVIDENCE_FILE}")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime, reverse=True)


def row_answers(files: Sequence[Path], evaluations: Path, reporter: Reporter) -> RowAnswers:
    """Read the answers of these files; an unreadable evaluation is left out with a warning."""
    found = []
    for file in files:
        try:
            evidence = load_checked(file.parent, evaluations, reporter)
            items = {item.key: item for item in load_items(file.parent)}
        except UserError as error:
            reporter.warn(f"The answers of an evaluation are not shown: {error}")
        else:
            found.append(EvaluatedRows(file.parent, evidence, items))
    return RowAnswers(tuple(found))
