"""An agent loop of OpenAI's client on the engines that are processes or libraries of their own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from engine_kinds import STOPS, TOKENIZER, llamacpp_engine, vllm_engine
from tool_server import client_of

from making.tool_families import family
from tunewright.serving.gateway.auth import AnonymousAuth

ROOM = 2048
"""Context: declared functions alone are 400 tokens, of one byte each."""


class Weather(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2]


class Court(pydantic.BaseModel):
    name: Literal["Ala.", "Fla."]


TOOLS: list[Any] = [openai.pydantic_function_tool(Weather, name="weather")]
COMPACT = {str(TOKENIZER.convert_tokens_to_ids(space)): -50 for space in "ĠĊčĉ"}
"""Random weights would write white space without end."""


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=pytest.mark.vllm), "llamacpp"])
def client(
    request: pytest.FixtureRequest,
    small_base: Path,
    small_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[openai.OpenAI]:
    base = tmp_path_factory.mktemp("agent") / "base"
    shutil.copytree(small_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": ROOM}))
    started = vllm_engine(base) if request.param == "vllm" else llamacpp_engine(base, context=ROOM, tokens=4 * ROOM)
    chat = family("hermes-chatml")
    assert chat.stop_ids == STOPS
    digest, folder = next(iter(small_adapters.items()))
    with started as engine:
        asyncio.run(engine.load(digest, folder))
        with client_of(engine, chat, AnonymousAuth({"base": None, "courts": digest})) as client:
            yield client


def test_agent_loop_calls_a_local_function_and_ends_with_a_formatted_answer(client: openai.OpenAI) -> None:
    asked: list[Weather] = []

    def weather(arguments: str) -> str:
        asked.append(Weather.model_validate_json(arguments))
        return f"{asked[-1].city}: rain"

    messages: list[Any] = [{"role": "user", "content": "How is it?"}]
    how: Any = {"model": "courts", "tools": TOOLS, "max_tokens": 200, "logit_bias": COMPACT, "response_format": Court}
    how |= {"parallel_tool_calls": False}
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]
    for choice in choices:
        (answer,) = client.chat.completions.parse(messages=messages, tool_choice=choice, **how).choices
        assert answer.finish_reason == "tool_calls"
        with client.chat.completions.stream(messages=messages, tool_choice=choice, **how) as stream:
            (streamed,) = stream.get_final_completion().choices
        message = answer.message
        assert message.tool_calls and streamed.message.tool_calls
        assert [call.function for call in streamed.message.tool_calls] == [call.function for call in message.tool_calls]
        messages.append(message)
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": weather(call.function.arguments)})
    assert len(asked) == 2
    (last,) = client.chat.completions.parse(messages=messages, tool_choice="none", **how).choices
    assert isinstance(last.message.parsed, Court) and last.message.tool_calls is None
    messages += [last.message, {"role": "user", "content": "Sure?"}]
    assert client.chat.completions.parse(messages=messages, tool_choice="none", **how).choices[0].message.parsed


@pytest.mark.parametrize(("avoided", "finish"), [("<", "stop"), ("{", "tool_calls")])
def test_free_choice_allows_calls_and_the_format(client: openai.OpenAI, avoided: str, finish: str) -> None:
    """Calls begin with ``<tool_call>`` and the format with a brace: the bias decides between them."""
    how: Any = {"model": "courts", "tools": TOOLS, "max_tokens": 200, "response_format": Court}
    how |= {
        "parallel_tool_calls": False,
        "logit_bias": {**COMPACT, str(TOKENIZER.convert_tokens_to_ids(avoided)): -100},
    }
    (choice,) = client.chat.completions.parse(messages=[{"role": "user", "content": "How is it?"}], **how).choices
    assert choice.finish_reason == finish
    if finish == "stop":
        assert isinstance(choice.message.parsed, Court) and not choice.message.tool_calls
    else:
        assert choice.message.tool_calls and not choice.message.content
        (call,) = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather)
