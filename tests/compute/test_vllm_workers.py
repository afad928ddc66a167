"""Evaluations by real vLLM in workers of a Ray cluster: the same evidence as by vLLM without one, and no orphans."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from compute_helpers import Answering, results
from raylets import WAIT_S, raylets, token_required

from making.command_line import write_jsonl
from tunewright.api import Project
from tunewright.config.project import ProjectFolder

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

CONFIG = """\
name: small
base_model: {base}
data:
  sources: [pairs.jsonl]
train:
  preset: all-linear
  lora_r: 4
  batch_size: 8
  epochs: 1
  dtype: float32
  eval_max_samples: 0
evaluate:
  engine: vllm
  num_fewshot: [1]
  static_seeds: 1
  retrievers: [bm25]
  batch_size: 4
  max_new_tokens: 16
  finalists: 1
regressions:
  samples: 0
"""


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    with token_required():
        yield


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """The folder of temporary files of all processes. Its path is short, for the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="tw-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    tempfile.tempdir = None
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def machines(token: None, temporary: Path) -> Iterator[Any]:
    """A cluster of two machines with a CPU each."""
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        yield cluster


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    """A project with an adapter and nothing answered yet."""
    folder = tmp_path_factory.mktemp("trained") / "project"
    folder.mkdir()
    rows = [{"prompt": f"{n * 7919 % 10007} {'ab' * (n % 7)}", "completion": f"{n * 7919 % 10007}"} for n in range(120)]
    write_jsonl(folder / "pairs.jsonl", rows)
    (folder / "tunewright.yaml").write_text(CONFIG.format(base=small_base))
    project = Project(ProjectFolder(folder))
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return folder


@pytest.fixture(scope="module")
def without(trained: Path, temporary: Path) -> dict[str, Any]:
    """The results of the project by vLLM without a cluster."""
    folder = _copied(trained, trained.parent / "without")
    Project(ProjectFolder(folder)).evaluate()
    return results(folder)


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return _copied(trained, tmp_path / "project")


def _copied(trained: Path, folder: Path) -> Path:
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(".tunewright"))
    return folder


def _vllms(temporary: Path) -> list[psutil.Process]:
    """All processes of vLLM: they run in their private folders."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(f"{temporary}/tunewright-engine-"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _kill_the_busy_worker(temporary: Path, killed: list[psutil.Process]) -> None:
    """Kill the worker that computes a part, but nothing that it has started."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for vllm in _vllms(temporary):
            parent = vllm.parent()
            if parent is not None and "ray::_Actor.run" in " ".join(parent.cmdline()):
                killed += [vllm, *vllm.children(recursive=True)]
                os.kill(parent.pid, signal.SIGKILL)
                return
        time.sleep(0.005)


def test_evaluation_by_vllm_is_the_same_on_a_cluster_and_a_killed_worker_takes_vllm_with_it(
    machines: Any, without: dict[str, Any], project: Path, temporary: Path
) -> None:
    with (project / "tunewright.yaml").open("a") as file:
        file.write("compute: {workers: 1}\n")  # so that another vLLM has to start
    killed: list[psutil.Process] = []
    kill = Thread(target=_kill_the_busy_worker, args=(temporary, killed))
    heard = Answering("tuned on test", kill.start)
    Project(ProjectFolder(project).on_cluster("auto"), heard).evaluate()
    kill.join()
    assert "Cluster: 1 worker with 1 thread" in heard.said
    assert "Answers are computed by vllm: evaluate.engine says so." in heard.said
    assert [text for text in heard.warned if "lost a worker" in text] == [
        "The cluster lost a worker: its part is computed again by another."
    ]
    assert results(project) == without
    assert (without["evidence"]["engine"]["name"], len(without["answers"])) == ("vllm", 2)
    assert "with vllm" in without["evidence"]["noise_floor"]["how"]
    assert len(killed) >= 2, "the server, and the process that computes"
    assert not _vllms(temporary)
    assert not list(temporary.glob("tunewright-engine-*")), "those of the killed worker, too"
