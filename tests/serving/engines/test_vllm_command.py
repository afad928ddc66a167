"""``tunewright serve --engine vllm`` over two trained adapters, as a user runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

import tunewright
from command_line import tiny_project
from command_line import tunewright as command
from tunewright.adapters.registry import list_adapters

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def project(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters that were trained with other seeds."""
    folder = tiny_project(tmp_path_factory.mktemp("vllm") / "project", small_base, count=80)
    recipe = folder / "tunewright.yaml"
    assert command("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert command("train", "-p", folder).code == 0
    recipe.write_text(recipe.read_text() + "seed: 1\n")
    assert command("train", "-p", folder).code == 0
    assert len(list_adapters(folder / "adapters")) == 2
    return folder


def test_the_self_test_of_trained_adapters_passes(project: Path) -> None:
    ran = command("serve", "--engine", "vllm", "--self-test", "--json", "-p", project)
    assert ran.code == 0, (ran.stdout, ran.stderr)
    told = ran.document
    assert (told["verdict"], told["engine"], len(told["models"])) == ("isolated", "vllm", 3)
    assert all(check["asked"] > 0 and not check["failures"] for check in told["checks"])


def test_a_client_gets_from_vllm_what_it_gets_from_the_embedded_engine(project: Path) -> None:
    road = tunewright.open(project)
    asked = ["violet red teal 17", "navy green blue 4"]

    def answers(engine: Any) -> list[Any]:
        service = road.serve(port=0, engine=engine)
        said: list[Any] = [service.models]
        with service.running() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            for model in service.models:
                for text in asked:
                    messages: Any = [{"role": "user", "content": text}]
                    reply = client.chat.completions.with_raw_response.create(
                        model=model, messages=messages, max_tokens=12
                    )
                    whole = reply.parse()
                    assert whole.usage is not None
                    pieces = client.chat.completions.create(model=model, messages=messages, max_tokens=12, stream=True)
                    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
                    assert streamed == whole.choices[0].message.content
                    header = reply.headers["x-tunewright-adapter"]
                    said.append((header, streamed, whole.choices[0].finish_reason, whole.usage.total_tokens))
                    plain = client.completions.create(model=model, prompt=text, max_tokens=12)
                    said.append((plain.choices[0].text, plain.choices[0].finish_reason))
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="../adapters", messages=messages)
        return said

    assert answers("vllm") == answers("peft")
