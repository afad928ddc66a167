"""Verbs that train: ``train``, ``sweep``, ``crossval``, with the checks before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunewright.adapters.lora_weights import require_servable
from tunewright.core.errors import UserError
from tunewright.data.versions import load_version
from tunewright.evaluation.verbs import current_split_power, report_detectable_effects
from tunewright.evidence.causes import undertrained
from tunewright.evidence.power import split_power_text
from tunewright.models.loading import require_bitsandbytes
from tunewright.open_project import OpenProject
from tunewright.training.memory import require_room
from tunewright.training.options import SweepOptions

if TYPE_CHECKING:
    from tunewright.adapters.signing import SigningKey
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.training.sweep.sweep import SweepResult
    from tunewright.training.train import TrainResult
    from tunewright.training.trainings import Trainings

FOLDS = 5
"""Folds of a cross-validation: each adapter trains on four fifths of the rows, minus its dev rows."""


@contextmanager
def open_trainings(project: OpenProject) -> Iterator[Trainings]:
    """Yield the place of independent trainings: this process, or the machines of ``compute.cluster``, once checked.

    Raises:
        UserError: as for `workers`; or no machine has room for a training, or one does not see the project's folder
            or lacks the base.
    """
    from tunewright.training import trainings

    with (
        project.workers() as workers,
        trainings.open_trainings(workers, project.folder, project.base, project.reporter) as found,
    ):
        yield found


def train(project: OpenProject, *, force: bool = False) -> TrainResult:
    """Train the config's adapter on the current version, or return the one already trained.

    Fewer than 50 training pairs are refused. ``force`` trains anyway, and the lineage records it.
    """
    power = current_split_power(project)
    if not power.significant:
        project.reporter.warn(split_power_text(power))
    refuse_up_front(project)
    forced = require_rows(project, force=force)
    report_detectable_effects(project)
    return train_adapter(project, forced)


def train_adapter(project: OpenProject, forced: str | None, signer: SigningKey | None = None) -> TrainResult:
    """Train the adapter where the config says: here, or on ``compute.cluster``.

    Args:
        forced: the reason for the lineage, from :func:`require_rows`.
        signer: signs the adapter (None: the only key that the project trusts, if there is one).

    Raises:
        UserError: ``compute.fsdp`` without a cluster, or any error of the training.
    """
    facts = {"forced": forced} if forced else {}
    inputs = project.folder, load_version(project.folder.dataset), project.base, project.chat, project.reporter
    if project.folder.config.compute.cluster is not None:
        from tunewright.training.trainings import train_on_cluster

        result = train_on_cluster(*inputs, facts=facts, signer=signer)
    elif project.folder.config.compute.fsdp:
        fix = "Set compute.cluster, or remove it: without a cluster a launcher asks for FSDP."
        raise UserError("FSDP needs a cluster", where="compute.fsdp", fix=fix)
    else:
        from tunewright.training import train as training

        result = training.train(*inputs, facts=facts, signer=signer)
    if short := undertrained(result.adapter.lineage, result.adapter.history):
        project.reporter.warn(f"{short.what} ({short.evidence}). {short.next_command}.")
    return result


def sweep(project: OpenProject, options: SweepOptions = SweepOptions()) -> tuple[SweepResult, dict[str, Any]]:
    """Try presets and learning rates by successive halving on dev, and finish training the winner.

    Returns:
        The result, and the keys of the train section that were written.

    Raises:
        UserError: the budget is not positive or is too small for one trial, or a learning rate is invalid.
    """
    from tunewright.config.io import write_section
    from tunewright.config.project import CONFIG_FILE
    from tunewright.training.sweep.sweep import Sweep

    minutes = options.minutes
    if minutes is not None and not minutes > 0:
        raise UserError(f"Must be greater than 0 (got {minutes:g})", where="--minutes")
    refuse_up_front(project, "A sweep")
    version, chat = load_version(project.folder.dataset), project.chat
    with open_trainings(project) as trainings:
        trials = Sweep(
            project.folder,
            version,
            project.base,
            chat,
            project.reporter,
            trainings,
            rates=options.rates,
            force=options.force,
        )
        result = trials.run(minutes)
    written: dict[str, Any] = {}
    if options.write and result.winner is not None:
        written = write_section(project.folder.root / CONFIG_FILE, result.winner.train)
        if not written:
            project.reporter.say("tunewright.yaml already has the winner's values.")
    elif options.write:
        project.reporter.warn("tunewright.yaml is unchanged: the sweep has no winner.")
    return result, written


def crossval(project: OpenProject, *, folds: int = FOLDS, force: bool = False) -> EvaluateResult:
    """Cross-validate the config on all rows of the current version, for sets too small to hold out a test.

    ``force`` as in :meth:`train`.
    """
    from tunewright.evaluation.crossval import CrossValidation

    if folds < 2:
        raise UserError(f"Must be at least 2 (got {folds})", where="--folds", fix="Five are usual.")
    refuse_up_front(project, "Cross-validation")
    version, chat = load_version(project.folder.dataset), project.chat
    with open_trainings(project) as trainings:
        return CrossValidation(
            project.folder, version, project.base, chat, project.reporter, trainings, folds=folds, force=force
        ).run()


def refuse_up_front(project: OpenProject, new_adapters_of: str | None = None) -> None:
    """Refuse a config that cannot be trained, before a base is downloaded or anything measured.

    Args:
        new_adapters_of: the name of a command that trains new adapters on parts of the rows.
    """
    settings = project.folder.config.train
    if new_adapters_of is not None:
        from tunewright.training.parent import require_new_adapter

        require_new_adapter(settings, new_adapters_of)
    require_servable(settings)
    require_bitsandbytes(settings.quantization, "train.quantization")
    if project.folder.config.compute.cluster is None:  # else other machines train
        require_room(project)


def require_rows(project: OpenProject, *, force: bool) -> str | None:
    """Refuse fewer than 50 training pairs; with ``force``, return the words for the lineage.

    Raises:
        UserError: too few pairs, and not forced.
    """
    from tunewright.training.rows import require_min_examples

    return require_min_examples(
        len(load_version(project.folder.dataset).domain_of("train")), force=force, reporter=project.reporter
    )


def has_trained(project: OpenProject) -> bool:
    """Return whether the adapter of the config and the current version is there already."""
    from tunewright.core.io import digest
    from tunewright.training.train import find_trained, training_inputs

    inputs = training_inputs(project.folder, load_version(project.folder.dataset), project.base, project.chat)
    return find_trained(project.folder.adapters, project.folder.config.name, digest(inputs)) is not None


def check_trainable(project: OpenProject) -> None:
    """Check before other work that ``compute.cluster`` can train, if it is set."""
    if project.folder.config.compute.cluster is not None:
        from tunewright.training.trainings import check_cluster

        check_cluster(project.folder, project.base, project.reporter)
