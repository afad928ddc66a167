"""The seed of a run with faults, and projects at each stage of the pipeline to run commands on."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import SEED_VARIABLE, compiled, seed
from stages import Stages

from forked import Server
from scripted_judge import honest, scripted


def pytest_report_header() -> str:
    """Print the seed, which workers inherit through the environment."""
    return f"faults: {SEED_VARIABLE}={seed()} repeats this run's choices"


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The compiled faults.c."""
    return compiled(request.config.cache.mkdir("faults"))


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, library: Path) -> Iterator[Stages]:
    """Projects on a tiny base, and a process that runs commands on them."""
    # In memory where there is such a file system: a sync of a real disk takes milliseconds, and here are thousands.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with (
        tempfile.TemporaryDirectory(prefix="tw-chaos-", dir=place) as folder,
        Server(Path(folder) / "commands", library) as server,
        scripted(honest) as judge,
    ):
        yield Stages(Path(folder), tiny_base_folder, server, judge)


@pytest.fixture(scope="session")
def second(stages: Stages) -> Iterator[Stages]:
    """Another process that runs commands on the same project."""
    with Server(stages.root / "more-commands", stages.server.preload) as server:
        yield Stages(stages.root, stages.base, server, stages.judge)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)
