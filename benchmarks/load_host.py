"""The server of `serve_load.py`, in a process of its own: it is told by lines of JSON what to do beside answering.

The first line says what to serve (``project``, ``state``, ``threads``); the answer is its address. Then:

    {"do": "memory"}                            bytes that are this process's own
    {"do": "cpu"}                               seconds of processor time that it has used, all threads together
    {"do": "bare", "asks": [[seconds, prompt, digest, tokens], ...]}
                                                the engine alone, without the gateway, each asked when it is due:
                                                seconds to the first token and to the end of each, and to the end of all
    {"do": "stop"}

Answers have no end but their limit, so that all sides do the same work.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunewright.adapters.registry import list_adapters
from tunewright.models.requests import Request
from tunewright.progress import LogReporter
from tunewright.project import Project
from tunewright.recipe import Recipe
from tunewright.road.opened import OpenProject
from tunewright.road.serving import adapter_of
from tunewright.serving.engines.protocol import Engine
from tunewright.serving.service import Service, Tenancy
from tunewright.serving.state import State


def main() -> None:
    """Serve until told to stop."""
    # What the libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(sys.stdin.readline())
    service = open_service(settings)
    engine: Engine = service._engine
    with service.running() as url:
        print(json.dumps({"url": url}), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "stop":
                break
            print(json.dumps(obey(engine, **order)), file=answers, flush=True)


def obey(engine: Engine, do: str, **order: Any) -> Any:
    """Do what a line says."""
    if do == "memory":
        return own_memory()
    if do == "cpu":
        return time.process_time()
    assert do == "bare"
    return asyncio.run(ask_bare(engine, **order))


def open_service(settings: dict[str, Any]) -> Service:
    """As `tunewright serve` makes one for tenants, of answers that end at their limit only."""
    import torch

    torch.set_num_threads(settings["threads"])
    project = Project(Path(settings["project"]))
    opened = OpenProject(project, LogReporter())
    state = State(settings["state"], "load")
    live = {release.digest for release in state.releases.live().values()}
    folders = {a.name: a.folder for a in list_adapters(project.adapters) if a.digest in live}
    return Service(
        patient(project.recipe),
        opened.base,
        replace(opened.chat, stop_ids=frozenset()),
        "none",
        Tenancy(state, lambda name, digest: adapter_of(opened, name, digest).folder, folders),
        opened.reporter,
    )


def patient(recipe: Recipe) -> Recipe:
    """The recipe on any port, and without the gateway's limits on waits, which are to be measured and not cut off."""
    waits = dict.fromkeys(("queue_s", "first_token_s", "between_tokens_s", "total_s"), 3600.0)
    gateway, serve = recipe.gateway.model_copy(update=waits), recipe.serve.model_copy(update={"port": 0})
    return recipe.model_copy(update={"gateway": gateway, "serve": serve})


async def ask_bare(engine: Engine, asks: list[tuple[float, list[int], str, int]]) -> dict[str, Any]:
    """The engine's own speed."""
    began = time.perf_counter()

    async def ask(due: float, prompt: list[int], digest: str, tokens: int) -> tuple[float, float]:
        if (wait := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked, count, first = time.perf_counter(), 0, 0.0
        async with aclosing(engine.stream(Request(tuple(prompt), digest, tokens))) as deltas:
            async for delta in deltas:
                count += len(delta.ids)
                first = first or time.perf_counter() - asked
        assert count == tokens
        return first, time.perf_counter() - asked

    each = await asyncio.gather(*(ask(*one) for one in asks))
    return {"each": each, "seconds": time.perf_counter() - began}


def own_memory() -> int:
    """Bytes of this process that no file stands behind, after what is free has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's own memory")


if __name__ == "__main__":
    main()
