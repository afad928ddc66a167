"""`data add` killed with SIGKILL at a hundred moments: the dataset always opens at the old version or the new one."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl, write_rows

from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data import versions
from tunewright.data.add import add
from tunewright.data.options import RemoveOptions
from tunewright.data.remove import remove
from tunewright.data.verify import verify
from tunewright.data.versions import checkout, load_version, locked

pytestmark = pytest.mark.slow

# A child that begins as a copy of this process is at work at once, where a new interpreter would first import for a
# second; and it can be killed as dead as any other.
FORK = multiprocessing.get_context("fork")

FILE_CALLS = ("open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of 30 rows, and a file of 30 more; and, for the times, numpy and scipy warmed up."""
    root = tmp_path_factory.mktemp("crash")
    project = new_project(root / "p")
    add(project, [write_jsonl(root / "first.jsonl", unlike_pairs(30, seed=1))], Listener(), message="first")
    write_jsonl(root / "second.jsonl", unlike_pairs(30, seed=2))
    return root


def _fresh(template: Path, folder: Path) -> ProjectFolder:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return ProjectFolder(folder / "p")


def _add_second(project: ProjectFolder) -> str:
    return add(project, [project.root.parent / "second.jsonl"], Listener(), message="second").version.digest


def _die_at(work: Callable[[ProjectFolder], object], project: ProjectFolder, call: int, out: Any = None) -> None:
    """In a child: do the work, killed at the n-th call that touches a file; put out the number of calls otherwise."""
    calls = 0

    def count(event: str, _: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += event in FILE_CALLS
        if event in FILE_CALLS and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work(project)
    if out is not None:
        out.put(calls)


def _exit_code(*arguments: Any) -> int | None:
    """Call :func:`_die_at` in a child, and return the child's exit code."""
    child = FORK.Process(target=_die_at, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def _assert_old_or_new(project: ProjectFolder, old: str, new: str) -> str:
    """The dataset opens, nothing in it is damaged, and adding again gives the new version and no litter."""
    version = load_version(project.dataset)
    assert version.digest in (old, new)
    assert load_version(project.dataset, old).digest == old
    assert verify(OpenFolder(project, Listener())).damage == ()
    with locked(project.dataset):
        assert verify(OpenFolder(project, Listener())).unneeded == 0
    assert _add_second(project) == new
    assert list(project.dataset.rglob(".*")) == []
    return version.digest


@pytest.mark.parametrize("tried", [10, pytest.param(80, marks=pytest.mark.release)])
@pytest.mark.fault("kill", "add")
def test_dataset_is_the_old_or_the_new_version_when_killed_at_any_file_call(
    tried: int, template: Path, tmp_path: Path
) -> None:
    project = _fresh(template, tmp_path / "w")
    old, new = load_version(project.dataset).digest, _add_second(project)
    out = FORK.SimpleQueue()
    assert _exit_code(_add_second, _fresh(template, tmp_path / "w"), 0, out) == 0
    total = out.get()
    seen = set()
    # Rows are written alike; the version's folder and HEAD come last, so of 80 tries each of the last 30 calls is one.
    last = tried * 3 // 8
    before = tried - last
    moments = sorted({*range(total - last + 1, total + 1), *(1 + i * (total - last) // before for i in range(before))})
    assert len(moments) == tried
    for call in moments:
        project = _fresh(template, tmp_path / "w")
        assert _exit_code(_add_second, project, call) == -signal.SIGKILL
        seen.add(_assert_old_or_new(project, old, new))
    assert seen == {old, new}


def test_dataset_is_the_old_or_the_new_version_when_killed_at_random_times(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without it git is asked, and a process that is killed while it starts git may leave it the lock for a moment.
    monkeypatch.setenv("TUNEWRIGHT_AUTHOR", "Ada")
    project = _fresh(template, tmp_path / "w")
    old = load_version(project.dataset).digest
    began = time.perf_counter()
    new = _add_second(project)
    lasts = time.perf_counter() - began
    draw = random.Random(0)
    killed = 0
    for _ in range(20):
        project = _fresh(template, tmp_path / "w")
        child = FORK.Process(target=_add_second, args=(project,))
        child.start()
        time.sleep(draw.uniform(0, lasts))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        _assert_old_or_new(project, old, new)
    assert killed > 0


def _hold(dataset: Path, ready: Any, done: Any) -> None:
    with locked(dataset):
        ready.put(True)
        done.get()


def test_lock_refuses_a_second_writer_and_ends_with_its_process(template: Path, tmp_path: Path) -> None:
    project = _fresh(template, tmp_path / "w")
    old = load_version(project.dataset).digest
    ready, done = FORK.SimpleQueue(), FORK.SimpleQueue()
    child = FORK.Process(target=_hold, args=(project.dataset, ready, done))
    child.start()
    ready.get()
    with pytest.raises(UserError, match="Another command is changing this dataset"):
        _add_second(project)
    assert load_version(project.dataset).digest == old
    child.kill()
    child.join()
    assert _add_second(project) == load_version(project.dataset).digest != old


def test_interrupted_add_leaves_no_rows(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _fresh(template, tmp_path / "w")
    before = {path: path.read_bytes() for path in project.dataset.rglob("*") if path.is_file()}

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions, "write_head", stopped)
    monkeypatch.setattr(versions, "new_folder", stopped)
    with pytest.raises(KeyboardInterrupt):
        _add_second(project)
    assert {path: path.read_bytes() for path in project.dataset.rglob("*") if path.is_file()} == before


def test_missing_head_is_reported_and_nothing_is_added(template: Path, tmp_path: Path) -> None:
    project = _fresh(template, tmp_path / "w")
    old, new = load_version(project.dataset).digest, _add_second(project)
    (project.dataset / "HEAD").unlink()
    [damage] = verify(OpenFolder(project, Listener())).damage
    assert damage.where == str(project.dataset / "HEAD")
    with pytest.raises(UserError, match="HEAD, which names the current version, is missing"):
        _add_second(project)
    checkout(project.dataset, old)
    assert _add_second(project) == new


# A purge


def _purge(project: ProjectFolder) -> None:
    remove(
        OpenFolder(project, Listener()),
        RemoveOptions(because="asked", where="contains(output, 'answer 1')", purge=True),
    )


@pytest.mark.parametrize("every", [31, pytest.param(7, marks=pytest.mark.release)])
def test_purge_killed_at_any_file_call_is_finished_when_repeated(every: int, template: Path, tmp_path: Path) -> None:
    """The version stays whole meanwhile: what is damaged is at most what the log says is purged."""
    project = _fresh(template, tmp_path / "w")
    _add_second(project)
    for seed in (3, 4):
        rows = [{"prompt": p, "completion": c, "id": f"of {c}."} for p, c in unlike_pairs(20, seed)]
        path = write_rows(tmp_path / f"{seed}.jsonl", rows)
        add(project, [path], Listener())
    shutil.copytree(tmp_path / "w", tmp_path / "t")
    texts = [m.example.input_text for m in load_version(project.dataset).members if "answer 1" in m.example.output]
    assert texts
    call, halfway = 1, 0
    while True:
        shutil.rmtree(tmp_path / "w")
        shutil.copytree(tmp_path / "t", tmp_path / "w")
        if (code := _exit_code(_purge, project, call)) == 0:
            break
        assert code == -signal.SIGKILL
        load_version(project.dataset)
        damage = verify(OpenFolder(project, Listener())).damage
        reported = ("was purged on", "Metadata of purged rows is still here")
        assert all(any(words in each.what for words in reported) for each in damage), damage
        halfway += any(reported[1] in each.what for each in damage)
        _purge(project)
        assert verify(OpenFolder(project, Listener())).damage == ()
        kept = b"".join(path.read_bytes() for path in project.dataset.rglob("*") if path.is_file())
        assert not any(text.encode() in kept for text in texts)
        assert b"of answer 1" not in kept
        assert b"of answer 2" in kept
        assert list(project.dataset.rglob(".*")) == []
        call += every  # a purge makes some two hundred
    assert call > 70
    assert halfway > 0
