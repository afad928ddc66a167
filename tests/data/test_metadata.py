"""Keys that nothing uses: kept alike from every kind of file, screened, shown and exported; never part of a digest."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import Listener, new_project, unlike_pairs, write_rows

from making.command_line import tunewright
from tunewright.config import DataConfig
from tunewright.config.project import OpenFolder, ProjectFolder
from tunewright.core.errors import UserError
from tunewright.data.add import add
from tunewright.data.options import AddOptions, RemoveOptions
from tunewright.data.readers import read_pairs
from tunewright.data.readers.file_check import check_files, fix_file
from tunewright.data.readers.validate import MOST_CHARACTERS
from tunewright.data.remove import remove
from tunewright.data.trace import metadata_by_key, places_by_key
from tunewright.data.versions import load_version, version_folder

Row = dict[str, Any]


def _rows(count: int = 20, **more: Any) -> list[Row]:
    return [{"prompt": q, "completion": a, **more} for q, a in unlike_pairs(count)]


def _record(project: ProjectFolder) -> list[Row]:
    digest = load_version(project.dataset).digest
    lines = (version_folder(project.dataset, digest) / "imports.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_extra_keys_become_metadata_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "a", "completion": "b", "id": "r1", "source": "mail", "empty": ""}]
    reading = read_pairs(write_rows(tmp_path / name, rows), DataConfig())
    assert reading.faults == []
    assert [row.metadata for row in reading.rows] == [{"id": "r1", "source": "mail"}]
    ignoring = read_pairs(tmp_path / name, DataConfig(drop_columns=("source",)))
    assert [row.metadata for row in ignoring.rows] == [{"id": "r1"}]
    assert any("dropped by data.drop_columns: source" in note for note in ignoring.notes)


def test_table_values_become_json_and_others_are_reported(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "day": datetime.date(2026, 1, 2), "n": {"x": [1, None]}, "raw": b"\xff"}
    path = write_rows(tmp_path / "a.parquet", [row])
    reading = read_pairs(path, DataConfig())
    assert reading.rows[0].metadata == {"day": "2026-01-02", "n": {"x": [1, None]}}
    assert any("not kept as metadata" in note and note.endswith("raw (1 row)") for note in reading.notes)


def test_long_values_are_dropped_and_counted(tmp_path: Path) -> None:
    reading = read_pairs(write_rows(tmp_path / "a.jsonl", _rows(3, text="x" * MOST_CHARACTERS)), DataConfig())
    assert [row.metadata for row in reading.rows] == [{}] * 3
    assert any(note.endswith("longer than 1,000 characters: text (3 rows)") for note in reading.notes)


def test_invalid_byte_in_an_unused_column_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion,note\né,b,".encode() + b"\xff\n")
    assert [row.metadata for row in read_pairs(path, DataConfig()).rows] == [{}]


def test_metadata_is_recorded_without_changing_digests(tmp_path: Path) -> None:
    plain, project = new_project(tmp_path / "plain"), new_project(tmp_path / "p")
    rows = _rows()
    first = add(plain, [write_rows(tmp_path / "a.jsonl", rows)], Listener())
    listener = Listener()
    with_ids = [{**row, "id": n, "metadata": {"lang": "en"}} for n, row in enumerate(rows)]
    second = add(project, [write_rows(tmp_path / "a.jsonl", with_ids)], listener)
    assert second.version.digest == first.version.digest
    assert [said for said in listener.said if said.startswith("Kept")] == [
        "Kept as metadata: id (20 rows), metadata (20)"
    ]
    assert [line["metadata"] for line in _record(project)] == [{"id": n, "metadata": {"lang": "en"}} for n in range(20)]
    version = load_version(project.dataset)
    found, places = metadata_by_key(project.dataset, version.manifest), places_by_key(project.dataset, version.manifest)
    for member in version.members:
        number = found[member.key]["id"]
        assert with_ids[number]["prompt"] == member.example.input_text
        assert places[member.key] == f"a.jsonl:{number + 1}"


def test_newer_metadata_of_a_known_row_is_stored_with_the_next_version(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = _rows(20, rating=1)
    path = write_rows(tmp_path / "a.jsonl", rows)
    add(project, [path], Listener())
    listener = Listener()
    again = [{**row, "rating": 2} for row in rows]
    assert not add(project, [write_rows(path, again)], listener).created
    assert any("metadata of 20 known rows was not stored" in warned for warned in listener.warned)
    first = Listener()
    add(project, [write_rows(path, [again[0]])], first)
    assert any("metadata of 1 known row was not stored" in warned for warned in first.warned)
    assert not any("Kept as metadata" in said for said in listener.said)
    more = [{"prompt": q, "completion": a, "rating": 3} for q, a in unlike_pairs(5, seed=4)]
    add(project, [write_rows(path, [*again, *more])], Listener())
    found = metadata_by_key(project.dataset, load_version(project.dataset).manifest)
    assert sorted(value["rating"] for value in found.values()) == [2] * 20 + [3] * 5
    unchanged = Listener()
    add(project, [path], unchanged)
    assert not any("not stored" in warned for warned in unchanged.warned)


def test_metadata_of_a_purged_row_is_not_recorded(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    rows = _rows(20)
    add(project, [write_rows(tmp_path / "a.jsonl", rows)], Listener())
    where = "split == 'train' && ends_with(output, '3')"
    gone = remove(OpenFolder(project, Listener()), RemoveOptions(because="asked", where=where, purge=True)).rows
    assert gone
    more = [{"prompt": q, "completion": a, "owner": "Ada"} for q, a in unlike_pairs(5, seed=4)]
    listener = Listener()
    add(project, [write_rows(tmp_path / "b.jsonl", [*({**row, "owner": "Ada"} for row in rows), *more])], listener)
    record = _record(project)
    assert {line["key"] for line in record if line["fate"] == "removed"} == {row.key for row in gone}
    assert all(("metadata" in line) is (line["fate"] != "removed") for line in record)
    assert f"Kept as metadata: owner ({25 - len(gone)} rows)" in listener.said


@pytest.mark.parametrize(
    ("extra", "found", "secret"),
    [
        ({"note": "4539148803436467"}, "payment card number in the key note", "4539"),
        ({"note": 4539148803436467}, "payment card number in the key note", "4539"),
        ({"note": {"pay": ["4539 1488 0343 6467"]}}, "payment card number in the key note", "4539"),
        ({"4539148803436467": "paid"}, "payment card number in a key's name", "4539"),
        ({"password": "hunter2xyz!"}, "password in the key password", "hunter2"),
        ({"metadata": {"password": "hunter2xyz!"}}, "password in the key metadata", "hunter2"),
        ({"login": [{"dbPassword": ["hunter2xyz!"]}]}, "password in the key login", "hunter2"),
    ],
)
def test_secret_metadata_is_refused_by_place_and_redacted(
    tmp_path: Path, extra: dict[str, Any], found: str, secret: str
) -> None:
    project = new_project(tmp_path / "p")
    rows = _rows()
    rows[3] |= extra
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        add(project, [path], Listener())
    assert f"{path}:4: {found}" in str(caught.value)
    assert secret not in str(caught.value)
    assert check_files([path], project.config.data, Listener()).secrets.keys() <= {"password", "card"}
    add(project, [path], Listener(), AddOptions(redact=True))
    [line] = [line for line in _record(project) if "metadata" in line]
    assert "redacted-" in json.dumps(line["metadata"])
    assert not any(secret in file.read_text(encoding="utf-8") for file in project.dataset.rglob("*.jsonl"))


def test_add_accepts_ordinary_metadata(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    extra = {
        "password": True,
        "password_policy": "at least 12 characters",
        "pwd": "/home/user1/work",
        "passwordReset": "2024-01-01T00:00:00Z",
        "url": "https://docs.python.org/3/",
        "20": "24-01-01",
        "call": 20240101,
        "compass": "north2west!",
        "id": "hunter2xyz!",
    }
    listener = Listener()
    add(project, [write_rows(tmp_path / "a.jsonl", [row | extra for row in _rows()])], listener)
    assert not any("data in groups or metadata" in warned for warned in listener.warned)
    assert all(line["metadata"] == extra for line in _record(project))


def test_add_warns_of_personal_data_in_metadata(tmp_path: Path) -> None:
    listener = Listener()
    path = write_rows(tmp_path / "a.jsonl", _rows(20, by="maria@uni-bonn.de"))
    add(new_project(tmp_path / "p"), [path], listener)
    assert any("e-mail address in the key by" in warned for warned in listener.warned)


def test_fix_file_keeps_metadata_except_chat_keys(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "a", "r": "b", "id": 7, "system": "x"}])
    changes = fix_file(path, tmp_path / "out.jsonl", DataConfig(input="q", output="r"))
    [row] = read_pairs(tmp_path / "out.jsonl", DataConfig()).rows
    assert (row.metadata, len(row.example.messages)) == ({"id": 7}, 2)
    assert any(change.what == "keys not in the copy: system" for change in changes)


def test_metadata_is_shown_and_exported_on_request(tmp_path: Path) -> None:
    project = new_project(tmp_path / "p")
    path = write_rows(project.root / "a.jsonl", [{**row, "id": n} for n, row in enumerate(_rows())])
    add(project, [path], Listener())
    shown = tunewright("data", "show", "a.jsonl:3", "-p", project.root)
    assert "id: 2\n" in shown.stderr + shown.stdout
    assert tunewright("data", "show", "a.jsonl:3", "-p", project.root, "--json").document["metadata"] == {"id": 2}
    plain, out = tmp_path / "plain.jsonl", tmp_path / "out.jsonl"
    assert tunewright("data", "export", plain, "-p", project.root).code == 0
    assert {tuple(json.loads(line)) for line in plain.read_text().splitlines()} == {("messages",)}
    assert tunewright("data", "export", out, "--metadata", "-p", project.root).code == 0
    assert sorted(row.metadata["id"] for row in read_pairs(out, DataConfig()).rows) == list(range(20))
    refused = tunewright("data", "export", tmp_path / "x.csv", "--format", "csv", "--metadata", "-p", project.root)
    assert (refused.code, "--metadata requires the format chat (got csv)" in refused.stderr) == (2, True)
