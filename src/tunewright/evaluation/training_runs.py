"""Training runs in progress and finished, sweeps and learning curves, from the files that training writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunewright.adapters.registry import HISTORY, Adapter, list_adapters, read_history
from tunewright.config import MetricName, metric_name
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.locks import is_locked
from tunewright.evidence.learning_curve import CURVE_FILE, Curve, load_curve
from tunewright.training.history import COMMAND, Evaluation, best_evaluation, evaluations, read_dev_answers

if TYPE_CHECKING:
    from tunewright.training.sweep.ledger import Ledger

_OF_SWEEP = ":"
"""Between a sweep's ID and its trial in the name of a run."""
_ID_LENGTH = 12
_ABSENT = "not set"


@dataclass(frozen=True)
class TrainingRun:
    """A training run: an unfinished one in its working folder, or a stored adapter."""

    name: str
    """The adapter's name; of an unfinished run the name of its working folder, as ID or SWEEP:TRIAL."""
    folder: Path
    metric: MetricName | None
    """The metric of the answered dev rows; None if none were answered."""
    adapter: Adapter | None = None
    """None for an unfinished run."""

    @property
    def state(self) -> Literal["running", "stopped", "finished"]:
        """Its state; the same command resumes a stopped run."""
        if self.adapter is not None:
            return "finished"
        return "running" if is_locked(self.folder) else "stopped"

    @property
    def command(self) -> str:
        """The command that trains it, and resumes it once it is stopped."""
        if _OF_SWEEP in self.name:
            return "tunewright train --sweep"
        with suppress(FileNotFoundError):
            return f"tunewright {(self.folder / COMMAND).read_text(encoding='utf-8')}"
        return "tunewright train"

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Its rows of ``metrics.jsonl``; empty before the first step."""
        file = self.folder / HISTORY
        if not self.folder.is_dir():
            raise UserError(f"The run {self.name} was removed", fix="Choose another one on the page Train.")
        return read_history(file) if file.exists() else []

    @property
    def dev_answers(self) -> dict[int, dict[str, str]]:
        """Answers to a few dev rows by step and pair key; empty once the run has finished."""
        return read_dev_answers(self.folder)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Its evaluations on dev, in order."""
        return evaluations(self.history)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation, whose adapter is kept; None before the first."""
        found = self.evaluations
        return best_evaluation(found) if found else None


@dataclass(frozen=True)
class RunComparison:
    """Runs next to each other."""

    runs: Sequence[TrainingRun]
    differing: Mapping[str, Sequence[str]]
    """Each config key whose value differs, with the value of each run."""


class TrainingRuns:
    """A project's training runs, sweeps and learning curves."""

    def __init__(self, project: ProjectFolder) -> None:
        self._project = project

    def list(self) -> Sequence[TrainingRun]:
        """Return all runs: unfinished ones first, then adapters, newest first."""
        return [*self._unfinished(), *reversed([*_finished(self._project.adapters)])]

    @property
    def unfinished(self) -> TrainingRun | None:
        """The run in progress, else the newest stopped one, of any command."""
        found = []
        for run in self._unfinished():
            with suppress(FileNotFoundError):  # finished since it was listed
                found.append((run.state == "running", run.folder.stat().st_mtime, run.name, run))
        return max(found)[-1] if found else None

    def find(self, name: str) -> TrainingRun:
        """Return a run by its name; an unfinished run's name also finds the adapter that it became."""
        inputs = self._inputs_of(name)
        project = self._project
        for run in _finished(project.adapters, project.curve_adapters, project.fold_adapters, project.pilot_adapters):
            assert run.adapter is not None
            known = [str(run.adapter.lineage.get("inputs_digest")), *run.adapter.local.get("also_inputs", [])]
            if run.name == name or (inputs is not None and any(each.startswith(inputs) for each in known)):
                return run
        for run in self._unfinished():
            if run.name == name:
                return run
        fix = "It was removed. Choose another one on the page Train."
        raise UserError(f"There is no training run {name!r}", fix=fix)

    def compare(self, names: Sequence[str]) -> RunComparison:
        """Return runs with the values of the config that differ between them."""
        if len(names) < 2:
            raise UserError(f"Choose at least two runs (got {len(names)})", fix="Mark them on the page Train.")
        runs = [self.find(name) for name in names]
        flat = [self._settings(run) for run in runs]
        keys = sorted({key for each in flat for key in each})
        values = {key: [each.get(key, _ABSENT) for each in flat] for key in keys}
        return RunComparison(runs, {key: each for key, each in values.items() if len(set(each)) > 1})

    def sweeps(self) -> Sequence[str]:
        """Return the IDs of all sweeps, newest first."""
        return _newest(self._project.sweeps.glob("[!.]*/ledger.jsonl"))

    def sweep(self, name: str) -> Ledger:
        """Return a sweep's ledger."""
        from tunewright.training.sweep.ledger import Ledger

        return Ledger.stored(_inside(self._project.sweeps, name))

    def curves(self) -> Sequence[str]:
        """Return the IDs of all learning curves, newest first."""
        return _newest(self._project.curves.glob(f"[!.]*/{CURVE_FILE}"))

    def curve(self, name: str) -> Curve:
        """Return a learning curve."""
        return load_curve(_inside(self._project.curves, name) / CURVE_FILE)

    def _unfinished(self) -> Iterator[TrainingRun]:
        config = self._project.config
        metric = metric_name(config.evaluate.metric) if config.train.eval_max_samples != 0 else None
        work = self._project.root / ".tunewright"
        for folder in sorted((work / "training").glob("[!.]*")):
            yield TrainingRun(folder.name, folder, metric)
        for folder in sorted((work / "sweeps").glob("[!.]*/*")):
            if folder.is_dir():
                yield TrainingRun(f"{folder.parent.name}{_OF_SWEEP}{folder.name}", folder, metric)

    def _inputs_of(self, name: str) -> str | None:
        """Return the digest of the inputs of a run whose working folder had this name, or its beginning."""
        sweep, of_sweep, trial = name.partition(_OF_SWEEP)
        if not of_sweep:
            return name if len(name) == _ID_LENGTH else None
        trials = self.sweep(sweep).head.trials
        return str(trials[trial]["inputs"]) if trial in trials else None

    def _settings(self, run: TrainingRun) -> dict[str, str]:
        """Return the flat config of a run, with its base and dataset; for an unfinished run, only the known values."""
        if run.adapter is None:
            return {}
        lineage = run.adapter.lineage
        config = {name: value for name, value in lineage.get("config", {}).items() if name in {"train", "seed"}}
        known = {"base": lineage["base"]["spec"], "dataset": (run.adapter.dataset or _ABSENT)[:12]}
        return {**dict(_flat(config)), **known}


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{above}{key}.")
        else:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            yield f"{above}{key}", text


def _newest(files: Iterator[Path]) -> Sequence[str]:
    return [file.parent.name for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]


def _inside(folder: Path, name: str) -> Path:
    """Return a folder by its name, which must not lead elsewhere."""
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"Invalid ID {name!r}", where=str(folder), fix="Choose one on the page Train.")
    return folder / name


def _finished(*folders: Path) -> Iterator[TrainingRun]:
    """Yield the runs of the adapters in these folders, in order."""
    for adapter in (each for folder in folders for each in list_adapters(folder)):
        yield TrainingRun(adapter.name, adapter.folder, adapter.lineage.get("training", {}).get("metric"), adapter)
