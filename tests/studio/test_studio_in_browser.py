"""The studio in a real browser: keys, both themes, small windows, and nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tunewright as library
from making.browser import AXE, EXECUTABLE, axe_faults, faults, show, wait_for
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_history
from making.human_evaluations import evaluation
from tunewright.adapters.registry import HISTORY
from tunewright.core.errors import UserError
from tunewright.core.locks import locked_folder
from tunewright.data.review.reviews import read_reviews

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

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


def _key(page: Page) -> str:
    return page.locator("[name=key]").first.input_value()


def _press(page: Page, key: str) -> None:
    """Press a key that leads to the next page."""
    with page.expect_navigation():
        page.keyboard.press(key)


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
def test_pages_fit_can_be_read_and_ask_for_nothing_else(page: Page, project: Path, width: int, dark: bool) -> None:
    for path in _paths(project):
        show(page, path, width=width, dark=dark)
        found = faults(page)
        assert found == [] or (path == "/nowhere" and "404" in found.pop() and not found), path
        assert page.locator("h1").count() == 1, path


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: make test-clients")
def test_axe_finds_no_fault(page: Page, project: Path) -> None:
    for path in _paths(project):
        show(page, path, width=1100)
        assert axe_faults(page) == [], path


def test_charts_grow_while_a_run_trains_and_the_page_is_small(page: Page, project: Path) -> None:
    file = project / ".tunewright" / "training" / RUN / HISTORY
    show(page, f"/train/runs/{RUN}", width=1100)
    assert page.locator("figure svg").count() == 2, "losses with the dev score, and the learning rate"
    size = "performance.getEntries().reduce((sum, each) => sum + (each.encodedBodySize || 0), 0)"
    assert 10_000 < page.evaluate(size) < 150_000
    with locked_folder(file.parent, UserError("Another process is training this adapter")):
        page.goto(f"/train/runs/{RUN}")
        with file.open("a") as more:
            more.write('{"step": 13, "epoch": 0.65, "loss": 0.125, "tokens_per_s": 512}\n')
        steps = page.get_by_role("region", name="Last steps")
        wait_for(steps.locator("tbody th, tbody td").first).to_have_text("13")
        wait_for(page.locator("figure svg")).to_have_count(3)
    wait_for(page.locator("#run-state")).to_have_text("stopped")


def test_review_by_keys_alone(page: Page, project: Path) -> None:
    page.goto("/review")
    first = _key(page)
    _press(page, "r")
    second = _key(page)
    _press(page, "w")
    _press(page, "u")
    assert _key(page) == second != first
    page.keyboard.press("e")
    assert page.evaluate("document.activeElement.id") == "output"
    page.keyboard.press("x")  # typed, and no verdict
    assert "x" in page.input_value("#output")
    _press(page, "Control+Enter")
    reviews = read_reviews(project / "dataset")
    assert reviews.current_verdicts(first)["ada"].verdict == "right"
    edited = reviews.current_verdicts(second)["ada"]
    assert edited.verdict == "edit" and edited.output is not None and "x" in edited.output


def test_key_pressed_twice_is_one_verdict(page: Page, project: Path) -> None:
    page.goto("/review")
    before = len(read_reviews(project / "dataset").stacks)
    with page.expect_navigation():
        page.keyboard.press("s")
        page.keyboard.press("s")
    assert len(read_reviews(project / "dataset").stacks) == before + 1


def test_comparison_by_keys_alone(page: Page) -> None:
    page.goto(f"/compare/{EVALUATION}")
    first = _key(page)
    _press(page, "v")
    assert "Reference" in page.inner_text("body")
    _press(page, "a")
    assert _key(page) != first
    _press(page, "u")
    assert _key(page) == first
