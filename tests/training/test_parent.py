"""train.from: training starts from an adapter, and everything that its parent saw counts as seen by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tunewright
from making.command_line import tiny_project
from making.tiny_bases import build_base
from making.training_runs import Heard, new_config, tiny_preference_project
from tunewright.adapters.lineage import trace
from tunewright.adapters.manifest import LOCAL
from tunewright.adapters.registry import Adapter
from tunewright.api import Project
from tunewright.core.errors import UserError
from tunewright.core.io import write_json
from tunewright.data.options import RemoveOptions
from tunewright.data.trace import uses_of_row
from tunewright.training.parent import require_parent

pytestmark = pytest.mark.usefixtures("tiny_base_folder")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> tuple[Path, Adapter]:
    """A project whose first adapter is trained."""
    folder = tiny_preference_project(tmp_path_factory.mktemp("parent") / "project", tiny_base_folder)
    return folder, tunewright.open(folder).train().adapter


@pytest.fixture
def project(trained: tuple[Path, Adapter], tmp_path: Path) -> Path:
    """A copy of that project."""
    return Path(shutil.copytree(trained[0], tmp_path / "project"))


def test_training_starts_from_the_parents_weights(trained: tuple[Path, Adapter], project: Path) -> None:
    """A learning rate that changes no float32 weight gives the parent back, to the bit."""
    new_config(project, {"from": trained[1].name}, learning_rate=1e-30)
    result = tunewright.open(project).train()
    assert result.trained
    assert result.adapter.digest == trained[1].digest


def test_rows_of_the_parent_count_as_trained_by_its_child(trained: tuple[Path, Adapter], project: Path) -> None:
    parent = trained[1]
    opened = tunewright.open(project)
    version = opened.data.version()
    gone, kept = (m.key for m in version.domain_of("train")[:2])
    (project / "keys.txt").write_text(f"{gone}\n")
    opened.data.remove(RemoveOptions(keys=project / "keys.txt", because="asked to"))
    heard = Heard()
    new_config(project, {"from": parent.digest[:12]}, learning_rate=0.001)
    child = tunewright.open(project, heard).train().adapter
    assert child.lineage["parent"]["digest"] == parent.digest
    assert any(f"{parent.name} was trained on 1 row that version" in line for line in heard.lines)
    uses = {use.adapter: use for use in uses_of_row(project / "dataset", project / "adapters", gone)}
    assert (uses[child.name].use, uses[child.name].reason) == (
        "trained",
        f"through {parent.name}, from which it started",
    )
    assert {u.reason for u in uses_of_row(project / "dataset", project / "adapters", kept) if u.use == "trained"} == {
        ""
    }
    shutil.rmtree(project / "adapters" / parent.name)
    (alone,) = uses_of_row(project / "dataset", project / "adapters", gone)
    assert alone.use == "trained"
    assert [each["name"] for each in trace(child, project / "dataset").parents] == [parent.name]


def _imported(adapter: Path) -> None:
    write_json(adapter / LOCAL, {"imported": {"signed": False, "at": "", "source": "", "by": ""}})


def _other_base(adapter: Path) -> None:
    build_base(adapter.parents[1] / "other", seed=1)
    new_config(adapter.parents[1], {}, base_model=adapter.parents[1] / "other")


def _no_version(adapter: Path) -> None:
    lineage = json.loads((adapter / "lineage.json").read_text())
    lineage["dataset"]["digest"] = "0" * 64
    (adapter / "lineage.json").write_text(json.dumps(lineage))
    (adapter / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"lora_r": 8, "use_rslora": "true"}, None, "lora_r is 16, not 8; use_rslora is false, not true"),
        ({"from": "nobody"}, None, "No adapter is named 'nobody'"),
        ({}, _imported, "is a foreign adapter"),
        ({}, _other_base, "was trained on"),
        ({}, _no_version, "which is missing"),
    ],
)
def test_unsuitable_parent_is_refused_before_training(
    trained: tuple[Path, Adapter],
    project: Path,
    settings: dict[str, Any],
    change: Callable[[Path], None] | None,
    words: str,
) -> None:
    new_config(project, {"from": trained[1].name, **settings})
    if change is not None:
        change(project / "adapters" / trained[1].name)
    with pytest.raises(UserError, match=words):
        tunewright.open(project).train()
    assert len(list((project / "adapters").iterdir())) == 1


def test_parent_trained_on_rows_that_are_held_out_now_is_refused(trained: tuple[Path, Adapter], project: Path) -> None:
    new_config(project, {"from": trained[1].name})
    opened = tunewright.open(project)
    version = opened.data.version()
    moved = next(m for m in version.members if m.split == "train")
    other = replace(version, members=tuple(replace(m, split="test") if m is moved else m for m in version.members))
    with pytest.raises(UserError, match=r"was trained on 1 rows that version .* holds out") as caught:
        require_parent(opened.folder, other, opened.base, opened.chat, opened.reporter)
    assert moved.key[:12] in caught.value.what


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (Project.sweep, {"from": "any"}),
        (Project.curve, {"method": "dpo"}),
        (Project.crossval, {"from": "any"}),
        (Project.advise, {"method": "dpo"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_commands_that_train_on_parts_refuse_a_parent_and_a_preference_method(
    command: Callable[[Project], object], settings: dict[str, str], tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    tunewright.open(folder).data.add([folder / "pairs.jsonl"])
    new_config(folder, settings)
    with pytest.raises(UserError, match="trains new adapters on the ideal outputs") as caught:
        command(tunewright.open(folder))
    assert caught.value.where == f"train.{next(iter(settings))}"
