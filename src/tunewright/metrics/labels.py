"""Scores, differences and p-values in readable form."""

from __future__ import annotations

from tunewright.config import MetricName

_SHARES = {
    "exact_match": "exact match",
    "choices": "accuracy",
    "json_valid": "valid JSON",
    "regex": "valid format",
    "call_exact_match": "call exact match",
    "call_ast_match": "call AST match",
    "call_name_match": "call name match",
    "call_schema_valid": "valid calls",
    "irrelevance_detection": "irrelevance detection",
}
_SCORES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "token_f1": "token F1",
    "json": "field F1",
    "call_argument_f1": "argument F1",
}


def metric_label(metric: MetricName) -> str:
    """Return the metric's label in tables: ``exact match``, ``BLEU``, ``field F1 (name,date)``."""
    kind, _, settings = metric.partition(" ")
    if kind == "python":
        return settings.partition(":")[2]
    label = (_SHARES | _SCORES)[kind]
    return f"{label} ({settings})" if settings else label


def axis_label(metric: MetricName) -> str:
    """Return the metric with its unit: ``exact match, %``, ``corpus BLEU``."""
    kind = metric.partition(" ")[0]
    if kind in _SHARES:
        return f"{metric_label(metric)}, %"
    return f"corpus {metric_label(metric)}" if kind in {"bleu", "chrf"} else f"{metric_label(metric)}, of 100"


def score_text(metric: MetricName, share: float) -> str:
    """Return a score in readable form: ``86.0%``, ``BLEU 43.2``, ``citation 71.0`` (for a function of that name)."""
    kind = metric.partition(" ")[0]
    if kind in _SHARES:
        return f"{100 * share:.1f}%"
    label = _SCORES.get(kind) or metric_label(metric)
    return f"{label} {100 * share:.1f}"


def points_text(difference: float) -> str:
    """Return a difference of shares in points, with its sign: ``+35.0``."""
    # Adding zero turns a rounded -0.0 into +0.0.
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def p_text(p_value: float) -> str:
    """Return a p-value in readable form: ``p = 0.031``, ``p = 2e-05``, ``p < 1e-15``."""
    if p_value < 1e-15:
        return "p < 1e-15"
    return f"p = {p_value:.0e}" if p_value < 0.001 else f"p = {p_value:.3f}"
