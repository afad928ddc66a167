"""Arms for rows with functions: demonstrations with calls, and answers constrained to calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making.command_line import tunewright, write_jsonl
from making.tool_families import family
from tunewright.chat.call_grammar import CallGrammars
from tunewright.core.io import canonical_json
from tunewright.data.examples import Example, Message, ToolCall, call_id
from tunewright.data.versions import Member
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.evaluation.arms import ArmPlan, find_instruction
from tunewright.evaluation.demonstrations import Demonstrations, with_demonstrations
from tunewright.generation.constraints import Grammar
from tunewright.metrics import Unscored, metric_inputs, scorer_of
from tunewright.metrics.scorer import AnsweredItem

COLOURS = ("red", "green", "blue")


def _tool(name: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": list(COLOURS)}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "Paint.", "parameters": schema}}


def _member(asked: str, *calls: str, function: str = "paint", results: bool = False) -> Member:
    """A row whose function is called with these colours; without any, the answer is text."""
    made = tuple(ToolCall(function, canonical_json({"colour": colour}), call_id(n)) for n, colour in enumerate(calls))
    turns = [Message("assistant", "" if made else "No.", calls=made)]
    if results:
        turns += [Message("tool", "done", call_id=call.id) for call in made]
        turns += [Message("assistant", "Done.")]
    tools = Message("tools", canonical_json([_tool(function)]))
    return Member(Example((tools, Message("user", asked), *turns)), f"key {asked}", "train", asked)


def _plain(asked: str) -> Member:
    return Member(Example((Message("user", asked), Message("assistant", "x"))), f"key {asked}", "train", asked)


# Demonstrations


def test_demonstrations_keep_their_calls_with_ids_by_place() -> None:
    shown = [_member("one", "red", "blue", results=True), _member("two", "green", function="draw")]
    query = _member("three", "red", results=True)
    prompt = with_demonstrations(query, shown)
    assert [m.role for m in prompt] == [
        *("tools", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"),
        *("user", "assistant", "tool"),
    ]
    assert prompt[0] == query.example.messages[0]
    assert [call.id for m in prompt for call in m.calls] == [call_id(n) for n in range(4)]
    assert [m.call_id for m in prompt if m.role == "tool"] == [call_id(0), call_id(1), call_id(3)]
    chat = family("hermes-chatml")
    text = chat.texts([chat.prompt(prompt)])[0]
    assert text.count('{"name": "paint", "arguments": {"colour": "red"}}') == 2


def test_query_without_functions_is_shown_no_calls() -> None:
    rows = [_member(f"red wall {n}", "red") for n in range(4)] + [_plain(f"red wall so {n}") for n in range(2)]
    demonstrations = Demonstrations(rows, 0)
    for plan in (ArmPlan("static", 4, seed=1), ArmPlan("retrieved", 4, retriever="bm25")):
        assert {m.example.messages[0].role for m in demonstrations.shown(plan, _plain("red wall"))} == {"user"}
        assert len(demonstrations.shown(plan, _member("a red wall", "red"))) == 4


def test_instruction_stands_after_the_declared_functions() -> None:
    rows = [_member("one", "red"), _member("two", "blue")]
    replaced = find_instruction(rows).replaced(rows[0].example.prompt, "Be brief.")
    assert [m.role for m in replaced] == ["tools", "system", "user"]


# Constraints


@pytest.mark.parametrize(
    ("choice", "allowed"), [("auto", [True, True, True, False]), ("required", [True, True, False, False])]
)
def test_constraints_allow_answers_with_calls_of_the_rows_functions(choice: Any, allowed: list[bool]) -> None:
    constraints = AnswerConstraints(family("hermes-chatml"), CallGrammars(choice))
    rows = [_member("a", "red"), _member("b", "red", "blue"), _member("c"), _member("d", "pink")]
    assert [constraints.allow(m.example) for m in rows] == allowed
    assert constraints.allow(_plain("e").example)  # nothing to constrain
    first = rows[0].example.messages[0]
    assert constraints.of_row(first) is constraints.of_row(first)
    assert constraints.of_row(Message("tools", canonical_json([_tool("draw")]))) is not constraints.of_row(first)
    assert constraints.of_row(None) is None


def test_one_grammar_constrains_rows_with_functions_too() -> None:
    constraints = AnswerConstraints(family("hermes-chatml"), Grammar('"x" | "No."'))
    assert constraints.allow(_plain("a").example)
    assert constraints.allow(_member("b").example)
    assert constraints.of_row(None) is constraints.of_row(Message("tools", "[]"))


# A project


def _row(number: int) -> dict[str, Any]:
    colour = COLOURS[number % 3]
    call = {"name": "paint", "arguments": json.dumps({"colour": colour})}
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": f"Paint wall {number * 7919 % 10007} in {colour}."},
            {"role": "assistant", "tool_calls": [{"id": f"c{number}", "type": "function", "function": call}]},
        ],
        "tools": [_tool("paint")],
    }
    return row if number % 3 else {**row, "acceptable": [{"colour": ["red", "blue"]}]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with functions on a tiny base."""
    folder = tmp_path_factory.mktemp("calls")
    write_jsonl(folder / "rows.jsonl", [_row(n) for n in range(60)])
    (folder / "tunewright.yaml").write_text(
        f"name: calls\nbase_model: {tiny_base_folder}\ndata:\n  sources: [rows.jsonl]\nchat:\n  tools: hermes\n"
        "train:\n  dtype: float32\nevaluate:\n  metric: call_ast_match\n  extra_metrics: [call_schema_valid]\n"
        "  num_fewshot: [1]\n  static_seeds: 0\n  retrievers: [bm25]\n  max_new_tokens: 90\n"
        "  structured_outputs: {tools: required}\n"
    )
    added = tunewright("data", "add", folder / "rows.jsonl", "-p", folder)
    assert added.code == 0, added.stderr
    return folder


@pytest.mark.slow
def test_constrained_arms_call_declared_functions_by_their_schema(project: Path) -> None:
    advised = tunewright("advise", "-p", project, "--json")
    assert advised.code in {0, 3, 4}, advised.stderr
    arms = {arm["name"]: arm for arm in advised.document["advice"]["prompting"]["arms"]}
    assert arms.keys() == {"zero-shot", "retrieved-1", "zero-shot+constrained", "retrieved-1+constrained"}
    for name, arm in arms.items():
        # Random weights write no call of their own accord; constrained, each answer is one, unless it is cut.
        valid = arm["scores"]["call_schema_valid"]["value"] * arm["items"]
        assert valid == (arm["items"] - arm["truncated"] if arm["constrained"] else 0), name
    assert sum(arm["truncated"] for arm in arms.values() if arm["constrained"]) < 6


def test_acceptable_values_are_read_from_the_versions_metadata(project: Path) -> None:
    from tunewright.data.versions import load_version

    scorer = scorer_of("call_ast_match", project)
    seen = set()
    for member in load_version(project / "dataset").members:
        given = json.loads(member.example.messages[-1].calls[0].arguments)["colour"]
        answer = '{"name": "paint", "arguments": {"colour":"blue"}}'
        score = scorer.item(AnsweredItem(answer, member.example, (member.example.output,)))
        assert not isinstance(score, Unscored)
        assert score.value == (given in ("red", "blue"))
        seen.add(given)
    assert seen == set(COLOURS)


def test_other_acceptable_values_make_another_measurement(project: Path, tmp_path: Path) -> None:
    ours, none = metric_inputs("call_ast_match", project), metric_inputs("call_ast_match", tmp_path)
    assert ours != none
    assert metric_inputs("call_exact_match", project) == "call_exact_match"
