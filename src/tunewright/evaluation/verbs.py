"""Verbs that measure arms (``evaluate``, ``regressions``, ``optimize-prompt``) or train (``train``, ``sweep``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.lora_weights import require_servable
from tunewright.adapters.registry import (
    Adapter,
    find_adapter,
    list_adapters,
    require_compatible,
    trained_quantization,
)
from tunewright.config import TrainConfig
from tunewright.core.errors import UserError
from tunewright.core.text import count_of
from tunewright.core.workers import ModelWorkers
from tunewright.data.versions import load_version
from tunewright.data.versions.version import clusters_by_split
from tunewright.evaluation.frozen_answers import incumbent_models, require_ready
from tunewright.evidence.causes import undertrained
from tunewright.evidence.power import (
    DetectableEffects,
    SplitPower,
    split_power,
    split_power_text,
)
from tunewright.models.bases import base_here
from tunewright.models.loading import require_bitsandbytes
from tunewright.open_project import OpenProject
from tunewright.training.history import require_trackers
from tunewright.training.memory import require_room
from tunewright.training.options import SweepOptions
from tunewright.training.parent import find_parent, require_new_adapter
from tunewright.training.rows import require_min_examples

if TYPE_CHECKING:
    from tunewright.adapters.signing import SigningKey
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult
    from tunewright.evaluation.frozen_answers import IncumbentEstimate
    from tunewright.evaluation.prompt_optimization.run import (
        OptimizePromptEstimate,
        OptimizePromptResult,
        PromptOptimization,
    )
    from tunewright.evaluation.prompt_search import AdviseResult
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.evaluation.time_limit import AnswersEstimate
    from tunewright.evidence.schema import Advice
    from tunewright.training.sweep.sweep import SweepResult
    from tunewright.training.train import TrainResult
    from tunewright.training.trainings import Trainings


def require_minutes(minutes: float | None) -> None:
    """Refuse a time limit that is not positive and finite; None is no limit."""
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"Must be a finite number greater than 0 (got {minutes:g})", where="--minutes")


def answer_workers(project: OpenProject) -> AbstractContextManager[ModelWorkers | None]:
    """Return the workers of ``compute.cluster`` that answer prompts, to be entered; None without a cluster."""
    config = project.folder.config
    if config.compute.cluster is None:
        return nullcontext()
    from tunewright.compute import open_model_workers
    from tunewright.evaluation.answer_worker import unload

    return open_model_workers(config, base_here, project.base, unload, project.reporter)


def open_arm_runner(
    project: OpenProject, adapter: Adapter | None = None, workers: ModelWorkers | None = None
) -> ArmRunner:
    """Return a runner of arms on the base, quantized as ``adapter`` was trained (None: as the config says).

    Answers are computed by a cluster's ``workers``, or in this process.

    Raises:
        UserError: the adapter does not fit the base or chat format, or was trained on another version.
    """
    folder, config = project.folder, project.folder.config
    version = load_version(folder.dataset)
    if adapter is not None:
        if adapter.dataset is None:
            project.reporter.warn(
                f"{adapter.name} was imported: its training data is unknown and may include held-out rows."
            )
        elif adapter.dataset != version.digest:
            raise UserError(
                f"{adapter.name} was trained on dataset version {adapter.dataset[:12]}, but the current version is "
                f"{version.digest[:12]}, which may hold out rows that it trained on",
                fix="Train on the current version first: tunewright train",
            )
        require_compatible(adapter, project.base, project.chat)
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.evaluation.generations import Generator

    trained = config.train.quantization if adapter is None else trained_quantization([adapter])
    quantization = config.evaluate.quantization or trained
    generator = Generator.of(
        project.folder, project.base, project.chat, quantization, project.reporter, adapter, workers
    )
    return ArmRunner(project.folder, version, generator, project.reporter)


def current_split_power(project: OpenProject) -> SplitPower:
    """Return the smallest difference that a comparison on the current version's test split can detect."""
    version = load_version(project.folder.dataset)
    clusters = clusters_by_split(version.members)
    return split_power(version.manifest.counts.domain, clusters, project.folder.config.data.test_size)


def detectable_effects(project: OpenProject) -> tuple[DetectableEffects, ...]:
    """Return the smallest difference that the current dev and test splits can show."""
    version = load_version(project.folder.dataset)
    held_out = {split: version.examples(split) for split in ("dev", "test")}
    return tuple(
        DetectableEffects(split, len(rows), len({row.cluster for row in rows}))
        for split, rows in held_out.items()
        if rows
    )


def prompting(project: OpenProject, minutes: float | None = None) -> AdviseResult:
    """Measure the prompting arms on dev and choose the best one, the baseline of a fine-tune.

    ``minutes`` also has to suffice for the comparison on test that follows.
    """
    from tunewright.evaluation.prompt_search import advise

    with answer_workers(project) as workers:
        arm_runner = open_arm_runner(project, workers=workers)
        from tunewright.evaluation.workload import time_limit

        return advise(arm_runner, time_limit(arm_runner, minutes, (None, "test")))


