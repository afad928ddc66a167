"""Projects at each stage of the pipeline to run commands on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import compiled
from stages import Stages

from making.forked import Server
from making.scripted_judge import honest, scripted


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The compiled faults.c."""
    return compiled(request.config.cache.mkdir("faults"))


@pytest.fixture(scope="session")
def stages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, library: Path
) -> Iterator[Stages]:
    """Projects on a tiny base, and a process that runs commands on them."""
    # In memory where there is such a file system: a sync of a real disk takes milliseconds, and here are thousands.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with (
        tempfile.TemporaryDirectory(prefix="tw-chaos-", dir=place) as folder,
        Server(Path(folder) / "commands", library) as server,
        scripted(honest) as judge,
    ):
        release = "not release" not in request.config.option.markexpr
        yield Stages(Path(folder), tiny_base_folder, server, judge, release=release)


@pytest.fixture(scope="session")
def second(stages: Stages) -> Iterator[Stages]:
    """Another process that runs commands on the same project."""
    with Server(stages.root / "more-commands", stages.server.preload) as server:
        yield Stages(stages.root, stages.base, server, stages.judge, release=stages.release)
