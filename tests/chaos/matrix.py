"""The table of faults and commands in docs/reference/faults.md, from the markers of the tests.

``python tests/chaos/matrix.py`` writes it; test_matrix.py checks it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "faults.md"
BEGIN, END = "<!-- The table is written by tests/chaos/matrix.py. -->", "<!-- End of the table. -->"
COLUMNS = ("add", "train", "evaluate", "judge", "deploy", "promote", "serve", "export")
ROWS = {
    "kill": "`kill -9`",
    "stop": "SIGSTOP, then SIGCONT",
    "full disk": "full disk",
    "read-only disk": "read-only disk",
    "deleted files": "deleted files",
    "clock jump": "jump of the clock",
    "connection": "slow or dropped connection",
    "postgresql": "PostgreSQL restarted or stopped",
    "engine": "engine's process killed or hung",
    "memory limit": "memory limit (rlimit)",
}
_NO_NETWORK = "does not apply: it reads and writes local files"
_NO_DATABASE = "does not apply: it uses no database"
_NO_ENGINE = "does not apply: it starts no engine's process"
WITHOUT = {
    ("connection", "add"): _NO_NETWORK,
    ("connection", "train"): _NO_NETWORK,
    ("connection", "evaluate"): _NO_NETWORK,
    ("connection", "export"): _NO_NETWORK,
    **{("postgresql", name): _NO_DATABASE for name in ("add", "train", "evaluate", "judge", "export")},
    **{("engine", name): _NO_ENGINE for name in ("add", "train", "judge")},
}
"""Cells without a test, and the reason."""


class _Collected:
    """A plugin that notes the cells of collected tests."""

    def __init__(self) -> None:
        self.cells: list[tuple[str, str, str]] = []

    def pytest_collection_modifyitems(self, items: list[object]) -> None:
        for item in items:
            for marker in item.iter_markers("fault"):  # type: ignore[attr-defined]
                row, column = marker.args
                self.cells.append((row, column, item.nodeid))  # type: ignore[attr-defined]


def marked() -> dict[tuple[str, str], list[str]]:
    """Return the tests of each cell, as pytest collects them in a process of its own."""
    files = [
        str(f.relative_to(ROOT)) for f in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.fault(" in f.read_text()
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cells"
        environment = os.environ | {"TUNEWRIGHT_CELLS": str(out)}
        command = [sys.executable, __file__, "--collect", *files]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert out.exists(), done.stdout + done.stderr
        found: dict[tuple[str, str], list[str]] = {}
        for row, column, test in json.loads(out.read_text()):
            found.setdefault((row, column), []).append(test)
    return found


def table(cells: dict[tuple[str, str], list[str]]) -> str:
    """Return the table: in each cell the numbers of its tests, which follow below it, or the reason for none."""
    numbers: dict[str, int] = {}
    reasons: dict[str, str] = {}
    lines = [f"| fault | {' | '.join(f'`{column}`' for column in COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for row, title in ROWS.items():
        shown = []
        for column in COLUMNS:
            if (row, column) in cells:
                names = sorted({test.partition("[")[0] for test in cells[row, column]})
                shown.append(" ".join(str(numbers.setdefault(name, len(numbers) + 1)) for name in names))
            else:
                reason = WITHOUT[row, column]
                shown.append(reasons.setdefault(reason, chr(ord("a") + len(reasons))))
        lines.append(f"| {title} | {' | '.join(shown)} |")
    tests = [f"{number}. `{name.partition('::')[0]}`: `{name.partition('::')[2]}`" for name, number in numbers.items()]
    letters = [f"- **{letter}**: {reason}" for reason, letter in reasons.items()]
    return "\n".join([*lines, "", *letters, "", *tests]) + "\n"


def _collect(files: list[str]) -> None:
    import pytest

    plugin = _Collected()
    code = pytest.main(["--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", *files], plugins=[plugin])
    if code == 0:
        Path(os.environ["TUNEWRIGHT_CELLS"]).write_text(json.dumps(plugin.cells))


def page(cells: dict[tuple[str, str], list[str]]) -> str:
    """Return the page with the table that fits the tests."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(cells)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--collect"]:
        _collect(sys.argv[2:])
    else:
        PAGE.write_text(page(marked()), encoding="utf-8")
