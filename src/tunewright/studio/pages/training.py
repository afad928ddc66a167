"""Training runs, live and finished, next to each other; sweeps and learning curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from starlette.responses import Response

from tunewright.advisor.training_plan import training_plan
from tunewright.config import MetricName
from tunewright.core.errors import UserError
from tunewright.core.numbers import read_numbers
from tunewright.core.progress import downsample, duration
from tunewright.data.examples import Example
from tunewright.data.versions import current_manifest
from tunewright.evaluation.training_runs import TrainingRun
from tunewright.evidence.causes import undertrained
from tunewright.evidence.learning_curve import curve_section
from tunewright.metrics import axis_label, metric_label, score_text
from tunewright.render.blocks import SERIES, Cell, Line, Lines, Table, Tone, table, words
from tunewright.report.training import run_lines, sweep_section
from tunewright.studio.visit import Handlers, Visit, in_form, path_of, positive_numbers
from tunewright.training.history import DEV_LOSS, DEV_METRIC

_LAST_STEPS = 20
_MOST_COMPARED = 8


@dataclass(frozen=True)
class _Summary:
    """A run on the list; ``fault`` names damage of its metrics."""

    run: TrainingRun
    steps: int = 0
    best: str = ""
    fault: str = ""
    number: int | None = None
    """None while it runs, and for a run of an earlier release."""


def train_page(visit: Visit) -> Response:
    """Show all runs, sweeps and learning curves, and the forms that start one."""
    runs, folder = visit.project.runs, visit.project.folder
    plan = None
    if current_manifest(folder.dataset) is not None:
        # The time of the next training is estimated from finished ones.
        trained = sorted(path.name for path in (*folder.adapters.glob("[!.]*"), *folder.pilot_adapters.glob("[!.]*")))
        plan = visit.computed(training_plan, deciding=trained)
    numbers = read_numbers(folder.adapters)
    return visit.page(
        "train.html.j2",
        "Train",
        plan=plan,
        runs=[replace(_summary(run), number=numbers.get(run.name)) for run in runs.list()],
        sweeps=runs.sweeps(),
        curves=runs.curves(),
        running=visit.jobs.running(),
        query=visit.query,
    )


def _summary(run: TrainingRun) -> _Summary:
    try:
        history = run.history
    except UserError as error:
        return _Summary(run, fault=f"{error.where}: {error.what}")
    return _Summary(run, history[-1]["step"] if history else 0, _best(run))


def _best(run: TrainingRun) -> str:
    best = run.best
    if best is None:
        return "not evaluated yet"
    score = "" if best.dev_metric is None or run.metric is None else f"{_score(run.metric, best.dev_metric)}, "
    return f"{score}dev loss {best.dev_loss:.3f} at step {best.step:,}"


def _score(metric: MetricName, value: float) -> str:
    text = score_text(metric, value)
    return f"{metric_label(metric)} {text}" if text.endswith("%") else text


_NUMBERS_OF: dict[str, dict[str, str]] = {
    "train": {},
    "sweep": {"minutes": "--minutes", "rates": "--rate"},
    "curve": {"seeds": "--seeds"},
}
"""Each kind of training, with its form's fields of numbers and the options that they become."""


def start_training(visit: Visit) -> Response:
    """Start a training, a sweep or a learning curve as a job."""
    kind = visit.chosen("kind", _NUMBERS_OF)
    words = ["train", *(() if kind == "train" else (f"--{kind}",))]
    for field, option in _NUMBERS_OF[kind].items():
        numbers = positive_numbers(visit.form, field, several=field == "rates")
        words += [word for number in numbers for word in (option, number)]
    words += ["--write"] if kind == "sweep" and "write" in visit.form else []
    return visit.start(*words)


