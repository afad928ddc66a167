"""Published SDKs and frameworks with their defaults, against a server over HTTP: only the base URL is changed.

`make test-clients` makes their environments; without them these tests skip.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_scripts import NODE, PYTHON, ROOT, needs_node, needs_python, node, python, run
from served_model import MODELS, build_model, expected_answer, running_server

from tunewright.config import GatewayConfig

pytestmark = pytest.mark.slow  # needs what `make test` does not install

MODEL, QUESTION = "courts", "Which court is this?"
ANSWER_TOKENS = 24
"""The tiny base would fill the context; clients that ask for more, as LangChain's 256, get this many."""


LIMITS = GatewayConfig(max_completion_tokens=ANSWER_TOKENS, max_prompt_tokens=1000)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server whose answer to the question ends at a stop string: some SDKs raise at a limit."""
    model = build_model()
    stop = expected_answer(model, MODELS[MODEL], QUESTION, ANSWER_TOKENS)[12:15]
    with running_server(model, stops=[stop], limits=LIMITS) as address:
        yield f"{address}/v1"


def chat(url: str, *turns: tuple[str, str]) -> tuple[str, dict[str, int]]:
    """The answer to these turns and its usage, by a request with no option at all."""
    messages = [{"role": role, "content": content} for role, content in turns]
    reply = httpx.post(f"{url}/chat/completions", json={"model": MODEL, "messages": messages}, trust_env=False).json()
    return reply["choices"][0]["message"]["content"], reply["usage"]


def text(url: str, prompt: str, max_tokens: int) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens}
    reply = httpx.post(f"{url}/completions", json=body, trust_env=False).json()
    return str(reply["choices"][0]["text"])


def examples() -> Iterator[Any]:
    """The code of docs/how-to/openai-clients.md."""
    page = (ROOT / "docs" / "how-to" / "openai-clients.md").read_text()
    blocks = re.findall(r"^## ([^\n]+)|^```(python|js)\n(.*?)^```", page, re.M | re.S)
    section = ""
    for heading, language, code in blocks:
        section = heading or section
        if language:
            needs = needs_python if language == "python" else needs_node
            own = "from anthropic" in code  # in this environment, too
            yield pytest.param("here" if own else language, code, id=section, marks=() if own else needs)


@pytest.mark.parametrize(("language", "code"), list(examples()))
def test_documented_example_prints_the_answer(url: str, language: str, code: str, tmp_path: Path) -> None:
    base = "http://127.0.0.1:8000"
    for written, here in (
        (base, url.removesuffix("/v1")) if language == "here" else (f"{base}/v1", url),
        ("legal-citations-4402f7ff19bf", MODEL),
        ("Ravenna Municipal Court, Ohio", QUESTION),
    ):
        assert written in code
        code = code.replace(written, here)
    interpreter = {"js": Path("node"), "python": PYTHON, "here": Path(sys.executable)}[language]
    script = NODE / "example.mjs" if language == "js" else tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    printed = run([interpreter], script).splitlines()
    assert printed and set(printed) == {chat(url, ("user", QUESTION))[0]}


def check_openai(got: Any, url: str) -> None:
    answer, usage = chat(url, ("user", QUESTION))
    assert {got["create"], got["stream"], got["stream helper"]} == {answer}
    assert got["usage"] == [usage, usage]
    assert got["repeated"] == chat(url, ("user", QUESTION), ("assistant", answer), ("user", "And?"))[0]
    assert got["texts"] == [[0, text(url, QUESTION, 16)], [1, text(url, "x", 16)]]
    assert got["models"] == ["base", "courts", "recipes", "tickets"]
    assert got["model"] == MODEL


@pytest.mark.parametrize(
    ("interpreter", "version"),
    [
        pytest.param(Path(sys.executable), "3", id="3"),
        pytest.param(PYTHON, "2", id="2", marks=needs_python),
    ],
)
def test_openai_python_works_with_its_defaults(url: str, interpreter: Path, version: str) -> None:
    got = python("openai_client.py", url, MODEL, QUESTION, interpreter=interpreter)
    assert got["version"].startswith(version)
    check_openai(got, url)
    answer, _ = chat(url, ("user", QUESTION))
    assert [got["parse"], got["response"], *got["choices"], *got["async"]] == [answer] * 7
    assert got["labels"] == chat(url, ("system", "Be brief."), ("user", QUESTION))[0]
    assert got["texts usage"]["prompt_tokens"] == len(QUESTION) + 1
    assert got["raised"] == {
        "embeddings": "NotFoundError embeddings_not_supported None",
        "model": "NotFoundError model_not_found model",
        "retrieve": "NotFoundError model_not_found model",
        "tools": "BadRequestError tools_not_supported tools",
        "n": "BadRequestError too_many_choices n",
        "verbosity": "BadRequestError unsupported_parameter verbosity",
        "long": "BadRequestError prompt_too_long messages",
    }


@needs_node
def test_openai_npm_works_with_its_defaults(url: str) -> None:
    got = node("openai_client.mjs", url, MODEL, QUESTION)
    check_openai(got, url)
    assert [got["response"], *got["at once"]] == [got["create"]] * 4
    assert got["raised"] == {
        "embeddings": "NotFoundError embeddings_not_supported null",
        "model": "NotFoundError model_not_found model",
        "retrieve": "NotFoundError model_not_found model",
        "n": "BadRequestError too_many_choices n",
    }