def announce(project: OpenProject) -> None:
    """Report what the pipeline will train and how many answers it will compute."""
    from tunewright.evaluation.workload import estimated_answers

    train = project.folder.config.train
    rows = len(load_version(project.folder.dataset).examples("train"))
    with answer_workers(project) as workers:
        expected = estimated_answers(open_arm_runner(project, workers=workers), (None, "test"))
    project.reporter.say(
        f"Prompting arms answer dev rows, {count_of(rows, 'row')} train an adapter (at most "
        f"{count_of(train.epochs, 'epoch')}), and the test split compares both. {expected.text}"
    )


def optimize_prompt(project: OpenProject) -> OptimizePromptResult:
    """Search for a better instruction with GEPA and the config's reflection model, and choose on dev.

    Later commands measure the result as further arms, as long as the dataset version, base, template and metric
    stay the same. Replies and answers are kept, so a stopped call resumes and pays for nothing twice.

    Raises:
        UserError: no reflection model or GEPA, too few training rows, or the endpoint fails.
    """
    return _prompt_optimization(project).run()


def estimate_optimize_prompt(project: OpenProject) -> OptimizePromptEstimate:
    """Return upper limits of the calls, tokens and cost of :meth:`optimize_prompt` without sending anything."""
    return _prompt_optimization(project).estimate()


def _prompt_optimization(project: OpenProject) -> PromptOptimization:
    from tunewright.evaluation.prompt_optimization.run import PromptOptimization, reflection_endpoint

    reflection_endpoint(project.folder.config)  # refused before a base is loaded
    return PromptOptimization(open_arm_runner(project))


def evaluate(
    project: OpenProject,
    adapter: str | None = None,
    *,
    dev: bool = False,
    minutes: float | None = None,
    advice: Advice | None = None,
) -> EvaluateResult:
    """Compare an adapter (the newest by default) with zero-shot and the best prompting arm on the test split.

    The access to the test split is logged first. Existing evidence is read again, not measured. The
    benchmarks of the config's regressions section are also measured.

    Args:
        adapter: a name or its beginning (None: the newest).
        dev: compare on the dev split that chose the adapter and the prompting arm; nothing is opened.
        minutes: time limit for answers; arms that do not fit are left out by name (None: no limit).
        advice: measured choice of a prompt, with its own time limit (None: chosen now).

    Raises:
        UserError: the access log was changed, or too few minutes.
        ValueError: both ``minutes`` and ``advice``.
    """
    if minutes is not None and advice is not None:
        raise ValueError("minutes and advice are mutually exclusive: the advice has its own time limit")
    require_minutes(minutes)
    split: Literal["test", "dev"] = "dev" if dev else "test"
    tuned = find_adapter(project.folder.adapters, adapter)
    require_ready(project.folder, load_version(project.folder.dataset), asked_splits(split), project.reporter)
    with answer_workers(project) as workers:
        arm_runner = open_arm_runner(project, tuned, workers)
        # These import torch, so that what the folder alone refuses is refused without it.
        from tunewright.evaluation import runner
        from tunewright.evaluation.benchmarks.runner import open_suites
        from tunewright.evaluation.prompt_search import advise
        from tunewright.evaluation.workload import time_limit

        # Faults in a benchmark's file are reported before anything is measured.
        suites = open_suites(project.folder) if split == "test" and project.folder.config.regressions.measures else []
        # Keys added since the adapter was trained had the effect of their defaults.
        trained_by = TrainConfig().model_dump(mode="json") | tuned.lineage.get("config", {}).get("train", {})
        trained_by["use_liger_kernel"] = trained_by["use_liger_kernel"] is True  # as `deciding` counts auto
        settings = project.folder.config.train
        now = {**settings.deciding(), "method": settings.method}
        if "config" in tuned.lineage and any(trained_by[key] != value for key, value in now.items()):
            project.reporter.warn(
                f"The config's train section has changed since {tuned.name} was trained. `tunewright train` trains an "
                "adapter with the new values."
            )
        if advice is None:
            advice = advise(arm_runner, time_limit(arm_runner, minutes, (tuned, split))).advice
        else:
            arm_runner.budget = advice.budget
        comparison = runner.plan_comparison(arm_runner, tuned, advice, split)
        return runner.evaluate(arm_runner, comparison, suites)


