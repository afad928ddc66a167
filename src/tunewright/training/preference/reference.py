"""Log-probabilities under the reference model: computed once for each answer before the first step, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.core.io import write_json
from tunewright.core.progress import Reporter
from tunewright.training import distributed

if TYPE_CHECKING:
    from tunewright.training.preference.trainer import PreferenceTrainer

FILE = "reference.json"


def set_reference(trainer: PreferenceTrainer, work: Path, identity: str, reporter: Reporter) -> None:
    """Give the trainer its reference: that of an earlier part of this run, or the current adapter.

    Args:
        trainer: before its first step, with the weights that it starts from.
        work: the run's working folder, which keeps the numbers for a run that resumes.
        identity: digest of the answers and of the reference model.
        reporter: shows progress.
    """
    count = len(trainer.answers) + len(trainer.mismatched)
    kept = _kept(work / FILE, identity, count)
    if kept is None:
        with reporter.task("Reference log-probabilities", count, "answers") as task:
            kept = trainer.log_probabilities(task.advance)
        if distributed.is_main_process():
            write_json(work / FILE, {"identity": identity, "log_probabilities": kept})
    trainer.reference = kept


def _kept(file: Path, identity: str, count: int) -> list[float] | None:
    """Return the kept numbers; None if there are none, or not of these answers."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("identity") != identity:
        return None
    numbers = found.get("log_probabilities")
    return numbers if isinstance(numbers, list) and len(numbers) == count else None
