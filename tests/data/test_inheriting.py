"""A fresh dataset that keeps the split of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_jsonl

from tunewright.config.project import ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import AddOptions
from tunewright.data.versions import load_version


@pytest.fixture
def old(tmp_path: Path) -> ProjectFolder:
    """A project with 60 rows and a system turn."""
    project = new_project(tmp_path / "old", "data: {system_prompt: Be kind.}\n")
    add(project, [write_jsonl(tmp_path / "old.jsonl", unlike_pairs(60))], Listener())
    return project


def _splits(project: ProjectFolder) -> dict[str, str]:
    return {m.example.input_text: m.split for m in load_version(project.dataset).members}


@pytest.mark.parametrize("named", [".", "dataset"])
def test_inherit_split_keeps_splits_of_shared_inputs(tmp_path: Path, old: ProjectFolder, named: str) -> None:
    new = new_project(tmp_path / "new", "seed: 7\ndata: {system_prompt: Be terse.}\n")
    rows = [(f" {text.upper()}", f"new {answer}") for text, answer in unlike_pairs(60)[5:]]
    listener = Listener()
    path = write_jsonl(tmp_path / "new.jsonl", [*rows, *unlike_pairs(20, seed=3)])
    result = add(new, [path], listener, AddOptions(split_from=old.root / named))
    before = _splits(old)
    now = {text.strip().casefold(): split for text, split in _splits(new).items()}
    shared = {text: split for text, split in before.items() if text in now}
    assert len(shared) == 55
    assert {text: now[text] for text in shared} == shared
    about = result.version.split_from
    assert about is not None
    assert (about.name, about.digest, about.rows) == ("old", load_version(old.dataset).digest, 55)
    assert any("55 of 75 rows inherited" in said for said in listener.said)
    # What comes later keeps it too.
    add(new, [write_jsonl(tmp_path / "more.jsonl", unlike_pairs(20, seed=4))], Listener())
    later = {text.strip().casefold(): split for text, split in _splits(new).items()}
    assert {text: later[text] for text in shared} == shared


def test_inherit_split_moves_a_cluster_with_its_held_out_row(tmp_path: Path, old: ProjectFolder) -> None:
    before = _splits(old)
    test = next(text for text, split in before.items() if split == "test")
    new = new_project(tmp_path / "new")
    rows = [*unlike_pairs(60), (test + "?", "a near one")]
    add(new, [write_jsonl(tmp_path / "new.jsonl", rows)], Listener(), AddOptions(split_from=old.root))
    now = _splits(new)
    assert now[test + "?"] == "test"
    assert {text: now[text] for text in before} == before


def test_inherit_split_counts_rows_that_move(tmp_path: Path) -> None:
    text = "what is the monthly fee for a late payment by credit card in {} if I pay it by hand"
    old = new_project(tmp_path / "old", "data: {dedup_threshold: 0.99}\n")
    family = [(text.format(f"{n:02}"), f"answer {n}") for n in range(10, 40)]
    add(old, [write_jsonl(tmp_path / "a.jsonl", [*family, *unlike_pairs(20)])], Listener())
    assert {split for t, split in _splits(old).items() if t.startswith("what")} >= {"train", "test"}
    new = new_project(tmp_path / "new")
    listener = Listener()
    add(new, [tmp_path / "a.jsonl"], listener, AddOptions(split_from=old.root))
    [reported] = [said for said in listener.said if said.startswith("Split from old")]
    assert "moved, because" in reported
    assert {split for t, split in _splits(new).items() if t.startswith("what")} == {"test"}


@pytest.mark.parametrize("case", ["nothing there", "nothing shared", "not fresh"])
def test_inherit_split_refuses_impossible_cases(tmp_path: Path, old: ProjectFolder, case: str) -> None:
    new = new_project(tmp_path / "new")
    other = write_jsonl(tmp_path / "other.jsonl", unlike_pairs(30, seed=8))
    words = {
        "nothing there": "No dataset there",
        "nothing shared": "share no pair or input with version",
        "not fresh": "already has a split",
    }
    if case == "not fresh":
        add(new, [other], Listener())
    path = tmp_path if case == "nothing there" else old.root
    with pytest.raises(UserError, match=words[case]):
        add(new, [other], Listener(), AddOptions(split_from=path))
