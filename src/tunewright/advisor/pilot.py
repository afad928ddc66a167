"""Signal (d): pilot adapters, trained on a subset of the training rows and on half of that subset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.advisor.context import Answers, Items, per_doubling
from tunewright.advisor.signals import PilotPart, TuningGain
from tunewright.chat import ChatFormat
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.splits import FEWEST_TRAINING_PAIRS
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.learning_curve import subset_versions
from tunewright.models.bases import Base
from tunewright.training.train import TrainResult, find_trained, train, training_inputs
from tunewright.training.trainings import Training


@dataclass(frozen=True)
class Part:
    """A part of the training rows, with its adapter once it is trained."""

    version: DatasetVersion
    rows: int


def pilot_parts(project: ProjectFolder, version: DatasetVersion) -> list[Part]:
    """Return half of the pilot's rows, if enough to train on, and the pilot's: nested, with whole clusters.

    The pilot has `advise.pilot_fraction` of the rows, but at least `FEWEST_TRAINING_PAIRS` and at most
    `advise.pilot_max_samples`.

    Raises:
        UserError: too few training rows, or too few clusters to split.
    """
    settings = project.config.advise
    count = len(version.domain_of("train"))
    if count < FEWEST_TRAINING_PAIRS:
        raise UserError(f"A pilot needs at least {FEWEST_TRAINING_PAIRS} training pairs (got {count})")
    wanted = min(max(settings.pilot_fraction * count, FEWEST_TRAINING_PAIRS), settings.pilot_max_samples, count)
    parts = [rows / count for rows in (wanted / 2, wanted) if rows >= FEWEST_TRAINING_PAIRS]
    versions = subset_versions(version, sorted({*parts, 1.0}), project.config.seed)[: len(parts)]
    return [Part(part, len(part.domain_of("train"))) for part in versions]


def train_pilot(
    project: ProjectFolder, version: DatasetVersion, part: Part, base: Base, chat: ChatFormat, reporter: Reporter
) -> TrainResult:
    """Return the adapter trained on a part, for a pilot, a learning curve or the project; reuse an existing one.

    Args:
        project: its config decides; its working folder keeps the adapter, apart from those that are served.
        version: the version that the part belongs to.
        part: the rows to train on.
        base, chat, reporter: as for `train`.

    Raises:
        UserError: any error of the training.
        KeyboardInterrupt: stopped by a signal; the next call resumes from there.
    """
    there = _elsewhere(project, part, base, chat)
    if there is not None:
        return TrainResult(there, trained=False)
    training = _training(project, version, part)
    return train(project, part.version, base, chat, reporter, adapters=training.adapters, facts=training.facts)


def missing_pilots(
    project: ProjectFolder, version: DatasetVersion, parts: Sequence[Part], base: Base, chat: ChatFormat
) -> list[Training]:
    """Return the trainings of parts that no training of the project or of a learning curve has made."""
    return [_training(project, version, part) for part in parts if _elsewhere(project, part, base, chat) is None]


def _training(project: ProjectFolder, version: DatasetVersion, part: Part) -> Training:
    facts: dict[str, Any] = {"pilot": {"of": version.digest, "rows": part.rows}}
    return Training(f"pilot on {part.rows:,} rows", project, part.version, project.pilot_adapters, facts)


def _elsewhere(project: ProjectFolder, part: Part, base: Base, chat: ChatFormat) -> Adapter | None:
    inputs = digest(training_inputs(project, part.version, base, chat))
    found = (find_trained(place, project.config.name, inputs) for place in (project.adapters, project.curve_adapters))
    return next((adapter for adapter in found if adapter is not None), None)


def measured_part(part: Part, adapter: Adapter, answers: Answers, items: Items) -> PilotPart:
    """Return a part with its adapter's score."""
    return PilotPart(
        rows=part.rows,
        score=items.score(answers),
        adapter=adapter.digest,
        seconds=adapter.lineage["training"]["seconds"],
    )


def gain(
    parts: Sequence[PilotPart], answers: Sequence[Answers], best: Answers, items: Items, all_rows: int
) -> TuningGain:
    """Return the pilot's difference from the best prompting arm, and the gain of its last doubling.

    Args:
        parts: one or two, the pilot last.
        answers: each part's answers to the dev items.
        best: the best prompting arm's answers.
        items: the dev items.
        all_rows: number of training rows of the domain.
    """
    pilot = answers[-1]
    return TuningGain(
        parts=list(parts),
        all_rows=all_rows,
        contrast=items.contrast(pilot, best),
        slope=per_doubling(pilot, answers[-2], parts[-1].rows, parts[-2].rows, items) if len(parts) > 1 else None,
    )
