"""``tunewright serve`` as a user runs it: a process, the real openai client, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from command_line import tiny_project, tunewright
from tunewright.adapters.registry import find_adapter


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with a trained adapter."""
    folder = tiny_project(tmp_path_factory.mktemp("serve") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    assert tunewright("train", "-p", folder).code == 0
    return folder


@pytest.fixture
def server(project: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The running process and what it said of itself."""
    name = find_adapter(project / "adapters").name
    command = [sys.executable, "-m", "tunewright", "serve", name, f"{name}@step-12", "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "-p", str(project)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            break
    try:
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_base_adapter_and_checkpoint_answer_the_openai_client(
    server: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    process, said = server
    client = openai.OpenAI(base_url=f"{said['url']}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == said["models"]
    assert len(said["models"]) == 3
    answers = {}
    for model in said["models"]:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "red teal navy 7"}], max_tokens=8
        )
        answers[model] = reply.choices[0].message.content
    assert len(set(answers.values())) > 1, answers
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr


def test_serve_refuses_an_address_in_use_before_loading_the_base(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = tunewright("serve", "--port", str(port), "-p", project)
    assert ran.code == 2
    assert f"Cannot listen on 127.0.0.1 port {port}" in ran.stderr
    assert "Loading" not in ran.stderr


def test_serve_names_an_unknown_checkpoint_and_the_existing_ones(project: Path) -> None:
    name = find_adapter(project / "adapters").name
    ran = tunewright("serve", f"{name}@step-13", "-p", project)
    assert (ran.code, "step-12" in ran.stderr) == (2, True)
