"""Crashes, hangs and stops of vLLM, with a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from making.fake_vllm import DIE, ENDLESS, FAIL, LOSE_CORE
from making.vllm_child import StopAfter, alive, ids, settings, wait_until
from tunewright.core.processes import end
from tunewright.engines.child import STOP_SECONDS, PrivateFolder
from tunewright.engines.protocol import EngineStoppedError, RequestFailedError
from tunewright.engines.vllm.engine import VllmEngine
from tunewright.generation.requests import Request

pytestmark = pytest.mark.slow

pytest_plugins = ["making.vllm_child"]


@pytest.mark.fault("engine", "serve")
def test_vllm_restarts_and_fails_running_requests_when_it_crashes(engine: VllmEngine, reporter: StopAfter) -> None:
    async def ask() -> None:
        waiting = asyncio.create_task(ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineStoppedError, match="vLLM crashed"):
            await ids(engine, Request((DIE,), None, 500))
        with pytest.raises(EngineStoppedError):
            await waiting

    asyncio.run(ask())
    wait_until(lambda: engine.stopped is not None)
    assert not engine.permanently_stopped
    with pytest.raises(EngineStoppedError):
        asyncio.run(ids(engine, Request((5,), None, 2)))
    wait_until(lambda: engine.stopped is None)
    assert asyncio.run(ids(engine, Request((5,), None, 2))) == [1, 2]
    assert engine.child.starts == 2
    assert any("crashed" in warning for warning in reporter.warnings)


def test_crash_of_vllms_core_is_not_blamed_on_a_request(engine: VllmEngine) -> None:
    async def ask() -> None:
        with pytest.raises(RequestFailedError, match="not this one"):
            await ids(engine, Request((FAIL,), None, 5))
        waiting = asyncio.create_task(ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        for prompt in (LOSE_CORE, 5):
            with pytest.raises(EngineStoppedError, match="restarting"):
                await ids(engine, Request((prompt,), None, 5))
        with pytest.raises(EngineStoppedError, match="restarting"):
            await waiting

    asyncio.run(ask())
    wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert asyncio.run(ids(engine, Request((5,), None, 2))) == [1, 2]


@pytest.mark.fault("engine", "serve")
def test_vllm_restarts_and_fails_running_requests_when_it_hangs(
    engine: VllmEngine, reporter: StopAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("PATIENCE_SECONDS", 2)):
        monkeypatch.setattr(f"tunewright.engines.child.{name}", seconds)

    async def ask() -> None:
        waiting = asyncio.create_task(ids(engine, Request((ENDLESS,), None, 500)))
        await asyncio.sleep(0.1)
        assert engine.child.process_id is not None
        os.kill(engine.child.process_id, signal.SIGSTOP)
        with pytest.raises(EngineStoppedError):
            await asyncio.wait_for(waiting, 30)

    asyncio.run(ask())
    wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert asyncio.run(ids(engine, Request((5,), None, 2))) == [1, 2]
    assert any("vLLM hung" in warning for warning in reporter.warnings)


@pytest.mark.parametrize("ignores", [False, True])
def test_child_waits_a_limited_time_for_its_helper_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool
) -> None:
    monkeypatch.setattr("tunewright.core.processes.TIDY_SECONDS", 1.0 if ignores else 60.0)
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
    wait_until(lambda: (tmp_path / "tracker").exists() and (tmp_path / "tracker").read_text())
    end(server, STOP_SECONDS)
    assert server.poll() is not None
    assert (tmp_path / "shared-memory").exists() == ignores
    wait_until(lambda: not alive(int((tmp_path / "tracker").read_text())))


def test_vllm_counts_as_hung_when_it_computes_nothing_but_only_with_requests(
    engine: VllmEngine, reporter: StopAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("STUCK_SECONDS", 2)):
        monkeypatch.setattr(f"tunewright.engines.child.{name}", seconds)
    time.sleep(3)
    assert (engine.child.starts, engine.stopped) == (1, None)
    with pytest.raises(EngineStoppedError):
        asyncio.run(ids(engine, Request((ENDLESS,), None, 500)))
    wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)
    assert any("vLLM hung" in warning for warning in reporter.warnings)


def test_hang_is_detected_when_all_clients_disconnect(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PROBE_SECONDS", 0.05), ("STUCK_SECONDS", 2)):
        monkeypatch.setattr(f"tunewright.engines.child.{name}", seconds)

    async def ask_for_a_while() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                await ids(engine, Request((ENDLESS,), None, 500))
        await asyncio.sleep(0.3)

    async def ask() -> None:
        with pytest.raises(EngineStoppedError):
            for _ in range(100):
                await ask_for_a_while()

    asyncio.run(ask())
    wait_until(lambda: engine.child.starts == 2 and engine.stopped is None)


def test_child_is_given_up_after_repeated_crashes(
    engine: VllmEngine, orders: Path, reporter: StopAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright.engines.child._LONGEST_WAIT", 0.05)
    orders.write_text("it is broken")
    assert engine.child.process_id is not None
    os.kill(engine.child.process_id, signal.SIGKILL)
    wait_until(lambda: "Restart the server" in (engine.stopped or ""))
    assert engine.child.starts == 5
    assert engine.permanently_stopped
    assert "it is broken" in reporter.warnings[-1]


def test_hanging_vllm_ends_with_a_killed_gateway_and_the_next_start_removes_its_folder(
    tmp_path: Path, orders: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tunewright.core.progress import LogReporter\n"
        "from tunewright.engines.vllm.engine import VllmEngine, VllmSettings\n"
        "numbers = dict(room=1, max_rank=1, max_num_seqs=1)\n"
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
    wait_until(lambda: not alive(process))
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
