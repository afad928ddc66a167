"""vLLM's life as a child, with a stand-in for vLLM: what is asked of it, how it dies, and what then happens."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_vllm import DIE, ENDLESS, FAIL, LOSE_CORE

from tunewright.adapters.registry import write_manifest
from tunewright.disk import file_digest, write_json
from tunewright.errors import UserError
from tunewright.models.requests import Request
from tunewright.progress import LogReporter
from tunewright.serving.engines.child import _end
from tunewright.serving.engines.private_folder import PrivateFolder
from tunewright.serving.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.serving.engines.vllm import inside
from tunewright.serving.engines.vllm.engine import VllmEngine, VllmSettings

FAKE = Path(__file__).with_name("fake_vllm.py")


class Told(LogReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose text the stand-in dies of when it starts, if it is there."""
    monkeypatch.setenv("FAKE_ORDERS", str(tmp_path / "orders"))
    return tmp_path / "orders"


def settings(tmp_path: Path, **changes: Any) -> VllmSettings:
    """Of the stand-in."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    python.chmod(0o755)
    asked: dict[str, Any] = {"room": 2, "max_rank": 9, "max_batch": 4, "dtype": "float32", **changes}
    return VllmSettings(python=python, cpu=True, base=tmp_path, **asked)


@pytest.fixture
def reporter() -> Told:
    return Told()


@pytest.fixture
def engine(tmp_path: Path, orders: Path, reporter: Told) -> Iterator[VllmEngine]:
    engine = VllmEngine(settings(tmp_path), stop_ids={0}, reporter=reporter)
    try:
        yield engine
    finally:
        engine.stop()


async def _ids(engine: VllmEngine, request: Request, whose: str = "") -> list[int]:
    return [token async for delta in engine.stream(request, whose=whose) for token in delta.ids]


def _seen(engine: VllmEngine) -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.child.socket))) as client:
        seen: dict[str, Any] = client.get("http://vllm/metrics").json()
        return seen


def test_slots_are_one_more_than_adapters_and_ranks_are_rounded_up(tmp_path: Path) -> None:
    assert [settings(tmp_path, room=room).slots for room in (1, 7)] == [2, 8]
    assert [settings(tmp_path, max_rank=rank).allowed_rank for rank in (1, 4, 16, 17, 257)] == [1, 8, 16, 32, 320]
    options = settings(tmp_path, room=7, max_rank=17).options()
    told = dict(pairwise(options))
    assert (told["--max-loras"], told["--max-cpu-loras"], told["--max-lora-rank"]) == ("8", "8", "32")


def test_nobody_else_reaches_the_socket_and_of_the_routes_only_those_that_are_used(engine: VllmEngine) -> None:
    assert stat.S_IMODE(engine.child.folder.stat().st_mode) == 0o700
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.child.socket)), base_url="http://vllm") as client:
        for path in (
            "/v1/load_lora_adapter",
            "/adapters",
            "/invocations",
            "/docs",
            "/v1/models/",
            "/health/../adapters",
        ):
            assert {client.get(path).status_code, client.post(path, json={}).status_code} <= {404}
        assert client.get("/health").status_code == 200


def test_what_the_callers_environment_says_of_vllm_is_not_handed_on(
    tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", "/")
    engine = VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())
    try:
        environment = _seen(engine)["environment"]
    finally:
        engine.stop()
    ours = {name for name in environment if name.startswith("VLLM_")}
    assert ours == {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_NO_USAGE_STATS",
        "VLLM_PLUGINS",
    }
    assert environment["VLLM_PLUGINS"] == "tunewright_vllm", "and not vLLM's own resolvers"


def test_each_tenant_has_a_cache_of_its_own_and_a_request_says_all_that_decides_its_answer(
    engine: VllmEngine,
) -> None:
    salts = []
    for whose in ("a", "b", "a"):
        request = Request((5, 6), None, 3, temperature=0.5, top_p=0.9, seed=7)
        assert asyncio.run(_ids(engine, request, whose)) == [1, 2, 3]
        body = _seen(engine)["body"]
        salts.append(body.pop("cache_salt"))
    assert salts[0] == salts[2] != salts[1]
    assert len(salts[0]) == 64 and salts[0] != "a"
    assert body == {
        "model": "base",
        "prompt": [5, 6],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop_token_ids": [0],
        "ignore_eos": True,
        "add_special_tokens": False,
        "stream": True,
        "return_token_ids": True,
    }


def test_adapters_are_listed_loaded_and_let_go_and_there_is_room_for_so_many(
    engine: VllmEngine, small_adapters: dict[str, Path]
) -> None:
    (one, first), (two, second), (three, third) = small_adapters.items()

    async def load() -> None:
        await engine.load(one, first)
        await engine.load(two, second)
        with pytest.raises(UserError, match="room for 2 adapters"):
            await engine.load(three, third)
        await engine.unload(one)
        await engine.load(three, third)
        assert await _ids(engine, Request((5,), three, 2)) == [1, 2]
        with pytest.raises(RequestFailedError, match="not loaded"):
            await _ids(engine, Request((5,), one, 2))

    asyncio.run(load())
    assert len(_seen(engine)["evicted"]) == 1
    manifest = json.loads((engine.child.folder / "adapters.json").read_text())
    assert {digest: entry["path"] for digest, entry in manifest.items()} == {two: str(second), three: str(third)}


def test_a_name_is_looked_up_and_never_taken_for_a_path(tmp_path: Path, small_adapters: dict[str, Path]) -> None:
    digest, folder = next(iter(small_adapters.items()))
    from tunewright.disk import file_digest

    files = {name: file_digest(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")}
    manifest = tmp_path / "adapters.json"
    manifest.write_text(json.dumps({digest: {"path": str(folder), "files": files}}))
    assert inside.listed(manifest, digest) == str(folder)
    for name in (
        str(folder),
        f"../{folder.name}",
        folder.name,
        digest[:12],
        digest.upper(),
        "",
        "meta-llama/Llama-3.1-8B",
    ):
        assert inside.listed(manifest, name) is None
    changed = {**files, "adapter_config.json": "0" * 64}
    manifest.write_text(json.dumps({digest: {"path": str(folder), "files": changed}}))
    assert inside.listed(manifest, digest) is None


def test_files_are_held_to_the_manifest_that_was_admitted(
    tmp_path: Path, engine: VllmEngine, small_adapters: dict[str, Path]
) -> None:
    digest, source = next(iter(small_adapters.items()))
    folder = tmp_path / "signed-one"
    shutil.copytree(source, folder)
    write_json(folder / "lineage.json", {"digest": digest, "created": "2026-11-25T12:00:00+00:00"})
    write_manifest(folder, "signed-one")
    asyncio.run(engine.load(digest, folder))
    manifest = engine.child.folder / "adapters.json"
    assert json.loads(manifest.read_text())[digest]["manifest"] == file_digest(folder / "manifest.json")
    assert inside.listed(manifest, digest) == str(folder.resolve())

    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-1] + b"\x7f")
    assert inside.listed(manifest, digest) is None, "the file has changed"
    # Nor does it help to change the manifest with it.
    write_manifest(folder, "signed-one")
    assert inside.listed(manifest, digest) is None
    asyncio.run(engine.unload(digest))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="its manifest is not of these files"):
        asyncio.run(engine.load(digest, folder))


def test_when_vllm_does_not_start_its_log_is_told(tmp_path: Path, orders: Path) -> None:
    orders.write_text("no kernel image is available for execution")
    with pytest.raises(UserError, match="no kernel image is available"):
        VllmEngine(settings(tmp_path), stop_ids={0}, reporter=LogReporter())


def test_a_client_that_hangs_up_is_aborted_in_vllm(engine: VllmEngine) -> None:
    async def hang_up() -> None:
        stream = engine.stream(Request((ENDLESS,), None, 500))
        await anext(stream)
        await stream.aclose()

    asyncio.run(hang_up())
    _wait_until(lambda: _seen(engine)["hung_up"] == 1)
    assert engine.under_way == (0, 0)


def test_when_vllm_dies_who_waits_is_told_and_it_is_started_again(engine: VllmEngine, reporter: Told) -> None:
    async def ask() -> None:
        waiting = asyncio.create_task(_ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineStoppedError, match="died while it answered"):
            await _ids(engine, Request((DIE,), None, 500))
        with pytest.raises(EngineStoppedError):
            await waiting

    asyncio.run(ask())
    _wait_until(lambda: engine.stopped is not None)
    assert not engine.dead
    with pytest.raises(EngineStoppedError):
        asyncio.run(_ids(engine, Request((5,), None, 2)))
    _wait_until(lambda: engine.stopped is None)
    assert asyncio.run(_ids(engine, Request((5,), None, 2))) == [1, 2]
    assert engine.child.starts == 2
    assert any("has died" in warning for warning in reporter.warnings)


def test_when_what_computes_behind_vllms_server_dies_nobodys_request_is_at_fault(engine: VllmEngine) -> None:
    async def ask() -> None:
        with pytest.raises(RequestFailedError, match="not this one"):
            await _ids(engine, Request((FAIL,), None, 5))
        waiting = asyncio.create_task(_ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        for prompt in (LOSE_CORE, 5):
            with pytest.raises(EngineStoppedError, match="being started again"):
                await _ids(engine, Request((prompt,), None, 5))
        with pytest.raises(EngineStoppedError, match="being started again"):
            await waiting

    asyncio.run(ask())
    _wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert asyncio.run(_ids(engine, Request((5,), None, 2))) == [1, 2]


def test_vllm_that_hangs_is_killed_and_started_again_and_who_waits_is_told(
    engine: VllmEngine, reporter: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("PATIENCE_SECONDS", 0.2)):
        monkeypatch.setattr(f"tunewright.serving.engines.child.{name}", seconds)

    async def ask() -> None:
        waiting = asyncio.create_task(_ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        assert engine.child.process_id is not None
        os.kill(engine.child.process_id, signal.SIGSTOP)
        with pytest.raises(EngineStoppedError):
            await asyncio.wait_for(waiting, 30)

    asyncio.run(ask())
    _wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert asyncio.run(_ids(engine, Request((5,), None, 2))) == [1, 2]
    assert any("vLLM hangs" in warning for warning in reporter.warnings)


@pytest.mark.parametrize("ignores", [False, True])
def test_what_tidies_up_after_a_server_has_the_time_for_it_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool
) -> None:
    monkeypatch.setattr("tunewright.serving.engines.child.TIDY_SECONDS", 1.0 if ignores else 60.0)
    (tmp_path / "shared-memory").touch()
    tracker = "trap '' TERM; echo $$ > tracker; cat > /dev/null; sleep " + (
        "600" if ignores else "0.3; rm shared-memory"
    )
    program = (
        "import subprocess, sys, time\n"
        "helper = subprocess.Popen(['sh', '-c', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", program, tracker], cwd=tmp_path, start_new_session=True)
    _wait_until(lambda: (tmp_path / "tracker").exists() and (tmp_path / "tracker").read_text())
    _end(server)
    assert server.poll() is not None
    assert (tmp_path / "shared-memory").exists() == ignores
    _wait_until(lambda: not _alive(int((tmp_path / "tracker").read_text())))


def test_vllm_that_answers_probes_and_computes_nothing_hangs_too_but_not_while_nothing_is_asked_of_it(
    engine: VllmEngine, reporter: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("STUCK_SECONDS", 0.5)):
        monkeypatch.setattr(f"tunewright.serving.engines.child.{name}", seconds)
    time.sleep(2)
    assert (engine.child.starts, engine.stopped) == (1, None)
    with pytest.raises(EngineStoppedError):
        asyncio.run(_ids(engine, Request((ENDLESS,), None, 500)))
    _wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert any("vLLM hangs" in warning for warning in reporter.warnings)


def test_that_everybody_gives_up_waiting_does_not_make_vllm_that_computes_nothing_look_well(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("STUCK_SECONDS", 0.5)):
        monkeypatch.setattr(f"tunewright.serving.engines.child.{name}", seconds)

    async def ask_for_a_while() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                await _ids(engine, Request((ENDLESS,), None, 500))
        await asyncio.sleep(0.3)

    async def ask() -> None:
        with pytest.raises(EngineStoppedError):
            for _ in range(100):
                await ask_for_a_while()

    asyncio.run(ask())
    _wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)


def test_what_dies_again_and_again_is_given_up(
    engine: VllmEngine, orders: Path, reporter: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.serving.engines.child._LONGEST_WAIT", 0.05)
    orders.write_text("it is broken")
    assert engine.child.process_id is not None
    os.kill(engine.child.process_id, signal.SIGKILL)
    _wait_until(lambda: "must be restarted" in (engine.stopped or ""))
    assert engine.child.starts == 5
    assert engine.dead
    assert "it is broken" in reporter.warnings[-1]


def test_vllm_does_not_outlive_a_gateway_that_is_killed_though_it_hangs_nor_its_folder_the_next_start(
    tmp_path: Path, orders: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tunewright.progress import LogReporter\n"
        "from tunewright.serving.engines.vllm.engine import VllmEngine, VllmSettings\n"
        "numbers = dict(room=1, max_rank=1, max_batch=1)\n"
        "of = VllmSettings(python=Path(sys.argv[1]), cpu=True, base=Path('/'), dtype='float32', **numbers)\n"
        "engine = VllmEngine(of, stop_ids={0}, reporter=LogReporter())\n"
        "print(engine.child.process_id, flush=True)\n"
        "time.sleep(600)\n"
    )
    python = settings(tmp_path).python
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    gateway = subprocess.Popen(
        [sys.executable, "-c", program, str(python)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(short_folder)},
    )
    try:
        assert gateway.stdout is not None
        process = int(gateway.stdout.readline())
        os.kill(process, signal.SIGSTOP)
        (left,) = short_folder.iterdir()
        PrivateFolder().remove()
        assert (left / "engine.sock").exists(), "it is in use"
    finally:
        gateway.kill()
        gateway.communicate()
    _wait_until(lambda: not _alive(process))
    (others := short_folder / "tunewright-engine-of-others").mkdir()
    (link := short_folder / "tunewright-engine-link").symlink_to(tmp_path)
    (tmp_path / "lock").touch()
    fresh = PrivateFolder()
    assert set(short_folder.iterdir()) == {fresh.path, others, link}
    assert python.exists()
    assert stat.S_IMODE(fresh.path.stat().st_mode) == 0o700
    fresh.remove()
    assert not fresh.path.exists()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For temporary files: the path of a Unix socket has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="tw-") as folder:
        yield Path(folder)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(true: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)
