"""Metrics: scorers for the config's metrics, and text for their scores."""

from __future__ import annotations

import importlib.util
import sys
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from tunewright.config import EvaluateConfig, Metric, MetricName, metric_name
from tunewright.config.metrics import Choices, ExactMatch, Json, Normalisation, Python, Regex
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import digest, file_digest
from tunewright.metrics.calls import (
    acceptable_values,
    call_argument_f1,
    call_ast_match,
    call_exact_match,
    call_name_match,
    call_schema_valid,
    irrelevance_detection,
)
from tunewright.metrics.scorer import (
    AnsweredItem,
    ItemScore,
    Kind,
    Scorer,
    Scores,
    Unscored,
    check_references,
    mean_score,
    references_of,
    score_all,
)
from tunewright.metrics.texts import (
    accuracy,
    bleu,
    chrf,
    exact_match,
    json_fields,
    json_valid,
    macro_f1,
    matches,
    normalised,
    rouge_l,
    token_f1,
)

__all__ = [
    "AnsweredItem",
    "ItemScore",
    "Kind",
    "Scorer",
    "Scores",
    "Unscored",
    "axis_label",
    "check_references",
    "metric_inputs",
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
    """Return the scorer of a metric."""
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
        case "macro_f1":
            from tunewright.data.versions import load_version

            members = load_version(ProjectFolder(root).dataset).domain
            return macro_f1(name, {normalised(member.example.output) for member in members})
        case "bleu":
            return bleu(name)
        case "chrf":
            return chrf(name)
        case "token_f1":
            return token_f1(name)
        case "rouge_l":
            return rouge_l(name)
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


def open_scorers(settings: EvaluateConfig, root: Path) -> tuple[Scorer, ...]:
    """Return the scorers of the config's metrics, the deciding one first; raises as `scorer_of` does."""
    return tuple(scorer_of(metric, root) for metric in settings.metrics)


def metric_inputs(metric: Metric, root: Path) -> Any:
    """Return everything that decides a metric's scores: its config, and the file or the metadata that it reads."""
    if metric == "call_ast_match":
        return {metric: digest(acceptable_values(root))}
    if isinstance(metric, str):
        return metric
    inputs = metric.model_dump(mode="json")
    if isinstance(metric, Python):
        inputs["sha256"] = file_digest(module_file(metric.python, root))
    return inputs


# A function of the project


_RETURNS = "It returns a number from 0 to 1, or None for an item that cannot be scored."


def custom_metric(name: MetricName, function: str, root: Path) -> Scorer:
    """Return a scorer of the mean of ``function(answer, reference, example)`` over the items for which it is not None.

    If an input has several references, the function is called with each, and the item's score is the best result.
    """
    file = module_file(function, root)
    module = _load(file, function)
    call = getattr(module, function.partition(":")[2], None)
    if not callable(call):
        raise UserError(f"The module has no function {function.partition(':')[2]!r}", where=str(module.__file__))

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        try:
            value = call(pair.answer, pair.reference, pair.example)
        except Exception as error:  # a user's code can raise anything
            raise UserError(
                f"{function} raised {type(error).__name__} ({error}) for {_named(pair)}",
                where="evaluate.metric",
                fix=f"Correct {file}. For an item that it cannot score, return None.",
            ) from error
        if value is None:
            return Unscored(f"{function} returned None")
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise UserError(f"{function} returned {value!r} for {_named(pair)}", where="evaluate.metric", fix=_RETURNS)
        return mean_score(float(value))

    definition = f"the mean of {function} ({file.name}, SHA-256 {file_digest(file)[:12]})"
    return Scorer(name, "mean", definition, 2, item)


def module_file(function: str, root: Path) -> Path:
    """Return the file of ``module:function`` in the project's folder."""
    module, _, _ = function.partition(":")
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise UserError(f"No module {module!r} in the project's folder", where="evaluate.metric", fix=f"Create {file}.")
    return file


def _load(file: Path, function: str) -> ModuleType:
    root = file
    for _ in function.partition(":")[0].split("."):
        root = root.parent
    # At the end of the path: the module can import its neighbours, which hide no installed package.
    if str(root) not in sys.path:
        sys.path.append(str(root))
    # Not by its bare name: a project's `metrics.py` must not clash with an installed package or another project's.
    name = f"tunewright_project_{file_digest(file)[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code can raise anything
        del sys.modules[name]
        raise UserError(f"Importing it raised {type(error).__name__} ({error})", where=str(file)) from error
    return module


def _named(pair: AnsweredItem) -> str:
    text = pair.example.input_text
    return f"example {pair.example.pair_key[:12]} ({text[:40]!r}{'…' if len(text) > 40 else ''})"


# Scores, differences and p-values in readable form


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
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro F1",
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
