"""The road from raw pairs to traffic, as verbs: what the command line and ``tunewright.open`` both call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.registry import Adapter, find_adapter
from tunewright.adapters.vllm_compat import require_servable
from tunewright.api.adapters import AdaptersApi
from tunewright.api.context import ProjectContext
from tunewright.api.data import DatasetApi
from tunewright.api.engines import EnginesApi
from tunewright.api.evaluations import EvaluationsApi
from tunewright.api.export import ExportApi
from tunewright.api.keys import SigningKeysApi
from tunewright.api.releases import ReleasesApi
from tunewright.api.tenants import AuditApi, TenantsApi
from tunewright.config import EngineName, TrainConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter, Reporter
from tunewright.data.add import AddResult
from tunewright.evidence.power import Prospect, prospect, prospect_text
from tunewright.evidence.schema import Advice
from tunewright.evidence.split_power import foresight_text, require_significance
from tunewright.evidence.verdict import Verdict
from tunewright.metrics import metric_kind
from tunewright.models.bases import Base
from tunewright.models.quantized import require_bitsandbytes
from tunewright.training.trackers import require_trackers

if TYPE_CHECKING:
    from tunewright.advisor.result import AdviceResult
    from tunewright.chat import ChatFormat
    from tunewright.evaluation.arm_runner import ArmRunner
    from tunewright.evaluation.benchmarks.runner import BenchmarkResult
    from tunewright.evaluation.learning_curve import CurveResult
    from tunewright.evaluation.prompt_search import AdviseResult
    from tunewright.evaluation.runner import EvaluateResult
    from tunewright.models.memory.answer import Answer
    from tunewright.models.memory.plan import Plan
    from tunewright.serving.isolation import IsolationResult
    from tunewright.serving.service import Service
    from tunewright.training.sweep.sweep import SweepResult
    from tunewright.training.train import TrainResult

CURVE_PLOT = "curve.svg"
SEEDS = 3
"""Of a learning curve: with fewer the luck of a training cannot be told from what the rows bring."""
FOLDS = 5
"""Of a cross-fitted evaluation: each adapter sees four fifths of the rows, less those that it is chosen by."""


@dataclass(frozen=True)
class RunResult:
    """Where the whole road ended."""

    added: AddResult
    advised: AdviseResult
    trained: TrainResult
    evaluated: EvaluateResult
    verdict: Verdict
    report: Path


class Project(EvaluationsApi):
    """A project and the steps that it can take, by the command line's names.

    Its groups of commands are attributes: ``tunewright data add`` is ``road.data.add``.
    """

    def __init__(self, project: ProjectFolder, reporter: Reporter | None = None) -> None:
        super().__init__(ProjectContext(project, reporter or LogReporter()))
        self.folder = project
        self.reporter = self._context.reporter
        self.data = DatasetApi(self._context)
        self.adapters = AdaptersApi(self._context)
        self.engine = EnginesApi(self.reporter)
        self.tenant = TenantsApi(self._context)
        self.audit = AuditApi(self._context)
        releases = ReleasesApi(self._context, self.ledger)
        self.deploy, self.promote, self.rollback = releases.deploy, releases.promote, releases.rollback
        self.withdraw, self.releases, self.shadow = releases.withdraw, releases.history, releases.shadow
        self.keys = SigningKeysApi(self._context)
        self.export = ExportApi(self._context)

    @property
    def base(self) -> Base:
        """The config's base, found, fetched and checked."""
        return self._context.base

    @property
    def chat(self) -> ChatFormat:
        """How conversations become tokens here."""
        return self._context.chat

    def run(self, *, force: bool = False) -> RunResult:
        """Go the whole road; a stage whose inputs have not changed is found done.

        A test split with too few clusters for any verdict is refused; with ``force`` that is a warning. ``force`` is
        also as in :meth:`train`.
        """
        sources = self.folder.config.data.sources
        require_trackers(self.folder.config.train.report_to)
        if not sources:
            raise UserError(
                "the config names no sources of pairs",
                where="data.sources",
                fix="List your files there, e.g. sources: [pairs.jsonl]",
            )
        added = self.data.add([self.folder.root / source for source in sources])
        self._stage("data", added.created, f"version {added.version.digest[:12]}")
        require_significance(self.data.foresight(), force=force, reporter=self.reporter)
        self._refuse_up_front()
        forced = self._forced(force)
        advised = self.prompting()
        self._stage("advise", advised.measured, f"best prompting arm on dev: {advised.advice.best}")
        trained = self._train(forced)
        self._stage("train", trained.trained, trained.adapter.name)
        evaluated = self.evaluate(trained.adapter.name)
        self._stage("evaluate", evaluated.evaluated, f"evidence {evaluated.evidence.id}")
        decision = self.verdict(evaluated.folder)
        report = self.report(evaluated.folder)
        return RunResult(added, advised, trained, evaluated, decision, report)

    def _stage(self, name: str, done_now: bool, what: str) -> None:
        self.reporter.say(f"{name}: {'done' if done_now else 'unchanged'}, {what}")

    def prospects(self) -> tuple[Prospect, ...]:
        """Return what the current version's dev and test splits can show, reckoned from their items and clusters."""
        version = self.data.version()
        held_out = {split: version.examples(split) for split in ("dev", "test")}
        return tuple(
            prospect(split, len(rows), len({row.cluster for row in rows})) for split, rows in held_out.items() if rows
        )

    def _tell_prospects(self) -> None:
        settings = self.folder.config.evaluate
        for told in self.prospects():
            self.reporter.say(prospect_text(told, metric_kind(settings.metric), settings.margin))

    def prompting(self) -> AdviseResult:
        """Measure the prompting arms on dev and choose the best: what a fine-tune has to beat, and no pilot."""
        from tunewright.evaluation.prompt_search import advise
        from tunewright.evaluation.schedule import Schedule

        self._tell_prospects()
        arm_runner = self._context.arm_runner()
        arm_runner.schedule = Schedule(arm_runner)
        return advise(arm_runner)

    def advise(
        self, stored: str | Path | None = None, *, pilot: bool = True, minutes: float | None = None
    ) -> AdviceResult:
        """Measure the three signals and a pilot on dev: prompt, retrieve, fine-tune, or can't tell.

        Args:
            stored: earlier advice (its ID or file) to decide from anew; then nothing is measured.
            pilot: train a pilot adapter on a part of the training rows; without, training's gain is not known.
            minutes: the most that answers may take; prompting arms are left out for it, by name (None: no limit).

        Raises:
            UserError: no such advice, too few minutes, or what cannot be measured.
        """
        from tunewright.advisor.signals import find_advice, load_signals

        if stored is not None:
            from tunewright.advisor.result import AdviceResult

            file = find_advice(self.folder.advice, stored)
            return AdviceResult(file, load_signals(file), measured=False)
        from tunewright.advisor.adviser import Adviser

        if pilot:
            self._refuse_up_front()
        self._tell_prospects()
        return Adviser(self._context.arm_runner, pilot=pilot, minutes=minutes).advise()

    def fit(
        self,
        *,
        gpu: str | None = None,
        base: str | None = None,
        rows: int | None = None,
        length: int | None = None,
        shared: int = 0,
        answer: int | None = None,
    ) -> tuple[Plan, Answer]:
        """Return what training needs of memory, by part, and whether that fits: from the base's config.json alone.

        The dataset's longest row is measured where there is a dataset and the base's tokenizer is on this machine.

        Args:
            gpu: a card's name or memory, such as RTX 4090 or 24GB (None: the card present, or this machine).
            base: another base than the project's; then no project is needed, and without one the defaults hold.
            rows, length: the micro-batch to tell of (None: the config's).
            shared: tokens that all rows begin with.
            answer: trained tokens of each row (None: all but the shared).

        Raises:
            UserError: no such base, card or size, a base that is not supported, or more shared and trained tokens
                than a row has.
        """
        from tunewright.api.memory import fitting_plan

        return fitting_plan(self._context, gpu=gpu, base=base, rows=rows, length=length, shared=shared, answer=answer)

    def train(self, *, force: bool = False) -> TrainResult:
        """Train the config's adapter on the current version, or find the one already trained.

        Fewer than 50 training pairs are refused; with ``force`` that is a warning, and the adapter's lineage says so.
        """
        told = self.data.foresight()
        if not told.significant:
            self.reporter.warn(foresight_text(told))
        self._refuse_up_front()
        forced = self._forced(force)
        self._tell_prospects()
        return self._train(forced)

    def sweep(
        self,
        *,
        minutes: float | None = None,
        rates: Sequence[float] | None = None,
        write: bool = False,
        force: bool = False,
    ) -> tuple[SweepResult, dict[str, Any]]:
        """Try presets and learning rates by successive halving on dev, and train the winner to its end.

        Args:
            minutes: for the whole sweep, what is in its ledger included; None: as long as it takes.
            rates: to try (None: three around what suits the base's size, one of which is the config's own).
            write: put the winner's values into tunewright.yaml.
            force: as in :meth:`train`.

        Returns:
            What the sweep came to, and the keys of the train section that were written.

        Raises:
            UserError: a budget that is none or too small for one trial, or rates that are none.
        """
        from tunewright.config.edit import write_train
        from tunewright.config.project import CONFIG_FILE
        from tunewright.training.sweep.sweep import Sweep

        if minutes is not None and not minutes > 0:
            raise UserError(f"{minutes:g} minutes are no time", where="--minutes")
        self._refuse_up_front()
        version, chat = self.data.version(), self.chat
        sweep = Sweep(self.folder, version, self.base, chat, self.reporter, rates=rates, force=force)
        result = sweep.run(minutes)
        written: dict[str, Any] = {}
        if write and result.winner is not None:
            written = write_train(self.folder.root / CONFIG_FILE, result.winner.train)
            if not written:
                self.reporter.say("tunewright.yaml has the winner's values already.")
        elif write:
            self.reporter.warn("Nothing is written to tunewright.yaml: there is no winner.")
        return result, written

    def curve(self, *, seeds: int = SEEDS, force: bool = False) -> CurveResult:
        """Train on parts of the training rows with several seeds, to see on dev whether more rows would help.

        The plot lies beside the result, as curve.svg. ``force`` as in :meth:`train`.
        """
        from tunewright.core.io import write_text
        from tunewright.evaluation.learning_curve import LearningCurve
        from tunewright.report.plots import curve_plot

        if seeds < 2:
            raise UserError(
                f"{seeds} seed", where="--seeds", fix="Two are the fewest: one cannot show how much is luck."
            )
        self._refuse_up_front()
        version, chat = self.data.version(), self.chat
        result = LearningCurve(self.folder, version, self.base, chat, self.reporter, seeds=seeds, force=force).run()
        write_text(result.folder / CURVE_PLOT, curve_plot(result.curve))
        return result

    def evaluate(self, adapter: str | None = None, *, minutes: float | None = None) -> EvaluateResult:
        """Compare an adapter (the newest by default) with zero-shot and the best prompting arm on the test split.

        That opens the test split, and is in the ledger before; evidence that is there already is only read again. The
        suites of the config's general section are measured too, if there are any.

        Args:
            adapter: its name, or its beginning.
            minutes: the most that answers may take; arms are left out for it, by name (None: no limit).

        Raises:
            UserError: the ledger is not whole, or too few minutes.
        """
        from tunewright.evaluation.benchmarks.runner import evaluate_with_general, open_suites

        # What is wrong with a suite's file is told before anything is measured.
        suites = open_suites(self.folder) if self.folder.config.general.measures else []
        return evaluate_with_general(*self._contest(adapter, "test", minutes), suites)

    def evaluate_on_dev(self, adapter: str | None = None, *, minutes: float | None = None) -> EvaluateResult:
        """Return the comparison of :meth:`evaluate` on the dev split, which chose the adapter and the prompting arm."""
        from tunewright.evaluation.runner import evaluate_on_dev

        return evaluate_on_dev(*self._contest(adapter, "dev", minutes))

    def _contest(
        self, adapter: str | None, split: Literal["test", "dev"], minutes: float | None
    ) -> tuple[ArmRunner, Adapter, Advice]:
        """Who is compared, and with which prompting arm."""
        from tunewright.evaluation.prompt_search import advise
        from tunewright.evaluation.schedule import Contest, Schedule

        tuned = find_adapter(self.folder.adapters, adapter)
        arm_runner = self._context.arm_runner(tuned)
        arm_runner.schedule = Schedule(arm_runner, minutes=minutes, contest=Contest(tuned, split))
        # Keys that there were not yet when it was trained had the effect of their defaults.
        trained_by = TrainConfig().deciding() | tuned.lineage.get("config", {}).get("train", {})
        if "config" in tuned.lineage and any(
            trained_by[key] != value for key, value in self.folder.config.train.deciding().items()
        ):
            self.reporter.warn(
                f"The config's train section has changed since {tuned.name} was trained, and that adapter is evaluated "
                "as it is; `tunewright train` makes one by the config."
            )
        return arm_runner, tuned, advise(arm_runner).advice

    def general(self, adapter: str | None = None) -> BenchmarkResult:
        """Measure what the base could do before with an adapter (the newest by default) off and on.

        The suites are those of the config's general section. Evidence on the adapter, if there is any, gets the result.

        Raises:
            UserError: no suite, a file that cannot be read, or no adapter that fits.
        """
        from tunewright.evaluation.benchmarks.runner import measure_general, open_suites

        suites = open_suites(self.folder)
        tuned = find_adapter(self.folder.adapters, adapter)
        return measure_general(self._context.arm_runner(tuned), tuned, suites)

    def crossval(self, *, folds: int = FOLDS, force: bool = False) -> EvaluateResult:
        """Evaluate the config on every row of the current version, in folds: for sets too small to hold a test out.

        ``force`` as in :meth:`train`.
        """
        from tunewright.evaluation.crossval import CrossValidation

        if folds < 2:
            raise UserError(f"{folds} folds", where="--folds", fix="Two are the fewest; five are usual.")
        self._refuse_up_front()
        version, chat = self.data.version(), self.chat
        return CrossValidation(self.folder, version, self.base, chat, self.reporter, folds=folds, force=force).run()

    def serve(
        self,
        adapters: Sequence[str] = (),
        *,
        host: str | None = None,
        port: int | None = None,
        metrics_port: int | None = None,
        auth: bool = True,
        engine: EngineName | None = None,
        system_prompts: bool = True,
    ) -> Service:
        """Return a server, loaded but not yet started.

        Without tenants: for the base and adapters (all that fit the base by default), to everybody on this machine.
        ``NAME@step-N`` is an adapter's earlier checkpoint. Adapters that are named decide how the base is held (as
        they were trained on it), unless ``serve.quantize`` does; else the config decides.

        With tenants: for their keys alone, to the releases of their aliases.

        Args:
            adapters: by name; none where there are tenants.
            host, port, metrics_port, engine: in place of the config's.
            auth: False lets everybody who reaches the address ask, where there are no tenants.
            system_prompts: False leaves requests without a system message as they came, where there are no tenants;
                else they get the one that the adapter was trained with.

        Raises:
            UserError: a named adapter that does not fit, or that cannot be served together with the others; an address
                that others can reach, without tenants.
        """
        from tunewright.api.serving import open_service

        given = {"host": host, "port": port, "metrics_port": metrics_port, "engine": engine}
        own = {name: value for name, value in given.items() if value is not None}
        config = self.folder.config
        served = config.model_copy(update={"serve": config.serve.model_copy(update=own)})
        return open_service(self._context, adapters, served, auth=auth, system_prompts=system_prompts)

    def self_test(self, adapters: Sequence[str] = (), *, engine: EngineName | None = None) -> IsolationResult:
        """Return whether an engine keeps the base and the adapters apart that :meth:`serve` would serve.

        Asked are dev items of the current version, if there is one, and general questions.

        Raises:
            UserError: as for :meth:`serve`; no adapter.
        """
        from tunewright.api.isolation import canary_prompts, open_self_test

        return open_self_test(self._context, adapters, engine).run(canary_prompts(self._context))

    def _refuse_up_front(self) -> None:
        """What no training by this config could end well with, before a base is fetched or anything measured."""
        settings = self.folder.config.train
        require_servable(settings)
        require_bitsandbytes(settings.quantize, "train.quantize")
        from tunewright.api.memory import require_room

        require_room(self._context)

    def _forced(self, force: bool) -> str | None:
        from tunewright.training.min_examples import forced_below

        return forced_below(len(self.data.version().domain_of("train")), force=force, reporter=self.reporter)

    def _train(self, forced: str | None) -> TrainResult:
        from tunewright.training.train import train

        facts = {"forced": forced} if forced else {}
        return train(self.folder, self.data.version(), self.base, self.chat, self.reporter, facts=facts)
