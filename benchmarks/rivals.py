"""The servers of `serve_rivals.py`: ours on three engines, and others, each with the same base, adapters and rows.

Each is a context manager that starts the server and stops it. Ours is the gateway of `load_host.py`; the others are
started by their own commands:

    vllm            its API server with the engine's settings of tunewright, and `/v1/load_lora_adapter`
    llamacpp        its server with its defaults (`bare_llamacpp.py`), GGUF files as tunewright writes them
    transformers    `transformers serve --continuous-batching` on the base with one adapter merged
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import platformdirs
import psutil
from load_clients import COUNTED, Clients, cold_loads
from load_host import Host
from load_tenants import add_tenants, release

from tunewright.adapters.registry import Adapter
from tunewright.config import EngineName
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.llamacpp import cache_tokens
from tunewright.engines.vllm.engine import PACKAGE, VllmSettings, kv_cache_bytes, max_rank
from tunewright.export.gguf.model import add_tokenizer, gguf_context, write_model
from tunewright.export.weights import Weights
from tunewright.models.loading import context_length, text_settings
from tunewright.open_project import OpenProject
from tunewright.serving.engine_start import lora_file, require_llamacpp
from tunewright.serving.tenants import State

GREEDY = {"temperature": 0.0}
UNENDING = {**GREEDY, **COUNTED, "ignore_eos": True}
START_SECONDS = 300
CACHE_BLOCK = 32
EXTRA = Path(__file__).parents[1] / "build" / "transformers-serve"
"""A folder with fastapi (`pip install --target`), which has a starlette of its own version."""


class UnavailableError(Exception):
    """The server cannot run here; the message says why."""


@dataclass(frozen=True)
class Material:
    """The input that all servers share.

    Args:
        opened: a project that the servers may write to.
        adapters: by tenant.
        folder: for files that are made once and used by several starts.
        rows: of the batch.
    """

    opened: OpenProject
    adapters: Sequence[Adapter]
    folder: Path
    threads: int
    rows: int


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        pid: the process to which all others of the server belong.
        clients: with a key and a model name for each tenant.
        load: makes the adapters of further tenants available, and returns once they are.
    """

    pid: int
    clients: Clients
    load: Callable[[Sequence[int]], None] | None = None

    def processes(self) -> list[psutil.Process]:
        """Return the running processes."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    def memory(self) -> int:
        """Return the bytes of all processes; a page that several share counts once."""
        return sum(int(process.memory_full_info().pss) for process in self.processes())

    def cpu(self) -> float:
        """Return the processor seconds of all processes."""
        every = [process.cpu_times() for process in self.processes()]
        return float(sum(times.user + times.system for times in every))


@dataclass(frozen=True)
class Rival:
    """A kind of server.

    Args:
        start: starts one with the adapters of the first tenants, as many as named.
        most: maximum number of adapters.
        fixed: start it for each number of adapters, because a further one takes a restart.
        limits: what it cannot do of the benchmark's program.
    """

    name: str
    start: Callable[[Material, int], AbstractContextManager[Server]]
    most: int | None = None
    fixed: bool = False
    limits: str = ""


@contextmanager
def _gateway(engine: EngineName, material: Material, count: int) -> Iterator[Server]:
    if engine == "vllm":
        _vllm_environment()
    serve = {"engine": engine, "spare_adapters": len(material.adapters), "max_num_seqs": material.rows}
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/state.sqlite"
        with State(url, "serve_rivals") as state:
            tenants = add_tenants(state, material.adapters)
            for tenant in tenants[:count]:
                release(state, tenant)
            with Host(material.opened.folder.root, url, material.threads, serve=serve) as host:
                keys, aliases = [tenant.key for tenant in tenants], [tenant.alias for tenant in tenants]
                clients = Clients(host.url, keys, aliases, fields=[{**GREEDY, **COUNTED}] * len(tenants))

                async def released(tenant: int) -> None:
                    await asyncio.to_thread(release, state, tenants[tenant])

                def load(numbers: Sequence[int]) -> None:
                    asyncio.run(cold_loads(clients, numbers, released, 0.0, 0.0))

                yield Server(host.pid, clients, load)


@contextmanager
def _vllm(material: Material, count: int) -> Iterator[Server]:
    opened, folders = material.opened, [adapter.folder for adapter in material.adapters]
    dtype = opened.folder.config.train.dtype
    settings = VllmSettings(
        python=_vllm_environment().python,
        cpu=True,
        base=opened.base.folder,
        dtype=dtype,
        room=len(folders),
        max_rank=max_rank(folders),
        max_num_seqs=material.rows,
        kv_cache_bytes=kv_cache_bytes(text_settings(opened.base).to_dict(), dtype, material.rows),
    )
    options = settings.options()
    gate = options.index(f"{PACKAGE}.RouteFilter")
    port = _free_port()
    command = [str(settings.python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), *options[: gate - 1], *options[gate + 1 :]]
    variables = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    names = [f"model-{number:02}" for number in range(len(folders))]
    with _process(command, variables, material, port) as (url, pid):

        def load(numbers: Sequence[int]) -> None:
            for number in numbers:
                body = {"lora_name": names[number], "lora_path": str(folders[number].resolve())}
                httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=START_SECONDS).raise_for_status()

        load(range(count))
        yield Server(pid, Clients(url, [""] * len(names), names, fields=[UNENDING] * len(names)), load)


@contextmanager
def _llamacpp(material: Material, count: int) -> Iterator[Server]:
    opened, base = material.opened, material.opened.base
    try:
        require_llamacpp()
    except UserError as error:
        raise UnavailableError(str(error)) from error
    model = material.folder / "base.gguf"
    if not model.exists():
        weights = Weights(base, "float32", {})
        write_model(model, "base", weights, base, partial(add_tokenizer, opened.chat, None), "f16", LogReporter())
    place = platformdirs.user_cache_path("tunewright") / "gguf"  # as the engine's: an adapter is converted once
    used = material.adapters[:count]
    shape, port = text_settings(base), _free_port()
    settings = {
        "model": str(model),
        "loras": [str(lora_file(place, base, one.digest, one.folder, LogReporter())) for one in used],
        "port": port,
        "rows": material.rows,
        "tokens": cache_tokens(shape.to_dict(), gguf_context(shape), material.rows),
        "threads": material.threads,
    }
    command = [sys.executable, str(Path(__file__).with_name("bare_llamacpp.py")), json.dumps(settings)]
    fields = [
        {**UNENDING, "lora": [{"id": other, "scale": float(other == own)} for other in range(count)]}
        for own in range(count)
    ]
    with _process(command, {}, material, port) as (url, pid):
        yield Server(pid, Clients(url, [""] * count, ["base"] * count, fields=fields))


@contextmanager
def _transformers(material: Material, count: int) -> Iterator[Server]:
    assert count == 1
    if find_spec("fastapi") is None and not EXTRA.exists():
        raise UnavailableError(f"fastapi is not installed: pip install --target build/{EXTRA.name} fastapi")
    base, folders = material.opened.base, [_merged(material, number) for number in (0, 1)]
    port = _free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--host"]
    command += ["127.0.0.1", "--device", "cpu", "--dtype", material.opened.folder.config.train.dtype]
    # By default its key/value cache takes half of the machine's free memory: 14 GB on one of 24 GB.
    tokens = cache_tokens(text_settings(base).to_dict(), context_length(base), material.rows)
    blocks = ["--cb-block-size", str(CACHE_BLOCK), "--cb-num-blocks", str(tokens // CACHE_BLOCK)]
    command += ["--continuous-batching", *blocks]
    with _process(command, {"PYTHONPATH": str(EXTRA)}, material, port) as (url, pid):
        yield Server(pid, Clients(url, [""] * 2, [str(folder) for folder in folders], fields=[GREEDY] * 2))


def _merged(material: Material, number: int) -> Path:
    """Write the base with a tenant's adapter merged, whose answers do not end before their limit."""
    folder = material.folder / f"merged-{number}"
    if not folder.exists():
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base, adapter = material.opened.base.folder, material.adapters[number].folder
        dtype = material.opened.folder.config.train.dtype
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model: Any = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        material.opened.chat.tokenizer.save_pretrained(folder)
    return folder


