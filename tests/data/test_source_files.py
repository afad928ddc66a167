"""Folders and patterns stand for their files, in the order of names; nothing is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import Listener, new_project, unlike_pairs

import tunewright
from tunewright.core.errors import UserError
from tunewright.data.readers.sources import source_files


def _pairs(path: Path, seed: int = 0, count: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": q, "completion": a} for q, a in unlike_pairs(count, seed=seed))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_source_files_expands_a_folder_and_names_other_files(tmp_path: Path) -> None:
    wanted = [_pairs(tmp_path / "d" / name) for name in ("a.jsonl", "deep/x.json", "z.csv")]
    for name in ("README.md", ".hidden.jsonl", ".git/y.jsonl"):
        _pairs(tmp_path / "d" / name)
    listener = Listener()
    assert source_files([tmp_path / "d"], listener) == wanted
    assert listener.warned == [f"{tmp_path / 'd'}: 1 file ignored because of the suffix: README.md"]


def test_source_files_names_files_relative_to_the_folder(tmp_path: Path) -> None:
    for name in ("dup/x/f.csv", "dup/y/f.csv", "dup/x/notes.md"):
        _pairs(tmp_path / name)
    listener = Listener()
    source_files([tmp_path / "dup", tmp_path / "dup" / "*" / "f.csv"], listener)
    assert [said.rpartition(": ")[2] for said in listener.said] == ["x/f.csv, y/f.csv"] * 2
    assert listener.warned[0].endswith(": x/notes.md")


def test_source_files_expands_a_pattern_without_duplicates(tmp_path: Path) -> None:
    files = [_pairs(tmp_path / f"p{n}.jsonl") for n in (3, 1, 2)]
    assert source_files([files[0], str(tmp_path / "p*.jsonl")], Listener()) == [files[0], files[1], files[2]]
    with pytest.raises(UserError, match="No file matches this pattern"):
        source_files([tmp_path / "q*.jsonl"], Listener())


def test_source_files_refuses_a_folder_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="The folder has no files of pairs"):
        source_files([tmp_path / "d"], Listener())


def test_source_files_treats_a_saved_dataset_as_one_source(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = tmp_path / "d" / "saved"
    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(str(saved))
    other = _pairs(tmp_path / "d" / "a.jsonl")
    assert source_files([saved], Listener()) == [saved]
    assert source_files([tmp_path / "d"], Listener()) == [other, saved]


def test_folder_is_added_and_checked_like_its_files(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    first, second = _pairs(project.root / "data" / "a.jsonl"), _pairs(project.root / "data" / "b.jsonl", seed=1)
    data = tunewright.open(project.root).data
    assert data.check_files([project.root / "data"]).effect.added == 24  # type: ignore[union-attr]
    added = data.add([project.root / "data"])
    assert [source.name for source in added.version.sources] == ["data/a.jsonl", "data/b.jsonl"]
    assert not data.add([first, second]).created
