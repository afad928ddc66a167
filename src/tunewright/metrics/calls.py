"""Function calls: their functions, their arguments and their schemas, and no call where no function fits.

An answer's calls are the lines at its end in the form of ``Message.text``: ``{"name": "weather", "arguments":
{"city":"Oslo"}}``, with the arguments in canonical JSON. Text above them is ignored. A row applies if it
declares functions; further conditions depend only on the reference, so all arms are scored on the same items.

In an AST match each argument is one of its acceptable values. The rules are the rules that the Berkeley
Function Calling Leaderboard (BFCL; Patil et al. 2025) applies to Python:
``bfcl_eval/eval_checker/ast_eval/ast_checker.py`` of https://github.com/ShishirPatil/gorilla. Differences:

* ``true`` is not 1, as in JSON.
* Numbers inside lists compare by value, as they do in BFCL inside objects: ``[1]`` is ``[1.0]``.
* Parallel calls are paired in any way that makes all of them match. BFCL takes the first match of each.
* An argument that the schema does not list is allowed if the reference has it.

Acceptable values are the row's metadata key ``acceptable``. Metadata travels with the dataset version: it is shown,
exported and purged with its row. It is not part of the conversation, so the row keeps its identity and no model sees
it. The value is a list with one object for each call of the reference, in order: argument to a list of acceptable
values. ``""`` in that list marks an argument that may be left out. An argument that is not listed must have the
reference's value::

    "acceptable": [{"unit": ["celsius", "C", ""]}]

Where the schema says ``object``, an acceptable value is an object whose values are such lists
again. Where it says an array of objects, it is a list of such objects.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tunewright.config import MetricName
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.core.strict_json import standard_json
from tunewright.data.examples import Example, ToolCall, call_id
from tunewright.data.tools import ArgumentsError, SchemaLimitError, compiled_schema
from tunewright.metrics.scorer import AnsweredItem, ItemScore, Scorer, Unscored, mean_score
from tunewright.metrics.texts import micro_f1, same

NO_FUNCTIONS = Unscored("the row declares no functions")
NO_CALL = Unscored("the reference has no call")
_CALL = Unscored("the reference has a call")
_NO_ARGUMENT = Unscored("the reference's calls have no arguments")

ACCEPTABLE = "acceptable"
OPTIONAL = ""

Options = Mapping[str, Sequence[Any]]
"""Argument to acceptable values."""

_IGNORED = re.compile(r"[ ,./\-_*^]")
_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


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


def reference_calls(pair: AnsweredItem) -> tuple[ToolCall, ...]:
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

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
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
    """Return a scorer: 1 if the answer calls the reference's functions as often as the reference does, else 0.

    Arguments and order are ignored. An item is unscored if the reference has no call.
    """

    def right(pair: AnsweredItem) -> bool:
        return _names(calls_in(pair.answer)) == _names(reference_calls(pair))

    definition = "the share of answers that call the reference's functions, each as often, with any arguments"
    return _where_called(name, definition, right)


def call_schema_valid(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer has calls, all of declared functions with arguments of their schema, else 0.

    Arguments that take too long to be checked do not satisfy their schema. An item is unscored if the reference has no
    call.
    """

    def right(pair: AnsweredItem) -> bool:
        schemas, calls = parameters_of(pair.example) or {}, calls_in(pair.answer)
        return bool(calls) and all(call.name in schemas and _satisfies(call, schemas[call.name]) for call in calls)

    definition = "the share of answers whose calls name declared functions and satisfy their JSON Schema"
    return _where_called(name, definition, right)


def _where_called(name: MetricName, definition: str, right: Callable[[AnsweredItem], bool]) -> Scorer:
    """Return a scorer of right and wrong over the items whose reference has a call."""

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        if parameters_of(pair.example) is None:
            return NO_FUNCTIONS
        return mean_score(float(right(pair))) if reference_calls(pair) else NO_CALL

    return Scorer(name, "right or wrong", definition, 2, item)


def _satisfies(call: ToolCall, schema: Any) -> bool:
    try:
        compiled_schema(canonical_json(schema)).check(json.loads(call.arguments))
    except (ArgumentsError, SchemaLimitError):
        return False
    return True


def irrelevance_detection(name: MetricName) -> Scorer:
    """Return a scorer: 1 if the answer has no call where the reference has none, else 0.

    The name is BFCL's, for prompts that no declared function fits. An item is unscored if the reference has a call.
    """

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
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

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
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


def acceptable_values(root: Path) -> dict[str, Any]:
    """Return the metadata ``acceptable`` of the rows that have it, by pair key, from all versions of a project."""
    from tunewright.data.trace import read_origins

    metadata = read_origins(ProjectFolder(root).dataset).metadata
    return {key: values[ACCEPTABLE] for key, values in sorted(metadata.items()) if ACCEPTABLE in values}


def call_ast_match(name: MetricName, acceptable: Mapping[str, Any]) -> Scorer:
    """Return a scorer: 1 if the answer's calls match the reference's in any order, else 0.

    Where the reference has no call, an answer without one is right.
    """

    def item(pair: AnsweredItem) -> ItemScore | Unscored:
        parameters = parameters_of(pair.example)
        if parameters is None:
            return NO_FUNCTIONS
        wanted, given = reference_calls(pair), calls_in(pair.answer)
        # Acceptable values belong to the row's own reference, not to another row's output for the same input.
        own = acceptable.get(pair.example.pair_key) if pair.reference == pair.example.output else None
        options = _options(wanted, own, parameters, pair.example.pair_key)
        if len(given) != len(wanted):
            return mean_score(0.0)
        fits = [
            [ours.name == call.name and _call_fits(ours, choice, parameters.get(call.name, {})) for ours in given]
            for call, choice in zip(wanted, options, strict=True)
        ]
        return mean_score(float(not wanted or best_pairing(np.array(fits, dtype=int)) == len(wanted)))

    definition = (
        "the share of answers whose calls match by BFCL's AST rules: each argument is one of its acceptable values"
    )
    return Scorer(name, "right or wrong", definition, 2, item)


