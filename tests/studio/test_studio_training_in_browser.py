"""A training that is started, watched, stopped and resumed in a real browser, by keys alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tunewright as library
from browser import EXECUTABLE, faults, wait_for
from command_line import tiny_project, tunewright

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("studio-training-browser") / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 40"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    return folder


def _press_on(page: Page, name: str) -> None:
    """Reach a button by Tab, press Enter, and wait for the next page."""
    button = page.get_by_role("button", name=name, exact=True).first
    while not button.evaluate("each => each === document.activeElement"):
        page.keyboard.press("Tab")
    with page.expect_navigation():
        page.keyboard.press("Enter")


def test_training_is_started_stopped_and_resumed_by_keys_alone(page: Page, project: Path) -> None:
    page.goto("/train")
    _press_on(page, "Train")
    job = page.url
    wait_for(page.locator("#log")).to_contain_text(re.compile("step", re.IGNORECASE))
    page.goto("/train")
    page.click("main table a")
    run = page.url
    state, steps = page.locator("#run-state"), page.locator("#steps-table tbody th").first
    wait_for(state).to_have_text("running")
    wait_for(steps).to_have_text(re.compile("^[1-9]"))
    wait_for(page.locator("figure svg").first).to_be_visible()
    page.goto(job)
    _press_on(page, "Stop")
    wait_for(page.locator("#state")).to_have_text("stopped")
    assert "Start it again, which resumes" in page.inner_text("main")
    page.goto(run)
    wait_for(state).to_have_text("stopped")
    stopped = int(steps.inner_text().replace(",", ""))
    _press_on(page, "Train")
    wait_for(page.locator("#log")).to_contain_text("Resuming from step")
    page.goto(run)
    wait_for(state).to_have_text(re.compile("running|finished"))
    wait_for(state).to_have_text("finished")  # the page follows the run to its adapter
    assert faults(page) == []
    (adapter,) = library.open(project).runs.list()
    assert page.url.endswith(adapter.name)
    numbers = [row["step"] for row in adapter.history if "loss" in row]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > stopped
