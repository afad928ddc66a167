"""Evaluations on a Ray cluster of several raylets on this machine: the same evidence as without, also after a loss."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from compute_helpers import Answering, journals, results
from data_helpers import Listener
from parts import failing, ready, released
from raylets import raylets, token_required

from making.command_line import tiny_project
from tunewright.api import Project
from tunewright.compute import open_model_workers
from tunewright.config import ComputeConfig, Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.evaluation.answer_worker import unload
from tunewright.models.bases import Base, base_here, resolve_base

pytestmark = pytest.mark.ray

WAIT_S = 240
EVALUATE = "  batch_size: 2\n  max_new_tokens: 24\n  finalists: 1\n"


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    with token_required():
        yield


@pytest.fixture(scope="module")
def machines(token: None) -> Iterator[Any]:
    """A cluster of two machines with a CPU each."""
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        yield cluster


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with an adapter and nothing answered yet."""
    folder = tiny_project(tmp_path_factory.mktemp("trained") / "project", tiny_base_folder, count=80)
    config = (folder / "tunewright.yaml").read_text()
    (folder / "tunewright.yaml").write_text(
        config.replace("evaluate:\n", f"evaluate:\n{EVALUATE}", 1).replace("[1, 2]", "[1]")
    )
    project = Project(ProjectFolder(folder))
    project.data.add([folder / "pairs.jsonl"])
    project.train()
    return folder


@pytest.fixture(scope="module")
def without(trained: Path) -> dict[str, Any]:
    """The results of the project without a cluster."""
    folder = _copied(trained, trained.parent / "without")
    Project(ProjectFolder(folder)).evaluate()
    return results(folder)


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return _copied(trained, tmp_path / "project")


def _copied(trained: Path, folder: Path) -> Path:
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(".tunewright"))
    return folder


def test_evaluation_is_the_same_on_a_cluster(machines: Any, without: dict[str, Any], project: Path) -> None:
    heard = Listener()
    Project(ProjectFolder(project).on_cluster("auto"), heard).evaluate()
    assert "Cluster: 2 workers with 1 thread" in heard.said
    assert results(project) == without
    assert without["evidence"]["noise_floor"]["items"]
    assert len(without["answers"]) == 2  # of the base, and of the adapter


