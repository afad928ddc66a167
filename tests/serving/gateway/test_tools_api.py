"""Functions through OpenAI's client: calls in answers, streamed and whole, results in messages, and their faults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served_model import build_model, running_engine
from tool_server import ASKED, CALL, CLOCK, QUESTION, TOOLS, WEATHER, Saying, answer_ids, client_of

from making.property_examples import examples
from making.tool_families import FAMILIES as ALL_FAMILIES
from making.tool_families import arguments, family
from tunewright.config import DataConfig
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.data.readers.validate import example_from_object
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.responses_api import ResponsesRequest
from tunewright.serving.gateway.schemas import ChatRequest

FLAT: list[Any] = [{"type": "function", "strict": None, **function} for function in (WEATHER, CLOCK)]


def spoken(message: Any) -> tuple[str, list[tuple[str, Any]]]:
    # Mistral's templates write a space before an answer, which is part of it.
    return (message.content or "").lstrip(), [
        (call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()
    ]


def test_request_declares_functions_as_rows_of_the_same_text_do() -> None:
    functions = [{"name": "clock", "description": "", "strict": True}, {**WEATHER, "description": "Cafe\u0301"}]
    body: dict[str, Any] = {
        "messages": QUESTION,
        "tools": [{"type": "function", "function": each} for each in functions],
    }
    answered = [*QUESTION, {"role": "assistant", "content": "x"}]
    row = example_from_object(body | {"messages": answered}, DataConfig())
    request = parse_request(ChatRequest, json.dumps({"model": "courts", **body}).encode())
    assert tuple(request.conversation) == row.prompt


def joined_chat(chunks: Iterable[Any]) -> tuple[str, list[tuple[str, str]], str]:
    content, called, finish = "", [], ""
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            if call.id:
                called.append((call.function.name, ""))
            name, before = called[call.index]
            called[call.index] = name, before + call.function.arguments
    return content, called, finish


def joined_response(events: Iterable[Any]) -> tuple[str, list[tuple[str, str]], str]:
    content, called, status = "", [], ""
    for event in events:
        if event.type == "response.output_text.delta":
            content += event.delta
        elif event.type == "response.output_item.added" and event.item.type == "function_call":
            called.append((event.item.name, ""))
        elif event.type == "response.function_call_arguments.delta":
            called[-1] = called[-1][0], called[-1][1] + event.delta
        elif event.type == "response.function_call_arguments.done":
            assert (event.name, event.arguments) == called[-1]
        elif event.type in ("response.completed", "response.incomplete"):
            status = event.response.status
    return content, called, status


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_streamed_pieces_join_to_the_answer_wherever_it_is_cut(name: str) -> None:
    chat, engine = family(name), Saying(())
    most = 3 if chat.tool_form.parallel else 1
    made = st.lists(st.tuples(st.sampled_from(["weather", "clock"]), arguments), max_size=most)
    how: Any = {"model": "base", "messages": QUESTION, "tools": TOOLS}
    items: Any = {"model": "base", "input": "How is it there?", "tools": FLAT}

    with client_of(engine, chat) as client:

        @settings(examples(20, quick=6), suppress_health_check=list(HealthCheck))
        @given(made, st.booleans(), st.floats(0, 1))
        def check(made: list[tuple[str, str]], cut: bool, share: float) -> None:
            calls = tuple(ToolCall(called, text, call_id(place)) for place, (called, text) in enumerate(made))
            content = "I look." if chat.tool_form.with_text or not calls else ""
            ids = answer_ids(chat, Message("assistant", content, calls=calls))
            engine.ids, engine.finish = (ids[: 1 + int(share * (len(ids) - 1))], "length") if cut else (ids, "stop")
            (choice,) = client.chat.completions.create(**how).choices
            whole = [
                (call.function.name, call.function.arguments)
                for call in choice.message.tool_calls or ()
                if call.type == "function"
            ]
            content, finish = choice.message.content or "", choice.finish_reason
            assert finish == ("length" if cut else "tool_calls" if calls else "stop")
            assert joined_chat(client.chat.completions.create(stream=True, **how)) == (content, whole, finish)
            if not cut:
                assert [(called, json.loads(text)) for called, text in whole] == [
                    (called, json.loads(text)) for called, text in made
                ]
            response = client.responses.create(**items)
            output = [(item.name, item.arguments) for item in response.output if item.type == "function_call"]
            assert (response.output_text, output) == (content, whole)
            assert joined_response(client.responses.create(stream=True, **items)) == (content, whole, response.status)

        check()


def test_answer_cut_in_its_calls_has_the_complete_ones_and_what_there_is_of_the_last() -> None:
    chat = family("hermes-chatml")
    ids = answer_ids(chat, Message("assistant", "I look.", calls=(CALL, ToolCall("clock", "{}", call_id(1)))))
    text = chat.text(ids)
    how: Any = {"model": "base", "messages": QUESTION, "tools": TOOLS}
    engine = Saying((), "length")
    with client_of(engine, chat) as client:
        for end, expected in (
            (text.index('"weather') + 4, []),
            (text.index("Oslo") + 2, [("weather", '{"city": "Os')]),
            (text.index('"clock') + 4, [("weather", '{"city": "Oslo", "days": 2}')]),
        ):
            engine.ids = ids[:end]  # a token is a byte
            (choice,) = client.chat.completions.create(**how).choices
            made = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
            assert (choice.finish_reason, choice.message.content, made) == ("length", "I look.", expected)
            response = client.responses.create(model="base", input="How is it there?", tools=FLAT)
            assert (response.status, response.output_text) == ("incomplete", "I look.")
            calls = [item for item in response.output if item.type == "function_call"]
            assert [(call.name, call.arguments) for call in calls] == expected
            assert [call.status for call in calls] == [
                "completed" if text.endswith("}") else "incomplete" for _, text in expected
            ]


def test_conversation_with_results_is_rendered_as_in_training_whatever_the_ids() -> None:
    chat = family("mistral-v7")
    engine = Saying(answer_ids(chat, Message("assistant", "Sunny.")))
    turns = [
        *QUESTION,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "x-1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"days": 2, "city": "Oslo"}'},
                },
                {"id": "x-2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "x-2", "content": "noon"},
        {"role": "tool", "tool_call_id": "x-1", "content": [{"type": "text", "text": "rain"}]},
    ]
    with client_of(engine, chat) as client:
        client.chat.completions.create(model="base", messages=turns, tools=TOOLS)
    ((request, _),) = engine.asked
    assert request.prompt_ids == chat.prompt(
        [
            *ASKED,
            Message("assistant", "", calls=(CALL, ToolCall("clock", "{}", call_id(1)))),
            Message("tool", "noon", call_id=call_id(1)),
            Message("tool", "rain", call_id=call_id(0)),
        ]
    )


@pytest.fixture(scope="module")
def embedded() -> Iterator[openai.OpenAI]:
    """The embedded engine, whose random weights call functions where a grammar makes them."""
    with running_engine(build_model()) as engine, client_of(engine, family("hermes-chatml")) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_call_matches_its_functions_schema(embedded: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        (answer,) = embedded.chat.completions.create(
            model="courts",
            messages=QUESTION,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=200,
            temperature=1,
            seed=seed,
        ).choices
        content, [(name, arguments)] = spoken(answer.message)
        assert content == ""
        assert name == "weather" if choice != "required" else name in ("weather", "clock")
        if name == "weather":
            jsonschema.validate(arguments, WEATHER["parameters"])


def test_fault_of_a_format_next_to_tools_names_the_format(embedded: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        embedded.chat.completions.create(model="courts", messages=QUESTION, tools=TOOLS, response_format=form)
    assert caught.value.param == "response_format.json_schema.schema"


def test_fault_of_a_schema_in_a_responses_tool_is_named_as_it_was_sent(embedded: openai.OpenAI) -> None:
    nested: Any = {"type": "object", "properties": {"x": {"$ref": "#"}}}
    tools: Any = [*FLAT, {"type": "function", "name": "f", "parameters": nested, "strict": True}]
    with pytest.raises(openai.BadRequestError, match=r"tools\.2\.parameters: the schema is recursive") as caught:
        embedded.responses.create(model="courts", input="How is it there?", tools=tools)
    assert caught.value.param == "tools.2.parameters"


def test_tool_choice_none_answers_as_without_tools(embedded: openai.OpenAI) -> None:
    how: Any = {"model": "courts", "messages": QUESTION, "max_tokens": 20}
    without = embedded.chat.completions.create(**how)
    none = embedded.chat.completions.create(tools=TOOLS, tool_choice="none", **how)
    assert (none.choices, none.usage) == (without.choices, without.usage)


@pytest.mark.parametrize("content", ["", "I look."])
def test_response_has_the_calls_as_items_and_its_events_join_to_them(content: str) -> None:
    chat = family("hermes-chatml")
    turn = Message("assistant", content, calls=(CALL, ToolCall("clock", "{}", call_id(1))))
    engine = Saying(answer_ids(chat, turn))
    how: Any = {"model": "base", "input": "How is it there?", "tools": FLAT}
    with client_of(engine, chat) as client:
        response = client.responses.create(**how)
        events = list(client.responses.create(stream=True, **how))
        with client.responses.stream(**how) as stream:
            final = stream.get_final_response()
        items: Any = [{"role": "user", "content": "How is it there?"}, *response.output]
        made = [item for item in response.output if item.type == "function_call"]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in made]
        client.responses.create(model="base", input=items, tools=FLAT)
    expected = [("weather", json.loads(CALL.arguments)), ("clock", {})]
    both: list[Any] = [response, final]
    for each in both:
        assert [
            (item.name, json.loads(item.arguments)) for item in each.output if item.type == "function_call"
        ] == expected
        assert (each.output_text, each.status) == (content, "completed")
    done: Any = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == list(range(len(response.output)))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    results = [Message("tool", "rain", call_id=call_id(place)) for place in range(2)]
    assert engine.asked[-1][0].prompt_ids == chat.prompt([*ASKED, turn, *results])


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "clock"}]}, "input.0.arguments"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": 3}}]}, "tools.0"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.schema"),
        ({"tool_choice": "any"}, "tool_choice"),
    ],
)
def test_fault_of_calls_in_a_request_for_a_response_names_its_field(more: dict[str, Any], param: str) -> None:
    body = {"model": "m", "input": "x", "tools": FLAT} | more
    with pytest.raises(ApiError) as caught:
        parse_request(ResponsesRequest, json.dumps(body).encode()).as_chat()
    assert (caught.value.status, caught.value.param) == (400, param)


def turn(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **fields}


def calls(*ids: str, name: str = "clock", arguments: Any = "{}") -> dict[str, Any]:
    called = {"name": name, "arguments": arguments}
    return turn(tool_calls=[{"id": one, "type": "function", "function": called} for one in ids])


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [*QUESTION, {"role": "tool", "tool_call_id": "a", "content": "x"}]}, "messages.1.tool_call_id"),
        ({"messages": [*QUESTION, calls("a")]}, "messages.1"),
        ({"messages": [*QUESTION, calls("a"), *QUESTION]}, "messages.1"),
        ({"messages": [*QUESTION, calls("a", "a")]}, "messages.1.tool_calls"),
        ({"messages": [*QUESTION, calls("a", arguments="{")]}, "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [*QUESTION, calls("a", arguments="[]")]}, "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [*QUESTION, {"role": "tool", "content": "x"}]}, "messages.1"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": calls("a")["tool_calls"]}]}, "messages.0"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ],
)
def test_fault_of_calls_names_its_field(more: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": QUESTION, "tools": TOOLS} | more
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, param)


def test_function_that_is_not_declared_and_recursive_parameters_are_refused(embedded: openai.OpenAI) -> None:
    how: Any = {"model": "courts", "messages": QUESTION, "max_tokens": 5}
    other: Any = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(openai.BadRequestError, match=r"named other \(declared: weather, clock\)") as caught:
        embedded.chat.completions.create(tools=TOOLS, tool_choice=other, **how)
    assert caught.value.param == "tool_choice"
    nested: Any = {"type": "object", "properties": {"x": {"$ref": "#"}}}
    tree: Any = [{"type": "function", "function": {"name": "f", "parameters": nested, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match="recursive") as caught:
        embedded.chat.completions.create(tools=tree, **how)
    assert caught.value.param == "tools.0.function.parameters"


def test_functions_are_refused_by_name_on_a_base_without_a_form_for_them() -> None:
    chat = family("hermes-plain")
    from making.tiny_bases import byte_tokenizer, chat_of

    plain = chat_of(byte_tokenizer(), "plain")
    assert chat.tool_form
    with client_of(Saying((65,)), plain) as client:
        with pytest.raises(openai.BadRequestError, match="not supported with this base") as caught:
            client.chat.completions.create(model="base", messages=QUESTION, tools=TOOLS)
        assert (caught.value.param, caught.value.code) == ("tools", "tools_not_supported")
        assert client.chat.completions.create(model="base", messages=QUESTION).choices
