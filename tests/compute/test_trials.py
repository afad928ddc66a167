"""Trials on a Ray cluster of several raylets on this machine: the same adapters as without, also when one is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener
from raylets import ONE, Machines, command, wait_until

from making.command_line import tiny_project
from tunewright.adapters.registry import HISTORY, list_adapters
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.evidence.files import EVIDENCE_FILE
from tunewright.training.options import SweepOptions

pytest_plugins = ["raylets"]
pytestmark = pytest.mark.ray

TIMES = {"time", "seconds", "training_seconds", "steps"}
"""What a ledger's line says of the time, and of the steps that were made for it: a lost trial makes some again."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A project with data, whose trainings take seconds."""
    folder = tiny_project(tmp_path_factory.mktemp("trials") / "project", tiny_base_folder, count=90)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace("epochs: 2", "epochs: 16\n  eval_max_samples: 0")
    config.write_text(text.replace("num_fewshot: [1, 2]", "num_fewshot: [1]\n  retrievers: []\n  max_new_tokens: 8"))
    Project(ProjectFolder(folder)).data.add([folder / "pairs.jsonl"])
    return folder


def _copy(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder)
    return folder


def _project(folder: Path, cluster: str | None = None) -> tuple[Project, Listener]:
    heard = Listener()
    return Project(ProjectFolder(folder).on_cluster(cluster), heard), heard


def _folds(folder: Path) -> list[str]:
    found = list_adapters(folder / ".tunewright" / "crossval" / "adapters")
    return sorted(adapter.digest for adapter in found)


def _steps(folder: Path) -> list[int]:
    """The lines of metrics of each training in progress."""
    return [
        len(file.read_bytes().splitlines())
        for file in folder.glob(f".tunewright/*/*/**/{HISTORY}")
        if "adapters" not in file.parts
    ]


def _ledger(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("sweeps/*/ledger.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_sweep_is_the_same_when_a_machine_is_killed(machines: Machines, prepared: Path, tmp_path: Path) -> None:
    here, there = (_copy(prepared, tmp_path / name) for name in ("here", "there"))
    one, _ = _project(here)
    winner = one.sweep(SweepOptions(rates=[0.003]))[0].adapter
    _, victim = machines.have(ONE, ONE)
    project, heard = _project(there, "auto")

    def kill() -> None:
        wait_until(lambda: len(found := _steps(there)) == 2 and min(found) > 5)
        machines.kill(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    also, _ = project.sweep(SweepOptions(rates=[0.003]))
    killer.join()
    assert winner is not None and also.adapter is not None
    assert also.adapter.digest == winner.digest
    assert _ledger(there) == _ledger(here)
    assert any("Resuming from step" in message for message in heard.said)
    assert "Each training takes 1 CPU: up to 2 at once." in heard.said
    assert not list((there / ".tunewright" / "machines").iterdir())


def test_cross_validation_is_the_same_after_its_command_was_killed(
    machines: Machines, prepared: Path, tmp_path: Path
) -> None:
    here, there = (_copy(prepared, tmp_path / name) for name in ("here", "there"))
    whole = _project(here)[0].crossval(folds=2, force=True).folder
    machines.have(ONE, ONE)
    first = command(there, "crossval", "--folds", "2", "--force")
    # Past the first checkpoint, of step 5, whose own evaluation is a line too.
    wait_until(lambda: any(steps > 9 for steps in _steps(there)), first)
    os.killpg(first.pid, signal.SIGKILL)
    output = first.communicate()
    assert first.returncode == -signal.SIGKILL, output
    project, heard = _project(there, "auto")
    again = project.crossval(folds=2, force=True)
    # Ray ends the workers of a killed command a moment later, in which a fold may have ended by itself.
    begun = sum(": Loading" in message for message in heard.said)
    assert begun - sum(": Resuming from step" in message for message in heard.said) < 2
    assert len(_folds(here)) == 2
    assert _folds(there) == _folds(here)
    assert _evidence(again.folder) == _evidence(whole)


def _evidence(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / EVIDENCE_FILE).read_text())
    del found["lineage"]["created"], found["opening"]
    return found


def test_machine_without_the_projects_folder_is_refused_before_work(
    machines: Machines, prepared: Path, tmp_path: Path
) -> None:
    folder = _copy(prepared, tmp_path / "project")
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", str(folder)]).returncode:
        pytest.skip("this user may not mount, so every machine sees the same folders")
    message = "The machine .*: The project's folder is not there"
    with _machine_without(folder, machines), pytest.raises(UserError, match=message):
        _project(folder, "auto")[0].curve(seeds=2)
    assert not (folder / ".tunewright" / "training").exists()


@contextmanager
def _machine_without(hidden: Path, machines: Machines) -> Iterator[None]:
    """A machine with one CPU that sees an empty folder here."""
    machines.have()
    start = f"mount -t tmpfs none {hidden} && exec {sys.executable} -m ray.scripts.scripts start --block --num-cpus 1"
    machine = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{start} --address {machines.cluster.address}"], start_new_session=True
    )
    try:
        wait_until(lambda: machines.alive() == 1)
        yield
    finally:
        os.killpg(machine.pid, signal.SIGKILL)
        machine.wait()
        wait_until(lambda: machines.alive() == 0)
