"""An installation without extras: torch and the packages of `tunewright[train]` cannot be imported here.

`tests/check_wheel.py` repeats some of it in an environment that pip made.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_golden_project import ARCHIVES, missing
from write_project import EXPECTED, READING

from making.command_line import Ran, pairs, tiny_project, write_jsonl
from making.hidden_packages import ROOT, without
from making.tiny_bases import build_base

_RUN = """
import json, sys
from dataclasses import asdict
from making.command_line import tunewright
print(json.dumps([asdict(tunewright(*words)) for words in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process without the packages of `tunewright[train]`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"]["train"]}
    owners = packages_distributions()
    hidden = {module for module, names in owners.items() if extra & {canonicalize_name(name) for name in names}}
    assert {"torch", "peft", "trl", "accelerate"} <= hidden
    return without(hidden, tmp_path_factory.mktemp("hidden"))


def ran(light: dict[str, str], *commands: Sequence[str | Path]) -> list[Ran]:
    """Run commands in one process of this environment."""
    words = json.dumps([list(map(str, each)) for each in commands])
    done = subprocess.run([sys.executable, "-c", _RUN, words], env=light, capture_output=True, text=True, check=True)
    return [Ran(**each) for each in json.loads(done.stdout)]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.name)
def test_a_project_is_read_without_torch(light: dict[str, str], archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    reading = [(*words, "-p", tmp_path, "--json") for words in READING]
    *documents, report = ran(light, *reading, ("report", "-p", tmp_path))
    then = json.loads((tmp_path / EXPECTED).read_text(encoding="utf-8"))["documents"]
    for words, now in zip(READING, documents, strict=True):
        assert missing(then[" ".join(words)], now.document) == [], words
    assert report.code == 0, report.stderr


def test_rows_are_added_without_torch_and_training_names_the_extra(light: dict[str, str], tmp_path: Path) -> None:
    project = tiny_project(tmp_path / "project", build_base(tmp_path / "base"))
    more = write_jsonl(tmp_path / "more.jsonl", pairs(80, seed=7))
    here = ("-p", project, "--json")
    demo = tmp_path / "demo"
    commands = ("train", *here), ("run", *here), ("demo", demo, "--json")
    added, *refused = ran(light, ("data", "add", more, *here), *commands)
    assert added.code == 0, added.stderr
    for each in refused:
        assert each.code == 2
        assert "tunewright[train]" in each.document["error"]["fix"]
        assert "Traceback" not in each.stderr
    assert not list(project.glob("adapters/*"))
    assert not demo.exists()


@contextmanager
def listening(command: Sequence[str], environment: dict[str, str] | None, ready: str) -> Iterator[str]:
    """Run a server and give its address, which stands in the line that begins with ``ready``."""
    out, merged = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=environment, stdout=out, stderr=merged, text=True) as server:
        assert server.stdout is not None
        try:
            lines = []
            for line in server.stdout:
                lines.append(line)
                if line.startswith(ready) and (address := re.search(r"http://[\d.:]+", line)):
                    yield address[0]
                    return
            raise AssertionError("".join(lines))
        finally:
            server.terminate()


@pytest.mark.slow
def test_a_gateway_to_an_engine_elsewhere_answers_without_torch(
    light: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "T0ken" * 8
    monkeypatch.setenv("TUNEWRIGHT_ENGINE_TOKEN", token)
    project = tiny_project(tmp_path / "project", build_base(tmp_path / "base"))
    here = ("--port", "0", "-p", str(project))
    tunewright = (sys.executable, "-m", "tunewright")
    with listening((*tunewright, "engine", "serve", *here), None, "The engine is") as engine:
        config = project / "tunewright.yaml"
        config.write_text(f"{config.read_text(encoding='utf-8')}\nserve:\n  engines: [{engine}]\n", encoding="utf-8")
        environment = {**light, "TUNEWRIGHT_ENGINE_TOKEN": token}
        with listening((*tunewright, "serve", *here), environment, "Serving at") as gateway:
            (model,) = httpx.get(f"{gateway}/v1/models").json()["data"]
            question = {"model": model["id"], "messages": [{"role": "user", "content": "red?"}], "max_tokens": 4}
            answer = httpx.post(f"{gateway}/v1/chat/completions", json=question, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
