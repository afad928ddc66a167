"""A sweep: presets and learning rates by successive halving on dev, until one is trained to its end.

A trial is the same run that `tunewright train` makes with its config, paused where trials are compared.
So none of the winner's work is repeated, and its adapter is the adapter that its config produces.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.registry import Adapter
from tunewright.adapters.signing import read_signatures, sign, store_signer
from tunewright.chat import ChatFormat
from tunewright.config import metric_name
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest
from tunewright.core.progress import Reporter
from tunewright.data.versions import DatasetVersion
from tunewright.models import quiet_transformers
from tunewright.models.bases import Base
from tunewright.models.loading import context_length, load_model, text_settings
from tunewright.training.checkpoints import latest_complete_checkpoint, step_of
from tunewright.training.monitoring import DivergedError
from tunewright.training.proving import proved
from tunewright.training.rows import require_min_examples, total_steps, training_rows
from tunewright.training.self_samples import draw_replay
from tunewright.training.sweep.ledger import Head, Ledger
from tunewright.training.sweep.successive_halving import (
    Outcome,
    Progress,
    SuccessiveHalving,
    Trial,
    default_rates,
    halving_rungs,
    make_trials,
)
from tunewright.training.train import train, train_until, training_inputs
from tunewright.training.trainings import Job, Trainings, absolute


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; all numbers are of the dev split."""

    ledger: Ledger
    winner: Trial | None
    """None if the budget or every trial ended before."""
    adapter: Adapter | None
    """The winner's adapter, trained to its end."""

    @property
    def edge_warning(self) -> str | None:
        """A warning if the winner's rate is the lowest or highest tried, so that the best may be beyond it."""
        if self.winner is None:
            return None
        rate, rates = self.winner.train.learning_rate, [t["learning_rate"] for t in self.ledger.head.trials.values()]
        side = {min(rates): "lowest", max(rates): "highest"}.get(rate)
        if side is None or len(set(rates)) == 1:
            return None
        return f"{rate:g} is the {side} rate tried, so the best may be beyond it. Try others with --rate."


