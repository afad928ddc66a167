"""The `openai` SDK with functions and structured output, through the gateway, on each engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from engine_kinds import KINDS
from pydantic import BaseModel, Field

from small_models import write_base
from tool_families import family
from tunewright.chat.answers import grammar_compiler
from tunewright.config import GatewayConfig
from tunewright.serving.gateway.app import Gateway
from tunewright.serving.gateway.auth import AnonymousAuth
from tunewright.serving.gateway.preprocess import Tokenization
from tunewright.serving.gateway.server import serving

CHAT = family("hermes-chatml")
QUESTION: Any = [{"role": "user", "content": "Oslo?"}]


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


# Short: the small base has a context of 512 bytes.
PLAIN: Any = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}}
PLAIN["parameters"] |= {"required": ["city"], "additionalProperties": False}
CALL: Any = {
    "tools": [{"type": "function", "function": PLAIN}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}


@pytest.fixture(scope="module", params=KINDS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    base = write_base(tmp_path_factory.mktemp("openai") / "base")
    tokenization = Tokenization(CHAT.prompt, CHAT.continuation, CHAT.text, grammar_compiler(CHAT), (), CHAT)
    with (
        request.param(base) as engine,
        serving(Gateway(engine, AnonymousAuth({"base": None}), tokenization, GatewayConfig()).app) as url,
        openai.DefaultHttpxClient(trust_env=False) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as sdk,
    ):
        yield sdk


def test_parse_returns_an_object_of_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="base", messages=QUESTION, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    response = client.responses.parse(model="base", input="Oslo?", text_format=Weather)
    assert isinstance(response.output_parsed, Weather)


def test_required_call_has_arguments_of_its_schema_whole_and_streamed(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(model="base", messages=QUESTION, **CALL).choices
    with client.chat.completions.stream(model="base", messages=QUESTION, **CALL) as stream:
        final = stream.get_final_completion().choices[0]
    for each in (choice, final):
        (call,) = each.message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        assert each.finish_reason == "tool_calls"


def test_result_of_a_call_is_taken_for_the_next_answer(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model="base", messages=QUESTION, **CALL).choices[0].message
    (call,) = message.tool_calls or []
    messages: Any = [*QUESTION, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = client.chat.completions.create(
        model="base", messages=messages, max_tokens=4, **CALL | {"tool_choice": "none", "parallel_tool_calls": True}
    )
    assert answer.usage and answer.usage.prompt_tokens > len(CHAT.prompt([]))
    assert answer.choices[0].message.tool_calls is None
