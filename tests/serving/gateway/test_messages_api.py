"""Messages through Anthropic's client with its defaults: only the base URL is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import pydantic
import pytest
from scripted_engine import ScriptedEngine, scripted_server
from served_model import build_model, running_engine
from tenant_server import Running, until
from tool_server import ASKED, CALL, WEATHER, CallingEngine, Saying, answer_ids, tool_server

from making.tool_families import family
from tunewright.data.examples import Message, ToolCall, call_id
from tunewright.engines.protocol import Engine
from tunewright.serving.gateway.errors import ApiError, parse_request
from tunewright.serving.gateway.messages_api import MessagesRequest
from tunewright.serving.tenants import State
from tunewright.serving.tenants.quota import Limits

pytest_plugins = ["tenant_server"]

CHAT = family("hermes-chatml")
QUESTION = "How is it there?"
ASK: list[Any] = [{"role": "user", "content": QUESTION}]
TOOLS: list[Any] = [
    {"name": "weather", "description": "Return the weather.", "input_schema": WEATHER["parameters"]},
    {"name": "clock", "input_schema": {"type": "object", "properties": {}}},
]
HOW: Any = {"model": "courts", "messages": ASK, "max_tokens": 20}


@contextmanager
def messages_client(url: str, key: str = "none", **options: Any) -> Iterator[Any]:
    with (
        anthropic.DefaultHttpxClient(trust_env=False) as http,
        anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, http_client=http, **options) as client,
    ):
        yield client


@contextmanager
def said_by(engine: Engine) -> Iterator[Any]:
    with tool_server(engine, CHAT) as url, messages_client(url) as client:
        yield client


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the embedded engine with random weights."""
    with running_engine(build_model()) as engine, tool_server(engine, CHAT) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with messages_client(url) as opened:
        yield opened


def chat(url: str, messages: list[Any], **how: Any) -> Any:
    body = {"model": "courts", "messages": messages, "max_tokens": 20, **how}
    return httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=60).json()


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_message_is_the_chat_answer_to_the_same_messages(url: str, client: Any) -> None:
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    system: Any = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", **cached}]
    content: Any = [{"type": "text", "text": "How is it "}, {"type": "text", "text": "there?", **cached}]
    turns: Any = [*ASK, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": content}]
    labels: Any = {"metadata": {"user_id": "ann"}, "service_tier": "auto", **cached}
    message = client.messages.create(model="courts", max_tokens=20, system=system, messages=turns, **labels)
    same = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "Where?"}, *ASK]
    answer = chat(url, same)
    assert text_of(message) == answer["choices"][0]["message"]["content"]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (
        answer["usage"]["prompt_tokens"],
        answer["usage"]["completion_tokens"],
    )
    expected = {"length": "max_tokens", "stop": "end_turn"}[answer["choices"][0]["finish_reason"]]
    assert (message.stop_reason, message.stop_sequence, message.role, message.model) == (
        expected,
        None,
        "assistant",
        "courts",
    )
    drawn = {text_of(client.messages.create(**HOW, extra_body={"temperature": 1.0, "top_p": 0.9})) for _ in range(3)}
    assert len(drawn) > 1, "the client has no parameter for it any more"


def test_stream_joins_to_the_message(client: Any) -> None:
    whole = client.messages.create(**HOW)
    events = list(client.messages.create(stream=True, **HOW))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    begun: Any = events[0]
    assert (begun.message.usage.input_tokens, begun.message.stop_reason) == (whole.usage.input_tokens, None)
    with client.messages.stream(**HOW) as stream:
        assert "".join(stream.text_stream) == text_of(whole)
        final = stream.get_final_message()
    assert (text_of(final), final.stop_reason) == (text_of(whole), whole.stop_reason)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_stop_sequence_is_named_whole_and_streamed(client: Any) -> None:
    text = text_of(client.messages.create(**HOW))
    ends = ["never said", text[5:7]]
    message = client.messages.create(stop_sequences=ends, **HOW)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ends[1])
    assert text_of(message) == text[: text.index(ends[1])]
    with client.messages.stream(stop_sequences=ends, **HOW) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, text_of(final)) == ("stop_sequence", ends[1], text_of(message))


