"""Metrics of function calls against brute force, JSON Schema and small cases."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making.evidence import pair, scorers
from tunewright.config import Metric
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.metrics import Scores, score_all
from tunewright.metrics.calls import call_ast_match, calls_in

CALL_METRICS: list[Metric] = [
    "call_exact_match",
    "call_ast_match",
    "call_name_match",
    "call_argument_f1",
    "call_schema_valid",
    "irrelevance_detection",
]

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "limit": {"type": "number"},
        "units": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object"},
        "stops": {"type": "array", "items": {"type": "object"}},
        "any": {},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]

Call = tuple[str, dict[str, Any]]


def _example(calls: Sequence[Call], content: str = "", tools: Any = TOOLS) -> Example:
    answer = Message("assistant", content, calls=_tool_calls(calls))
    return Example((Message("tools", canonical_json(tools)), Message("user", "?"), answer))


def _tool_calls(calls: Sequence[Call]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(name, canonical_json(given), call_id(n)) for n, (name, given) in enumerate(calls))


def _text(calls: Sequence[Call], content: str = "") -> str:
    return Message("assistant", content, calls=_tool_calls(calls)).text


def _score(metric: Metric, reference: Sequence[Call], answer: Sequence[Call] | str, content: str = "") -> Scores:
    text = answer if isinstance(answer, str) else _text(answer)
    return score_all(scorers([metric])[0], [text], [_example(reference, content or "No." * (not reference))])


OSLO: Call = ("weather", {"city": "Oslo"})
ROME: Call = ("weather", {"city": "Rome", "days": 2})
NOW: Call = ("now", {})

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", 'é "x"\n', "\u2028"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("kl"), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)
CALLS = st.lists(
    st.tuples(st.just("now"), ARGUMENTS)
    | st.tuples(st.just("weather"), ARGUMENTS.map(lambda arguments: {"city": "Oslo", **arguments})),
    max_size=4,
)


# Calls in answers


@given(CALLS, st.text(max_size=20).map(str.strip))
def test_calls_in_returns_the_calls_that_a_message_writes(calls: list[Call], content: str) -> None:
    found = calls_in(_text(calls, content))
    assert found == _tool_calls(calls)


@pytest.mark.parametrize(
    "line",
    [
        '{"name":"now","arguments":{}}',
        '{"arguments": {}, "name": "now"}',
        '{"name": "now", "arguments": {"b": 1}}',
        '{"name": "now", "arguments": {"b":1,"a":2}}',
        '{"name": "now", "arguments": {"a":1,"a":2}}',
        '{"name": "now", "arguments": "{}"}',
        '{"name": "now", "arguments": []}',
        '{"name": 1, "arguments": {}}',
        '{"name": "now", "arguments": {}, "id": "x"}',
        '{"name": "now", "arguments": {"a":NaN}}',
        '{"name": "now", "arguments": {"a":1e999}}',
        '{"name": "now", "arguments": {}',
        '{"name": "now", "arguments": {"a":' + "[" * 100_000,
        '{"name": "now", "arguments": {"a":' + "9" * 5_000 + "}}",
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ],
)
def test_call_in_another_spelling_is_text(line: str) -> None:
    assert calls_in(line) == ()
    assert calls_in(f"{_text([NOW])}\n{line}") == ()


def test_text_above_the_calls_is_ignored() -> None:
    answer = f'Let me look.\n{{"name": "now"}}\n{_text([OSLO, NOW])}\n'
    assert [call.name for call in calls_in(answer)] == ["weather", "now"]
    assert _score("call_exact_match", [OSLO, NOW], answer).total() == 1


# Exact match, names, irrelevance


@pytest.mark.parametrize(
    ("answer", "exact", "names"),
    [
        ([OSLO, ROME], 1, 1),
        ([ROME, OSLO], 1, 1),
        ([OSLO, OSLO], 0, 1),
        ([OSLO], 0, 0),
        ([OSLO, ROME, NOW], 0, 0),
        ([("weather", {"city": "oslo"}), ROME], 0, 1),
        ([("weather", {"city": "Oslo"}), ("weather", {"city": "Rome", "days": 2.0})], 0, 1),
        ("Oslo is cold.", 0, 0),
    ],
)
def test_exact_match_compares_calls_and_name_match_their_functions(answer: Any, exact: int, names: int) -> None:
    assert _score("call_exact_match", [OSLO, ROME], answer).total() == exact
    assert _score("call_name_match", [OSLO, ROME], answer).total() == names


@given(CALLS, st.randoms(use_true_random=False))
def test_reference_in_any_order_scores_one_by_every_metric(calls: list[Call], draw: Any) -> None:
    for metric in CALL_METRICS:
        scores = _score(metric, calls, draw.sample(calls, len(calls)))
        assert not scores.scored.any() or scores.total() == 1, metric
        assert scores.scored.any() or metric not in ("call_exact_match", "call_ast_match")


def test_answer_without_a_call_is_right_where_none_fits() -> None:
    metrics: list[Metric] = ["call_exact_match", "call_ast_match", "irrelevance_detection"]
    for metric in metrics:
        assert _score(metric, [], "I cannot tell.").total() == 1
        assert _score(metric, [], [NOW]).total() == 0


@pytest.mark.parametrize("metric", CALL_METRICS)
@pytest.mark.parametrize("answer", ["", _text([OSLO]), "text"])
def test_items_without_meaning_are_unscored_whatever_the_answer(metric: Metric, answer: str) -> None:
    (scorer,) = scorers([metric])
    plain = score_all(scorer, [answer], [pair("?", "text")])
    assert plain.reasons == {"the row declares no functions": 1}
    irrelevant, called = _score(metric, [], answer), _score(metric, [OSLO], answer)
    if metric == "irrelevance_detection":
        assert called.reasons == {"the reference has a call": 1}
    elif metric in ("call_exact_match", "call_ast_match"):
        assert irrelevant.reasons == called.reasons == {}
    else:
        assert irrelevant.reasons == {"the reference has no call": 1}


# Argument F1


@given(CALLS, CALLS)
def test_argument_f1_is_the_best_of_all_pairings(reference: list[Call], answer: list[Call]) -> None:
    count = sum(len(arguments) for _, arguments in reference)
    scores = _score("call_argument_f1", reference, answer)
    if not count:
        why = "the reference's calls have no arguments" if reference else "the reference has no call"
        assert scores.reasons == {why: 1}
        return
    # Every way to put the answer's calls, and gaps, next to the reference's.
    right = max(
        sum(_shared(one, other) for one, other in zip(reference, order, strict=False))
        for order in itertools.permutations([*answer, *[None] * len(reference)], len(reference))
    )
    given_ = sum(len(arguments) for _, arguments in answer)
    precision, recall = (right / given_ if given_ else 0), right / count
    expected = 2 * precision * recall / (precision + recall) if right else 0
    assert scores.total() == pytest.approx(expected)
    assert scores.values[0] == pytest.approx(expected)


def _shared(one: Call, other: Call | None) -> int:
    if other is None or one[0] != other[0]:
        return 0
    theirs = {key: json.dumps(value, sort_keys=True) for key, value in other[1].items()}
    return sum(theirs.get(key) == json.dumps(value, sort_keys=True) for key, value in one[1].items())


def test_argument_f1_of_the_corpus_counts_all_arguments_together() -> None:
    (scorer,) = scorers(["call_argument_f1"])
    scores = score_all(scorer, [_text([OSLO]), "nothing"], [_example([OSLO]), _example([ROME])])
    assert scores.values.tolist() == [1, 0]
    assert scores.total() == pytest.approx(2 * 1 / (1 + 3))


# Schemas


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ([OSLO], 1),
        ([ROME, NOW], 1),
        ([("now", {"zone": "CET"})], 1),
        ([("weather", {})], 0),
        ([("weather", {"city": 1})], 0),
        ([("weather", {"city": "Oslo", "days": 0})], 0),
        ([OSLO, ("forecast", {})], 0),
        ("It is cold.", 0),
    ],
)
def test_schema_valid_needs_declared_functions_and_their_arguments(answer: Any, valid: int) -> None:
    assert _score("call_schema_valid", [OSLO], answer).total() == valid


def test_arguments_that_take_too_long_to_check_are_invalid() -> None:
    slow = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    example = _example([("f", {"a": "a"})], tools=[{"type": "function", "function": {"name": "f", "parameters": slow}}])
    (scorer,) = scorers(["call_schema_valid"])
    answers = [_text([("f", {"a": value})]) for value in ("aaa", "a" * 40 + "b")]
    assert score_all(scorer, answers, [example] * 2).values.tolist() == [1, 0]


# AST match


def _ast(acceptable: Any, reference: Sequence[Call], answer: Sequence[Call]) -> float:
    example = _example(reference)
    scorer = call_ast_match("call_ast_match", {example.pair_key: acceptable})
    return score_all(scorer, [_text(answer)], [example]).total()


@pytest.mark.parametrize(
    ("acceptable", "given_", "right"),
    [
        ({}, {"city": "Oslo"}, 1),
        ({}, {"city": "OSLO."}, 1),
        ({}, {"city": "Bergen"}, 0),
        ({}, {}, 0),
        ({}, {"city": "Oslo", "days": 2}, 0),
        ({"city": ["Oslo", "Christiania"]}, {"city": "christiania"}, 1),
        ({"days": [2, 3]}, {"city": "Oslo", "days": 3}, 1),
        ({"days": [2, 3]}, {"city": "Oslo"}, 0),
        ({"days": [2, 3, ""]}, {"city": "Oslo"}, 1),
        ({"days": [2]}, {"city": "Oslo", "days": 2.0}, 0),
        ({"days": [1]}, {"city": "Oslo", "days": True}, 0),
        ({"days": ["week"]}, {"city": "Oslo", "days": "week"}, 1),
        ({"days": ["week"]}, {"city": "Oslo", "days": "Week"}, 0),
        ({"limit": [2]}, {"city": "Oslo", "limit": 2.0}, 1),
        ({"limit": [2.0]}, {"city": "Oslo", "limit": 2}, 1),
        ({"city": ["Oslo", ""]}, {}, 0),  # required by the schema
        ({"units": [["C", "F"]]}, {"city": "Oslo", "units": ["c", "f"]}, 1),
        ({"units": [["C", "F"]]}, {"city": "Oslo", "units": ["F", "C"]}, 0),
        ({"units": [["C", "F"], ""]}, {"city": "Oslo", "units": []}, 1),
        ({"place": [{"lat": [1, 2], "name": ["x", ""]}]}, {"city": "Oslo", "place": {"lat": 2}}, 1),
        ({"place": [{"lat": [1, 2], "name": ["x", ""]}]}, {"city": "Oslo", "place": {"lat": 2, "name": "X"}}, 1),
        ({"place": [{"lat": [1, 2], "name": ["x", ""]}]}, {"city": "Oslo", "place": {"name": "x"}}, 0),
        ({"place": [{"lat": [1, 2]}]}, {"city": "Oslo", "place": {"lat": 2, "lon": 3}}, 0),
        ({"place": [{"lat": [1]}]}, {"city": "Oslo", "place": {"lat": True}}, 0),
        ({"stops": [[{"at": ["A", "B"]}, {"at": ["C"]}]]}, {"city": "Oslo", "stops": [{"at": "b"}, {"at": "C"}]}, 1),
        ({"stops": [[{"at": ["A", "B"]}, {"at": ["C"]}]]}, {"city": "Oslo", "stops": [{"at": "b"}]}, 0),
        ({"any": [{"a": 1}]}, {"city": "Oslo", "any": {"a": 1}}, 1),
        ({"any": ["X y", 3]}, {"city": "Oslo", "any": "xy"}, 1),
        ({"any": ["X y", 3]}, {"city": "Oslo", "any": 3}, 1),
    ],
)
def test_ast_match_follows_the_acceptable_values(acceptable: Any, given_: Any, right: int) -> None:
    assert _ast([acceptable], [OSLO], [("weather", given_)]) == right


def test_unlisted_objects_match_themselves() -> None:
    call: Call = ("weather", {"city": "Oslo", "place": {"lat": [1], "of": {"a": 1}}, "stops": [{"at": ["C"]}]})
    assert _ast([{}], [call], [call]) == 1
    assert _ast([{}], [call], [("weather", {**call[1], "place": {"lat": 1, "of": {"a": 1}}})]) == 0


def test_parallel_calls_are_paired_in_any_way_that_matches() -> None:
    # The first match of the first call would take the only match of the second.
    acceptable = [{"city": ["Oslo", "Rome"]}, {"city": ["Oslo"], "days": ["", 2]}]
    assert _ast(acceptable, [OSLO, ROME], [OSLO, ("weather", {"city": "Rome"})]) == 1


def test_acceptable_values_belong_to_the_rows_own_reference() -> None:
    one, other = _example([OSLO]), _example([ROME])
    scorer = call_ast_match("call_ast_match", {one.pair_key: [{"city": ["Oslo", "Bergen"]}]})
    answers = [_text([("weather", {"city": "Bergen"})]), _text([("weather", {"city": "Bergen", "days": 2})])]
    for answer, right in zip(answers, (1, 0), strict=True):
        scores = score_all(scorer, [answer] * 2, [one, other])
        assert scores.values.tolist() == [right, 0]
    assert score_all(scorer, [_text([ROME])] * 2, [one, other]).values.tolist() == [1, 1]


@pytest.mark.parametrize(
    "acceptable",
    [
        *({}, [], [{}, {}], [{"city": "Oslo"}], "Oslo", [["Oslo"]]),
        *([{"place": [{"lat": 1}]}], [{"stops": [[{"at": "A"}]]}]),
    ],
)
def test_acceptable_values_of_another_form_are_an_error(acceptable: Any) -> None:
    with pytest.raises(UserError, match=r"Invalid metadata 'acceptable' of row \w{12}: expected a list of 1 objects"):
        _ast(acceptable, [OSLO], [OSLO])
