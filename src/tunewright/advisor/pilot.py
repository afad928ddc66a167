"""Signal (d): pilot adapters on a nested part of the training rows, and on half of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunewright.adapters.registry import Adapter
from tunewright.advisor.items import Answers, Items, per_doubling
from tunewright.advisor.signals import PilotPart, TuningGain
from tunewright.chat import ChatFormat
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.notices import FEWEST_TRAINING_PAIRS
from tunewright.data.versions import DatasetVersion
from tunewright.evaluation.subsets import subset_versions
from tunewright.models.bases import Base
from tunewright.training.train import TrainResult, find_trained, train, training_inputs


@dataclass(frozen=True)
class Part:
    """A part of the training rows, and an adapter of it once it is trained."""

    version: DatasetVersion
    rows: int


def pilot_parts(project: ProjectFolder, version: DatasetVersion) -> list[Part]:
    """Half of the pilot's rows, if that is enough to train on, and the pilot's; nested, clusters whole.

    The pilot has `advise.pilot_fraction` of the rows, but at least `FEWEST_TRAINING_PAIRS` and at most
    `advise.pilot_max_samples`.

    Raises:
        UserError: fewer training rows than any training wants, or too few clusters to make parts of.
    """
    settings = project.config.advise
    count = len(version.domain_of("train"))
    if count < FEWEST_TRAINING_PAIRS:
        raise UserError(f"{count} training pairs, and a pilot takes at least {FEWEST_TRAINING_PAIRS}")
    wanted = min(max(settings.pilot_fraction * count, FEWEST_TRAINING_PAIRS), settings.pilot_max_samples, count)
    parts = [rows / count for rows in (wanted / 2, wanted) if rows >= FEWEST_TRAINING_PAIRS]
    versions = subset_versions(version, sorted({*parts, 1.0}), project.config.seed)[: len(parts)]
    return [Part(part, len(part.domain_of("train"))) for part in versions]


def train_pilot(
    project: ProjectFolder, version: DatasetVersion, part: Part, base: Base, chat: ChatFormat, reporter: Reporter
) -> TrainResult:
    """The adapter of a part, or the one already trained: as a pilot, for a learning curve, or as the project's own.

    Args:
        project: its config decides; its working folder keeps the adapter, apart from those that are served.
        version: the whole that the part is of.
        part: what to train on.
        base, chat, reporter: as for `train`.

    Raises:
        UserError: whatever a training raises.
        KeyboardInterrupt: stopped by a signal; the next call goes on from there.
    """
    inputs = digest(training_inputs(project, part.version, base, chat))
    for place in (project.adapters, project.curve_adapters):
        if (there := find_trained(place, project.config.name, inputs)) is not None:
            return TrainResult(there, trained=False)
    facts: dict[str, Any] = {"pilot": {"of": version.digest, "rows": part.rows}}
    return train(project, part.version, base, chat, reporter, adapters=project.pilot_adapters, facts=facts)


def measured_part(part: Part, adapter: Adapter, answers: Answers, items: Items) -> PilotPart:
    """Return what a part's adapter scored."""
    return PilotPart(
        rows=part.rows,
        score=items.score(answers),
        adapter=adapter.digest,
        seconds=adapter.lineage["training"]["seconds"],
    )


def gain(
    parts: Sequence[PilotPart], answers: Sequence[Answers], best: Answers, items: Items, all_rows: int
) -> TuningGain:
    """Return the pilot against the best prompting arm, and what its last doubling brought.

    Args:
        parts: one or two, the pilot last.
        answers: theirs, to the dev items.
        best: the best prompting arm's.
        items: the dev items.
        all_rows: the training rows of the domain.
    """
    pilot = answers[-1]
    return TuningGain(
        parts=list(parts),
        all_rows=all_rows,
        contrast=items.contrast(pilot, best),
        slope=per_doubling(pilot, answers[-2], parts[-1].rows, parts[-2].rows, items) if len(parts) > 1 else None,
    )