@pytest.mark.parametrize("content", ["", "I look."])
def test_calls_are_blocks_and_their_results_are_rendered_as_in_training(content: str) -> None:
    turn = Message("assistant", content, calls=(CALL, ToolCall("clock", "{}", call_id(1))))
    engine = Saying(answer_ids(CHAT, turn))
    how: Any = {"model": "base", "max_tokens": 100, "tools": TOOLS}
    with said_by(engine) as client:
        message = client.messages.create(messages=ASK, **how)
        with client.messages.stream(messages=ASK, **how) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        uses = [block for block in message.content if block.type == "tool_use"]
        results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"} for use in uses]
        results[1] |= {"content": [{"type": "text", "text": "ra"}, {"type": "text", "text": "in"}], "is_error": True}
        question: Any = {"type": "text", "text": "And?"}
        said: Any = {"role": "assistant", "content": message.content}
        client.messages.create(messages=[*ASK, said, {"role": "user", "content": [*results, question]}], **how)
    called = [("weather", {"city": "Oslo", "days": 2}), ("clock", {})]
    for each in (message, final):
        assert [(block.name, block.input) for block in each.content if block.type == "tool_use"] == called
        assert (text_of(each), each.stop_reason) == (content, "tool_use")
        assert [block.type for block in each.content] == ["text"] * bool(content) + ["tool_use"] * 2
    assert len(pieces) > 2, "arguments are streamed in pieces"
    declared = engine.asked[0][0].prompt_ids
    assert declared == CHAT.prompt(ASKED), "the same ids as for OpenAI's form of the functions"
    answered = [Message("tool", "rain", call_id=call_id(place)) for place in range(2)]
    assert engine.asked[-1][0].prompt_ids == CHAT.prompt([*ASKED, turn, *answered, Message("user", "And?")])


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_chosen_call_matches_its_schema(client: Any, choice: Any) -> None:
    how = HOW | {"max_tokens": 200, "tools": TOOLS, "tool_choice": choice | {"disable_parallel_tool_use": True}}
    for temperature in (0, 1.0):
        (use,) = client.messages.create(**how, extra_body={"temperature": temperature}).content
        assert use.name == "weather" if "name" in choice else use.name in ("weather", "clock")
        if use.name == "weather":
            jsonschema.validate(use.input, WEATHER["parameters"])
    none = client.messages.create(**HOW, tools=TOOLS, tool_choice={"type": "none"})
    assert text_of(none) == text_of(client.messages.create(**HOW))


def test_output_format_of_the_client_gives_a_parsed_answer(client: Any) -> None:
    class Court(pydantic.BaseModel):
        name: Literal["Ala.", "Fla."]

    parsed = client.messages.parse(model="courts", messages=ASK, max_tokens=500, output_format=Court)
    assert isinstance(parsed.parsed_output, Court)
    assert parsed.stop_reason == "end_turn"
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema is not supported") as caught:
        client.messages.create(**HOW, output_config={"format": {"type": "json_schema", "schema": {"type": "nothing"}}})
    assert caught.value.status_code == 400


def test_tool_runner_calls_a_local_function_and_ends_with_its_result() -> None:
    asked = []

    @anthropic.beta_tool
    def weather(city: str, days: int) -> str:
        """Return the weather.

        Args:
            city: where.
            days: for how long.
        """
        asked.append((city, days))
        return "rain"

    with said_by(CallingEngine(CHAT)) as client:
        how: Any = {"model": "courts", "max_tokens": 200, "tools": [weather], "messages": ASK, "thread": False}
        last = client.beta.messages.tool_runner(**how).until_done()
        streamed = [stream.get_final_message() for stream in client.beta.messages.tool_runner(stream=True, **how)]
    assert asked == [("Oslo", 2)] * 2
    assert text_of(last) == text_of(streamed[-1]) == "Result: rain"
    assert (last.stop_reason, [each.stop_reason for each in streamed]) == ("end_turn", ["tool_use", "end_turn"])


def test_arguments_that_are_no_object_are_wrapped() -> None:
    whole = CHAT.continuation('<tool_call>\n{"name": "weather", "arguments": {"city": Oslo}}\n</tool_call>')
    cut = CHAT.continuation('<tool_call>\n{"name": "weather", "arguments": {"city": "Os')
    for ids, finish, reason in ((whole, "stop", "tool_use"), (cut, "length", "max_tokens")):
        with said_by(Saying(ids, finish)) as client:  # type: ignore[arg-type]
            message = client.messages.create(model="base", messages=ASK, max_tokens=100, tools=TOOLS)
        (use,) = [block for block in message.content if block.type == "tool_use"]
        assert set(use.input) == {"INVALID_JSON"}
        assert str(use.input["INVALID_JSON"]).startswith('{"city": ')
        assert message.stop_reason == reason


def tool_result(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", **fields}]}


USE = {"type": "tool_use", "id": "a", "name": "clock", "input": {}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}


DOCUMENT = {"type": "document", "source": {}}


def asking(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "y"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"top_k": 5}, "top_k"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"top_p": 0.5}, "top_p"),
        (asking(IMAGE), "messages.0.content.0.type"),
        (asking(DOCUMENT), "messages.0.content.0.type"),
        (asking(USE), "messages.0"),
        ({"messages": [*ASK, tool_result(content=[IMAGE])]}, "messages.1.content.0.content.0.type"),
        ({"messages": [*ASK, {"role": "assistant", "content": "I"}]}, "messages"),
        ({"messages": [*ASK, tool_result(content="x")]}, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": [USE]}, *ASK]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2"),
        ({"tools": [{"name": "f", "input_schema": {"type": 3}}]}, "tools.0"),
        ({"tools": [TOOLS[0] | {"input_examples": [{"city": "Oslo"}]}]}, "tools.0.input_examples"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"max_tokens": None}, "max_tokens"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"metadata": {"user_id": "a\u0000"}}, "metadata.user_id"),
        ({"cache_salt": "mine"}, "cache_salt"),
    ],
)
def test_fault_names_its_field(more: dict[str, Any], param: str) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": ASK, **more}
    with pytest.raises(ApiError) as caught:
        parse_request(MessagesRequest, json.dumps(body).encode()).as_chat()
    assert (caught.value.status, caught.value.param) == (400, param)


