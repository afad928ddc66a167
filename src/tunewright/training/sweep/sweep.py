"""A sweep: presets and learning rates by successive halving on dev, until one is trained to its end.

A trial is the very run that `tunewright train` would make with its config, paused where trials are compared. So nothing
that the winner has done is done again, and its adapter is the one that its config makes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from accelerate.utils.memory import clear_device_cache

from tunewright.adapters.registry import Adapter
from tunewright.chat import ChatFormat
from tunewright.config import metric_name
from tunewright.config.project import ProjectFolder
from tunewright.core.io import digest
from tunewright.core.progress import Reporter, Task
from tunewright.data.versions import DatasetVersion
from tunewright.models.bases import Base
from tunewright.models.loading import context_length, hidden_size, load_model
from tunewright.models.quiet import quiet_transformers
from tunewright.training.checkpoints import whole_checkpoint
from tunewright.training.min_examples import forced_below
from tunewright.training.replay import draw_replay
from tunewright.training.rows import training_rows
from tunewright.training.run import evaluation_interval, total_steps
from tunewright.training.sweep.ledger import Head, Ledger
from tunewright.training.sweep.search_space import Trial, default_rates, halving_schedule, make_trials
from tunewright.training.sweep.successive_halving import Progress, SuccessiveHalving
from tunewright.training.train import train, train_until, trained_before, training_inputs


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to; all numbers are of the dev split."""

    ledger: Ledger
    winner: Trial | None
    """None where the budget, or every trial, ended before."""
    adapter: Adapter | None
    """The winner's, trained to its end."""

    @property
    def at_the_edge(self) -> str | None:
        """True if the winner's rate is the lowest or highest of all tried, so that the best may lie beyond."""
        if self.winner is None:
            return None
        rate, rates = self.winner.train.learning_rate, [t["learning_rate"] for t in self.ledger.head.trials.values()]
        side = {min(rates): "lowest", max(rates): "highest"}.get(rate)
        if side is None or len(set(rates)) == 1:
            return None
        return f"{rate:g} is the {side} rate that was tried, so the best may lie beyond: name others with --rate."


class Sweep:
    """The trials of a config on a dataset version, and all that decides what comes out of them.

    Args:
        project: its config is what the trials vary.
        version, base, chat: as for `train`.
        reporter: shows progress, hears warnings.
        rates: learning rates to try; None: three around what suits the base, see `default_rates`.
        force: train on fewer pairs than are refused otherwise.

    Raises:
        UserError: too few pairs, rates that are none, rows that cannot be trained on, or nothing to replay.
    """

    def __init__(
        self,
        project: ProjectFolder,
        version: DatasetVersion,
        base: Base,
        chat: ChatFormat,
        reporter: Reporter,
        *,
        rates: Sequence[float] | None = None,
        force: bool = False,
    ) -> None:
        self.project = project
        self.version = version
        self.base = base
        self.chat = chat
        self.reporter = reporter
        self.once = _Once(reporter)
        self.forced = forced_below(len(version.domain_of("train")), force=force, reporter=reporter)
        own = project.config.train
        self.trials = make_trials(own, rates or default_rates(own.learning_rate, hidden_size(base)))
        if own not in [trial.train for trial in self.trials]:
            self.reporter.warn(
                "The config as it is now is not among the trials: they are the presets classic and all-linear with "
                f"rates of {', '.join(f'{rate:g}' for rate in sorted({t.train.learning_rate for t in self.trials}))}."
            )
        limit = min(own.max_length, context_length(base))
        rows = training_rows(chat, version.examples("train"), limit, own.on_overlength, self.once)
        # Drawn here and found by every trial: how many there are decides how many steps a trial has.
        load = cache(lambda: load_model(base, own.dtype, own.quantization))
        with quiet_transformers():
            replay = draw_replay(project, version, base, chat, load, limit, self.once)
        load.cache_clear()
        clear_device_cache(garbage_collection=True)  # the first trial loads a base of its own
        self.steps = total_steps(own, len(rows.rows) + len(replay.rows))
        self.schedule = halving_schedule(len(self.trials), self.steps, evaluation_interval(own, self.steps))
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
            sweep=digest({"trials": trials, "rungs": self.schedule.rungs})[:12],
            dataset=self.version.digest,
            base=self.base.digest,
            template=self.chat.digest,
            metric=None if config.train.eval_max_samples == 0 else metric_name(config.evaluate.metric),
            steps=self.steps,
            rungs=self.schedule.rungs,
            trials=trials,
        )

    def run(self, minutes: float | None = None) -> SweepResult:
        """Sweep within so many minutes, all commands that took part counted together; None: as long as it takes.

        Raises:
            UserError: too few minutes for a single trial, or whatever a training raises.
            KeyboardInterrupt: stopped by a signal; what was finished is in the ledger, and a checkpoint is saved.
        """
        ledger = Ledger(self.folder, self.head)
        budget = None if minutes is None else 60 * minutes
        halving = SuccessiveHalving(self.trials, self.schedule, ledger, self._train_to, budget, self.reporter)
        winner = halving.run()
        adapter = None
        if winner is not None:
            inputs = self.head.trials[winner.name]["inputs"]
            adapter = trained_before(self.project.adapters, self.project.config.name, inputs)
            assert adapter is not None, "the winner was trained to its end"
            if all(ledger.result(trial.name, 1) for trial in self.trials):
                shutil.rmtree(self.work, ignore_errors=True)  # nothing is left that could go on from there
        return SweepResult(ledger, winner, adapter)

    def _project(self, trial: Trial) -> ProjectFolder:
        return ProjectFolder(self.project.root, self.project.config.model_copy(update={"train": trial.train}))

    def _train_to(self, trial: Trial, step: int) -> Progress:
        """Return one trial up to a step, from where it is; at the end its adapter is stored."""
        project = self._project(trial)
        work = self.work / trial.name
        checkpoint = whole_checkpoint(work)
        behind = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        if behind > step:  # of a sweep whose ledger was removed
            shutil.rmtree(work)
            behind = 0
        if step == self.steps:
            return self._to_the_end(project, work, behind)
        paused = train_until(project, self.version, self.base, self.chat, self.once, work=work, step=step)
        best = paused.best
        return Progress(paused.step - behind, paused.seconds, best.dev_loss, best.dev_metric)

    def _to_the_end(self, project: ProjectFolder, work: Path, behind: int) -> Progress:
        facts = {"sweep": self.head.sweep, **({"forced": self.forced} if self.forced else {})}
        result = train(project, self.version, self.base, self.chat, self.once, work=work, facts=facts)
        told = result.adapter.lineage["training"]
        kept = next(each for each in told["epochs"] if each["step"] == told["kept_step"])
        made = self.steps - behind if result.trained else 0
        seconds = told["seconds"] if result.trained else 0.0
        return Progress(made, seconds, kept["dev_loss"], kept["dev_metric"])


class _Once:
    """A reporter that says each thing once: all trials have the same rows and the same base to speak of."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.said: set[str] = set()

    def say(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.reporter.say(message)

    def warn(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            self.reporter.warn(message)

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Task]:
        return self.reporter.task(title, total, unit)
