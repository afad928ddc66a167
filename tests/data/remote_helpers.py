"""Helpers of the push and pull tests: places to push to, a project with data, and one without.

PYTEST_DONT_REWRITE: the tests have imported it before pytest takes the fixtures from it, and nothing is asserted here.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.data.add import add
from tunewright.data.remote import Transfer, pull, push


@dataclass
class Place:
    """Somewhere to push to."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """All files there, by their path below the URL."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        fs.invalidate_cache()
        return {str(path)[len(root.rstrip("/")) + 1 :]: fs.cat_file(path) for path in fs.find(root)}

    def write(self, name: str, data: bytes) -> None:
        """Change a file behind the dataset's back."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        if not self.options:
            fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name}", data)

    def remove(self, name: str) -> None:
        """Lose a file."""
        fs, root = fsspec.core.url_to_fs(self.url, **self.options)
        fs.rm_file(f"{root}/{name}")


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """A real S3 API on loopback."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """A folder."""
    return Place(str(tmp_path / "there"))


# A second for each test: tests/data/test_remote_s3.py pushes to S3 in `make test`.
@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, folder: Place) -> Place:
    """A folder, a dictionary, a bucket."""
    if request.param == "folder":
        return folder
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}/there")
    endpoint = request.getfixturevalue("s3_endpoint")
    options = {"key": "testing", "secret": "testing", "client_kwargs": {"endpoint_url": endpoint}}
    bucket = uuid.uuid4().hex
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return Place(f"s3://{bucket}/there", options)


@pytest.fixture(scope="module")
def pristine_one(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A project with one version of 60 rows."""
    project = new_project(tmp_path_factory.mktemp("one") / "p")
    add_rows(project, 60, 1)
    return project


@pytest.fixture
def one(pristine_one: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    """A copy of a project with one version of 60 rows."""
    shutil.copytree(pristine_one.root, tmp_path / "one")
    return ProjectFolder(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> ProjectFolder:
    """A project without data."""
    return new_project(tmp_path / "two")


def add_rows(project: ProjectFolder, count: int, seed: int) -> str:
    """Add pairs of their own seed; the version's digest."""
    path = write_jsonl(project.root.parent / f"{seed}.jsonl", unlike_pairs(count, seed))
    return add(project, [path], Listener(), message=f"seed {seed}").version.digest


def push_to(project: ProjectFolder, place: Place) -> Transfer:
    """Push to wherever that is."""
    return push(OpenFolder(project, Listener()), place.url, options=place.options)


def pull_from(project: ProjectFolder, place: Place) -> Transfer:
    """Pull from wherever that is."""
    return pull(OpenFolder(project, Listener()), place.url, options=place.options)
