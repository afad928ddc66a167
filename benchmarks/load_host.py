"""The server of the load benchmarks in a separate process, controlled by :class:`Host`.

The protocol is lines of JSON. The first one names what to serve (``project``, ``state``, ``threads``), whether
scheduling is ``fair`` or first come, first served, and changes of the config's section ``serve``. The answer is the
server's address. Then:

    {"do": "memory"}                            private memory of the process in bytes
    {"do": "cpu"}                               processor seconds of all its threads
    {"do": "bare", "asks": [[seconds, prompt, digest, tokens], ...]}
                                                the engine without the gateway, each request at its due time:
                                                seconds to the first token and to the end of each, and to the end of all

It ends with its input. Answers end only at their token limit, so that all sides do the same work.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tunewright.adapters.lineage import SystemPrompt
from tunewright.adapters.registry import list_adapters
from tunewright.chat import ChatFormat
from tunewright.chat.rendering import Tokens
from tunewright.config import Config
from tunewright.config.project import ProjectFolder
from tunewright.core.progress import LogReporter
from tunewright.data.examples import Message
from tunewright.engines.protocol import Engine, stream
from tunewright.generation.requests import Request
from tunewright.open_project import OpenProject
from tunewright.serving.gateway.auth import ServedAdapter
from tunewright.serving.gateway.fair_scheduler import AdmissionQueue, Slot
from tunewright.serving.gateway.server import Service, TenantSource
from tunewright.serving.serve import adapter_of
from tunewright.serving.tenants import State


class Host:
    """The server's process.

    Args:
        fair: schedule requests fairly between tenants; else first come, first served.
        script: another checkout's copy of this file, which serves with that checkout's code.
        environment: of the process.
        serve: changed settings of the config's section ``serve``.
    """

    def __init__(
        self,
        project: Path,
        state: str,
        threads: int,
        *,
        fair: bool = True,
        script: Path = Path(__file__),
        environment: Mapping[str, str] = os.environ,
        serve: Mapping[str, Any] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(threads)},
        )
        self.pid = self._process.pid
        about = {"project": str(project), "state": state, "threads": threads, "fair": fair, "serve": dict(serve or {})}
        self.url: str = self.send(**about)["url"]

    def send(self, **order: Any) -> Any:
        """Send a command and wait for its reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server has ended; what it printed says why")
        return json.loads(line)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class FirstCome(AdmissionQueue):
    """First come, first served: all requests count as one tenant's."""

    @asynccontextmanager
    async def slot(self, tenant: str, prompt: int) -> AsyncIterator[Slot]:  # noqa: ARG002
        async with super().slot("everybody", prompt) as place:
            yield place


def main() -> None:
    """Serve until the input ends."""
    # What the libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(sys.stdin.readline())
    with nullcontext() if settings["fair"] else patch("tunewright.serving.gateway.app.AdmissionQueue", FirstCome):
        service = open_service(settings)
    engine: Engine = service._engine
    with service.running() as url:
        print(json.dumps({"url": url}), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(obey(engine, **order)), file=answers, flush=True)


def obey(engine: Engine, do: str, **order: Any) -> Any:
    """Run the command of a line."""
    if do == "memory":
        return own_memory()
    if do == "cpu":
        return time.process_time()
    assert do == "bare"
    return asyncio.run(ask_bare(engine, **order))


def open_service(settings: dict[str, Any]) -> Service:
    """Create the service as `tunewright serve` does for tenants, with answers that end only at their limit."""
    import torch

    torch.set_num_threads(settings["threads"])
    project = ProjectFolder(Path(settings["project"]))
    opened = OpenProject(project, LogReporter())
    state = State(settings["state"], "load", serving=True)
    live = {release.digest for release in state.releases.live().values()}
    folders = {a.name: a.folder for a in list_adapters(project.adapters) if a.digest in live}
    return Service(
        patient(project.config, settings["serve"]),
        opened.base,
        _endless(opened.chat, settings["serve"]),
        "none",
        # Prompts as long as the clients make them: nothing is added.
        TenantSource(
            state,
            lambda name, digest: ServedAdapter(adapter_of(opened, name, digest).folder, SystemPrompt(None)),
            folders,
        ),
        opened.reporter,
    )


@dataclass(frozen=True)
class _EndlessFormat(ChatFormat):
    """A format without the tokens that end answers."""

    original: ChatFormat | None = None
    """Encodes whole conversations, whose answers do end."""

    def encode(self, messages: Sequence[Message]) -> Tokens:
        assert self.original is not None
        return self.original.encode(messages)


def _endless(chat: ChatFormat, serve: Mapping[str, Any]) -> ChatFormat:
    """Return the format without end tokens; for llama.cpp, which needs one, with one that no conversation has."""
    ends: frozenset[int] = frozenset()
    if serve.get("engine") == "llamacpp":
        ends = frozenset([max(chat.tokenizer.added_tokens_decoder.keys() - chat.stop_ids)])
    return _EndlessFormat(chat.tokenizer, chat.template, ends, chat.encoder, original=chat)


def patient(config: Config, serve: Mapping[str, Any]) -> Config:
    """Return the config with a free port and without the gateway's timeouts, so that all waits are measured.

    Args:
        serve: further changes of the section of this name.
    """
    waits = dict.fromkeys(
        ("queue_timeout_s", "first_token_timeout_s", "inter_token_timeout_s", "total_timeout_s"), 3600.0
    )
    gateway = config.gateway.model_copy(update=waits)
    return config.model_copy(update={"gateway": gateway, "serve": config.serve.model_copy(update={**serve, "port": 0})})


async def ask_bare(engine: Engine, asks: list[tuple[float, list[int], str, int]]) -> dict[str, Any]:
    """Measure the engine without the gateway."""
    began = time.perf_counter()

    async def ask(due: float, prompt: list[int], digest: str, tokens: int) -> tuple[float, float]:
        if (wait := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked, count, first = time.perf_counter(), 0, 0.0
        async with aclosing(stream(engine, Request(tuple(prompt), digest, tokens))) as deltas:
            async for delta in deltas:
                count += len(delta.ids)
                first = first or time.perf_counter() - asked
        assert count == tokens
        return first, time.perf_counter() - asked

    each = await asyncio.gather(*(ask(*one) for one in asks))
    return {"each": each, "seconds": time.perf_counter() - began}


def own_memory() -> int:
    """Return the anonymous memory of this process in bytes, after freed memory was returned to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's own memory")


if __name__ == "__main__":
    main()
