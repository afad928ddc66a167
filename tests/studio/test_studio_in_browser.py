"""The studio in a real browser: keys, both themes, small windows, and nothing from elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunewright as library
from browser import AXE, CONTRASTS, EXECUTABLE, Page, chromium
from command_line import pairs, tiny_project, tunewright, write_jsonl
from factories import make_history
from people_helpers import evaluation
from tunewright.adapters.registry import HISTORY
from tunewright.core.errors import UserError
from tunewright.core.locks import locked_folder
from tunewright.data.review.reviews import read_reviews
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")

EVALUATION = f"{7:012x}"
RUN = "0123456789ab"
LONG = "verylongwordwithoutanyspace" * 30


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("studio-browser") / "project", tiny_base_folder)
    write_jsonl(
        folder / "pairs.jsonl", [*pairs(120), {"prompt": f"<b>{LONG}</b> \u05e9\u05dc\u05d5\u05dd", "completion": LONG}]
    )
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    evaluation(folder / "evaluations" / EVALUATION, count=12)
    run = folder / ".tunewright" / "training" / RUN
    run.mkdir(parents=True)
    (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in make_history(12)))
    return folder


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    studio = Studio(project, "ada")
    with serving(studio.app()) as url:
        yield studio.address(url)


@pytest.fixture(scope="module")
def page(url: str) -> Iterator[Page]:
    """A browser that has followed the printed address: the script signs it in."""
    with chromium() as page:
        page.open(url, width=1100)
        while page.value("document.title") == "Sign in: tunewright":
            page.happened.clear()
            page.loaded()
        assert page.value("location.hash") == ""
        yield page


def _key(page: Page) -> str:
    return str(page.value("document.querySelector('[name=key]').value"))


def _press(page: Page, key: str, *, control: bool = False) -> None:
    """Press a key that leads to the next page."""
    page.happened.clear()
    page.press(key, control=control)
    page.loaded()


def _place(url: str, path: str) -> str:
    return url.partition("/sign-in")[0] + path


def _paths(project: Path) -> list[str]:
    member = next(m for m in library.open(project).data.version().members if LONG in m.example.output)
    evidence = f"/evidence/{EVALUATION}"
    return [
        *("/", "/data", "/data/leakage", "/rows", f"/rows?q={LONG}", f"/rows/{member.key}"),
        *("/review", "/review/suspects", "/review/second", "/review/conflicts", "/review/agreement", "/review/edits"),
        *("/train", f"/train/runs/{RUN}", "/evidence", evidence, f"{evidence}/1"),
        *("/compare", f"/compare/{EVALUATION}", "/playground", "/deploy", "/tenants", "/audit", "/nowhere"),
    ]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_pages_fit_can_be_read_and_ask_for_nothing_else(
    page: Page, url: str, project: Path, width: int, dark: bool
) -> None:
    for path in _paths(project):
        page.said.clear()
        page.open(_place(url, path), width=width, dark=dark)
        assert page.value("document.documentElement.scrollWidth") == width, path
        assert page.value("document.querySelectorAll('h1').length") == 1
        dim = [text for contrast, text in page.value(CONTRASTS) if contrast < 4.5]
        assert dim == [], path
        assert page.said == [] or path == "/nowhere"


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: make test-clients")
def test_axe_finds_no_fault(page: Page, url: str, project: Path) -> None:
    for path in _paths(project):
        page.open(_place(url, path), width=1100)
        assert page.accessibility_faults() == [], path


def test_charts_grow_while_a_run_trains_and_the_page_is_small(page: Page, url: str, project: Path) -> None:
    file = project / ".tunewright" / "training" / RUN / HISTORY
    drawn = "[...document.querySelectorAll('figure:not([hidden]) canvas')].map(each => each.width > 200)"
    page.open(_place(url, f"/train/runs/{RUN}"), width=1100)
    assert page.value(drawn) == [True, True, True], "loss, dev score, learning rate"
    score = "charts.find(each => each.spec.bounds && each.plot)"
    low, high = page.value(f"[{score}.plot.scales.y.min, {score}.plot.scales.y.max]")
    assert 0 <= low < high <= 100, "a share has no more than 100%"
    size = "performance.getEntries().reduce((sum, each) => sum + (each.transferSize || 0), 0)"
    assert 50_000 < page.value(size) < 150_000
    with locked_folder(file.parent, UserError("Another process is training this adapter")):
        page.open(_place(url, f"/train/runs/{RUN}"), width=1100)
        with file.open("a") as more:
            more.write('{"step": 13, "epoch": 0.65, "loss": 0.125, "tokens_per_s": 512}\n')
        _wait_for(page, "document.querySelector('#steps-table tbody th').textContent === '13'")
        _wait_for(page, f"{drawn}.length === 4")
        page.happened.clear()
    page.loaded()
    assert page.value("document.getElementById('run-state').textContent") == "stopped"


def _wait_for(page: Page, condition: str) -> None:
    until = time.monotonic() + 600
    while not page.value(condition):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_review_by_keys_alone(page: Page, url: str, project: Path) -> None:
    page.open(_place(url, "/review"), width=1100)
    first = _key(page)
    _press(page, "r")
    second = _key(page)
    _press(page, "w")
    _press(page, "u")
    assert _key(page) == second != first
    page.press("e")
    assert page.value("document.activeElement.id") == "output"
    page.press("x")  # typed, and no verdict
    assert "x" in page.value("document.activeElement.value")
    _press(page, "Enter", control=True)
    reviews = read_reviews(project / "dataset")
    assert reviews.current_verdicts(first)["ada"].verdict == "right"
    edited = reviews.current_verdicts(second)["ada"]
    assert edited.verdict == "edit" and edited.output is not None and "x" in edited.output


def test_key_pressed_twice_is_one_verdict(page: Page, url: str, project: Path) -> None:
    page.open(_place(url, "/review"), width=1100)
    before = len(read_reviews(project / "dataset").stacks)
    page.happened.clear()
    page.press("s")
    page.press("s")
    page.loaded()
    assert len(read_reviews(project / "dataset").stacks) == before + 1


def test_comparison_by_keys_alone(page: Page, url: str) -> None:
    page.open(_place(url, f"/compare/{EVALUATION}"), width=1100)
    first = _key(page)
    _press(page, "r")
    assert "Reference" in page.value("document.body.innerText")
    _press(page, "a")
    assert _key(page) != first
    _press(page, "u")
    assert _key(page) == first
