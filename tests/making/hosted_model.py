"""A hosted model for tests: a real OpenAI-compatible server on loopback whose answers follow a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
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


def first_word(body: dict[str, Any]) -> dict[str, Any]:
    """The right answer to the rows of `command_line.pairs`."""
    return {"content": body["messages"][-1]["content"].split()[0]}


@dataclass
class StandIn:
    """The server's script, and the requests that it had."""

    message: Callable[[dict[str, Any]], dict[str, Any]] = first_word
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    version: Callable[[int], str] = lambda _count: "stand-in-2026-11-01"
    """Called with the number of earlier requests."""
    finish: Callable[[int], str] = lambda _count: "stop"
    misbehave: Callable[[int], Response | None] = lambda _count: None
    """A response in place of the script's."""
    slow_s: float = 0.0

    @property
    def prompts(self) -> list[str]:
        """The last turn of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def stand_in(message: Callable[[dict[str, Any]], dict[str, Any]] = first_word) -> Iterator[StandIn]:
    """Serve a script while the block runs."""
    import time

    server, lock = StandIn(message), threading.Lock()

    def answer(body: dict[str, Any]) -> Response:
        with lock:
            count = len(server.bodies)
            server.bodies.append(body)
        time.sleep(server.slow_s)
        other = server.misbehave(count)
        if other is not None:
            return other
        choice = {"index": 0, "message": {"role": "assistant", **server.message(body)}}
        return JSONResponse(
            {
                "model": server.version(count),
                "choices": [{**choice, "finish_reason": server.finish(count)}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
        )

    async def chat(http: Request) -> Response:
        return await run_in_threadpool(answer, json.loads(await http.body()))

    with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        server.url = f"{url}/v1"
        yield server


def with_incumbents(project: Path, *incumbents: dict[str, Any], **sections: dict[str, Any]) -> None:
    """Set the project's incumbents, and values of other sections."""
    file = project / "tunewright.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["evaluate"]["incumbents"] = list(incumbents)
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
