"""BFCL's items as examples, with every call that BFCL accepts; the data set is no part of the project."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from making.real_data import SHARED
from prepare_bfcl import convert
from tunewright.config import DataConfig
from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, ToolCall
from tunewright.data.readers.validate import example_from_object

FOLDER = SHARED / "bfcl"
needs_bfcl = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs ../shared/data/bfcl, which the project has no copy of"
)

Arguments = dict[str, Any]
Call = tuple[str, Arguments]


@dataclass(frozen=True)
class Item:
    """A converted item with BFCL's own declarations and acceptable calls."""

    row: dict[str, Any]
    example: Example
    functions: list[dict[str, Any]]
    truth: list[dict[str, dict[str, list[Any]]]]
    """BFCL's acceptable values; empty where no function fits."""

    @property
    def category(self) -> str:
        return str(self.row["category"])


@cache
def items() -> tuple[Item, ...]:
    """All items that convert."""
    originals: dict[str, dict[str, Any]] = {}
    truths: dict[str, Any] = {}
    for path in FOLDER.glob("*.json"):
        originals |= {item["id"]: item for item in _lines(path)}
    for path in FOLDER.glob("possible_answer/*.json"):
        truths |= {item["id"]: item["ground_truth"] for item in _lines(path)}
    return tuple(
        Item(
            row,
            example_from_object(row, DataConfig(group_by=("family",))),
            originals[row["id"]]["function"],
            truths.get(row["id"], []),
        )
        for row in convert(FOLDER).rows
    )


def _lines(path: Any) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def answer_text(calls: Sequence[Call]) -> str:
    """The canonical text of an answer with these calls."""
    return "\n".join(ToolCall(name.replace(".", "_"), canonical_json(given), "").text for name, given in calls)


def gold(item: Item, most: int, random_: random.Random) -> Iterator[list[Call]]:
    """BFCL's acceptable answers: every combination of each call's arguments, or ``most`` drawn if there are more.

    Each acceptable value of each argument is in at least one of them.
    """
    spaces = [_space(item, call) for call in item.truth]
    for place, (name, arguments) in enumerate(spaces):
        sizes = [len(values) for values in arguments.values()]
        total = 1
        for size in sizes:
            total *= size
        if total <= most:
            choices = list(itertools.product(*(range(size) for size in sizes)))
        else:
            drawn = [tuple(random_.randrange(size) for size in sizes) for _ in range(most)]
            each = [tuple(n % size for size in sizes) for n in range(max(sizes))]
            choices = drawn + each
        others = [_chosen(space, [random_.randrange(len(v)) for v in space[1].values()]) for space in spaces]
        for choice in choices:
            calls = [*others]
            calls[place] = _chosen((name, arguments), choice)
            random_.shuffle(calls)
            yield calls


_OUT = object()


def _space(item: Item, call: dict[str, dict[str, list[Any]]]) -> tuple[str, dict[str, list[Any]]]:
    """A call's function, and the plain values that each argument may have."""
    ((name, options),) = call.items()
    parameters = next(f["parameters"] for f in item.functions if f["name"] == name)
    space = {}
    for argument, values in options.items():
        declared = parameters["properties"].get(argument)
        required = argument in parameters["required"]
        plain = [
            _OUT if value == "" and not required else spelled
            for value in values
            for spelled in ([value] if value == "" or declared is None else _spelled(value, declared))
        ]
        # An argument that is not declared is never accepted, and one that is required never left out.
        kept = [v for v in plain if v is _OUT] if declared is None else plain
        if declared is not None and declared["type"] in ("integer", "float", "boolean", "dict") and required:
            kept = [v for v in plain if v != ""]
        space[argument] = kept
    return name, space


def _spelled(value: Any, declared: Mapping[str, Any]) -> list[Any]:
    """All plain values that an acceptable value stands for."""
    if declared["type"] == "dict":
        return _objects(value)
    if isinstance(value, list) and declared.get("items", {}).get("type") == "dict":
        return [list(each) for each in itertools.product(*(_objects(inner) for inner in value))]
    return [value]


def _objects(value: Mapping[str, list[Any]]) -> list[Any]:
    spaces = [[_OUT if v == "" else v for v in options] for options in value.values()]
    return [
        {key: v for key, v in zip(value, choice, strict=True) if v is not _OUT} for choice in itertools.product(*spaces)
    ]


def _chosen(space: tuple[str, dict[str, list[Any]]], choice: Sequence[int]) -> Call:
    name, arguments = space
    picked = {argument: values[place] for (argument, values), place in zip(arguments.items(), choice, strict=True)}
    return name, {argument: value for argument, value in picked.items() if value is not _OUT}


_OTHERS = ("quite different", 987_654_321, 0.123_456_789, ["quite different"], {"quite": "different"})


def perturbed(item: Item, calls: Sequence[Call], random_: random.Random) -> Iterator[tuple[str, list[Call]]]:
    """Answers that BFCL refuses, each one change away from an accepted one, with the change."""
    place = random_.randrange(len(calls))
    name, arguments = calls[place]

    def changed(call: Call) -> list[Call]:
        return [*calls[:place], call, *calls[place + 1 :]]

    yield "call left out", [*calls[:place], *calls[place + 1 :]]
    yield "call repeated", [*calls, calls[place]]
    yield "another function", changed((f"{name}_other", arguments))
    yield "another argument", changed((name, {**arguments, "not_declared": 1}))
    parameters = next(f["parameters"] for f in item.functions if f["name"] == name)
    for argument in arguments:
        if argument in parameters["required"]:
            yield "required argument left out", changed((name, {k: v for k, v in arguments.items() if k != argument}))
        value = random_.choice(_OTHERS)
        yield f"value {value!r}", changed((name, {**arguments, argument: value}))
        given = arguments[argument]
        if isinstance(given, int | float) and not isinstance(given, bool) and str(given) not in _texts(item.truth):
            yield "number as text", changed((name, {**arguments, argument: str(given)}))


def _texts(value: Any) -> set[str]:
    """All texts in a value."""
    if isinstance(value, dict | list):
        return set().union(*map(_texts, value.values() if isinstance(value, dict) else value))
    return {value} if isinstance(value, str) else set()


def respelled(calls: Sequence[Call], random_: random.Random) -> list[Call]:
    """The calls with one argument in another spelling or type, which may or may not be accepted."""
    place = random_.randrange(len(calls))
    name, arguments = calls[place]
    if not arguments:
        return list(calls)
    argument = random_.choice(list(arguments))
    given = arguments[argument]
    spellings: list[Any] = [None, "", [], True, False, 0, 1, str(given), [given]]
    if isinstance(given, str):
        spellings += [
            given.upper(),
            f" {given}.",
            given.replace(" ", "-"),
            given.replace("'", '"'),
            given[1:],
            [*given],
        ]
    elif isinstance(given, int | float) and not isinstance(given, bool):
        spellings += [float(given), int(given), -given]
    elif isinstance(given, list):
        # Not in another type: numbers in lists are compared by value here, and by type too there.
        spellings += [given[::-1], given[1:], [v.upper() if isinstance(v, str) else v for v in given]]
    elif isinstance(given, dict):
        spellings += [dict(list(given.items())[1:]), {**given, "more": 1}, {k: [v] for k, v in given.items()}]
    changed = (name, {**arguments, argument: random_.choice(spellings)})
    return [*calls[:place], changed, *calls[place + 1 :]]
