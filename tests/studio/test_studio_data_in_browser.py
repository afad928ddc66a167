"""The studio's data pages in a real browser: both themes, a narrow window, and a file that is too large to send."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tunewright as library
from making.browser import AXE, EXECUTABLE, axe_faults, faults, show
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

LONG = "averylongcolumnnamewithoutanyspace" * 6


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Two versions, an edited row, and an uploaded file whose columns have long names."""
    folder = tiny_project(tmp_path_factory.mktemp("studio-data-browser") / "project", tiny_base_folder)
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    write_jsonl(folder / "more.jsonl", [{"prompt": pairs(1)[0]["prompt"], "completion": f"{LONG} <b>"}])
    assert tunewright("data", "add", folder / "more.jsonl", "--replace", "-p", folder).code == 0
    (folder / "uploads").mkdir()
    (folder / "uploads" / "long.csv").write_text(f"{LONG};{LONG}2\n{LONG};x\n", encoding="utf-8")
    write_jsonl(folder / "uploads" / "faulty.jsonl", [*pairs(3, seed=4), {"prompt": LONG}])
    return folder


def _paths(project: Path) -> list[str]:
    row = next(m for m in library.open(project).data.version().members if LONG in m.example.output)
    checks = ["/data/check?file=long.csv", "/data/check?file=faulty.jsonl"]
    return [
        "/data",
        *checks,
        "/data/diff",
        "/data/leakage",
        "/rows?flag=edited",
        "/rows?flag=suspect",
        f"/rows/{row.key}",
    ]


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1100, False)])
def test_data_pages_fit_and_can_be_read(page: Page, project: Path, width: int, dark: bool) -> None:
    for path in _paths(project):
        show(page, path, width=width, dark=dark)
        assert faults(page) == [], path


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: make test-clients")
def test_axe_finds_no_fault_in_the_data_pages(page: Page, project: Path) -> None:
    for path in _paths(project):
        show(page, path, width=1100)
        assert axe_faults(page) == [], path


def test_new_project_page_fits_and_can_be_read(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / LONG
    folder.mkdir()
    with serving(Studio(folder, "ada", demo=True).app()) as url:
        for width, dark in ((360, False), (1100, True)):
            show(page, f"{url}/", width=width, dark=dark)
            assert page.title() == "New project: tunewright"
            assert faults(page) == []
            assert not AXE.exists() or axe_faults(page) == []
