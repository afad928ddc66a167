"""Functions and structured output with published SDKs and frameworks with their defaults: only the base URL changes.

Structured output and required calls come from the embedded engine, whose random weights obey the schemas. Where
the model chooses to call, a scripted model does: this is about what the clients send and read back.
`make test-clients` makes their environments; without them these tests skip.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_scripts import PYTHON, ROOT, needs_node, needs_python, node, python, run
from served_model import STOPS, build_model, running_engine
from tool_server import CallingEngine, tool_server

from making.tool_families import family
from tunewright.config import GatewayConfig

pytestmark = pytest.mark.slow  # needs what `make test` does not install

CHAT = family("hermes-chatml")
MODEL, QUESTION = "courts", "How is it in Oslo for two days?"
ASKED = {"city": "Oslo", "days": 2}
LIMITS = GatewayConfig(max_completion_tokens=200)


def terse_model() -> Any:
    """Random weights that end an answer as soon as its grammar allows."""
    import torch

    model = build_model()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[sorted(STOPS)] = 100
    return model


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """The addresses of an engine that obeys schemas, and of one that calls."""
    with (
        running_engine(terse_model()) as embedded,
        tool_server(embedded, CHAT, limits=LIMITS) as url,
        tool_server(CallingEngine(CHAT), CHAT, limits=LIMITS) as calling,
    ):
        yield f"{url}/v1", f"{calling}/v1"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_documented_curl_commands_print_answers(urls: tuple[str, str], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "openai-clients.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(curl .*?)^```", page, re.MULTILINE | re.DOTALL)
    printed = []
    for number, written in enumerate(commands):
        here = written.replace("http://127.0.0.1:8000/v1", urls[0]).replace("legal-citations-4402f7ff19bf", MODEL)
        assert here.count(urls[0]) == here.count(f'"{MODEL}"') == 1
        script = tmp_path / f"{number}.sh"
        script.write_text(here, encoding="utf-8")
        printed.append(run(["sh"], script))
    whole, stream, schema, call, response, anthropic = printed
    message = json.loads(whole)["choices"][0]["message"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == message["content"]
    assert stream.endswith("data: [DONE]\n\n")
    (called,) = json.loads(call)["choices"][0]["message"]["tool_calls"]
    (item,) = json.loads(response)["output"]
    (block,) = json.loads(anthropic)["content"]
    assert called["function"]["name"] == item["name"] == block["name"] == "set_level"
    assert block["input"]["level"] in ("federal", "state", "municipal")
    for answer in (
        json.loads(schema)["choices"][0]["message"]["content"],
        called["function"]["arguments"],
        item["arguments"],
    ):
        assert json.loads(answer)["level"] in ("federal", "state", "municipal")


def is_weather(value: Any) -> bool:
    return set(value) == {"city", "days"} and value["city"] in ("Oslo", "Rome") and value["days"] in range(1, 10)


def check(got: Any, *, structured: list[str], loops: list[str]) -> None:
    """Check objects against the schema, and that each loop ran the function and answered with its result."""
    for name in structured:
        assert is_weather(got[name]), name
    for name in loops:
        assert got[name] == "Result: Oslo: rain", name
    assert got.get("ran", []) == [ASKED] * len(loops)


@pytest.mark.parametrize(
    "interpreter",
    [pytest.param(Path(sys.executable), id="3"), pytest.param(PYTHON, id="2", marks=needs_python)],
)
def test_openai_python_parses_answers_and_runs_functions(urls: tuple[str, str], interpreter: Path) -> None:
    got = python("openai_tools_client.py", *urls, MODEL, QUESTION, interpreter=interpreter)
    check(got, structured=["parsed", "streamed", "response"], loops=["loop", "stream loop", "responses loop"])
    assert got["required"]["name"] == "weather"
    assert is_weather(got["required"]["arguments"])
    assert [is_weather(each) for each in got["events"]] == [True]


@needs_node
def test_openai_npm_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = node("openai_tools_client.mjs", *urls, MODEL, QUESTION)
    check(got, structured=["parsed"], loops=["loop", "stream loop"])


@needs_python
def test_langchain_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = python("langchain_tools_client.py", *urls, MODEL, QUESTION)
    check(got, structured=["structured", "by function", "json mode"], loops=["loop", "stream loop", "responses loop"])


@needs_python
def test_llamaindex_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = python("llamaindex_tools_client.py", *urls, MODEL, QUESTION)
    assert is_weather(got["structured"])
    assert got["predict and call"] == "Oslo: rain"  # it returns the function's own output
    assert got["agent"] == "Result: Oslo: rain"
    assert got["ran"] == [ASKED] * 2


@needs_python
def test_pydantic_ai_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = python("pydantic_ai_tools_client.py", *urls, MODEL, QUESTION)
    check(got, structured=["output", "native output"], loops=["loop", "stream loop", "responses loop"])


@needs_python
def test_instructor_parses_answers(urls: tuple[str, str]) -> None:
    got = python("instructor_client.py", *urls, MODEL, QUESTION)
    check(got, structured=["create", "partial", "provider", "json schema", "async"], loops=[])


@needs_python
def test_litellm_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = python("litellm_tools_client.py", *urls, MODEL, QUESTION)
    check(got, structured=["structured"], loops=["loop", "stream loop"])


@needs_node
def test_vercel_ai_parses_answers_and_runs_functions(urls: tuple[str, str]) -> None:
    got = node("vercel_tools_client.mjs", *urls, MODEL, QUESTION)
    for provider in ("compatible", "openai", "responses"):
        assert is_weather(got[provider]["object"]), provider
        assert is_weather(got[provider]["output"]), provider
        assert got[provider]["loop"] == got[provider]["stream loop"] == "Result: Oslo: rain", provider
    assert got["ran"] == [ASKED] * 6
