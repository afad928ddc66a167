"""The documented table of faults has a test, or a reason for none, in each cell."""

from __future__ import annotations

import pytest
from matrix import COLUMNS, PAGE, ROWS, WITHOUT, marked, page

pytestmark = pytest.mark.chaos


def test_every_cell_has_a_test_or_a_reason_and_the_page_shows_them() -> None:
    cells = marked()
    every = {(row, column) for row in ROWS for column in COLUMNS}
    assert cells.keys() | WITHOUT.keys() == every
    assert cells.keys() & WITHOUT.keys() == set()
    assert PAGE.read_text(encoding="utf-8") == page(cells), "`python tests/chaos/matrix.py` writes it"