def run_page(visit: Visit) -> Response:
    """Show a run's numbers, which grow while it runs."""
    run = visit.project.runs.find(visit.place["run"])
    if run.name != visit.place["run"]:
        return visit.go(path_of("train", "runs", run.name), "The run has finished: this is its adapter.")
    folder = visit.project.folder
    current, history = current_manifest(folder.dataset), run.history
    steps = [row for row in history if "loss" in row]
    short = None if run.adapter is None else undertrained(run.adapter.lineage, history)
    return visit.page(
        "run.html.j2",
        visit.run_name(run.name),
        run=run,
        state=run.state,
        # Curves, folds and pilots have adapters that `evaluate` does not take.
        evaluable=run.adapter is not None
        and run.adapter.folder.parent == folder.adapters
        and run.adapter.dataset is not None
        and run.adapter.dataset == (None if current is None else current.digest),
        best=_best(run) if history else "",
        short=short,
        charts=_run_charts(history, run.metric),
        evaluations=_evaluations_table(run),
        steps=_steps_table(steps[: -_LAST_STEPS - 1 : -1]),
        dev_rows=_dev_rows(visit, run),
        running=visit.jobs.running(),
    )


def _evaluations_table(run: TrainingRun) -> Table:
    head = ("Step", "Epoch", "Training loss since the last", "Dev loss", "Dev score")
    rows = []
    for each in run.evaluations:
        loss = "" if each.train_loss is None else f"{each.train_loss:.3f}"
        score = _scored(run, each.dev_metric)
        rows.append((f"{each.step:,}", f"{each.epoch:.3g}", loss, f"{each.dev_loss:.3f}", score))
    return table("Evaluations on dev", head, rows)


def _steps_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = []
    for row in steps:
        memory = "" if "memory_bytes" not in row else f"{row['memory_bytes'] / 2**30:.4g}"
        numbers = (number(row.get(key)) for key in ("loss", "learning_rate", "grad_norm", "tokens_per_s"))
        rows.append((str(row["step"]), *numbers, memory))
    return table("Last steps", ("Step", "Loss", "Learning rate", "Gradient norm", "Tokens/s", "Memory, GiB"), rows)


_NUMBERS = {
    "learning_rate": ("Learning rate × 10,000", 1e4),
    "tokens_per_s": ("Tokens per second", 1.0),
    "memory_bytes": ("Memory, GiB", 1 / 2**30),
}


def _run_charts(history: Sequence[Mapping[str, Any]], metric: MetricName | None) -> list[Lines]:
    """Return the figures of what has been measured so far; the first one is the report's."""
    charts = [_chart(title, [_line(history, key, title, scale=scale)]) for key, (title, scale) in _NUMBERS.items()]
    return [run_lines(history, metric), *(chart for chart in charts if chart.lines[0].points)] if history else []


def _comparison_charts(runs: Sequence[TrainingRun]) -> list[Lines]:
    """Return the losses of several runs, and their dev scores by each metric."""
    tones = dict(zip((run.name for run in runs), cycle(SERIES), strict=False))
    charts = [
        _chart(title, [_line(run.history, key, run.name, tones[run.name]) for run in runs])
        for key, title in (("loss", "Training loss"), (DEV_LOSS, "Dev loss"))
    ]
    for metric in dict.fromkeys(run.metric for run in runs if run.metric is not None):
        same = [run for run in runs if run.metric == metric]
        lines = [_line(run.history, DEV_METRIC, run.name, tones[run.name], scale=100) for run in same]
        charts.append(_chart(f"Dev: {axis_label(metric)}", lines))
    return charts


def _chart(axis: str, lines: Sequence[Line]) -> Lines:
    name, from_zero = re.sub("[^a-z0-9]+", "-", axis.lower()), "loss" not in axis.lower()
    return Lines(name, f"{axis} by step", tuple(lines), axis, below="optimizer step", from_zero=from_zero)


def _line(
    history: Sequence[Mapping[str, Any]], key: str, label: str, tone: Tone = "tuned", *, scale: float = 1.0
) -> Line:
    points = downsample([(float(row["step"]), scale * row[key]) for row in history if key in row])
    return Line(label, tuple(points), tone, dots=key in {DEV_LOSS, DEV_METRIC})


