"""Section on the training run by step, and on the benefit of more data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from tunewright.config import MetricName
from tunewright.evidence.learning_curve import Curve
from tunewright.evidence.schema import Evidence
from tunewright.metrics import metric_label, score_text
from tunewright.render.blocks import Drawing, Lead, Section
from tunewright.report.plots import curve_figure, training_plot
from tunewright.report.sections import learning_curve
from tunewright.training.checkpoint_selection import best_evaluation, evaluations


def section(evidence: Evidence, history: Sequence[dict[str, Any]]) -> Section | None:
    """Return losses and the dev metric; None for a cross-validation, whose folds have separate runs."""
    if evidence.design == "cross-fitted":
        return None
    trained = f"{evidence.train_items:,} training examples."
    if not history:
        return Section("training", "Training", (Lead(f"{trained} This adapter has no loss history."),))
    metric = _trained_by(evidence)
    title = "Training and dev loss, and the score on dev, by optimizer step"
    drawn = training_plot("loss", title, history, metric)
    return Section("training", "Training", (Drawing(Markup(drawn), f"{trained} {_loss_words(history, metric)}"),))


def curve_section(curve: Curve) -> Section:
    """Return the learning curve that was measured on the same data, with its drawing."""
    found = learning_curve.section(curve)
    caption = f"Each point is an adapter trained on a part of the rows; {curve.method}."
    return replace(found, blocks=(*found.blocks, Drawing(Markup(curve_figure("curve", curve)), caption)))


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