class Sweep:
    """The trials of a config on a dataset version, and all inputs that decide their results.

    Without ``rates`` there are three around the suggested one (`default_rates`). ``force`` accepts few pairs.
    """

    def __init__(
        self,
        project: ProjectFolder,
        version: DatasetVersion,
        base: Base,
        chat: ChatFormat,
        reporter: Reporter,
        trainings: Trainings,
        *,
        rates: Sequence[float] | None = None,
        force: bool = False,
    ) -> None:
        self.project = project
        self.version = version
        self.base = base
        self.chat = chat
        self.reporter = reporter
        self.once = _OnceReporter(reporter)
        self.trainings = replace(trainings, reporter=self.once)
        self.forced = require_min_examples(len(version.domain_of("train")), force=force, reporter=reporter)
        own = project.config.train
        self.trials = make_trials(own, rates or default_rates(own.learning_rate, int(text_settings(base).hidden_size)))
        if own not in [trial.train for trial in self.trials]:
            self.reporter.warn(
                "The current config is not among the trials: they are the presets classic and all-linear with "
                f"rates of {', '.join(f'{rate:g}' for rate in sorted({t.train.learning_rate for t in self.trials}))}."
            )
        limit = min(own.max_length, context_length(base))
        rows = training_rows(chat, version.examples("train"), limit, own.on_overlength, self.once)
        # Drawn here and reused by every trial: their number decides the steps of a trial.
        load = cache(lambda: load_model(proved(base, self.once), own.dtype, own.quantization))
        with quiet_transformers():
            replay = draw_replay(project, version, base, chat, load, limit, self.once)
        load.cache_clear()
        clear_device_cache(garbage_collection=True)  # the first trial loads its own base
        self.steps = total_steps(own, len(rows.rows) + len(replay.rows))
        self.rungs = halving_rungs(len(self.trials), self.steps)
        self.head = self._head()
        self.folder = project.sweeps / self.head.sweep
        self.work = project.work / "sweeps" / self.head.sweep

    def _head(self) -> Head:
        config = self.project.config
        trials = {
            trial.name: {
                "preset": trial.train.preset,
                "learning_rate": trial.train.learning_rate,
                "inputs": digest(training_inputs(self._project(trial), self.version, self.base, self.chat)),
            }
            for trial in self.trials
        }
        return Head(
            sweep=digest({"trials": trials, "rungs": self.rungs})[:12],
            dataset=self.version.digest,
            base=self.base.digest,
            template=self.chat.digest,
            metric=None if config.train.eval_max_samples == 0 else metric_name(config.evaluate.metric),
            steps=self.steps,
            rungs=self.rungs,
            trials=trials,
        )

    def run(self, minutes: float | None = None) -> SweepResult:
        """Sweep within a budget in minutes, which covers all contributing commands; None means unlimited."""
        ledger = Ledger(self.folder, self.head)
        budget = None if minutes is None else 60 * minutes
        halving = SuccessiveHalving(
            self.trials,
            self.rungs,
            ledger,
            self._train,
            budget,
            self.reporter,
            at_once=self.trainings.at_once,
        )
        winner = halving.run()
        adapter = None
        if winner is not None:
            adapter = self._stored(winner)
            if all(ledger.result(trial.name, 1) for trial in self.trials):
                shutil.rmtree(self.work, ignore_errors=True)  # no trial can resume from it
        return SweepResult(ledger, winner, adapter)

    def _project(self, trial: Trial) -> ProjectFolder:
        return ProjectFolder(self.project.root, self.project.config.model_copy(update={"train": trial.train}))

    def _train(self, trials: Sequence[Trial], step: int) -> Generator[Outcome, None, None]:
        """Train trials up to a step, from their present steps; their adapters are stored at the end."""
        apart, last = self.trainings.on_cluster, step == self.steps
        facts = {"sweep": self.head.sweep, **({"forced": self.forced} if self.forced else {})}
        run = _Run(self.version, self.chat, self.steps, facts, apart)
        jobs = [
            Job(trial.name, work, _Part(project, work, step))
            for trial in trials
            for project in [absolute(self._project(trial)) if apart else self._project(trial)]
            for work in [project.work / "sweeps" / self.head.sweep / trial.name]
        ]
        # Workers have no private key: this process signs their stored adapters.
        signer = store_signer(self.project.keys, self.reporter) if apart and last else None
        for trial, outcome in zip(trials, self.trainings.run(_train_part, run, jobs), strict=True):
            if signer is not None and isinstance(outcome.result, Progress):
                adapter = self._stored(trial)
                if adapter.lineage.get("sweep") == self.head.sweep and not read_signatures(adapter.folder):
                    sign(adapter.folder, signer)
            yield outcome

    def _stored(self, trial: Trial) -> Adapter:
        """Return the adapter of a trial that was trained to its end."""
        inputs = self.head.trials[trial.name]["inputs"]
        return self.trainings.stored(self.project.adapters, self.project.config.name, inputs)


@dataclass(frozen=True)
class _Run:
    """Inputs that all trials share."""

    version: DatasetVersion
    chat: ChatFormat
    steps: int
    facts: dict[str, str]
    apart: bool
    """True in another process, which does not sign."""


@dataclass(frozen=True)
class _Part:
    """A trial, and the step up to which it is trained now."""

    project: ProjectFolder
    work: Path
    step: int


def _train_part(base: Base, run: _Run, part: _Part, reporter: Reporter) -> Outcome:
    """Train one trial up to a step."""
    began = time.monotonic()
    try:
        result: Progress | DivergedError = _train_to(base, run, part, reporter)
    except DivergedError as error:
        result = error
    return Outcome(result, time.monotonic() - began)


def _train_to(base: Base, run: _Run, part: _Part, reporter: Reporter) -> Progress:
    checkpoint = latest_complete_checkpoint(part.work)
    behind = 0 if checkpoint is None else step_of(checkpoint)
    if behind > part.step:  # left by a sweep whose ledger was removed
        shutil.rmtree(part.work)
        behind = 0
    if part.step < run.steps:
        paused = train_until(part.project, run.version, base, run.chat, reporter, work=part.work, step=part.step)
        return Progress(paused.step - behind, paused.seconds, paused.best.dev_loss, paused.best.dev_metric)
    place = part.project.adapters if run.apart else None
    result = train(part.project, run.version, base, run.chat, reporter, adapters=place, work=part.work, facts=run.facts)
    training = result.adapter.lineage["training"]
    kept = next(each for each in training["epochs"] if each["step"] == training["kept_step"])
    made = run.steps - behind if result.trained else 0
    seconds = training["seconds"] if result.trained else 0.0
    return Progress(made, seconds, kept["dev_loss"], kept["dev_metric"])


class _OnceReporter:
    """A reporter that repeats no message, since all trials have the same rows and base."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.task = reporter.task
        self.said: set[str] = set()

    def say(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.reporter.say(message)

    def warn(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.reporter.warn(message)
