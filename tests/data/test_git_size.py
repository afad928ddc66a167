"""A dataset lives in git: what one more row adds to the repository."""

from __future__ import annotations

import subprocess

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.data.add import add


def _git(project: ProjectFolder, *arguments: str, stdin: bytes = b"") -> bytes:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, cwd=project.root, input=stdin, capture_output=True, check=True).stdout


def _commit(project: ProjectFolder) -> None:
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "data")


def _add(project: ProjectFolder, pairs: list[tuple[str, str]], name: str = "pairs.jsonl") -> None:
    add(project, [write_jsonl(project.root / name, pairs)], Listener())
    (project.root / name).unlink()


@pytest.fixture(scope="module", params=["a file of its own", "the file that grew"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A repository with 2,000 rows in one commit, and one more row in the next."""
    project = new_project(tmp_path_factory.mktemp("git") / "p")
    pairs = unlike_pairs(2_001)
    _git(project, "init", "-q")
    _add(project, pairs[:-1])
    _commit(project)
    _git(project, "gc", "-q")
    if request.param == "a file of its own":
        _add(project, pairs[-1:], "one.jsonl")
    else:
        _add(project, pairs)
    _commit(project)
    return project


@pytest.mark.slow
def test_version_takes_under_4_kb_when_one_row_of_2000_is_new(project: ProjectFolder) -> None:
    pack = _git(project, "pack-objects", "--revs", "--thin", "--stdout", "-q", stdin=b"HEAD\n^HEAD~1\n")
    lines = _git(project, "diff", "HEAD~1", "HEAD", "--unified=0", "--no-color").splitlines(keepends=True)
    changed = [line for line in lines if line[:1] in b"+-" and line[:3] not in (b"+++", b"---")]
    assert 0 < len(pack) < 4096
    assert 0 < sum(map(len, changed)) < 4096
