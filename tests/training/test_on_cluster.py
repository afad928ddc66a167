"""Training on a cluster, as far as it needs no Ray: tests/compute/test_training.py has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import tiny_project, tunewright
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.training.checkpoints import stop_on_signal, stopped_from


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
    from tunewright.api import Project

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Processes of a launcher cannot use a cluster"):
        Project(ProjectFolder(project).on_cluster("auto")).train()
