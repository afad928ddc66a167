"""The config's regression suites, measured with an adapter off and on; and the tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from tunewright.adapters.lineage import packages
from tunewright.adapters.registry import Adapter
from tunewright.config.evaluate import LmEvalSuite as Settings
from tunewright.config.evaluate import RegressionsConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.clock import now
from tunewright.core.errors import UserError
from tunewright.core.installation import install_command
from tunewright.core.io import digest, write_json
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.benchmarks.bench import Bench, OpenSuite, above_chance, expected_text, suite_of
from tunewright.evaluation.benchmarks.instructions import InstructionsSuite
from tunewright.evaluation.benchmarks.likelihoods import ChoicesSuite, SamplesSuite
from tunewright.evidence.benchmarks import Benchmarks, RegressionResult, Suite, standing
from tunewright.evidence.files import evidence_on
from tunewright.models.loading import load_tokenizer


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
        """True if the adapter is worse at the base's abilities."""
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


def suite_names(config: RegressionsConfig) -> list[str]:
    """Return the names of the config's suites; no file is read."""
    files = (*config.multiple_choice, *config.instruction_following)
    own = [SamplesSuite.name] if config.samples else []
    return [*own, *(Path(suite.file).stem for suite in files), *(suite.task for suite in config.lm_eval)]


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
        began = monotonic()
        try:
            measured.append(suite.measure(bench))
            bench.generator.speeds.add_suite(suite.name, monotonic() - began)
        except UserError as error:
            if suite.margin is not None:  # this suite decides: without it there is no result
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


# Tasks of EleutherAI's lm-evaluation-harness as suites, through its Python API


_ENGINE = "lm-eval-2"
_BATCH = 16
_PREFERRED = "acc_norm"


