"""The road from raw pairs to traffic, as verbs: what the command line and ``tunewright.open`` both call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.adapters.fit import require_fit, trained_quantize
from tunewright.adapters.registry import Adapter, find_adapter, list_adapters
from tunewright.adapters.servable import require_batchable, require_servable
from tunewright.data.add import AddResult, add
from tunewright.data.formats import uses_columns
from tunewright.data.versions import DatasetVersion, Member, load_version
from tunewright.data.versions.find import find_row
from tunewright.errors import UserError
from tunewright.evaluation.evidence import find_evaluation, load_evidence, load_items
from tunewright.evaluation.verdict import Verdict, verdict
from tunewright.models.bases import Base, resolve_base
from tunewright.models.quantized import require_bitsandbytes
from tunewright.progress import LogReporter, Reporter
from tunewright.project import Project
from tunewright.recipe import DataRecipe, Quantize, Recipe, TrainRecipe
from tunewright.report.html import write_report
from tunewright.training.trackers import require_trackers

if TYPE_CHECKING:
    from tunewright.chat import ChatFormat
    from tunewright.data.formats.file_check import Change, FileCheck
    from tunewright.data.neighbours.contamination import Contamination
    from tunewright.data.neighbours.leak import BandScore, LeakReport
    from tunewright.data.review.suspects import Suspect
    from tunewright.data.splits import Split
    from tunewright.data.versions.export import Exported, Format
    from tunewright.evaluation.learning_curve import CurveResult
    from tunewright.evaluation.measure import AdviseResult, EvaluateResult, Measurement
    from tunewright.evaluation.scaling import ScaleResult
    from tunewright.models.fit.plan import Plan
    from tunewright.serving.service import Service
    from tunewright.training.lengths import LengthReport
    from tunewright.training.sweep import SweepResult
    from tunewright.training.train import TrainResult

REPORT_FILE = "report.html"
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


@dataclass(frozen=True)
class SuspectsResult:
    """The rows of a version most likely wrong, the worst first."""

    version: DatasetVersion
    suspects: list[Suspect]
    judged_by: str | None
    """Whose losses ranked the answers, in words; None where no losses did."""

    def as_dict(self) -> dict[str, Any]:
        """The suspects as ``--json`` prints them."""
        return {
            "version": self.version.digest,
            "judged_by": self.judged_by,
            "suspects": [suspect.as_dict() for suspect in self.suspects],
        }


class Road:
    """A project and the steps that it can take."""

    def __init__(self, root: str | Path, reporter: Reporter | None = None) -> None:
        self.project = Project(Path(root))
        self.reporter: Reporter = reporter or LogReporter()

    @cached_property
    def base(self) -> Base:
        """The recipe's base, found, fetched and checked."""
        recipe = self.project.recipe
        return resolve_base(recipe.base, recipe.revision, self.project.root, self.reporter)

    @cached_property
    def chat(self) -> ChatFormat:
        """How conversations become tokens here."""
        from tunewright.chat import open_chat

        return open_chat(self.base, self.project.recipe.chat, self.reporter)

    def add(
        self,
        files: Iterable[str | Path],
        *,
        rows: str | None = None,
        input_column: str | None = None,
        output_column: str | None = None,
        skip_bad: bool = False,
        redact: bool = False,
        accept_conflicts: bool = False,
        presidio: str | None = None,
        message: str = "",
    ) -> AddResult:
        """Add files of pairs to the dataset: a new version, unless nothing in them is new.

        ``rows``, ``input_column`` and ``output_column`` take the place of the recipe's data.rows, data.input and
        data.output; ``accept_conflicts`` keeps inputs with different outputs, as data.conflicts: accept does;
        ``presidio`` names a spaCy model to look for names and places with.
        """
        paths = [Path(f) for f in files]
        data = self._mapped(paths, rows, input_column, output_column)
        if accept_conflicts:
            data = data.model_copy(update={"conflicts": "accept"})
        project = Project(self.project.root, self.project.recipe.model_copy(update={"data": data}))
        return add(project, paths, self.reporter, skip_bad=skip_bad, redact=redact, presidio=presidio, message=message)

    def _mapped(self, paths: Sequence[Path], rows: str | None, input_: str | None, output: str | None) -> DataRecipe:
        """The recipe's data section with a command's options in it.

        Raises:
            UserError: an option that is empty, or that no file has a use for.
        """
        data = self.project.recipe.data
        options = {"rows": rows, "input": input_, "output": output}
        given = {key: option for key, option in options.items() if option is not None}
        empty = [key for key, option in given.items() if not option]
        if empty:
            raise UserError("it is empty", where=f"--{empty[0]}", fix="Leave it out for the recipe's.")
        data = data.model_copy(update=given)
        columns = [key for key in given if key != "rows"]
        if columns and not any(uses_columns(path, data) for path in paths):
            raise UserError(
                "columns are named, but no file is a CSV or another table, or has those keys",
                where="--" + "/--".join(columns),
            )
        return data

    def version(self, digest: str | None = None) -> DatasetVersion:
        """A dataset version; the current one where no digest is given."""
        return load_version(self.project.dataset, digest)

    def row(self, row: str) -> Member:
        """One row of the current version, by the beginning of its key or by ``FILE:LINE``."""
        return find_row(self.project.dataset, self.version(), row)

    def export(
        self, out: str | Path, form: Format = "chat", *, split: Split | None = None, version: str | None = None
    ) -> Exported:
        """Write a version (the current one by default), or one split of it, as a file for other tools."""
        from tunewright.data.versions.export import export

        return export(self.version(version), Path(out), form, self.reporter, split=split)

    def leak(self) -> LeakReport:
        """How near held-out rows are to training rows, and how near a random split would have brought them."""
        from tunewright.data.neighbours.leak import leak

        return leak(self.version(), self.project.recipe.seed, self.reporter)

    def scores_by_distance(self, report: LeakReport, evaluation: str | Path) -> list[BandScore]:
        """An evaluation's exact match by how near its items are to the training rows.

        Raises:
            UserError: there is no such evaluation, or it is of another version or of no single split.
        """
        from tunewright.data.neighbours.leak import score_by_distance

        folder = self.evaluation(evaluation)
        if load_evidence(folder).design != "held-out":
            raise UserError(
                "it is cross-fitted: its items were training rows too, and have no distance from them",
                where=str(folder),
                fix="Name an evaluation that `tunewright evaluate` made.",
            )
        return score_by_distance(load_items(folder), report)

    def contamination(self, files: Iterable[str | Path] = ()) -> Contamination:
        """Training rows that hold a test input, an item of the recipe's benchmarks, or one of these files."""
        from tunewright.data.neighbours.contamination import contamination

        return contamination(self.project, self.version(), [Path(f) for f in files], self.reporter)

    def check_files(
        self,
        files: Iterable[str | Path],
        *,
        rows: str | None = None,
        input_column: str | None = None,
        output_column: str | None = None,
    ) -> FileCheck:
        """All faults of all rows of files of pairs, before they are added; options as for ``add``."""
        from tunewright.data.formats.file_check import check_files

        paths = [Path(f) for f in files]
        return check_files(paths, self._mapped(paths, rows, input_column, output_column), self.reporter)

    def fix_file(
        self,
        file: str | Path,
        out: str | Path,
        *,
        rows: str | None = None,
        input_column: str | None = None,
        output_column: str | None = None,
    ) -> list[Change]:
        """Write a corrected copy of a file of pairs, and list each change; options as for ``add``."""
        from tunewright.data.formats import source_size
        from tunewright.data.formats.file_check import fix_file

        data = self._mapped([Path(file)], rows, input_column, output_column)
        with self.reporter.task("correcting", source_size(Path(file)), "bytes") as task:
            return fix_file(Path(file), Path(out), data, task)

    def check(self) -> LengthReport:
        """Encode every row of the current version as training would, and measure."""
        from tunewright.models.loading import context_length
        from tunewright.training.lengths import measure_lengths

        limit = min(self.project.recipe.train.max_length, context_length(self.base))
        return measure_lengths(self.chat, self.base.spec, self.version(), limit, self.reporter)

    def advise(self) -> AdviseResult:
        """Measure the prompting arms on the dev split with the untuned base."""
        return self._measurement().advise()

    def train(self, *, force: bool = False) -> TrainResult:
        """Train the recipe's adapter on the current version, or find the one already trained.

        Fewer than 50 training pairs are refused; with ``force`` that is a warning, and the adapter's lineage says so.
        """
        self._refuse_up_front()
        return self._train(self._forced(force))

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
            rates: to try (None: three around what suits the base's size, one of which is the recipe's own).
            write: put the winner's values into tunewright.yaml.
            force: as in :meth:`train`.

        Returns:
            What the sweep came to, and the keys of the train section that were written.

        Raises:
            UserError: a budget that is none or too small for one trial, or rates that are none.
        """
        from tunewright.project import RECIPE_FILE
        from tunewright.recipe_edit import write_train
        from tunewright.training.sweep import Sweep

        if minutes is not None and not minutes > 0:
            raise UserError(f"{minutes:g} minutes are no time", where="--minutes")
        self._refuse_up_front()
        forced = self._forced(force)
        facts = {"forced": forced} if forced else {}
        sweep = Sweep(self.project, self.version(), self.base, self.chat, self.reporter, rates=rates, facts=facts)
        result = sweep.run(minutes)
        written: dict[str, Any] = {}
        if write and result.winner is not None:
            written = write_train(self.project.root / RECIPE_FILE, result.winner.train)
            if not written:
                self.reporter.say("tunewright.yaml has the winner's values already.")
        elif write:
            self.reporter.warn("Nothing is written to tunewright.yaml: there is no winner.")
        return result, written

    def curve(self, *, seeds: int = SEEDS, force: bool = False) -> CurveResult:
        """Train on parts of the training rows with several seeds, to see on dev whether more rows would help.

        The plot lies beside the result, as curve.svg. ``force`` as in :meth:`train`.
        """
        from tunewright.disk import write_text
        from tunewright.evaluation.learning_curve import LearningCurve
        from tunewright.report.plots import curve_plot

        if seeds < 2:
            raise UserError(
                f"{seeds} seed", where="--seeds", fix="Two are the fewest: one cannot show how much is luck."
            )
        self._refuse_up_front()
        version, chat = self.version(), self.chat
        result = LearningCurve(self.project, version, self.base, chat, self.reporter, seeds=seeds, force=force).run()
        write_text(result.folder / CURVE_PLOT, curve_plot(result.curve))
        return result

    def crossfit(self, *, folds: int = FOLDS, force: bool = False) -> EvaluateResult:
        """Evaluate the recipe on every row of the current version, in folds: for sets too small to hold a test out.

        ``force`` as in :meth:`train`.
        """
        from tunewright.evaluation.crossfit import CrossFit

        if folds < 2:
            raise UserError(f"{folds} folds", where="--folds", fix="Two are the fewest; five are usual.")
        self._refuse_up_front()
        version, chat = self.version(), self.chat
        return CrossFit(self.project, version, self.base, chat, self.reporter, folds=folds, force=force).run()

    def evaluate(self, adapter: str | None = None) -> EvaluateResult:
        """Compare an adapter (the newest by default) with zero-shot and the best prompting arm on the test split."""
        tuned = find_adapter(self.project.adapters, adapter)
        require_fit(tuned, self.base, self.chat)
        # Keys that there were not yet when it was trained had the effect of their defaults.
        trained_by = TrainRecipe().deciding() | tuned.lineage["recipe"]["train"]
        if any(trained_by[key] != value for key, value in self.project.recipe.train.deciding().items()):
            self.reporter.warn(
                f"The recipe's train section has changed since {tuned.name} was trained, and that adapter is evaluated "
                "as it is; `tunewright train` makes one by the recipe."
            )
        measurement = self._measurement(tuned)
        _require_version(tuned, measurement.version)
        return measurement.evaluate(tuned, measurement.advise().advice)

    def scale(self, adapter: str | None = None, factors: Sequence[float] | None = None) -> ScaleResult:
        """Measure an adapter (the newest by default) at several scales, and store it at the one that is chosen.

        Chosen is, of those that lose less than evaluate.margin on dev against the best, the one that forgets least.

        Raises:
            UserError: no such adapter, or one that does not fit, is no plain LoRA or is itself a scaled one.
        """
        from tunewright.evaluation.forgetting import ForgettingMeter
        from tunewright.evaluation.scaling import FACTORS, scale

        tuned = find_adapter(self.project.adapters, adapter)
        require_fit(tuned, self.base, self.chat)
        require_batchable(tuned.folder)
        measurement = self._measurement(tuned)
        _require_version(tuned, measurement.version)
        meter = ForgettingMeter(self.project, measurement.version, measurement.generator)
        return scale(measurement, meter, tuned, factors or FACTORS)

    def verdict(self, evaluation: str | Path | None = None) -> Verdict:
        """Ship, don't ship or can't tell, from an evaluation's evidence alone (the newest by default)."""
        return verdict(load_evidence(self.evaluation(evaluation)))

    def report(self, evaluation: str | Path | None = None) -> Path:
        """Write an evaluation's HTML report beside its evidence (the newest by default)."""
        folder = self.evaluation(evaluation)
        evidence = load_evidence(folder)
        history: list[dict[str, Any]] = []
        if evidence.design == "held-out":  # cross-fitted evidence has each fold's dev losses itself
            adapters = {a.digest: a for a in list_adapters(self.project.adapters)}
            adapter = adapters.get(evidence.lineage["adapter"]["digest"])
            if adapter is None:
                self.reporter.warn("The evaluated adapter is no longer here: the report has no loss curve.")
            else:
                history = adapter.history
        out = folder / REPORT_FILE
        write_report(evidence, load_items(folder), history, out)
        return out

    def suspects(self, adapter: str | None = None) -> SuspectsResult:
        """The current version's rows whose answer is most likely wrong.

        Free text is ranked by each answer's loss: under cross-fitted adapters where the version has them, else the
        newest adapter that fits; or under the one that is named.

        Raises:
            UserError: an adapter is named where answers are classes, which a model of other rows judges better.
        """
        from tunewright.data.review.suspects import class_like, suspects

        version = self.version()
        losses = None
        if class_like([m.example.output.strip() for m in version.domain]):
            if adapter is not None:
                raise UserError(
                    "the answers are classes: a model of other rows judges them, and no adapter is used",
                    where="--adapter",
                    fix="Leave it out.",
                )
        elif adapter is not None or list_adapters(self.project.fold_adapters) or list_adapters(self.project.adapters):
            from tunewright.evaluation.losses import row_losses

            losses = row_losses(self.project, version, self.base, self.chat, self.reporter, adapter)
        found = suspects(version, self.reporter, losses=losses.by_key if losses else None)
        return SuspectsResult(version, found, losses.judged_by if losses else None)

    def fit(
        self,
        *,
        gpu: str | None = None,
        base: str | None = None,
        rows: int | None = None,
        length: int | None = None,
        shared: int = 0,
        answer: int | None = None,
    ) -> Plan:
        """What training needs of memory, by part, and what fits: from the base's config.json alone.

        Args:
            gpu: a card's memory, such as 24GB (None: of the card present, or of this machine).
            base: another base than the project's; then no project is needed, and without one the defaults hold.
            rows, length: the micro-batch to tell of (None: the recipe's).
            shared: tokens that all rows begin with.
            answer: trained tokens of each row (None: all but the shared).

        Raises:
            UserError: no such base or size, or more shared and trained tokens than a row has.
        """
        from tunewright.models.bases import base_config
        from tunewright.models.fit.plan import memory_at_hand, plan
        from tunewright.models.fit.shape import read_shape

        memory = memory_at_hand(gpu)
        alone = base is not None and not self.project.has_recipe
        recipe = Recipe() if alone else self.project.recipe
        if alone:
            self.reporter.say("There is no project here: the recipe's defaults hold.")
        spec, revision = (recipe.base, recipe.revision) if base is None else (base, None)
        settings = recipe.train
        if settings.dora:
            self.reporter.warn("DoRA takes more than is told here: what it needs beyond LoRA is not counted.")
        rows = rows or settings.micro_batch or settings.batch_size
        length = length or settings.max_length
        if shared + (answer or 1) > length:
            raise UserError(
                f"{shared:,} shared and {answer or 1:,} trained tokens are more than a row's {length:,}",
                where="--length",
                fix="Raise it, or lower --shared or --answer.",
            )
        shape = read_shape(base_config(spec, revision, self.project.root, self.reporter))
        answer = answer or length
        return plan(spec, shape, settings, memory, rows=rows, length=length, shared=shared, answer=answer)

    def run(self, *, force: bool = False) -> RunResult:
        """Go the whole road; a stage whose inputs have not changed is found done. ``force`` as in :meth:`train`."""
        sources = self.project.recipe.data.sources
        require_trackers(self.project.recipe.train.report_to)
        if not sources:
            raise UserError(
                "the recipe names no sources of pairs",
                where="data.sources",
                fix="List your files there, e.g. sources: [pairs.jsonl]",
            )
        added = self.add([self.project.root / source for source in sources])
        self._stage("data", added.created, f"version {added.version.digest[:12]}")
        self._refuse_up_front()
        forced = self._forced(force)
        advised = self.advise()
        self._stage("advise", advised.measured, f"best prompting arm on dev: {advised.advice.best}")
        trained = self._train(forced)
        self._stage("train", trained.trained, trained.adapter.name)
        evaluated = self.evaluate(trained.adapter.name)
        self._stage("evaluate", evaluated.evaluated, f"evidence {evaluated.evidence.id}")
        decision = verdict(evaluated.evidence)
        report = self.report(evaluated.folder)
        return RunResult(added, advised, trained, evaluated, decision, report)

    def serve(self, adapters: Sequence[str] = (), *, host: str | None = None, port: int | None = None) -> Service:
        """A server for the base and adapters (all that fit the base by default), loaded but not yet started.

        ``NAME@step-N`` is an adapter's earlier checkpoint. Adapters that are named decide how the base is held (as
        they were trained on it), unless ``serve.quantize`` does; else the recipe decides.

        Raises:
            UserError: a named adapter that does not fit, or that cannot be served together with the others.
        """
        from tunewright.serving.service import Service

        recipe = self.project.recipe
        folders: dict[str, Path] = {}
        named: list[Adapter] = []
        for name in adapters:
            adapter_name, _, step = name.partition("@")
            adapter = find_adapter(self.project.adapters, adapter_name)
            require_fit(adapter, self.base, self.chat)
            require_batchable(adapter.folder)
            named.append(adapter)
            if step:
                folders[f"{adapter.name}@{step}"] = adapter.checkpoint(step)
            else:
                folders[adapter.name] = adapter.folder
        held = recipe.serve.quantize or (trained_quantize(named) if named else recipe.train.quantize)
        if not adapters:
            folders = {adapter.name: adapter.folder for adapter in self._all_that_fit(held)}
        return Service(recipe, self.base, self.chat, held, folders, self.reporter, host=host, port=port)

    def _all_that_fit(self, held: Quantize) -> Iterator[Adapter]:
        """The adapters that can be served on the base held so; the others are named in warnings."""
        recipe = self.project.recipe
        for adapter in list_adapters(self.project.adapters):
            try:
                require_fit(adapter, self.base, self.chat)
                require_batchable(adapter.folder)
                trained = trained_quantize([adapter])
                if recipe.serve.quantize is None and trained != held:
                    raise UserError(
                        f"it was trained with train.quantize {trained}, and the base is held with {held}; name it to "
                        "serve it, or set serve.quantize"
                    )
            except UserError as error:
                self.reporter.warn(f"{adapter.name} is not served: {error.what}")
                continue
            yield adapter

    def evaluation(self, evaluation: str | Path | None = None) -> Path:
        """An evaluation's folder: as given (ID, folder or evidence file), else the newest.

        Raises:
            UserError: there is none.
        """
        return find_evaluation(self.project.evaluations, evaluation)

    def _refuse_up_front(self) -> None:
        """What no training by this recipe could end well with, before a base is fetched or anything measured."""
        settings = self.project.recipe.train
        require_servable(settings)
        require_bitsandbytes(settings.quantize, "train.quantize")

    def _forced(self, force: bool) -> str | None:
        from tunewright.training.few import forced_below

        return forced_below(len(self.version().domain_of("train")), force=force, reporter=self.reporter)

    def _train(self, forced: str | None) -> TrainResult:
        from tunewright.training.train import train

        facts = {"forced": forced} if forced else {}
        return train(self.project, self.version(), self.base, self.chat, self.reporter, facts=facts)

    def _measurement(self, adapter: Adapter | None = None) -> Measurement:
        """The arms on the base as ``adapter`` was trained on it, or will be by the recipe; or as the recipe says."""
        from tunewright.evaluation.generations import Generator
        from tunewright.evaluation.measure import Measurement

        recipe = self.project.recipe
        version = self.version()
        trained = recipe.train.quantize if adapter is None else trained_quantize([adapter])
        generator = Generator(
            self.base,
            self.chat,
            recipe.train.dtype,
            recipe.evaluate.quantize or trained,
            recipe.evaluate.batch_size,
            self.project.work,
            self.reporter,
        )
        return Measurement(self.project, version, generator, self.reporter)

    def _stage(self, name: str, done_now: bool, what: str) -> None:
        self.reporter.say(f"{name}: {'done' if done_now else 'unchanged'}, {what}")


def _require_version(adapter: Adapter, version: DatasetVersion) -> None:
    trained_on = adapter.lineage["dataset"]["digest"]
    if trained_on != version.digest:
        raise UserError(
            f"{adapter.name} was trained on dataset version {trained_on[:12]}, the current one is "
            f"{version.digest[:12]}: rows that it trained on may be held out there",
            fix="Train on the current version first: tunewright train",
        )