def _options(calls: Sequence[ToolCall], own: Any, parameters: Mapping[str, Any], key: str) -> list[Options]:
    """Return the acceptable values of every argument of the reference's calls, and of arguments that may be added."""
    listed = [{} for _ in calls] if own is None else own
    schemas = [_properties(parameters.get(call.name, {})) for call in calls]
    if not isinstance(listed, list) or len(listed) != len(calls) or not all(map(_has_lists, listed, schemas)):
        raise UserError(
            f"Invalid metadata {ACCEPTABLE!r} of row {key[:12]}: expected a list of {len(calls)} objects, one for each "
            "call of its last turn, whose values are lists",
            where="evaluate.metric",
            fix="Correct the row's file, and add it together with new rows.",
        )
    return [
        {name: [alternative(value, declared.get(name, {}))] for name, value in json.loads(call.arguments).items()}
        | options
        for call, options, declared in zip(calls, listed, schemas, strict=True)
    ]


def _has_lists(options: Any, schemas: Mapping[str, Any]) -> bool:
    """Return whether each value is a list, also inside of objects where the schema says ``object``."""
    if not isinstance(options, dict) or not all(isinstance(choice, list) for choice in options.values()):
        return False
    objects = [
        each
        for name, choice in options.items()
        for value in choice
        for each in _objects_in(value, schemas.get(name, {}))
    ]
    return all(isinstance(choice, list) for each in objects for choice in each.values())


def _objects_in(value: Any, schema: Any) -> list[dict[str, Any]]:
    """Return the objects of an acceptable value that the schema declares as objects."""
    if isinstance(value, dict) and dict in _kinds(schema):
        return [value]
    if isinstance(value, list) and dict in _kinds(_items(schema)):
        return [each for each in value if isinstance(each, dict)]
    return []


def alternative(value: Any, schema: Any) -> Any:
    """Return a value as the only acceptable one: an object's values become lists."""
    if dict in _kinds(schema) and isinstance(value, dict):
        return {key: [inner] for key, inner in value.items()}
    if isinstance(value, list) and dict in _kinds(_items(schema)):
        return [{key: [inner] for key, inner in each.items()} if isinstance(each, dict) else each for each in value]
    return value


def _call_fits(call: ToolCall, options: Options, parameters: Any) -> bool:
    given, schemas = json.loads(call.arguments), _properties(parameters)
    required = parameters.get("required", ()) if isinstance(parameters, dict) else ()
    return (
        all(name in given for name in required)
        and given.keys() <= options.keys()
        and all(name in given or OPTIONAL in choice for name, choice in options.items())
        and all(_value_fits(value, options[name], schemas.get(name, {})) for name, value in given.items())
    )


def _value_fits(value: Any, choice: Sequence[Any], schema: Any) -> bool:
    kinds = _kinds(schema)
    usual = next((type(each) for each in choice if each != OPTIONAL), None)
    if kinds and usual is not None and usual not in kinds:
        # Acceptable values of another type than the declared one, such as the name of a variable: no normalisation.
        return (type(value) in kinds or type(value) is usual) and any(same(value, each) for each in choice)
    if kinds and type(value) not in kinds:
        return False
    if isinstance(value, dict) and dict in kinds:
        return any(isinstance(each, dict) and _object_fits(value, each) for each in choice)
    if isinstance(value, list):
        lists = [[] if each == OPTIONAL else each for each in choice if each == OPTIONAL or isinstance(each, list)]
        one_fits = _object_fits if dict in _kinds(_items(schema)) else _same_text
        return any(len(value) == len(each) and all(map(one_fits, value, each)) for each in lists)
    return any(_same_text(value, each) for each in choice)


def _object_fits(value: Any, options: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(options, dict):
        return False
    return all(
        key in options and any(_same_text(inner, each) for each in options[key]) for key, inner in value.items()
    ) and all(key in value or OPTIONAL in choice for key, choice in options.items())


def _same_text(one: Any, other: Any) -> bool:
    """Return whether two values are equal; texts are compared without case, spaces and some punctuation."""
    if isinstance(one, str) and isinstance(other, str):
        return _folded(one) == _folded(other)
    return same(one, other)


def _folded(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _properties(parameters: Any) -> Mapping[str, Any]:
    found = parameters.get("properties", {}) if isinstance(parameters, dict) else {}
    return found if isinstance(found, dict) else {}


def _items(schema: Any) -> Any:
    return schema.get("items", {}) if isinstance(schema, dict) else {}


def _kinds(schema: Any) -> frozenset[type]:
    """Return the Python types of a schema's ``type``; empty if it has none. A whole number is a number."""
    declared = schema.get("type", ()) if isinstance(schema, dict) else ()
    names = [declared] if isinstance(declared, str) else declared
    found = {_TYPES[name] for name in names if name in _TYPES}
    return frozenset(found | {int}) if float in found else frozenset(found)
