"""Metrics that a config can name, which score answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator

from tunewright.config.section import ConfigSection

MetricName = str
"""A metric's name in evidence and tables: its kind, followed by its settings."""

PlainMetric = Literal[
    "exact_match",
    "macro_f1",
    "bleu",
    "chrf",
    "token_f1",
    "rouge_l",
    "json",
    "json_valid",
    "call_exact_match",
    "call_ast_match",
    "call_name_match",
    "call_argument_f1",
    "call_schema_valid",
    "irrelevance_detection",
]


class _Keyed(ConfigSection):
    """A metric with settings: a mapping with one key, dumped as it was written."""

    model_config = ConfigDict(serialize_by_alias=True)


class Normalisation(ConfigSection):
    """Differences that exact match ignores, besides outer white space and Unicode form (NFC)."""

    ignore_case: bool = False
    """Ignore case."""
    collapse_whitespace: bool = False
    """Collapse each run of white space to one space."""
    ignore_punctuation: bool = False
    """Remove punctuation (Unicode's general category P)."""


class ExactMatch(_Keyed):
    """Exact match with normalisation: ``{exact_match: {ignore_case: true}}``."""

    exact_match: Normalisation


class Choices(_Keyed):
    """Accuracy over a declared list of answers: ``{choices: [granted, denied]}``."""

    choices: Annotated[tuple[str, ...], Field(min_length=2)]
    """All valid answers. Any other answer is wrong and counted as outside the list."""

    @field_validator("choices", mode="before")
    @classmethod
    def _texts(cls, choices: Any) -> Any:
        if isinstance(choices, list) and not all(isinstance(choice, str) for choice in choices):
            raise ValueError("a choice must be text: quote values that YAML reads otherwise, such as 'yes' and '1'")
        return choices

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        if len({choice.strip() for choice in choices}) < len(choices) or not all(c.strip() for c in choices):
            raise ValueError("choices must be distinct and not empty")
        return choices


class JsonFields(ConfigSection):
    """The fields of a JSON object to score."""

    fields: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None
    """Names of top-level fields (null: all fields of reference and answer)."""


class Json(_Keyed):
    """F1 over the fields of a JSON object, all items' fields counted together: ``{json: {fields: [name, date]}}``."""

    of: Annotated[JsonFields, Field(alias="json")]


class Regex(_Keyed):
    """The share of answers that match a pattern in full: ``{regex: '[A-Z]{2}-[0-9]+'}``."""

    regex: Annotated[str, Field(min_length=1)]
    """A pattern of Python's re."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class Python(_Keyed):
    """The mean of your own function's values: ``{python: 'scoring:citation'}``."""

    python: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
    """module:function in the project's folder, called as function(answer, reference, example). It
    returns a number from 0 to 1, or None for an item that cannot be scored.
    """


def _kind(value: Any) -> str | None:
    """Return the tag of the type that reads a metric."""
    if isinstance(value, str):
        return "a name" if value in get_args(PlainMetric) else None
    if isinstance(value, _Keyed):
        return next(field.alias or name for name, field in type(value).model_fields.items())
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value)))
    return None


Metric = Annotated[
    Annotated[PlainMetric, Tag("a name")]
    | Annotated[ExactMatch, Tag("exact_match")]
    | Annotated[Choices, Tag("choices")]
    | Annotated[Json, Tag("json")]
    | Annotated[Regex, Tag("regex")]
    | Annotated[Python, Tag("python")],
    Discriminator(
        _kind,
        custom_error_type="metric",
        custom_error_message=f"a metric is one of {', '.join(get_args(PlainMetric))}, or a mapping with one key of "
        "exact_match, choices, json, regex, python",
    ),
]


def metric_name(metric: Metric) -> MetricName:
    """Return the metric's name in evidence and tables."""
    match metric:
        case ExactMatch(exact_match=settings):
            forgiven = [name for name, on in settings if on]
            return " ".join(["exact_match", "+".join(forgiven)]).strip()
        case Choices():
            return "choices"
        case Json(of=JsonFields(fields=fields)):
            return "json" if fields is None else f"json {','.join(fields)}"
        case Regex(regex=pattern):
            return f"regex {pattern}"
        case Python(python=function):
            return f"python {function}"
        case _:
            return metric