def _switch_off_the_busy_one(cluster: Any, machines: Sequence[Any]) -> None:
    """Kill everything on the machine that computes a part, once it does."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for machine in machines:
            (raylet,) = machine.all_processes["raylet"]
            processes = psutil.Process(raylet.process.pid).children(recursive=True)
            # Ray names its processes so while they compute.
            if any("ray::_Actor.run" in _name(process) for process in processes):
                # The raylet's workers would notice its end seconds later.
                for process in processes:
                    process.kill()
                cluster.remove_node(machine, allow_graceful=False)
                return
        time.sleep(0.005)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_evaluation_is_the_same_when_the_machine_that_answers_is_killed(
    without: dict[str, Any], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (project / "tunewright.yaml").open("a") as file:
        file.write("compute: {workers: 1}\n")
    with raylets() as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        kill = Thread(target=_switch_off_the_busy_one, args=(cluster, nodes))
        heard = Answering("tuned on test", kill.start)
        Project(ProjectFolder(project).on_cluster("auto"), heard).evaluate()
        kill.join()
    assert [text for text in heard.warned if "lost a worker" in text] == [
        "The cluster lost a worker: its part is computed again by another."
    ]
    assert results(project) == without
    assert capsys.readouterr().out == ""


def _command(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunewright", "evaluate", "--cluster", "auto", "--json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_answers(project: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WAIT_S
    while sum(map(len, journals(project).values())) < 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_head_that_is_lost_is_one_error_and_the_next_command_answers_nothing_twice(
    machines: Any, without: dict[str, Any], project: Path
) -> None:
    with raylets() as cluster:
        cluster.add_node(num_cpus=1)
        stopped = _command(project)
        until = time.monotonic() + WAIT_S
        while sum(map(len, journals(project).values())) < 10:
            assert stopped.poll() is None, stopped.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        out, err = stopped.communicate(timeout=WAIT_S)
    assert stopped.returncode == 2, (out, err)
    assert "The head of the cluster is lost" in json.loads(out)["error"]["what"]
    before = journals(project)
    assert sum(map(len, before.values())) >= 10
    assert not list((project / "evaluations").glob("[!.]*/evidence.json"))
    again = _command(project)
    out, err = again.communicate(timeout=WAIT_S)
    assert again.returncode == 0, (out, err)
    assert results(project) == without
    after = journals(project)
    assert all(after[name][: len(lines)] == lines for name, lines in before.items())
    assert all(len(set(lines)) == len(lines) for lines in after.values())


def _open(base: Base, **compute: Any) -> Any:
    config = Config(compute=ComputeConfig(cluster="auto", **compute))
    return open_model_workers(config, base_here, base, unload, Listener())


def test_machine_without_the_base_is_refused_before_work(tiny_base_folder: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(tiny_base_folder, snapshot)
    base = replace(resolve_base(str(tiny_base_folder), None, tmp_path, Listener()), spec="someone/tiny", commit=commit)
    with raylets() as cluster:
        cluster.add_node(num_cpus=1, env_vars={"HF_HUB_CACHE": str(tmp_path / "cache")})
        with _open(base) as workers:
            assert (workers.count, workers.device, workers.threads) == (1, "cpu", 1)
        cluster.add_node(num_cpus=1, env_vars={"HF_HUB_CACHE": str(tmp_path / "empty")})
        wanted = r"The machine .*: The base someone/tiny is not in its hub cache\nDownload it there: hf download"
        with pytest.raises(UserError, match=wanted), _open(base):
            pass


def test_workers_on_gpus_that_torch_cannot_use_are_refused(project: Path) -> None:
    with raylets() as cluster:
        cluster.add_node(num_cpus=2, num_gpus=1)
        heard = Listener()
        with pytest.raises(UserError, match="computes on cpu, and the cluster's workers are on cuda"):
            Project(ProjectFolder(project).on_cluster("auto"), heard).prompting()
    assert "Cluster: 1 worker with a GPU" in heard.said


def test_too_few_workers_are_refused(machines: Any, tiny_base_folder: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny_base_folder), None, tmp_path, Listener())
    with (
        pytest.raises(UserError, match=r"has room for 2 workers with 1 thread \(compute\.workers: 3\)"),
        _open(base, workers=3),
    ):
        pass


def test_worker_whose_engine_fails_is_replaced_and_every_worker_releases_what_it_has(tmp_path: Path) -> None:
    config, heard = Config(compute=ComputeConfig(cluster="auto", workers=1)), Listener()
    left, ended = tmp_path / "left", tmp_path / "released"
    ended.mkdir()
    with raylets() as cluster:
        cluster.add_node(num_cpus=1, env_vars={"RELEASED": str(ended)})
        with open_model_workers(config, ready, "", released, heard) as workers:
            left.write_text("2")
            found = dict(workers.each(failing, str(left), [0, 1, 2], 0))
            assert {number: part for number, (part, _) in found.items()} == {0: 0, 1: 1, 2: 2}
            warning = "The engine stopped\nAnother worker computes its part again."
            assert [text for text in heard.warned if "engine" in text] == [warning] * 2
            assert len(list(ended.iterdir())) == 2
        assert len(list(ended.iterdir())) == 3
        assert str(found[1][1]) in {file.name for file in ended.iterdir()}
        left.write_text("9")
        with (
            open_model_workers(config, ready, "", released, heard) as workers,
            pytest.raises(UserError, match="here: The engine stopped\nTry again"),
        ):
            list(workers.each(failing, str(left), [1], 0))
        assert left.read_text() == "5", "four processes have tried"
