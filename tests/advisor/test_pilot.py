"""Training rows of the pilots, and their contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import tiny_project, tunewright
from tunewright.advisor.adviser import pilot_parts
from tunewright.config import AdviseConfig
from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.versions import DatasetVersion, load_version


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectFolder, DatasetVersion]:
    """A version of 400 pairs, 320 of them to train on."""
    folder = tiny_project(tmp_path_factory.mktemp("pilot") / "project", Path("no-base"), 400)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    project = ProjectFolder(folder)
    return project, load_version(project.dataset)


def _parts(whole: tuple[ProjectFolder, DatasetVersion], **settings: Any) -> list[set[str]]:
    project, version = whole
    config = project.config.model_copy(update={"advise": AdviseConfig(**settings)})
    parts = pilot_parts(ProjectFolder(project.root, config), version)
    for part in parts:
        assert part.examples("dev") == version.examples("dev")
    return [{m.key for m in part.examples("train")} for part in parts]


def test_smaller_part_is_a_nested_half_of_the_pilot(
    whole: tuple[ProjectFolder, DatasetVersion],
) -> None:
    count = len(whole[1].domain_of("train"))
    half, pilot = _parts(whole, pilot_fraction=0.5)
    assert half < pilot < {m.key for m in whole[1].examples("train")}
    assert len(pilot) == pytest.approx(count / 2, abs=2)
    assert len(half) == pytest.approx(count / 4, abs=2)


def test_pilot_size_respects_minimum_and_config(
    whole: tuple[ProjectFolder, DatasetVersion],
) -> None:
    (pilot,) = _parts(whole, pilot_fraction=0.01)
    assert len(pilot) == pytest.approx(50, abs=2)
    half, pilot = _parts(whole, pilot_fraction=1, pilot_max_samples=120)
    assert len(half) == pytest.approx(60, abs=2)
    assert len(pilot) == pytest.approx(120, abs=2)


def test_pilot_of_all_rows_is_the_version(whole: tuple[ProjectFolder, DatasetVersion]) -> None:
    project, version = whole
    config = project.config.model_copy(update={"advise": AdviseConfig(pilot_fraction=1)})
    assert pilot_parts(ProjectFolder(project.root, config), version)[-1] is version


def test_pilot_is_refused_below_fifty_training_pairs(tmp_path: Path) -> None:
    folder = tiny_project(tmp_path / "project", Path("no-base"), 40)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    project = ProjectFolder(folder)
    with pytest.raises(UserError, match="A pilot needs at least 50 training pairs"):
        pilot_parts(project, load_version(project.dataset))
