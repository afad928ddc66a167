"""The studio's data pages in a real browser: both themes, a narrow window, and a file that is too large to send."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tunewright as library
from browser import AXE, EXECUTABLE, axe_faults, faults, show, signed_in
from command_line import pairs, tiny_project, tunewright, write_jsonl
from tunewright.config.io import load_config
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

LONG = "averylongcolumnnamewithoutanyspace" * 6
_CHOOSE = """(() => {
  const input = document.querySelector("#file");
  input.dataset.largest = "10";
  const chosen = new DataTransfer();
  chosen.items.add(new File(["x".repeat(SIZE)], "rows.csv"));
  input.files = chosen.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
  return input.validationMessage;
})()"""


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


def test_typed_base_is_the_base_and_a_bad_name_is_not_sent(page: Page, tmp_path: Path, tiny_base_folder: Path) -> None:
    assert page.context.browser is not None
    studio = Studio(tmp_path, "ada")
    with serving(studio.app()) as url:
        new = signed_in(page.context.browser, studio.address(url))
        new.evaluate("document.querySelector('[value=bundled]').checked = true")  # also where it is not installed
        new.type("#base_model", str(tiny_base_folder))
        assert new.is_checked("[value=other]")
        new.fill("#name", "Bad Name")
        assert new.evaluate("document.querySelector('#name').validity.patternMismatch")
        assert faults(new) == []
        new.fill("#name", "a-name-2")
        with new.expect_navigation():
            new.click("text=Make the project")
        assert load_config(tmp_path / "tunewright.yaml").base_model == str(tiny_base_folder)
        new.context.close()


def test_file_that_would_be_refused_is_not_sent(page: Page) -> None:
    page.goto("/data")
    assert page.evaluate(_CHOOSE.replace("SIZE", "11")) == "The file is larger than 10 bytes."
    assert page.evaluate("document.querySelector('#file').checkValidity()") is False
    assert page.evaluate(_CHOOSE.replace("SIZE", "10")) == ""
