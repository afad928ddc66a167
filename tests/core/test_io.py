"""Files are written whole or not at all, disk errors are reported in words, and no cell of a sheet is a formula."""

from __future__ import annotations

import csv
import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.csv import read_sheet, restored_cell, safe_cell, write_sheet
from tunewright.core.errors import UserError
from tunewright.core.io import canonical_json, digest, new_file, new_folder, seal, write_json, write_text, writing
from tunewright.core.log import extend

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(blacklist_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), max_size=5), json_values, max_size=5))
def test_digest_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert digest(value) == digest(backwards)
    assert canonical_json(value) == canonical_json(backwards)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RuntimeError, match="halfway"), new_folder(target) as folder:
        write_json(folder / "a.json", {"a": 1})
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        write_json(folder / "a.json", {"a": 1})
        assert not target.exists()
    assert (target / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with new_folder(tmp_path / "target") as folder:
            write_text(folder / "file", text)
    assert (tmp_path / "target" / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def _fill(made: Callable[[Path], Any], path: Path) -> None:
    with made(path) as given:
        (given / "a" if given.is_dir() else given).write_text("a")


def _seal(path: Path) -> None:
    path.mkdir()
    (path / "a").write_text("a")
    seal(path)


FILE, FOLDER = False, True
BEFORE, AFTER = False, True


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: write_text(path, "a"), [(FILE, BEFORE), (FOLDER, AFTER)]),
        (lambda path: _fill(new_file, path), [(FILE, BEFORE)]),
        (lambda path: _fill(new_folder, path), [(FILE, BEFORE), (FOLDER, AFTER)]),
        (lambda path: extend(path, lambda _: "a\n"), [(FILE, AFTER)]),
        (_seal, [(FILE, AFTER), (FOLDER, AFTER), (FILE, AFTER), (FOLDER, AFTER)]),
    ],
    ids=["file", "new file", "new folder", "record", "seal"],
)
def test_content_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], expected: list[tuple[bool, bool]]
) -> None:
    """A loss of power after the rename must not leave an empty file; no other test waits for the disk."""
    synced: list[tuple[bool, bool]] = []
    target = tmp_path / "target"
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), target.exists()))
    )
    write(target)
    assert synced == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "x"), "read-only"),
        (PermissionError(errno.EACCES, "x"), "permission denied"),
    ],
)
def test_disk_errors_become_user_errors(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value.where == str(tmp_path / "file")
    assert "existing files are unchanged" in caught.value.what


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "x"), RuntimeError("bug"), UserError("theirs")])
def test_other_errors_are_not_converted(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path / "file"):
        raise error
    assert caught.value is error


# Text that UTF-8 can hold; half of it begins as formulas and their quoted forms do.
CELL = st.text(st.characters(codec="utf-8"))
TRICKY = st.builds(lambda start, rest: start + rest, st.text(alphabet="'=+-@\t\r\n＝", max_size=4), CELL)


@given(st.one_of(CELL, TRICKY))
def test_cell_round_trips_and_is_not_a_formula(text: str) -> None:
    cell = safe_cell(text)
    assert restored_cell(cell) == text
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))


@given(st.lists(st.tuples(TRICKY, TRICKY), min_size=1, max_size=5))
def test_sheet_round_trips_cell_by_cell(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.csv"
        write_sheet(path, ["one", "two"], rows)
        read = read_sheet(path, ["one", "two"], "this test")
    kept = [row for row in rows if any(row)]
    assert [tuple(map(restored_cell, cells.values())) for _, cells in read] == kept


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_read_csv_reports_the_starting_line_of_each_row(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "saved.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["a", "b"], ["1\r\n2", "x"], ["", ""], ["3", "y"]])
    assert read_sheet(path, ["a"], "it") == [(2, {"a": "1\r\n2", "b": "x"}), (5, {"a": "3", "b": "y"})]


def test_write_sheet_keeps_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text("mine")
    with pytest.raises(UserError, match="The file already exists"):
        write_sheet(path, ["a"], [["b"]])
    assert path.read_text() == "mine"
