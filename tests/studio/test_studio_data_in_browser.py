"""The studio's data pages in a real browser: both themes, a narrow window, and a file that is too large to send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tunewright as library
from browser import CONTRASTS, EXECUTABLE, Page, chromium
from command_line import pairs, tiny_project, tunewright, write_jsonl
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")

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
    return folder


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    with serving(Studio(project, "ada", demo=True).app()) as url:
        yield url


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1100, False)])
def test_data_pages_fit_and_can_be_read(page: Page, url: str, project: Path, width: int, dark: bool) -> None:
    row = next(m for m in library.open(project).data.version().members if LONG in m.example.output)
    paths = (
        "/data",
        "/data/check?file=long.csv",
        "/data/diff",
        "/data/leakage",
        "/rows?flag=edited",
        f"/rows/{row.key}",
    )
    page.said.clear()
    for path in paths:
        page.open(f"{url}{path}", width=width, dark=dark)
        assert page.value("document.documentElement.scrollWidth") == width, path
        assert [text for contrast, text in page.value(CONTRASTS) if contrast < 4.5] == [], path
    assert page.said == []


def test_new_project_page_fits_and_can_be_read(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / LONG
    folder.mkdir()
    with serving(Studio(folder, "ada", demo=True).app()) as url:
        for width, dark in ((360, False), (1100, True)):
            page.open(f"{url}/", width=width, dark=dark)
            assert page.value("document.title") == "New project: tunewright"
            assert page.value("document.documentElement.scrollWidth") == width
            assert [text for contrast, text in page.value(CONTRASTS) if contrast < 4.5] == []


def test_file_that_would_be_refused_is_not_sent(page: Page, url: str) -> None:
    page.open(f"{url}/data", width=1100)
    assert page.value(_CHOOSE.replace("SIZE", "11")) == "The file is larger than 10 bytes."
    assert page.value("document.querySelector('#file').checkValidity()") is False
    assert page.value(_CHOOSE.replace("SIZE", "10")) == ""