def test_fields_of_the_clients_without_effect_are_accepted() -> None:
    tool = TOOLS[0] | {"type": "custom", "eager_input_streaming": True, "defer_loading": False, "strict": None}
    fields: dict[str, Any] = {
        "thinking": {"type": "disabled"},
        "mcp_servers": [],
        "container": None,
        "top_k": -1,
        "speed": "standard",
    }
    use = USE | {"caller": {"type": "direct"}, "toolset_name": None}
    said = {"role": "assistant", "content": [{"type": "text", "text": "x", "citations": None}, use]}
    body = {"model": "m", "max_tokens": 5, "messages": [*ASK, said, tool_result()], "tools": [tool], **fields}
    request = parse_request(MessagesRequest, json.dumps(body).encode()).as_chat()
    assert [message.role for message in request.conversation] == ["tools", "user", "assistant", "tool"]


def test_errors_have_anthropics_form(url: str, client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="The model other does not exist") as missing:
        client.messages.create(model="other", max_tokens=5, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="tool_choice requires tools") as bad:
        client.messages.create(**HOW, tool_choice={"type": "any"})
    nested: Any = {"type": "object", "properties": {"x": {"$ref": "#"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.input_schema: the schema is recursive"):
        client.messages.create(**HOW, tools=[{"name": "f", "input_schema": nested, "strict": True}])
    for caught, kind in ((missing, "not_found_error"), (bad, "invalid_request_error")):
        body: Any = caught.value.body
        assert (body["type"], set(body["error"]), body["error"]["type"]) == ("error", {"type", "message"}, kind)
    wrong = httpx.get(f"{url}/v1/messages", trust_env=False)
    assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
    counted = httpx.post(f"{url}/v1/messages/count_tokens", json={}, trust_env=False)
    assert (counted.status_code, counted.json()["error"]["type"]) == (404, "not_found_error")


def test_timeouts_are_errors_of_the_client_before_and_within_a_stream() -> None:
    how: Any = {"model": "courts", "max_tokens": 5, "messages": ASK}
    with (
        scripted_server(ScriptedEngine([60.0]), first_token_timeout_s=0.2) as http,
        messages_client(str(http.base_url)) as client,
    ):
        with pytest.raises(anthropic.APIStatusError, match="without a first token") as late:
            client.messages.create(**how)
        body: Any = late.value.body
        assert (late.value.status_code, body["error"]["type"]) == (504, "timeout_error")
    engine = ScriptedEngine([0.0, 60.0])
    with (
        scripted_server(engine, inter_token_timeout_s=0.2) as http,
        messages_client(str(http.base_url)) as client,
        pytest.raises(anthropic.APIStatusError, match="without a further token"),
    ):
        list(client.messages.create(stream=True, **how))


@pytest.mark.parametrize("state_url", ["sqlite"], indirect=True)
def test_tenant_sends_its_key_in_either_header_and_its_usage_is_recorded(
    server: Running, state: State, two_tenants: dict[str, str]
) -> None:
    key = two_tenants["acme"]
    state.tenants.limit("acme", Limits(requests_per_minute=3))
    how: Any = {**HOW, "metadata": {"user_id": "ann"}}
    with messages_client(server.url, key) as client:
        message = client.messages.create(**how)
    with messages_client(
        server.url, "none", default_headers={"x-api-key": key, "authorization": anthropic.Omit()}
    ) as client:
        with client.messages.stream(**how) as stream:
            final = stream.get_final_message()
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**how | {"model": "recipes"})
        with pytest.raises(anthropic.RateLimitError) as limited:
            client.messages.create(**how)
    assert int(limited.value.response.headers["retry-after"]) > 0
    body: Any = limited.value.body
    assert body["error"]["type"] == "rate_limit_error"
    until(lambda: all(line.outcome for line in state.usage.lines()))
    recorded = [
        (line.tenant, line.end_user, line.prompt_tokens, line.completion_tokens) for line in state.usage.lines()
    ]
    assert recorded == [("acme", "ann", each.usage.input_tokens, each.usage.output_tokens) for each in (message, final)]
    with messages_client(server.url, "wrong") as client, pytest.raises(anthropic.AuthenticationError) as refused:
        client.messages.create(**how)
    body = refused.value.body
    assert body["error"]["type"] == "authentication_error"
    both = {"authorization": f"Bearer {key}", "x-api-key": two_tenants["globex"]}
    twice = httpx.post(f"{server.url}/v1/messages", headers=both, json=HOW, trust_env=False)
    assert (twice.status_code, twice.json()["error"]["type"]) == (400, "invalid_request_error")