def estimate_evaluation(
    project: OpenProject, adapter: str | None = None, *, dev: bool = False, embed: bool = True
) -> AnswersEstimate:
    """Return the number of answers that :meth:`evaluate` has to compute, and their expected time; none is computed.

    Args:
        adapter: a name or its beginning (None: the newest; without any, one that is still to be trained).
        dev: estimate it on the dev split.
        embed: compute vectors of dense retrieval that are not kept. Otherwise no model is loaded.

    Raises:
        UserError: an adapter that does not fit; also without ``embed`` if vectors have to be computed.
    """
    known = adapter is not None or list_adapters(project.folder.adapters)
    tuned = find_adapter(project.folder.adapters, adapter) if known else None
    with answer_workers(project) as workers:
        arm_runner = open_arm_runner(project, tuned, workers)
        from tunewright.evaluation.workload import estimated_answers

        arm_runner.embeddings.kept_only = not embed
        return estimated_answers(arm_runner, (tuned, "dev" if dev else "test"))


def estimate_incumbents(project: OpenProject, *, dev: bool = False) -> list[IncumbentEstimate]:
    """Return the calls, tokens and cost of the incumbents' answers in :meth:`evaluate`, without sending anything.

    Args:
        dev: estimate it on the dev split.

    Raises:
        UserError: no incumbent, or a file of frozen answers was changed.
    """
    if not project.folder.config.evaluate.incumbents:
        raise UserError(
            "The config has no incumbents",
            where="evaluate.incumbents",
            fix="Set name, base_url and model of a model that you use today.",
        )
    version = load_version(project.folder.dataset)
    members = [member for split in asked_splits("dev" if dev else "test") for member in version.examples(split)]
    return [model.estimate(members) for model in incumbent_models(project.folder, project.reporter)]


def asked_splits(split: Literal["test", "dev"]) -> list[Literal["test", "dev"]]:
    """Return the splits that incumbents answer; dev comes first, so that a wrong setting shows before test."""
    return ["dev"] if split == "dev" else ["dev", "test"]


def regressions(project: OpenProject, adapter: str | None = None) -> BenchmarkResult:
    """Measure the benchmarks of the config's regressions section with an adapter off and on.

    The result is added to the adapter's evidence, if it has any.

    Raises:
        UserError: no benchmark, an unreadable file, or no adapter that fits.
    """
    tuned = find_adapter(project.folder.adapters, adapter)
    from tunewright.evaluation.benchmarks.runner import measure_benchmarks, open_suites

    suites = open_suites(project.folder)
    with answer_workers(project) as workers:
        return measure_benchmarks(open_arm_runner(project, tuned, workers), tuned, suites)


# Verbs that train, with the checks before them


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
    forced = require_rows(project, force=force)
    refuse_up_front(project)
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

    require_minutes(options.minutes)
    version = load_version(project.folder.dataset)
    refuse_up_front(project, "A sweep")
    from tunewright.training.sweep.sweep import Sweep

    chat = project.chat
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
        result = trials.run(options.minutes)
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
    if folds < 2:
        raise UserError(f"Must be at least 2 (got {folds})", where="--folds", fix="Five are usual.")
    version = load_version(project.folder.dataset)
    refuse_up_front(project, "Cross-validation")
    from tunewright.evaluation.crossval import CrossValidation

    chat = project.chat
    with open_trainings(project) as trainings:
        return CrossValidation(
            project.folder, version, project.base, chat, project.reporter, trainings, folds=folds, force=force
        ).run()


def refuse_up_front(project: OpenProject, new_adapters_of: str | None = None) -> None:
    """Refuse a config that cannot be trained, before torch is imported, a base downloaded or anything measured.

    Args:
        new_adapters_of: the name of a command that trains new adapters on parts of the rows.
    """
    settings = project.folder.config.train
    require_trackers(settings.report_to)
    if new_adapters_of is not None:
        require_new_adapter(settings, new_adapters_of)
    find_parent(project.folder)
    require_servable(settings)
    require_bitsandbytes(settings.quantization, "train.quantization")
    if project.folder.config.compute.cluster is None:  # else other machines train
        require_room(project)


def require_rows(project: OpenProject, *, force: bool) -> str | None:
    """Refuse fewer than 50 training pairs; with ``force``, return the words for the lineage.

    Raises:
        UserError: too few pairs, and not forced.
    """
    return require_min_examples(
        len(load_version(project.folder.dataset).domain_of("train")), force=force, reporter=project.reporter
    )


def has_trained(project: OpenProject) -> bool:
    """Return whether the adapter of the config and the current version exists already."""
    from tunewright.core.io import digest
    from tunewright.training.train import find_trained, training_inputs

    inputs = training_inputs(project.folder, load_version(project.folder.dataset), project.base, project.chat)
    return find_trained(project.folder.adapters, project.folder.config.name, digest(inputs)) is not None


def check_trainable(project: OpenProject) -> None:
    """Check before other work that ``compute.cluster`` can train, if it is set."""
    if project.folder.config.compute.cluster is not None:
        from tunewright.training.trainings import check_cluster

        check_cluster(project.folder, project.base, project.reporter)
