"""Independent trainings in other processes: the same results as here, and what every machine must have for them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import Listener, new_project

from making.command_line import tiny_project, tunewright
from making.pickled_workers import CPUS, PickledCluster, copied
from tunewright.advisor.adviser import pilot_parts, pilot_training
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.core.locks import locked_folder
from tunewright.core.progress import LogReporter, Reporter
from tunewright.core.workers import THIS_PROCESS, Machine, Needs
from tunewright.evaluation.learning_curve import LearningCurve
from tunewright.models.bases import Base, resolve_base
from tunewright.training.checkpoints import stop_on_signal, stopped_from
from tunewright.training.monitoring import DivergedError
from tunewright.training.sweep.successive_halving import Outcome
from tunewright.training.train import train
from tunewright.training.trainings import Job, open_trainings


@pytest.fixture
def base(small_base: Path, tmp_path: Path) -> Base:
    return resolve_base(str(small_base), None, tmp_path, LogReporter())


def _double(base: Base, factor: int, number: int, reporter: Reporter) -> tuple[int, int]:
    reporter.say(f"doubling {number}")
    reporter.warn(f"{number} is odd" if number % 2 else f"{number} is even")
    return factor * number, len(base.files)


def _jobs(folder: Path) -> list[Job[int]]:
    return [Job(f"job {number}", folder / str(number), number) for number in (1, 2)]


@pytest.mark.parametrize("workers", [THIS_PROCESS, PickledCluster()])
def test_jobs_give_their_results_and_messages_in_order(workers: Any, base: Base, tmp_path: Path) -> None:
    heard = Listener()
    with open_trainings(workers, new_project(tmp_path / "project"), base, heard) as trainings:
        results = list(trainings.run(_double, 2, _jobs(tmp_path)))
    assert results == [(2, len(base.files)), (4, len(base.files))]
    assert [message for message in heard.said if "doubling" in message] == ["doubling 1", "doubling 2"]
    assert heard.warned == ["1 is odd", "2 is even"]


def test_training_takes_the_threads_of_this_process(base: Base, tmp_path: Path) -> None:
    workers, heard = PickledCluster(), Listener()
    with open_trainings(workers, new_project(tmp_path / "project"), base, heard) as trainings:
        assert (trainings.at_once, trainings.on_cluster) == (3, True)
        list(trainings.run(_double, 2, _jobs(tmp_path)))
    assert workers.needs == [Needs(cpus=CPUS)]
    assert heard.steps["Training on the cluster"] == (2, 2)


def test_training_takes_a_gpu_where_machines_have_some(base: Base, tmp_path: Path) -> None:
    workers = PickledCluster(Machine("10.0.0.7", 64, 0), Machine("10.0.0.8", 8, 4))
    with open_trainings(workers, new_project(tmp_path / "project"), base, Listener()) as trainings:
        assert trainings.at_once == 4


def test_machines_too_small_for_a_training_are_refused(base: Base, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        small = PickledCluster(Machine("10.0.0.7", 2, 0), Machine("10.0.0.8", 3, 0))
        with (
            pytest.raises(UserError, match=r"Too few CPUs for a training: 3 .*\n.*OMP_NUM_THREADS=3"),
            open_trainings(small, new_project(tmp_path / "project"), base, Listener()),
        ):
            pass
    finally:
        torch.set_num_threads(threads)


def test_cluster_without_a_gpu_is_refused_where_this_machine_trains_on_one(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        pytest.raises(UserError, match="The cluster has no GPU, and this machine trains on one"),
        open_trainings(PickledCluster(), new_project(tmp_path / "project"), base, Listener()),
    ):
        pass


def test_machine_that_sees_a_copy_of_the_project_is_refused(base: Base, tmp_path: Path) -> None:
    def copied(site: Any) -> Any:
        copy = tmp_path / "copy"
        copy.write_text("another")
        return site._replace(file=copy)

    workers = PickledCluster(changed=copied)
    with (
        pytest.raises(UserError, match=r"The machine 10.0.0.8: The project's folder is not there") as caught,
        open_trainings(workers, new_project(tmp_path / "project"), base, Listener()),
    ):
        pass
    assert caught.value.where == str(tmp_path / "project")
    assert not list((tmp_path / "project" / ".tunewright" / "machines").iterdir())


def test_machine_with_another_base_is_refused(base: Base, tmp_path: Path) -> None:
    def changed(site: Any) -> Any:
        return site._replace(base=replace(base, files={**base.files, "config.json": "0"}))

    with (
        pytest.raises(UserError, match=r"The machine 10.0.0.8: The base .* is another one: config.json"),
        open_trainings(PickledCluster(changed=changed), new_project(tmp_path / "project"), base, Listener()),
    ):
        pass


def test_job_waits_for_the_process_of_a_lost_machine_to_end(base: Base, tmp_path: Path) -> None:
    ended: list[float] = []

    def lost() -> None:
        with locked_folder(tmp_path / "1", UserError("busy")):
            held.set()
            time.sleep(0.5)
            ended.append(time.monotonic())

    held = threading.Event()
    thread = threading.Thread(target=lost)
    thread.start()
    held.wait()
    with open_trainings(PickledCluster(), new_project(tmp_path / "project"), base, Listener()) as trainings:
        next(iter(trainings.run(_double, 2, _jobs(tmp_path))))
    assert ended
    thread.join()


def test_diverged_trial_is_pickled_with_its_reason() -> None:
    outcome = copied(Outcome(DivergedError("the loss is nan at step 3", where="train.learning_rate"), 2.0))
    assert isinstance(outcome.result, DivergedError)
    assert (outcome.result.what, outcome.result.where) == ("the loss is nan at step 3", "train.learning_rate")


@pytest.mark.slow
def test_curve_and_pilots_on_a_cluster_are_those_of_this_process(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, heard = [], Listener()
    for name, workers in (("here", THIS_PROCESS), ("there", PickledCluster())):
        folder = tiny_project(tmp_path / name, tiny_base_folder, count=240)
        config = folder / "tunewright.yaml"
        config.write_text(config.read_text().replace("epochs: 2", "epochs: 1"))
        monkeypatch.chdir(folder)  # a project that is opened by a relative path
        project = Project(ProjectFolder(Path()), heard)
        project.data.add([Path("pairs.jsonl")])
        version, chat, own = project.data.version(), project.chat, project.folder
        with open_trainings(workers, own, project.base, heard) as trainings:
            curve = LearningCurve(own, version, project.base, chat, heard, trainings, seeds=2, force=True)
            points.append(curve.run().curve.points)
            parts = pilot_parts(own, version)
            pilots = [pilot_training(own, version, part) for part in parts]
            trainings.train_missing(pilots, chat)
    assert points[0] == points[1]
    assert sum("trained in" in message for message in heard.said) == 6 + len(parts)
    for pilot in pilots:
        place, facts = pilot.adapters, pilot.facts
        assert not train(own, pilot.version, project.base, chat, heard, adapters=place, facts=facts).trained


# One training in several processes: tests/compute/test_training.py has the rest.


def test_run_stops_where_it_is_asked_to_from_elsewhere() -> None:
    asked = [False, False, True]
    with stopped_from(lambda: asked.pop(0)), stop_on_signal() as stop:
        assert [stop.after(step) for step in (1, 2, 3)] == [False, False, True]
    with stop_on_signal() as stop:
        assert not stop.agreed()


@pytest.fixture
def project(tmp_path: Path, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def test_fsdp_without_a_cluster_is_refused(project: Path) -> None:
    config = project / "tunewright.yaml"
    config.write_text(f"{config.read_text()}compute: {{fsdp: true}}\n")
    ran = tunewright("train", "-p", project)
    assert ran.code == 2
    assert "compute.fsdp: FSDP needs a cluster" in ran.stderr


def test_processes_of_a_launcher_cannot_use_a_cluster(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Processes of a launcher cannot use a cluster"):
        Project(ProjectFolder(project).on_cluster("auto")).train()