@dataclass(frozen=True)
class _DevRow:
    """A dev row with its answers: each step from which it has another answer."""

    key: str
    example: Example | None
    """None if the current dataset version does not have it."""
    answers: list[tuple[int, str]]


def _dev_rows(visit: Visit, run: TrainingRun) -> list[_DevRow]:
    answers = run.dev_answers
    changed: dict[str, list[tuple[int, str]]] = {}
    for step in sorted(answers):
        for key, text in answers[step].items():
            steps = changed.setdefault(key, [])
            if not steps or steps[-1][1] != text:
                steps.append((step, text))
    known = changed and current_manifest(visit.project.folder.dataset) is not None
    rows = {m.key: m.example for m in visit.version.examples("dev")} if known else {}
    return [_DevRow(key, rows.get(key), steps) for key, steps in changed.items()]


def _scored(run: TrainingRun, value: float | None) -> str:
    return "" if value is None or run.metric is None else score_text(run.metric, value)


def compare_page(visit: Visit) -> Response:
    """Show several runs on one chart, with the config keys that differ and their dev results."""
    names = [name.removeprefix("run.") for name in visit.query if name.startswith("run.")]
    if len(names) > _MOST_COMPARED:
        raise UserError(f"At most {_MOST_COMPARED} runs are compared (got {len(names)})", fix="Choose fewer.")
    found = visit.project.runs.compare(names)
    return visit.page(
        "compare_runs.html.j2",
        "Runs compared",
        runs=found.runs,
        differing=found.differing,
        settings=_settings_table(visit, found.runs, found.differing),
        evaluations=_by_step(found.runs),
        charts=_comparison_charts(found.runs),
    )


def _settings_table(visit: Visit, runs: Sequence[TrainingRun], differing: Mapping[str, Sequence[str]]) -> Table:
    """Return the runs next to each other, with the config keys that differ."""
    rows: list[tuple[str | Cell, ...]] = [
        ("Page", *(Cell(visit.run_name(run.name), link=path_of("train", "runs", run.name)) for run in runs)),
        ("State", *(run.state for run in runs)),
        ("Best evaluation", *map(_best, runs)),
        *((key, *values) for key, values in differing.items()),
    ]
    return table("Runs next to each other", words("Key", *(run.name for run in runs)), rows)


def _by_step(runs: Sequence[TrainingRun]) -> Table:
    """Return each evaluated step with each run's result; empty where a run was not evaluated."""
    texts: dict[int, list[str]] = {}
    for place, run in enumerate(runs):
        for each in run.evaluations:
            score = _scored(run, each.dev_metric)
            row = texts.setdefault(each.step, [""] * len(runs))
            row[place] = f"{score}, dev loss {each.dev_loss:.3f}" if score else f"dev loss {each.dev_loss:.3f}"
    rows = ((f"{step:,}", *row) for step, row in sorted(texts.items()))
    return table("Evaluations on dev", words("Step", *(run.name for run in runs)), rows)


def sweep_page(visit: Visit) -> Response:
    """Show each trial of a sweep at each rung, and its outcome."""
    ledger = visit.project.runs.sweep(visit.place["sweep"])
    return visit.page(
        "sweep.html.j2",
        f"Sweep {ledger.head.sweep}",
        blocks=sweep_section(ledger).blocks,
        trials=len(ledger.head.trials),
        took=duration(ledger.seconds),
    )


def curve_page(visit: Visit) -> Response:
    """Show a learning curve, and whether more rows would help."""
    curve = visit.project.runs.curve(visit.place["curve"])
    return visit.page("curve.html.j2", f"Learning curve {curve.id}", blocks=curve_section(curve).blocks)


HANDLERS: Handlers = {
    ("GET", "/train"): train_page,
    ("POST", "/train"): in_form("/train", train_page, start_training),
    ("GET", "/train/runs/{run}"): run_page,
    ("GET", "/train/compare"): in_form("/train", train_page, compare_page),
    ("GET", "/train/sweeps/{sweep}"): sweep_page,
    ("GET", "/train/curves/{curve}"): curve_page,
}
