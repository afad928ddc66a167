"""Function calls: their functions, their arguments and their schemas, and no call where no function fits.

An answer's calls are the lines at its end in the form of ``Message.text``: ``{"name": "weather", "arguments":
{"city":"Oslo"}}``, with the arguments in canonical JSON. Text above them is ignored. A row applies if it declares
functions; further conditions depend on the reference alone, so all arms are scored on the same items.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tunewright.config import MetricName
from tunewright.core.io import canonical_json
from tunewright.core.strict_json import standard_json
from tunewright.data.examples import Example, ToolCall, call_id
from tunewright.data.tool_limits import ArgumentsError, SchemaLimitError
from tunewright.metrics.fields import micro_f1
from tunewright.metrics.scorer import ItemScore, Pair, Scorer, Unscored, mean_score

NO_FUNCTIONS = Unscored("the row declares no functions")
NO_CALL = Unscored("the reference has no call")
_CALL = Unscored("the reference has a call")
_NO_ARGUMENT = Unscored("the reference's calls have no arguments")


def calls_in(text: str) -> tuple[ToolCall, ...]:
    """Return the calls of an answer: the lines at its end that are calls in their canonical form.

    A call in another spelling is text.
    """
    found: list[ToolCall] = []
    for line in reversed(text.strip().split("\n")):
        call = _call_of(line)
        if call is None:
            break
        found.append(call)
    return tuple(ToolCall(call.name, call.arguments, call_id(place)) for place, call in enumerate(reversed(found)))


def _call_of(line: str) -> ToolCall | None:
    if not line.startswith('{"name": '):
        return None
    try:
        value = standard_json(line)
        if value.keys() != {"name", "arguments"} or not isinstance(value["name"], str):
            return None
        call = ToolCall(value["name"], canonical_json(value["arguments"]), "")
    except (ValueError, RecursionError):
        return None
    return call if call.text == line and isinstance(value["arguments"], dict) else None


def reference_calls(pair: Pair) -> tuple[ToolCall, ...]:
    """Return the reference's calls."""
    if pair.reference == pair.example.output:
        return pair.example.messages[-1].calls
    return calls_in(pair.reference)  # another row's output, for the same input


def parameters_of(example: Example) -> dict[str, Any] | None:
    """Return the JSON Schema of each declared function's arguments; None if the row declares no functions."""
    first = example.messages[0]
    return _parameters(first.content) if first.role == "tools" else None


@lru_cache(maxsize=256)
def _parameters(declarations: str) -> dict[str, Any]:
    functions = [declaration["function"] for declaration in json.loads(declarations)]
    return {function["name"]: function.get("parameters", {}) for function in functions}


def call_exact_match(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer's calls equal the reference's in any order, else 0.

    Arguments are equal if their canonical JSON is: 1 and 1.0 differ. Where the reference has no call, an answer
    without one is right.
    """

    def item(pair: Pair) -> ItemScore | Unscored:
        if parameters_of(pair.example) is None:
            return NO_FUNCTIONS
        return mean_score(float(_lines(calls_in(pair.answer)) == _lines(reference_calls(pair))))

    definition = "the share of answers with the reference's calls (function and canonical arguments, in any order)"
    return Scorer(name, "right or wrong", definition, 2, item)


def _lines(calls: Sequence[ToolCall]) -> Counter[str]:
    return Counter(call.text for call in calls)


def _names(calls: Sequence[ToolCall]) -> Counter[str]:
    return Counter(call.name for call in calls)


def call_name_match(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer calls the reference's functions as often as it does, else 0.

    Arguments and order are ignored. An item is unscored if the reference has no call.
    """

    def right(pair: Pair) -> bool:
        return _names(calls_in(pair.answer)) == _names(reference_calls(pair))

    definition = "the share of answers that call the reference's functions, each as often, with any arguments"
    return _where_called(name, definition, right)


def call_schema_valid(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer has calls, all of declared functions with arguments of their schema, else 0.

    Arguments that take too long to be checked do not satisfy their schema. An item is unscored if the reference has no
    call.
    """

    def right(pair: Pair) -> bool:
        schemas, calls = parameters_of(pair.example) or {}, calls_in(pair.answer)
        return bool(calls) and all(call.name in schemas and _satisfies(call, schemas[call.name]) for call in calls)

    definition = "the share of answers whose calls name declared functions and satisfy their JSON Schema"
    return _where_called(name, definition, right)


def _where_called(name: MetricName, definition: str, right: Callable[[Pair], bool]) -> Scorer:
    """Return a scorer of right and wrong over the items whose reference has a call."""

    def item(pair: Pair) -> ItemScore | Unscored:
        if parameters_of(pair.example) is None:
            return NO_FUNCTIONS
        return mean_score(float(right(pair))) if reference_calls(pair) else NO_CALL

    return Scorer(name, "right or wrong", definition, 2, item)


def _satisfies(call: ToolCall, schema: Any) -> bool:
    from tunewright.data.tool_schemas import compiled_schema  # jsonschema takes a tenth of a second to import

    try:
        compiled_schema(canonical_json(schema)).check(json.loads(call.arguments))
    except (ArgumentsError, SchemaLimitError):
        return False
    return True


def irrelevance_detection(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer has no call where the reference has none, else 0.

    The name is BFCL's, for prompts that no declared function fits. An item is unscored if the reference has a call.
    """

    def item(pair: Pair) -> ItemScore | Unscored:
        if parameters_of(pair.example) is None:
            return NO_FUNCTIONS
        if reference_calls(pair):
            return _CALL
        return mean_score(float(not calls_in(pair.answer)))

    definition = "the share of answers without a call, where the reference has none"
    return Scorer(name, "right or wrong", definition, 2, item)


def call_argument_f1(name: MetricName) -> Scorer:
    """Return a scorer of micro F1 over the arguments of calls.

    An argument is right if a call of the same function has it with the same canonical value. Each call is compared with
    at most one call of the reference, in the pairing that makes most arguments right. An item is unscored if the
    reference has no call or no argument.
    """

    def item(pair: Pair) -> ItemScore | Unscored:
        if parameters_of(pair.example) is None:
            return NO_FUNCTIONS
        wanted = reference_calls(pair)
        if not wanted:
            return NO_CALL
        theirs, ours = [_arguments(call) for call in wanted], [_arguments(call) for call in calls_in(pair.answer)]
        count, given = sum(len(arguments) for _, arguments in theirs), sum(len(arguments) for _, arguments in ours)
        if not count:
            return _NO_ARGUMENT
        right = best_pairing(
            np.array([[len(a & b) if f == g else 0 for g, b in ours] for f, a in theirs]).reshape(len(theirs), -1)
        )
        return ItemScore(2 * right / (given + count), (right, given, count))

    definition = "micro F1 over the arguments of calls (function, argument and canonical value), all items' together"
    return Scorer(name, "corpus", definition, 3, item, micro_f1)


def _arguments(call: ToolCall) -> tuple[str, frozenset[tuple[str, str]]]:
    values = json.loads(call.arguments)
    return call.name, frozenset((key, canonical_json(value)) for key, value in values.items())


def best_pairing(gains: np.ndarray[Any, Any]) -> int:
    """Return the largest sum of gains of a pairing of rows with columns, each used at most once."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(gains, maximize=True)
    return int(gains[rows, columns].sum())
