"""llama.cpp's process is killed or hangs in the middle of a command."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
from stages import CASES, FORCED, HANG_S, Stages

from making.command_line import tunewright

pytestmark = pytest.mark.chaos
pytest_plugins = ["chaos_fixtures"]


@contextmanager
def signalled(number: signal.Signals) -> Iterator[list[int]]:
    """Send a signal to the first process of llama.cpp that this process starts, and yield whom it was sent to."""
    found: list[int] = []
    over = threading.Event()

    def watch() -> None:
        until = time.monotonic() + HANG_S
        while not found and not over.is_set() and time.monotonic() < until:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if any("llamacpp" in word for word in child.cmdline()):
                        os.kill(child.pid, number)
                        found.append(child.pid)
                        break
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@pytest.mark.fault("engine", "export")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_export_keeps_nothing_when_llama_cpp_is_killed_or_hangs(
    number: signal.Signals, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["export-gguf"]
    _, after, _ = stages.listed("export-gguf")
    stages.prepare(case.stage)
    command = [word.replace("WORK", str(stages.work)) for word in case.command]
    with monkeypatch.context() as patched, signalled(number) as hit:
        patched.setattr("tunewright.export.gguf.artifact._ANSWER_S", 3.0)
        ran = tunewright(*command, "-p", stages.project)
    assert hit
    assert "Traceback" not in ran.stderr
    assert ran.code == 2, ran
    assert case.state(stages) == []
    assert stages.run(case.command).code == 0
    assert case.state(stages) == after


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault("engine", name)) for name in ("deploy", "promote")]
)
def test_release_is_made_or_not_when_llama_cpp_is_killed_in_its_isolation_test(name: str, stages: Stages) -> None:
    case = CASES["canary" if name == "deploy" else name]
    stages.prepare(case.stage)
    before = case.state(stages)
    words = [*case.command[: -2 if name == "promote" else -len(FORCED[3:])], "--engine", "llamacpp"]
    newest = stages.read("adapters", "list")["adapters"][-1]["name"]
    command = [newest if word == "NEWEST" else word for word in words]
    with signalled(signal.SIGKILL) as hit:
        ran = tunewright(*command, "-p", stages.project)
    assert hit
    assert "Traceback" not in ran.stderr
    found = case.state(stages)
    assert found[: len(before)] == before
    assert (len(found) == len(before) + 1) == (ran.code == 0), ran
    if ran.code != 0:
        assert tunewright(*command, "-p", stages.project).code == 0
    assert len(case.state(stages)) == len(before) + 1
