"""Section on the training run by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunewright.config import MetricName
from tunewright.evidence.schema import Evidence
from tunewright.metrics import axis_label, metric_label, score_text
from tunewright.render.blocks import Lead, Line, Lines, Section
from tunewright.training.checkpoint_selection import best_evaluation, evaluations, pairs_loss


def section(evidence: Evidence, history: Sequence[dict[str, Any]]) -> Section | None:
    """Return losses and the dev metric; None for a cross-validation, whose folds have separate runs."""
    if evidence.design == "cross-fitted":
        return None
    trained = f"{evidence.train_items:,} training examples."
    if not history:
        return Section("training", "Training", (Lead(f"{trained} This adapter has no loss history."),))
    metric = _trained_by(evidence)
    caption = f"{trained} {_loss_words(history, metric)}"
    return Section("training", "Training", (replace(lines(history, metric), caption=caption),))


def lines(history: Sequence[dict[str, Any]], metric: MetricName) -> Lines:
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
