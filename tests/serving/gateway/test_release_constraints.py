"""A release may carry its constraint, which answers requests that set no form."""

from __future__ import annotations

from typing import Any

import pytest
from tool_server import DECLARED, QUESTION, TOOLS, Saying, client_of

from making.tool_families import family
from tunewright.chat.call_grammar import CallGrammars, call_grammar
from tunewright.chat.tool_calls import declared_functions
from tunewright.evaluation.answer_constraints import AnswerConstraints
from tunewright.generation.constraints import Grammar
from tunewright.serving.gateway.auth import AnonymousAuth

COURTS = Grammar.choices(["Ala.", "Fla."]).rule

CHAT = family("hermes-chatml")
MODELS = {"texts": "one", "auto": "one", "required": "one", "free": "one"}
RULES = {"texts": COURTS, "auto": CallGrammars("auto").rule, "required": CallGrammars("required").rule}


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
