"""Judges that follow a script, behind a real OpenAI-compatible server on loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from making.evidence import make_evidence, make_items
from making.human_evaluations import save
from tunewright.evidence.schema import Item
from tunewright.metrics import normalised
from tunewright.serving.gateway.server import serving

_BLOCK = re.compile(r"<<<(TASK|REFERENCE|ANSWER|ANSWER A|ANSWER B) ([0-9a-f]{12})>>>\n(.*?)\n<<<END \2>>>", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """A question as a judge reads it; ``answers`` are one (correctness) or two (pairwise)."""

    task: str
    reference: str
    answers: tuple[str, ...]

    @property
    def honest(self) -> str:
        """The verdict by comparing with the reference, and with nothing else."""
        right = [normalised(answer) == normalised(self.reference) for answer in self.answers]
        if len(right) == 1:
            return "CORRECT" if right[0] else "INCORRECT"
        return "TIE" if right[0] == right[1] else "A" if right[0] else "B"


def read_prompt(prompt: str) -> Asked:
    """The texts between the markers."""
    blocks = {name: text for name, _, text in _BLOCK.findall(prompt)}
    answers = [text for name, text in blocks.items() if name.startswith("ANSWER")]
    return Asked(blocks["TASK"], blocks.get("REFERENCE", ""), tuple(answers))


Script = Callable[[Asked], str]


def verdict(word: str) -> str:
    """A reply as a well-behaved judge writes it."""
    return f"I compared them.\nVERDICT: {word}"


def honest(asked: Asked) -> str:
    """Compares with the reference."""
    return verdict(asked.honest)


@dataclass
class Server:
    """Requests and scripted misbehaviour of the server."""

    script: Script
    url: str = ""
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    misbehave: Callable[[int], Response | None] = lambda _count: None
    """Called with the number of earlier requests; a response in place of the judge's."""
    finish: str = "stop"
    usage: bool = True
    slow_s: float = 0.0
    wait_for: int = 0
    """No request is answered before this many are there at once."""


@contextmanager
def scripted(script: Script) -> Iterator[Server]:
    """Serve a script at ``url`` while the block runs."""
    server = Server(script)
    lock = threading.Condition()

    def answer(body: dict[str, Any]) -> Response:
        import time

        with lock:
            count = len(server.bodies)
            server.bodies.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            lock.notify_all()
            assert lock.wait_for(lambda: server.most_at_once >= server.wait_for, timeout=300)
        try:
            time.sleep(server.slow_s)
            other = server.misbehave(count)
            if other is not None:
                return other
            prompt = body["messages"][-1]["content"]
            server.prompts.append(prompt)
            text = server.script(read_prompt(prompt)) if "<<<TASK" in prompt else f"An answer to {prompt}"
        finally:
            with lock:
                server.at_once -= 1
        document: dict[str, Any] = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": server.finish}]
        }
        if server.usage:
            document["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        return JSONResponse(document)

    async def chat(http: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        server.keys.append(http.headers.get("authorization"))
        return await run_in_threadpool(answer, json.loads(await http.body()))

    with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])) as url:
        server.url = f"{url}/v1"
        yield server


def write_project(
    folder: Path, judge: dict[str, Any], items: list[Item] | None = None, base: str = "some-base"
) -> Path:
    """A project with one evaluation, ``0123456789ab``, and a judge section; returns the evaluation's folder."""
    items = make_items() if items is None else items
    evidence = make_evidence(items)
    evidence = evidence.model_copy(update={"lineage": {**evidence.lineage, "base": {"spec": base}, "created": "2026"}})
    evaluation = save(folder / "evaluations" / evidence.id, items, evidence)
    (folder / "tunewright.yaml").write_text(
        yaml.safe_dump({"name": "court-citations", "judge": {"controls": 14, **judge}}, sort_keys=False)
    )
    return evaluation
