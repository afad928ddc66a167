"""JSON answers: validity, and the share of an object's fields that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunewright.config import MetricName
from tunewright.core.strict_json import standard_json
from tunewright.metrics.scorer import Floats, ItemScore, Pair, Scorer, Unscored, mean_score


def json_valid(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer parses as JSON, else 0, regardless of its content."""

    def item(pair: Pair) -> ItemScore:
        try:
            standard_json(pair.answer)
        except ValueError:
            return mean_score(0.0)
        return mean_score(1.0)

    return Scorer(name, "right or wrong", "the share of answers that parse as JSON (RFC 8259)", 2, item)


def json_fields(name: MetricName, fields: Sequence[str] | None) -> Scorer:
    """Return a scorer of micro F1 over top-level fields: a field is right if both have it with the same value.

    Values are compared as JSON values: 1 equals 1.0, but not "1" or true. An answer that is not an object has no
    fields, so it misses them all. An item is unscored if the reference is not an object or has none of the fields.
    """

    def counted(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            return None
        return value if fields is None else {key: value[key] for key in fields if key in value}

    def item(pair: Pair) -> ItemScore | Unscored:
        try:
            reference = counted(standard_json(pair.reference))
        except ValueError:
            return Unscored("the reference is not JSON")
        if not reference:
            return Unscored("the reference is not a JSON object" if reference is None else "the reference has no field")
        try:
            answer = counted(standard_json(pair.answer)) or {}
        except ValueError:
            answer = {}
        right = sum(key in answer and same(answer[key], value) for key, value in reference.items())
        return ItemScore(2 * right / (len(answer) + len(reference)), (right, len(answer), len(reference)))

    which = "top-level fields" if fields is None else f"the fields {', '.join(fields)}"
    return Scorer(name, "corpus", f"micro F1 over {which} of a JSON object, all items' together", 3, item, micro_f1)


def same(one: Any, other: Any) -> bool:
    """Return whether two parsed JSON values are equal: Python takes true for 1, JSON does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def micro_f1(sums: Floats) -> Floats:
    """Map [..., right, answered, wanted] to F1; every scored item wants at least one field."""
    f1: Floats = 2 * sums[..., 0] / np.asarray(sums[..., 1] + sums[..., 2])
    return f1