class LmEvalSuite:
    """A task or a group of tasks; an item scores what lm-eval gives it, as a share.

    No chat template is used, as by default in lm-eval. Its own cache is not used: it does not distinguish adapters.
    """

    def __init__(self, settings: Settings, root: Path, margin: float) -> None:
        if find_spec("lm_eval") is None:
            raise UserError(
                f"The task {settings.task} requires lm-eval, which is not installed",
                where="regressions.lm_eval",
                fix=install_command("lm-eval"),
            )
        from lm_eval.tasks import TaskManager

        self.settings = settings
        self.name = settings.task
        self.margin = margin
        self.tasks = TaskManager(
            include_path=None if settings.include_path is None else str(root / settings.include_path)
        )
        if settings.task not in self.tasks.all_tasks:
            raise UserError(
                f"lm-eval has no task {settings.task!r}",
                where="regressions.lm_eval",
                fix="List the tasks with `lm-eval ls tasks`. For your own tasks set the suite's `include_path`.",
            )
        self.identity: dict[str, Any] = {
            "engine": _ENGINE,
            "lm_eval": version("lm_eval"),
            "settings": settings.model_dump(mode="json"),
            "margin": margin,
        }

    def expected(self) -> str:
        """Return a message on the number of items that the margin requires, if the task's size is known."""
        if self.settings.limit is None:
            return f"{self.name}: all items of the task, against a margin of {100 * self.margin:g} points."
        return expected_text(self.name, self.settings.limit, self.margin)

    def measure(self, bench: Bench) -> Suite:
        """Measure the task with the adapter off and on; the control is that the base is above guessing."""
        off = self._measured(bench, None, "adapter off")
        on = self._measured(bench, bench.adapter, "adapter on")
        assert off["scores"].keys() == on["scores"].keys(), "the same items"
        names = list(off["scores"])
        base, tuned = (np.array([given["scores"][name] for name in names], dtype=np.float64) for given in (off, on))
        clusters = bench.clusters(self.name, [off["texts"][name] for name in names], [None] * len(names))
        return suite_of(
            name=self.name,
            kind="lm_eval",
            metric=off["metric"],
            base=base,
            tuned=tuned,
            clusters=clusters,
            margin=self.margin,
            controls=[above_chance(base, clusters, off["chance"], self.margin)],
            seed=bench.seed,
        )

    def _measured(self, bench: Bench, adapter: Adapter | None, what: str) -> dict[str, Any]:
        """Return each item's score and text by its name, the metric, and the average score of guessing."""
        kept = bench.kept(_ENGINE, adapter, **self.identity)
        if not kept.known:
            with bench.reporter.task(f"{self.name}, {what}", 1, "runs of lm-eval") as task:
                samples, metric = self._run(bench, adapter)
                kept.add(
                    {
                        "scores": {name: self._share(sample, metric) for name, sample in samples.items()},
                        "texts": {name: _asked(sample) for name, sample in samples.items()},
                        "metric": metric,
                        "chance": float(np.mean([_chance(sample) for sample in samples.values()])),
                    }
                )
                task.advance()
        return kept.known

    def _run(self, bench: Bench, adapter: Adapter | None) -> tuple[dict[str, dict[str, Any]], str]:
        """Return lm-eval's log of each item, by task and item number, and the metric to use."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # A separate tokenizer, since lm-eval sets padding on it.
        tokenizer = load_tokenizer(bench.generator.base)
        with bench.generator.answering(adapter) as model, redirect_stdout(sys.stderr):
            try:
                results = simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
                    tasks=[self.settings.task],
                    num_fewshot=self.settings.num_fewshot,
                    limit=self.settings.limit,
                    task_manager=self.tasks,
                    log_samples=True,
                    bootstrap_iters=0,
                    random_seed=bench.seed,
                    numpy_random_seed=bench.seed,
                    torch_random_seed=bench.seed,
                    fewshot_random_seed=bench.seed,
                )
            except OSError as error:  # the hub and `datasets` also raise it if a data set cannot be fetched
                raise UserError(f"The task's data cannot be read: {error}", where=self.name) from error
        samples: dict[str, dict[str, Any]] = {}
        for name, logged in results["samples"].items():
            kind = results["configs"][name]["output_type"]
            for sample in logged:
                # An item appears once for each of the task's filters; the first filter counts.
                samples.setdefault(f"{name}/{sample['doc_id']}", {**sample, "output_type": kind})
        return samples, self._metric(samples, results)

    def _metric(self, samples: dict[str, dict[str, Any]], results: dict[str, Any]) -> str:
        known = list(dict.fromkeys(metric for sample in samples.values() for metric in sample["metrics"]))
        wanted = self.settings.metric or (_PREFERRED if _PREFERRED in known else known[0])
        if wanted not in known:
            raise UserError(
                f"The task has no metric {wanted!r}", where=self.name, fix=f"Use one of: {', '.join(known)}."
            )
        if not all(better.get(wanted, True) for better in results["higher_is_better"].values()):
            raise UserError(
                f"Lower is better for the metric {wanted}", where=self.name, fix="Use a metric where higher is better."
            )
        return wanted

    def _share(self, sample: dict[str, Any], metric: str) -> float:
        value = sample.get(metric)
        if not isinstance(value, bool | int | float | np.number) or not 0 <= float(value) <= 1:
            raise UserError(
                f"The metric {metric} must be a share from 0 to 1 for each item", where=self.name, fix="Name another."
            )
        return float(value)


def _asked(sample: dict[str, Any]) -> str:
    """Return the texts of an item's data apart from its choices: the basis of similarity between items.

    Tasks name their fields freely, and the prompt may contain other items as worked examples.
    """
    of_choices = sample["output_type"] == "multiple_choice"
    choices = {str(choice).strip() for _, choice in sample["arguments"]} if of_choices else set()
    return " ".join(text for text in _texts(sample["doc"]) if text.strip() not in choices)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _chance(sample: dict[str, Any]) -> float:
    """Return the score of guessing: one over the number of choices, or 0 for a generated answer."""
    return 1 / len(sample["filtered_resps"]) if sample["output_type"] == "multiple_choice" else 0.0
