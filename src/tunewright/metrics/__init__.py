"""Metrics: scorers for the config's metrics, and text for their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewright.config import EvaluateConfig, Metric, metric_name
from tunewright.config.metrics import Choices, ExactMatch, Json, Normalisation, Python, Regex
from tunewright.core.io import digest
from tunewright.metrics.calls import (
    acceptable_values,
    call_argument_f1,
    call_ast_match,
    call_exact_match,
    call_name_match,
    call_schema_valid,
    irrelevance_detection,
)
from tunewright.metrics.custom import custom_metric, file_digest, module_file
from tunewright.metrics.fields import json_fields, json_valid
from tunewright.metrics.labels import axis_label, metric_label, p_text, points_text, score_text
from tunewright.metrics.scorer import (
    ItemScore,
    Kind,
    Pair,
    Scorer,
    Scores,
    Unscored,
    check_references,
    references_of,
    score_all,
)
from tunewright.metrics.string_match import accuracy, bleu, chrf, exact_match, matches, normalised, token_f1

__all__ = [
    "ItemScore",
    "Kind",
    "Pair",
    "Scorer",
    "Scores",
    "Unscored",
    "axis_label",
    "check_references",
    "metric_inputs",
    "metric_kind",
    "metric_label",
    "normalised",
    "open_scorers",
    "p_text",
    "points_text",
    "references_of",
    "score_all",
    "score_text",
    "scorer_of",
]


def scorer_of(metric: Metric, root: Path) -> Scorer:
    """Return the scorer of a metric.

    Args:
        metric: metric of the config.
        root: the project's folder, with its custom metric functions and its rows' acceptable values.

    Raises:
        UserError: a function does not exist, or its module cannot be imported.
    """
    name = metric_name(metric)
    match metric:
        case ExactMatch(exact_match=settings):
            return exact_match(name, settings)
        case Choices(choices=choices):
            return accuracy(name, choices)
        case Json(of=settings):
            return json_fields(name, settings.fields)
        case Regex(regex=pattern):
            return matches(name, pattern)
        case Python(python=function):
            return custom_metric(name, function, root)
        case "exact_match":
            return exact_match(name, Normalisation())
        case "bleu":
            return bleu(name)
        case "chrf":
            return chrf(name)
        case "token_f1":
            return token_f1(name)
        case "json":
            return json_fields(name, None)
        case "json_valid":
            return json_valid(name)
        case "call_exact_match":
            return call_exact_match(name)
        case "call_ast_match":
            return call_ast_match(name, acceptable_values(root))
        case "call_name_match":
            return call_name_match(name)
        case "call_argument_f1":
            return call_argument_f1(name)
        case "call_schema_valid":
            return call_schema_valid(name)
        case "irrelevance_detection":
            return irrelevance_detection(name)


def metric_kind(metric: Metric) -> Kind:
    """Return the metric's kind without importing a custom function."""
    if isinstance(metric, Json) or metric in ("json", "bleu", "chrf", "call_argument_f1"):
        return "corpus"
    return "mean" if isinstance(metric, Python) or metric == "token_f1" else "right or wrong"


def open_scorers(settings: EvaluateConfig, root: Path) -> tuple[Scorer, ...]:
    """Return the scorers of the config's metrics, the deciding one first; raises as `scorer_of` does."""
    return tuple(scorer_of(metric, root) for metric in settings.metrics)


def metric_inputs(metric: Metric, root: Path) -> Any:
    """Return everything that decides a metric's scores, for digests: its config, and the file or the metadata it reads.

    Raises:
        UserError: the file does not exist.
    """
    if metric == "call_ast_match":
        return {metric: digest(acceptable_values(root))}
    if isinstance(metric, str):
        return metric
    inputs = metric.model_dump(mode="json")
    if isinstance(metric, Python):
        inputs["sha256"] = file_digest(module_file(metric.python, root))
    return inputs
