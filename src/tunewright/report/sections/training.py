"""Sections on the training run by step, on a learning curve, and on a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tunewright.config import MetricName
from tunewright.evidence.learning_curve import Curve, more_data
from tunewright.evidence.schema import Evidence
from tunewright.metrics import axis_label, metric_label, score_text
from tunewright.render.blocks import Column, Lead, Line, Lines, Notes, Row, Section, row, table
from tunewright.training.history import best_evaluation, evaluations, pairs_loss
from tunewright.training.sweep.ledger import Ledger, measured_text


def section(evidence: Evidence, history: Sequence[dict[str, Any]]) -> Section | None:
    """Return losses and the dev metric; None for a cross-validation, whose folds have separate runs."""
    if evidence.design == "cross-fitted":
        return None
    trained = f"{evidence.train_items:,} training examples."
    if not history:
        return Section("training", "Training", (Lead(f"{trained} This adapter has no loss history."),))
    metric = _trained_by(evidence)
    caption = f"{trained} {_loss_words(history, metric)}"
    return Section("training", "Training", (replace(run_lines(history, metric), caption=caption),))


def run_lines(history: Sequence[dict[str, Any]], metric: MetricName) -> Lines:
    """Return a run by step: train and dev loss, the dev metric below, and the selected step.

    Args:
        history: the run's rows: ``step`` with ``loss`` (and ``pair_loss``, which is then drawn instead) or with
            ``epoch``, ``eval_loss`` and, if dev rows were answered, ``eval_metric``.
        metric: the metric in ``eval_metric``.
    """
    train = tuple((row["step"], loss) for row in history if (loss := pairs_loss(row)) is not None)
    evaluated = evaluations(history)
    dev = tuple((each.step, each.dev_loss) for each in evaluated)
    scores = tuple((each.step, 100 * each.dev_metric) for each in evaluated if each.dev_metric is not None)
    unit = ", %" if axis_label(metric).endswith("%") else ""
    score = Lines("loss-score", "", (Line("dev score", scores, "tuned", dots=True),), f"dev score{unit}")
    return Lines(
        "loss",
        "Training and dev loss, and the score on dev, by optimizer step",
        (Line("train", train), Line("dev", dev, "tuned", dots=True)),
        "loss (nats per token)",
        below="optimizer step",
        mark=(best_evaluation(evaluated).step, "kept") if evaluated else None,
        lower=score if scores else None,
    )


def _trained_by(evidence: Evidence) -> MetricName:
    """Return the metric that selected the checkpoint, or the evaluation's metric if the lineage has none."""
    training = evidence.lineage.get("adapter", {}).get("lineage", {}).get("training", {})
    metric: MetricName = training.get("metric") or evidence.metric
    return metric


def _loss_words(history: Sequence[dict[str, Any]], metric: MetricName) -> str:
    evaluated = evaluations(history)
    if not evaluated:
        return "No dev loss was measured during training."
    lowest, kept = min(evaluated, key=lambda e: e.dev_loss), best_evaluation(evaluated)
    words = f"Dev loss was lowest at step {lowest.step:,} ({lowest.dev_loss:.3f}) and "
    words += f"{evaluated[-1].dev_loss:.3f} at the end. The adapter of step {kept.step:,} was kept"
    if kept.dev_metric is None:
        return f"{words}, by the dev loss."
    return f"{words}, by its {metric_label(metric)} on dev: {score_text(metric, kept.dev_metric)}."


def curve_section(curve: Curve) -> Section:
    """Return the answer, and the scores on dev by share of the training rows and seed."""
    seeds = (f"Seed {seed}" for seed in curve.seeds)
    head: tuple[str | Column, ...] = (Column("Share"), "Training rows", *seeds, "Mean", "Dev loss")
    return Section(
        "more-data",
        "Would more data help?",
        (
            Notes(more_data(curve).reasons),
            Lead(
                f"{curve.items:,} dev items in {curve.clusters:,} clusters, answered after training on nested parts of "
                "the rows."
            ),
            table("Table of scores by share and seed", head, (_share_row(curve, share) for share in curve.shares)),
            curve_lines(curve),
        ),
    )


def curve_lines(curve: Curve) -> Lines:
    """Return the mean score by training rows, and each training's."""
    means = tuple((fmean(p.rows for p in curve.points if p.share == s), 100 * curve.mean(s)) for s in curve.shares)
    measured = sorted((p.rows, 100 * p.score, p.seed) for p in curve.points)
    trainings = (
        Line(f"seed {seed}", tuple((rows, score) for rows, score, s in measured if s == seed), dots=True, joined=False)
        for seed in curve.seeds
    )
    return Lines(
        f"curve-{curve.id}",
        f"Score on {curve.items} dev items by training rows",
        (Line(f"mean of {len(curve.seeds)} seeds", means, "tuned"), *trainings),
        axis_label(curve.metric),
        below="training rows",
        bounds=(0, 100),
        doubling=True,
        caption=f"Each point is an adapter trained on a part of the rows; {curve.method}.",
    )


def _share_row(curve: Curve, share: float) -> Row:
    points = {point.seed: point for point in curve.points if point.share == share}
    rows = sorted({point.rows for point in points.values()})
    scores = (score_text(curve.metric, points[seed].score) if seed in points else "" for seed in curve.seeds)
    loss = sum(point.dev_loss for point in points.values()) / len(points)
    return row(
        f"{share:.0%}",
        " to ".join(f"{count:,}" for count in dict.fromkeys((rows[0], rows[-1]))),
        *scores,
        score_text(curve.metric, curve.mean(share)),
        f"{loss:.3f}",
    )


def sweep_section(ledger: Ledger) -> Section:
    """Return each trial's dev result at each rung, and its outcome."""
    head = ledger.head
    lead = (
        f"Sweep {head.sweep}: {len(head.trials)} trials of at most {head.steps:,} steps, compared on the dev split; "
        "the test split stays closed."
    )
    rungs = (f"Rung {number}: step {step:,}" for number, step in enumerate(head.rungs, start=1))
    names: tuple[str | Column, ...] = ("Trial", *rungs, Column("Outcome", words=True))
    trials = table("Table of trials", names, (_trial_row(ledger, trial) for trial in head.trials))
    return Section("trials", "Trials", (Lead(lead), trials, sweep_lines(ledger)))


def _trial_row(ledger: Ledger, trial: str) -> Row:
    found = (ledger.result(trial, number) for number in range(1, len(ledger.head.rungs) + 1))
    results = ("" if entry is None else measured_text(entry, ledger.head.metric) for entry in found)
    return row(trial, *results, ledger.outcome(trial))


def sweep_lines(ledger: Ledger) -> Lines:
    """Return the dev score of each trial at each rung, or the dev loss if no dev rows were answered."""
    head = ledger.head
    found = []
    for name in head.trials:
        results = [ledger.result(name, number) for number in range(1, len(head.rungs) + 1)]
        values = [(each.step, each.dev_loss if head.metric is None else each.dev_metric) for each in results if each]
        scale = 1 if head.metric is None else 100
        points = tuple((step, scale * value) for step, value in values if value is not None)
        found.append(Line(name, points, dots=True))
    axis = "Dev loss" if head.metric is None else f"Dev: {axis_label(head.metric)}"
    bounds = None if head.metric is None else (0.0, 100.0)
    return Lines("trials", f"{axis} of each trial by step", tuple(found), axis, bounds=bounds)
