"""Grammars of calls: what they allow, in each form, and that what is decoded under them reads as calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from making.property_examples import examples
from making.tool_families import FAMILIES, family, texts
from tunewright.chat import ChatFormat
from tunewright.chat.answers import grammar_compiler
from tunewright.chat.call_grammar import call_grammar
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.generation.constraints import Constraint, Grammar
from tunewright.generation.generate import generate
from tunewright.generation.requests import Request

WEATHER: dict[str, Any] = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock"}
SEARCH = {
    "name": "brave_search",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
}
SINGLE = ("llama3_1", "llama3_2")


def _asked(*functions: Any) -> list[Message]:
    declared = [{"type": "function", "function": f} for f in functions or (WEATHER, CLOCK)]
    return [Message("tools", canonical_json(declared)), Message("user", "Oslo?")]


def _ids(chat: ChatFormat, *calls: tuple[str, dict[str, Any]], content: str = "", functions: Sequence[Any] = ()) -> Any:
    """The ids of an answer, without its end token."""
    asked = _asked(*functions)
    made = tuple(ToolCall(name, canonical_json(values), call_id(n)) for n, (name, values) in enumerate(calls))
    row = chat.rows([*asked, Message("assistant", content, calls=made)])[-1]
    return row.ids[len(chat.prompt(asked)) : -1]


def _allows(constraint: Constraint, ids: Sequence[int]) -> bool:
    matcher = constraint.start()._matcher
    return matcher.try_consume_tokens(list(ids)) == len(ids) and matcher.is_accepting()


def _constraint(
    chat: ChatFormat, choice: str = "auto", *, parallel: bool = True, text: Grammar | None = None
) -> Constraint:
    return grammar_compiler(chat).compile(call_grammar(chat, [WEATHER, CLOCK], choice, parallel=parallel, text=text))


@pytest.mark.parametrize("name", FAMILIES)
def test_grammar_allows_calls_that_fit_their_schema(name: str) -> None:
    chat = family(name)
    auto, required, weather = (_constraint(chat, choice) for choice in ("auto", "required", "weather"))

    @settings(examples(40, quick=8), suppress_health_check=list(HealthCheck))
    @given(texts.filter(lambda text: len(text) <= 8), st.none() | st.integers(0, 9))
    def check(city: str, days: int | None) -> None:
        values = {"city": city} if days is None else {"city": city, "days": days}
        ids = _ids(chat, ("weather", values))
        assert [_allows(c, ids) for c in (auto, required, weather)] == [True, True, True]

    check()


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("weather", {}),
    ("weather", {"city": 3}),
    ("weather", {"city": "Oslo", "days": 10}),
    ("weather", {"city": "Oslo", "more": 1}),
    ("weather", {"city": "Oslo, Norway"}),
    ("clock", {"zone": 1}),
    ("other", {}),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_grammar_refuses_calls_that_do_not(name: str) -> None:
    chat = family(name)
    for choice in ("auto", "required", "weather"):
        constraint = _constraint(chat, choice)
        assert [call for call in WRONG if _allows(constraint, _ids(chat, call))] == []
    assert not _allows(_constraint(chat, "weather"), _ids(chat, ("clock", {})))
    assert _allows(_constraint(chat, "clock"), _ids(chat, ("clock", {})))


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_allowed_by_auto_alone(name: str) -> None:
    chat = family(name)
    auto, required = _constraint(chat), _constraint(chat, "required")
    ids = _ids(chat, content="It is cold: {3}.")
    assert (_allows(auto, ids), _allows(required, ids)) == (True, False)
    if chat.tool_form.with_text and name != "llama4":
        ids = _ids(chat, ("clock", {}), content="Let me look.")
        assert (_allows(auto, ids), _allows(required, ids)) == (True, False)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_calls_are_allowed_if_parallel(name: str) -> None:
    chat = family(name)
    if name in SINGLE:
        once = list(_ids(chat, ("clock", {})))
        assert not _allows(_constraint(chat), once + once)
        return
    ids = _ids(chat, ("clock", {}), ("weather", {"city": "Oslo"}))
    for choice in ("auto", "required"):
        assert _allows(_constraint(chat, choice), ids)
        assert not _allows(_constraint(chat, choice, parallel=False), ids)
    assert not _allows(_constraint(chat, "weather"), ids)


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"answer": {"type": "string"}, "sure": {"$ref": "#/$defs/sure"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
        "$defs": {"sure": {"type": "boolean"}},
    },
    # Its first key is that of calls, too.
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
]
VALUES = [{"answer": "no", "sure": True}, {"name": "weather", "age": 3}]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("place", [0, 1])
def test_answer_is_calls_or_text_of_its_form(name: str, place: int) -> None:
    chat = family(name)
    form, right, wrong = Grammar.json_schema(SCHEMAS[place]), VALUES[place], VALUES[1 - place]
    auto, required, alone = _constraint(chat, text=form), _constraint(chat, "required", text=form), _constraint(chat)
    for text in (json.dumps(right), json.dumps(right, separators=(",", ":")), json.dumps(right, indent=2)):
        ids = _ids(chat, content=text)
        assert (_allows(auto, ids), _allows(required, ids)) == (True, False)
    for text in (json.dumps(wrong), "It is cold.", json.dumps(right) + "."):
        assert not _allows(auto, _ids(chat, content=text))
    made: list[list[tuple[str, dict[str, Any]]]] = [[("weather", {"city": "Oslo", "days": 3})], [("clock", {})]]
    made += [] if name in SINGLE else [[("clock", {}), ("weather", {"city": "Oslo"})]]
    for calls in made:
        ids = _ids(chat, *calls)
        assert (_allows(auto, ids), _allows(required, ids), _allows(alone, ids)) == (True, True, True)
    assert [call for call in WRONG if _allows(auto, _ids(chat, call))] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_choices_of_text_and_calls_share_a_grammar(name: str) -> None:
    chat = family(name)
    auto = _constraint(chat, text=Grammar.choices(["yes", "no"]))
    assert [_allows(auto, _ids(chat, content=text)) for text in ("yes", "no", "maybe")] == [True, True, False]
    assert _allows(auto, _ids(chat, ("clock", {})))


def test_builtin_functions_have_their_form() -> None:
    chat = family("llama3_1")
    constraint = grammar_compiler(chat).compile(call_grammar(chat, [SEARCH, WEATHER], "required"))
    assert _allows(constraint, _ids(chat, ("brave_search", {"query": "gold"}), functions=[SEARCH]))
    as_json = chat.encoder.ids(['{"name": "brave_search", "parameters": {"query": "gold"}}'])
    assert not _allows(constraint, next(iter(as_json.values())))


def test_choice_of_an_undeclared_function_is_refused() -> None:
    with pytest.raises(UserError, match=r"No declared function is named time \(declared: weather, clock\)"):
        call_grammar(family("llama3_1"), [WEATHER, CLOCK], "time")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_decoded_answers_read_as_calls(name: str, choice: str) -> None:
    """Random weights under the grammar, from prompts of several lengths."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    chat = family(name)
    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(chat.tokenizer), num_attention_heads=4, initializer_range=0.3, **shape)
    constraint = _constraint(chat, choice, parallel=False)  # random weights would call without end
    asked = _asked()
    prompts = [chat.prompt([*asked[:1], Message("user", "x" * n)]) for n in (1, 5, 9)]
    completions = generate(
        LlamaForCausalLM(config).eval(),
        [Request(prompt, None, 160, constraint=constraint) for prompt in prompts],
        stop_ids=chat.stop_ids,
        pad_id=0,
        batch_size=3,
    )
    schemas = {"weather": WEATHER["parameters"], "clock": {"maxProperties": 0}}
    ended = [c for c in completions if c.finish == "stop"]
    assert ended or choice == "auto"
    for completion in ended:
        answer = chat.answer(completion.ids, asked)
        assert answer.calls or choice == "auto"
        assert not (answer.calls and answer.content.strip()) or choice == "auto"
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
