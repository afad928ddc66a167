"""Responses through OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from scripted_engine import ScriptedEngine, scripted_server
from served_model import build_model, openai_client, running_server

from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.responses_api import ResponsesRequest

INPUT = "Which court is this?"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with running_server(build_model()) as url, openai_client(url) as opened:
        yield opened


def chat(client: openai.OpenAI, *messages: tuple[str, str], **how: Any) -> Any:
    turns: Any = [{"role": role, "content": content} for role, content in messages]
    return client.chat.completions.create(**{"model": "courts", "messages": turns, "max_tokens": 20, **how})


def test_response_is_the_chat_answer_to_the_same_messages(client: openai.OpenAI) -> None:
    how: Any = {"model": "courts", "max_output_tokens": 20, "temperature": 0.7, "instructions": "Be brief."}
    response = client.responses.create(input=INPUT, **how)
    answer = chat(client, ("system", "Be brief."), ("user", INPUT), temperature=0.7)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.object) == (answer.usage.prompt_tokens, "response")
    greedy = client.responses.create(input=INPUT, **how | {"temperature": 0})
    answer = chat(client, ("system", "Be brief."), ("user", INPUT))
    assert greedy.output_text == answer.choices[0].message.content
    expected = ("completed", None) if answer.choices[0].finish_reason == "stop" else ("incomplete", "max_output_tokens")
    details = greedy.incomplete_details
    assert (greedy.status, details and details.reason) == expected
    assert greedy.usage is not None
    assert greedy.usage.output_tokens == answer.usage.completion_tokens
    assert greedy.usage.total_tokens == answer.usage.total_tokens


def test_conversation_continues_with_the_items_of_a_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model="courts", input=INPUT, max_output_tokens=9)
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": INPUT},
        *first.output,
        {"type": "message", "role": "user", "content": "And this?"},
    ]
    response = client.responses.create(model="courts", input=items, max_output_tokens=20)
    turns = [("system", "Be brief."), ("user", INPUT), ("assistant", first.output_text), ("user", "And this?")]
    assert response.output_text == chat(client, *turns).choices[0].message.content


def test_streamed_events_join_to_the_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="courts", input=INPUT, max_output_tokens=30)
    events = list(client.responses.create(model="courts", input=INPUT, max_output_tokens=30, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 2 and "".join(deltas) == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert (last.response.output_text, last.response.usage) == (whole.output_text, whole.usage)


def test_client_parses_a_structured_response(client: openai.OpenAI) -> None:
    class Court(pydantic.BaseModel):
        name: Literal["Ala.", "Fla."]

    parsed = client.responses.parse(model="courts", input=INPUT, text_format=Court, max_output_tokens=60)
    if parsed.status == "completed":
        assert isinstance(parsed.output_parsed, Court)
    form: Any = {"type": "json_schema", "name": "n", "schema": {"enum": ["yes", "no"]}, "strict": True}
    response = client.responses.create(model="courts", input=INPUT, text={"format": form})
    assert response.output_text in ('"yes"', '"no"')
    assert response.status == "completed"


def test_error_in_a_stream_is_an_event() -> None:
    with scripted_server(ScriptedEngine(waits=[0.0, 30.0]), inter_token_timeout_s=0.2) as client:
        reply = client.post("/v1/responses", json={"model": "base", "input": "x", "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line.startswith("data: ")]
    assert (events[-1]["type"], events[-1]["code"]) == ("error", "idle_timeout")
    assert "[DONE]" not in reply.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"reasoning": {"generate_summary": "auto"}}, "reasoning.generate_summary"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": "e" + "\u0300" * 40}]}, "input.0"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_p": 0.5}, "top_p"),
    ],
)
def test_refused_field_is_named(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ResponsesRequest, json.dumps({"model": "m", "input": "x"} | more).encode()).as_chat()
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, "text.format.schema"),
        ({"input": [{"role": "user", "content": "x"}] * 129}, "input"),
    ],
)
def test_fault_found_later_names_the_field_of_this_route(client: openai.OpenAI, body: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "courts", "input": "x", **body})
    assert caught.value.param == param


def test_store_is_accepted_and_the_response_says_that_nothing_is_stored(client: openai.OpenAI) -> None:
    labels: Any = {
        "store": True,
        "metadata": {"a": "b"},
        "user": "ann",
        "service_tier": "auto",
        "truncation": "disabled",
    }
    response = client.responses.create(model="courts", input=INPUT, max_output_tokens=3, **labels)
    assert (response.model_dump()["store"], response.metadata) == (False, {"a": "b"})
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_embeddings_are_refused_with_a_pointer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embedding model on another server") as caught:
        client.embeddings.create(model="courts", input="x")
    assert caught.value.code == "embeddings_not_supported"
    url = str(client.base_url)
    assert httpx.get(f"{url}embeddings", trust_env=False).status_code == 405
