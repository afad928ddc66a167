"""All suites of the config's regressions section, measured with an adapter off and on, for the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import Adapter
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.io import digest, write_json
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.benchmarks.bench import Bench, OpenSuite
from tunewright.evaluation.benchmarks.choices import ChoicesSuite
from tunewright.evaluation.benchmarks.instructions import InstructionsSuite
from tunewright.evaluation.benchmarks.lm_eval import LmEvalSuite
from tunewright.evaluation.benchmarks.samples import SamplesSuite
from tunewright.evidence.benchmarks import Benchmarks, RegressionResult, Suite, standing
from tunewright.evidence.files import evidence_on


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of measuring the suites."""

    adapter: Adapter
    benchmarks: Benchmarks
    measured: bool
    """False when the same suites had already been measured."""
    folder: Path | None
    """The evaluation whose evidence holds the section; None if the adapter has not been evaluated yet."""

    @property
    def standing(self) -> RegressionResult:
        """True if the adapter is worse at what the base could do."""
        return standing(self.benchmarks)


def open_suites(project: ProjectFolder) -> list[OpenSuite]:
    """Return the config's suites with their items read; nothing is loaded or measured."""
    settings, root, seed = project.config.regressions, project.root, project.config.seed
    if not settings.measures:
        raise UserError(
            "The config has no suite", where="regressions", fix="Set regressions.samples, or list files of items."
        )
    suites: list[OpenSuite] = [SamplesSuite(settings.samples, settings.samples_margin)] if settings.samples else []
    suites += [ChoicesSuite(s, root, s.margin or settings.margin, seed) for s in settings.multiple_choice]
    suites += [InstructionsSuite(s, root, s.margin or settings.margin, seed) for s in settings.instruction_following]
    suites += [LmEvalSuite(s, root, s.margin or settings.margin) for s in settings.lm_eval]
    names = [suite.name for suite in suites]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"Two suites have the name {twice}", where="regressions", fix="Rename one of the files.")
    return suites


def measure_suites(arm_runner: ArmRunner, adapter: Adapter, suites: Sequence[OpenSuite]) -> tuple[Benchmarks, bool]:
    """Measure the suites with the adapter off and on, or read their measurement; True if anything was measured."""
    project, generator = arm_runner.project, arm_runner.generator
    identity = digest(
        {
            "suites": [suite.identity for suite in suites],
            "adapter": adapter.digest,
            "base": generator.base.digest,
            "template": generator.chat.digest,
            "weights": generator.inputs,
            "dataset": arm_runner.version.digest,
            "seed": project.config.seed,
            "dedup_threshold": project.config.data.dedup_threshold,
        }
    )[:12]
    file = project.work / "regressions" / f"{identity}.json"
    if file.exists():
        return Benchmarks.model_validate_json(file.read_text(encoding="utf-8")), False
    bench = Bench(project, arm_runner.version, generator, adapter, arm_runner.reporter)
    benchmarks = _measured(bench, suites, identity)
    write_json(file, benchmarks.model_dump(mode="json"))
    return benchmarks, True


def measure_benchmarks(arm_runner: ArmRunner, adapter: Adapter, suites: Sequence[OpenSuite]) -> BenchmarkResult:
    """Measure the suites, and add them to the newest held-out evidence on this adapter."""
    project = arm_runner.project
    benchmarks, measured = measure_suites(arm_runner, adapter, suites)
    access_log = AccessLog(project.evaluations)
    access_log.require_all()
    evidence = evidence_on(project.evaluations, adapter.digest, arm_runner.reporter)
    folder = None if evidence is None else project.evaluations / evidence.id
    if folder is not None and access_log.load(folder).regressions != benchmarks:
        access_log.amend(folder, regressions=benchmarks)
    return BenchmarkResult(adapter, benchmarks, measured, folder)


def _measured(bench: Bench, suites: Sequence[OpenSuite], identity: str) -> Benchmarks:
    for suite in suites:
        bench.reporter.say(suite.expected())
    measured: list[Suite] = []
    not_measured: list[str] = []
    for suite in suites:
        try:
            measured.append(suite.measure(bench))
        except UserError as error:
            if suite.margin is not None:  # it decides: without it there is no result
                raise
            reason = f"{suite.name}: {error.what}"
            bench.reporter.warn(f"Not measured: {reason}")
            not_measured.append(reason)
    generator = bench.generator
    return Benchmarks(
        id=identity,
        adapter=bench.adapter.digest,
        suites=tuple(measured),
        not_measured=tuple(not_measured),
        lineage={
            "created": now(),
            "base": {"spec": generator.base.spec, "digest": generator.base.digest},
            "template_digest": generator.chat.digest,
            "weights": generator.weights,
            "engine": generator.used.model_dump(mode="json"),
            "seed": bench.seed,
            "suites": {suite.name: suite.identity for suite in suites},
            "packages": packages(generator.quantization),
        },
    )
