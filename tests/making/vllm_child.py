"""vLLM as a child with a stand-in for vLLM: fixtures, and what is asked of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tunewright.core.io import write_json
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.vllm.engine import VllmEngine, VllmSettings
from tunewright.generation.requests import Request

FAKE = Path(__file__).with_name("fake_vllm.py")


class StopAfter(LogReporter):
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
    _write_python(python)
    asked: dict[str, Any] = {"room": 2, "max_rank": 9, "max_num_seqs": 4, "dtype": "float32", **changes}
    return VllmSettings(python=python, cpu=True, base=tmp_path, **asked)


@pytest.fixture
def reporter() -> StopAfter:
    return StopAfter()


@pytest.fixture
def engine(tmp_path: Path, orders: Path, reporter: StopAfter) -> Iterator[VllmEngine]:
    engine = VllmEngine(settings(tmp_path), stop_ids={0}, reporter=reporter)
    try:
        yield engine
    finally:
        engine.stop()


async def ids(engine: VllmEngine, request: Request, tenant: str = "") -> list[int]:
    return [token async for delta in engine.stream(request, tenant=tenant) for token in delta.ids]


def seen(engine: VllmEngine) -> dict[str, Any]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.child.socket))) as client:
        seen: dict[str, Any] = client.get("http://vllm/metrics").json()
        return seen


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Any, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def install_fake(monkeypatch: pytest.MonkeyPatch, folder: Path, build: environment.Build = "cpu") -> None:
    """Have the stand-in found as vLLM's environment of this build, and no other one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("FAKE_ORDERS", str(folder / "orders"))
    place = environment.default_folder(environment.VLLM, build)
    (place / "bin").mkdir(parents=True)
    _write_python(place / "bin" / "python")
    versions = {"vllm": "0.32.0", "torch": "2.13.0+fake", "cuda": build == "cuda"}
    write_json(place / environment.MARK, {"build": build, "pins": "", "versions": versions})


def _write_python(path: Path) -> None:
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    path.chmod(0o755)


def children_of(parent: int) -> list[int]:
    """Processes that this one has started and that are there."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
    return found
