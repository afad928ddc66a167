"""Teachers that follow a script, behind a real OpenAI-compatible server on loopback, and projects with one."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunewright.serving.gateway.server import serving

LICENSE = "Apache-2.0, outputs may be trained on"

Answer = str | dict[str, Any] | Response
"""A text, an assistant's message, or a whole response."""
Script = Callable[[dict[str, Any], int], Answer]
"""The answer to a request body that was received that often before."""


@dataclass
class Teacher:
    """A running teacher and the requests it got."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    model: Callable[[int], str] = lambda _count: "big-1"
    """The version that it names in its reply to the request of this number."""
    finish: str = "stop"


@contextmanager
def teaching(script: Script) -> Iterator[Teacher]:
    """Serve a script while the block runs."""
    teacher = Teacher()
    seen = Counter[str]()
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> Response:
        text = json.dumps(body, sort_keys=True)
        with lock:
            number, times = len(teacher.bodies), seen[text]
            teacher.bodies.append(body)
            seen[text] += 1
            said = script(body, times)
        if isinstance(said, Response):
            return said
        message = {"role": "assistant", "content": said} if isinstance(said, str) else said
        return JSONResponse(
            {
                "model": teacher.model(number),
                "choices": [{"index": 0, "message": message, "finish_reason": teacher.finish}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
        )

    async def chat(http: Request) -> Response:
        return await run_in_threadpool(answer, json.loads(await http.body()))

    with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        teacher.url = f"{url}/v1"
        yield teacher


def asked(body: dict[str, Any]) -> str:
    """The last turn of a request."""
    return str(body["messages"][-1]["content"])


_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "larch")
_DRAW = random.Random(1)
PEOPLE = [(" ".join(_DRAW.choices(_WORDS, k=8)) + f" {_DRAW.getrandbits(40):x}", f"answer {n}") for n in range(60)]
"""Pairs of people that every test project begins with."""


def teacher_project(folder: Path, url: str | None = None, base: str | None = None, **sections: Any) -> Path:
    """A project with people's pairs added, and a teacher."""
    from tunewright.api import Project
    from tunewright.config.project import ProjectFolder
    from tunewright.core.progress import LogReporter

    folder.mkdir(parents=True)
    generate: dict[str, Any] = {"license": LICENSE, **sections.pop("generate", {})}
    generate |= {"base_url": url, "model": "big"} if url is not None else {}
    config = {"name": "rows", **({"base_model": base} if base else {}), "generate": generate, **sections}
    (folder / "tunewright.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    people = write(folder / "people.jsonl", [{"prompt": p, "completion": c} for p, c in PEOPLE])
    Project(ProjectFolder(folder), LogReporter()).data.add([people])
    return folder


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
