"""Evaluations on a Ray cluster of several raylets on this machine: the same evidence as without, also after a loss."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from compute_helpers import CONFIG, Answering, digests, journals, results
from data_helpers import Listener, Pair, write_jsonl
from parts import failing, ready, released
from raylets import ONE, WAIT_S, Machines, command, raylets, wait_until

from making.command_line import tiny_project
from tunewright.api import Project
from tunewright.compute import open_model_workers
from tunewright.config import ComputeConfig, Config
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.locks import is_locked
from tunewright.evaluation.answer_worker import unload
from tunewright.models.bases import Base, base_here, resolve_base

pytest_plugins = ["raylets"]
pytestmark = pytest.mark.ray

EVALUATE = "  batch_size: 2\n  max_new_tokens: 24\n  finalists: 1\n"


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


def _switch_off_the_busy_one(machines: Machines, nodes: Sequence[Any]) -> None:
    """Kill everything on a machine that computes a part, once one does."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for node in nodes:
            (raylet,) = node.all_processes["raylet"]
            processes = psutil.Process(raylet.process.pid).children(recursive=True)
            # Ray names its processes so while they compute.
            if any("ray::_Actor.run" in _name(process) for process in processes):
                # The raylet's workers would notice its end seconds later.
                for process in processes:
                    process.kill()
                machines.kill(node)
                return
        time.sleep(0.005)


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_evaluation_is_the_same_on_a_cluster_when_a_machine_that_answers_is_killed(
    machines: Machines, without: dict[str, Any], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (project / "tunewright.yaml").open("a") as file:
        file.write("compute: {workers: 2}\n")
    kill = Thread(target=_switch_off_the_busy_one, args=(machines, machines.have(ONE, ONE, ONE)))
    heard = Answering("tuned on test", kill.start)
    Project(ProjectFolder(project).on_cluster("auto"), heard).evaluate()
    kill.join()
    assert "Cluster: 2 workers with 1 thread" in heard.said
    # While it computed a part, or still loaded the base: the other worker may have answered first.
    assert [text[:25] for text in heard.warned if "lost a worker" in text] == ["The cluster lost a worker"]
    assert results(project) == without
    assert without["evidence"]["noise_floor"]["items"]
    assert len(without["answers"]) == 2  # of the base, and of the adapter
    assert capsys.readouterr().out == ""


def test_head_that_is_lost_is_one_error_and_the_next_commands_finish(
    machines: Machines,
    large: tuple[list[Pair], dict[str, str]],
    without: dict[str, Any],
    project: Path,
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "tunewright.yaml").write_text(CONFIG)
    write_jsonl(rows / "pairs.jsonl", large[0])
    add, evaluate = ("data", "add", "--json", "pairs.jsonl"), ("evaluate", "--json")
    with raylets() as cluster:
        cluster.add_node(num_cpus=2)
        adding, answering = command(rows, *add), command(project, *evaluate)
        wait_until(lambda: (rows / "dataset").is_dir() and is_locked(rows / "dataset"), adding)
        # It compares rows. Within a call of Ray, the loss of a machine's object store would end it without a word.
        os.killpg(adding.pid, signal.SIGSTOP)
        wait_until(lambda: sum(map(len, journals(project).values())) >= 10, answering)
        cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        os.killpg(adding.pid, signal.SIGCONT)
        ended = [each.communicate(timeout=WAIT_S) for each in (adding, answering)]
    assert [adding.returncode, answering.returncode] == [2, 2], ended
    assert all("The head of the cluster is lost" in json.loads(out)["error"]["what"] for out, _ in ended)
    before = journals(project)
    assert sum(map(len, before.values())) >= 10
    assert not list((project / "evaluations").glob("[!.]*/evidence.json"))
    assert not (rows / "dataset" / "HEAD").exists()

    machines.have(ONE, ONE)
    again = command(rows, *add), command(project, *evaluate)
    ended = [each.communicate(timeout=WAIT_S) for each in again]
    assert [each.returncode for each in again] == [0, 0], ended
    assert digests(rows / "dataset") == large[1]
    assert results(project) == without
    after = journals(project)
    assert all(after[name][: len(lines)] == lines for name, lines in before.items()), "nothing is answered twice"
    assert all(len(set(lines)) == len(lines) for lines in after.values())


def _open(base: Base, **compute: Any) -> Any:
    config = Config(compute=ComputeConfig(cluster="auto", **compute))
    return open_model_workers(config, base_here, base, unload, Listener())


def test_machine_without_the_base_and_too_few_machines_are_refused_before_work(
    machines: Machines, tiny_base_folder: Path, tmp_path: Path
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--someone--tiny" / "snapshots" / commit
    shutil.copytree(tiny_base_folder, snapshot)
    base = replace(resolve_base(str(tiny_base_folder), None, tmp_path, Listener()), spec="someone/tiny", commit=commit)
    there, lacking = ({**ONE, "env_vars": {"HF_HUB_CACHE": str(tmp_path / name)}} for name in ("cache", "empty"))
    machines.have(there)
    with _open(base) as workers:
        assert (workers.count, workers.device, workers.threads) == (1, "cpu", 1)
    machines.have(there, lacking)
    wanted = r"has room for 2 workers with 1 thread \(compute\.workers: 3\)"
    with pytest.raises(UserError, match=wanted), _open(base, workers=3):
        pass
    wanted = r"The machine .*: The base someone/tiny is not in its hub cache\nDownload it there: hf download"
    with pytest.raises(UserError, match=wanted), _open(base):
        pass


def test_workers_on_gpus_that_torch_cannot_use_are_refused(machines: Machines, project: Path) -> None:
    machines.have({"num_cpus": 2, "num_gpus": 1})
    heard = Listener()
    with pytest.raises(UserError, match="computes on cpu, and the cluster's workers are on cuda"):
        Project(ProjectFolder(project).on_cluster("auto"), heard).prompting()
    assert "Cluster: 1 worker with a GPU" in heard.said


def test_worker_whose_engine_fails_is_replaced_and_every_worker_releases_what_it_has(
    machines: Machines, tmp_path: Path
) -> None:
    config, heard = Config(compute=ComputeConfig(cluster="auto", workers=1)), Listener()
    left, ended = tmp_path / "left", tmp_path / "released"
    ended.mkdir()
    machines.have({**ONE, "env_vars": {"RELEASED": str(ended)}})
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
