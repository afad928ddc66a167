"""Sheets: whatever a cell holds comes back, and no cell is a formula."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.csv import read_sheet, restored_cell, safe_cell, write_sheet
from tunewright.core.errors import UserError

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