RIVALS = {
    "embedded": Rival("tunewright, embedded engine", lambda *asked: _gateway("peft", *asked)),
    "gateway-vllm": Rival("tunewright on vLLM", lambda *asked: _gateway("vllm", *asked)),
    "gateway-llamacpp": Rival("tunewright on llama.cpp", lambda *asked: _gateway("llamacpp", *asked), fixed=True),
    "vllm": Rival("vLLM", _vllm),
    "llamacpp": Rival(
        "llama.cpp", _llamacpp, fixed=True, limits="Its adapters are fixed at the start: a further one takes a restart."
    ),
    "transformers": Rival(
        "transformers serve",
        _transformers,
        most=1,
        fixed=True,
        limits="It has no adapters: each is a whole merged model of its own, so only one is measured.",
    ),
}


def _vllm_environment() -> environment.Environment:
    try:
        found = environment.find(environment.VLLM)
    except UserError as error:
        raise UnavailableError(str(error)) from error
    if found.build != "cpu":
        raise UnavailableError("vLLM's environment is the build for a GPU, and this benchmark compares processors")
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def _process(
    command: Sequence[str], variables: Mapping[str, str], material: Material, port: int
) -> Iterator[tuple[str, int]]:
    """Run a server until the block ends; its address and process id, once it answers."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_", "LLAMA"))}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(material.threads), **variables}
    log = material.folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, **settings},
            # A group, so that all of it can be ended, and no session: Linux shares processors out by session.
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _await_health(url, process, log)
        yield url, process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _await_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    said = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    raise RuntimeError(f"the server did not start: {' '.join(process.args[:4])}\n{said}")  # type: ignore[index,arg-type]
