"""A release may carry its constraint, which answers requests that set no form."""

from __future__ import annotations

from typing import Any

import pytest
from tenant_server import SHIP, Running, Stored, ask, until
from tool_server import DECLARED, QUESTION, TOOLS, Saying, client_of

from tool_families import family
from tunewright.chat.call_grammar import CallGrammars, call_grammar
from tunewright.chat.tool_calls import declared_functions
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.generation.constraints import Grammar
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.tenants import Candidate, State

pytest_plugins = ["two_tenants"]

COURTS = Grammar.choices(["Ala.", "Fla."]).rule
STATES = Grammar.choices(["Ohio", "Utah"]).rule

CHAT = family("hermes-chatml")
MODELS = {"texts": "one", "auto": "one", "required": "one", "free": "one"}
RULES = {"texts": COURTS, "auto": CallGrammars("auto").rule, "required": CallGrammars("required").rule}


def _live(server: Running, number: int) -> None:
    until(lambda: any(f"courts: release {number} is live" in message for message in server.reported.messages))


def _free(server: Running, two_tenants: dict[str, str]) -> str:
    text, _ = ask(server.client(two_tenants["acme"]), "courts")
    assert text not in {"Ala.", "Fla.", "Ohio", "Utah"}
    return text


def test_release_constrains_requests_without_a_form_until_it_is_rolled_back(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    client = server.client(two_tenants["acme"])
    before = _free(server, two_tenants)
    state.releases.deploy("courts", "one", adapters["one"].digest, SHIP, grammar=COURTS)
    _live(server, 2)
    assert ask(client, "courts")[0] in {"Ala.", "Fla."}
    assert ask(client, "courts", response_format={"type": "text"})[0] in {"Ala.", "Fla."}
    completion = client.completions.create(model="courts", prompt="Which court?", max_tokens=12)
    assert completion.choices[0].text in {"Ala.", "Fla."}
    # The request's own form replaces the release's.
    assert ask(client, "courts", extra_body={"guided_choice": ["Ohio", "Utah"]})[0] in {"Ohio", "Utah"}
    assert any("requests that set no form get constrained answers" in each for each in server.reported.messages)
    assert ask(server.client(two_tenants["globex"]), "recipes")[0] not in {"Ala.", "Fla."}, "another alias is free"
    state.releases.rollback("courts")
    _live(server, 3)
    assert ask(client, "courts")[0] == before
    state.releases.rollback("courts", 2)
    _live(server, 4)
    assert ask(client, "courts")[0] in {"Ala.", "Fla."}
    assert state.verify().faults == ()


@pytest.mark.parametrize("share", [None, 0.5])
def test_candidate_has_its_own_constraint_and_keeps_it_when_promoted(
    server: Running,
    state: State,
    two_tenants: dict[str, str],
    adapters: dict[str, Stored],
    share: float | None,
) -> None:
    client, two = server.client(two_tenants["acme"]), adapters["two"].digest
    state.releases.deploy("courts", "one", adapters["one"].digest, SHIP, grammar=COURTS)
    state.releases.start_candidate("courts", Candidate("two", two, share, grammar=STATES), SHIP)
    _live(server, 3)
    answered = {ask(client, "courts", f"case {number}") for number in range(12)}
    for text, digest in answered:
        assert text in ({"Ohio", "Utah"} if digest == two else {"Ala.", "Fla."})
    if share is None:
        until(lambda: len(state.usage.shadow_lines("courts")) >= 1)
        answers = [line.shadow_answer for line in state.usage.shadow_lines("courts")]
        assert {answer for answer in answers if answer is not None} <= {"Ohio", "Utah"}
        assert any(answers)
    else:
        assert {digest for _, digest in answered} == {two, adapters["one"].digest}  # all but 1 in 2,000 draws
    promoted = state.releases.promote("courts")
    assert (promoted.adapter, promoted.grammar) == ("two", STATES)
    _live(server, 4)
    assert ask(client, "courts")[0] in {"Ohio", "Utah"}
    assert state.verify().faults == ()


def test_release_of_calls_follows_the_state_and_leaves_requests_without_functions_free(
    server: Running, state: State, two_tenants: dict[str, str], adapters: dict[str, Stored]
) -> None:
    before = _free(server, two_tenants)
    state.releases.deploy("courts", "one", adapters["one"].digest, SHIP, grammar=RULES["required"])
    _live(server, 2)
    assert ask(server.client(two_tenants["acme"]), "courts")[0] == before
    said = "calls are constrained to the functions of each request (required)"
    assert any(said in each for each in server.reported.messages)
    assert state.releases.live()["courts"].grammar == RULES["required"]


JSON_FORM = {"response_format": {"type": "json_object"}}
AUTO, REQUIRED = CallGrammars("auto"), CallGrammars("required")
Expected = CallGrammars | dict[str, Any] | Grammar | None
"""Evaluation's own grammars, or the options of a grammar of calls."""


def _grammar(expected: Expected) -> Grammar | None:
    if isinstance(expected, CallGrammars):
        constraint = AnswerConstraints(CHAT, expected).of_row(DECLARED)
        assert constraint is not None
        return constraint.grammar
    if isinstance(expected, dict):
        return call_grammar(CHAT, declared_functions([DECLARED]), **expected)
    return expected


@pytest.mark.parametrize(
    ("model", "request_fields", "expected"),
    [
        ("auto", {}, None),
        ("auto", {"tools": TOOLS}, AUTO),
        ("auto", {"tools": TOOLS, "tool_choice": "none"}, None),
        ("auto", {"tools": TOOLS, "tool_choice": "required"}, REQUIRED),
        ("required", {}, None),
        ("required", {"tools": TOOLS}, REQUIRED),
        ("required", {"tools": TOOLS, "tool_choice": "auto"}, REQUIRED),
        ("required", {"tools": TOOLS, "tool_choice": "none"}, None),
        ("required", {"tools": TOOLS, "parallel_tool_calls": False}, {"choice": "required", "parallel": False}),
        ("required", {"tools": TOOLS} | JSON_FORM, {"text": Grammar.json_schema({"type": "object"})}),
        ("texts", {"tools": TOOLS}, {"text": Grammar(COURTS)}),
        ("texts", {"tools": TOOLS, "tool_choice": "none"}, Grammar(COURTS)),
        ("texts", {"tools": TOOLS, "tool_choice": "required"}, REQUIRED),
        ("free", {"tools": TOOLS}, None),
    ],
)
def test_release_constrains_answers_to_functions_as_evaluation_did(
    model: str, request_fields: dict[str, Any], expected: Expected
) -> None:
    engine = Saying((65,))
    with client_of(engine, CHAT, AnonymousAuth(MODELS, grammars=RULES)) as client:
        client.chat.completions.create(model=model, messages=QUESTION, **request_fields)
        client.completions.create(model=model, prompt="Oslo")
    (chat, _), (text, _) = engine.asked
    assert (chat.constraint and chat.constraint.grammar) == _grammar(expected)
    assert (text.constraint and text.constraint.grammar) == (Grammar(COURTS) if model == "texts" else None)
