"""The whole way in a browser, without a terminal: from an empty folder to an adapter that was promoted and taken back.

A real studio process, two reviewers, and a tiny base that truly learns to answer with the last word of the message. The
verdicts are the gate's own. With ``pytest -s`` the test prints when each page first painted its text.
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from making.browser import EXECUTABLE, chromium, click_to_next, press_to_next, row_key, signed_in, wait_for
from making.word_bases import messages, word_base
from tunewright.studio.jobs import Jobs

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

ROWS = 240
# A promise, because the pages' policy forbids the polling of `wait_for_function`.
FIRST_PAINT = """new Promise(resolve => new PerformanceObserver(list => {
  for (const each of list.getEntriesByName("first-contentful-paint")) resolve(each.startTime);
}).observe({ type: "paint", buffered: true }))"""
MENU = [
    "Project",
    "Data",
    "Rows",
    "Review",
    "Settings",
    "Train",
    "Evidence",
    "Compare",
    "Playground",
    "Deploy",
    "Tenants",
]

LINKED = [
    ("A row", "Rows", 'a[href^="/rows/"]'),
    ("Suspects", "Review", 'a[href^="/review/suspects"]'),
    ("Evaluate", "Project", 'a[href^="/evaluate"]'),
    ("A run", "Train", 'a[href^="/train/runs/"]'),
    ("An evaluation", "Evidence", 'a[href^="/evidence/"]'),
    ("An item", None, 'a[href^="/evidence/"][href*="?"]'),
    ("Its prompts", None, 'a[href*="/prompts"]'),
]
"""Pages without a place in the menu: the page that links to each (None: the one before it), and the link."""


def table() -> bytes:
    """Return a CSV file of rows, of which some have a wrong colour, one has none, and one is there twice."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["Message", "Colour"])
    for number, message in enumerate(messages(ROWS)):
        words = message.split()
        writer.writerow([message, words[1] if number % 10 == 0 else words[-1]])
    writer.writerows([[message, message.split()[-1]] for message in messages(2)[1:]])
    writer.writerow(["77 red green blue", ""])
    return text.getvalue().encode()


class Walk:
    """One person's tab, and when its pages first painted their text."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.painted: dict[str, list[float]] = {}

    def open(self, name: str) -> None:
        """Open a page by the menu."""
        self.page.get_by_role("navigation", name="Pages").get_by_role("link", name=name, exact=True).click()
        wait_for(self.page.get_by_role("heading", level=1)).to_have_text(name)
        self.record(name)

    def open_linked(self, name: str, by: str | None, link: str) -> None:
        """Open a page by a link of another page."""
        if by is not None:
            self.open(by)
        with self.page.expect_navigation():
            self.page.get_by_role("main").locator(link).first.click()
        self.record(name)

    def record(self, name: str) -> None:
        """Record when this page first painted its text."""
        self.painted.setdefault(name, []).append(self.page.evaluate(FIRST_PAINT))

    def press(self, name: str) -> None:
        """Press a button of the page's main part."""
        with self.page.expect_navigation():
            self.page.get_by_role("main").get_by_role("button", name=name, exact=True).first.click()

    def follow(self, name: str | re.Pattern[str]) -> None:
        """Follow a link of the page's main part."""
        with self.page.expect_navigation():
            self.page.get_by_role("main").get_by_role("link", name=name).first.click()

    def finish_job(self) -> None:
        """Wait until the job of this page has ended well, and follow its link to the next step, if it has one."""
        state = self.page.locator("#state")
        wait_for(state).not_to_have_text("running")
        assert state.inner_text() == "done", self.page.locator("#log").inner_text()

    def said(self) -> str:
        """Return the text of the page's main part."""
        return self.page.get_by_role("main").inner_text()


@contextmanager
def studio(folder: Path) -> Iterator[str]:
    """A real ``tunewright studio``, and the address that it prints."""
    command = [sys.executable, "-m", "tunewright", "studio", "--project", str(folder), "--reviewer", "ada"]
    process = subprocess.Popen([*command, "--port", "0", "--no-browser"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield found[0]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        for job in Jobs(folder / ".tunewright" / "jobs", folder).all():
            job.stop()


def test_walk_from_an_empty_folder_to_a_release_that_is_taken_back(tmp_path: Path) -> None:
    base, folder = word_base(tmp_path / "base"), tmp_path / "colours"
    folder.mkdir()
    with studio(folder) as address, chromium() as browser:
        ada, ben = Walk(signed_in(browser, address)), Walk(signed_in(browser, address, reviewer="ben"))
        make_project(ada, base)
        add_rows(ada)
        ben.page.goto("/review")
        review_together(ada, ben)
        change(ada, {"Preset": "all-linear", "Learning rate": "0.005"})
        first = train_and_evaluate(ada)
        compare_blind(ada)
        release(ada, first, "It answers every request")
        key = add_tenant(ada)
        ask = start_server(ada, key)
        assert ask() == "snow"
        try_in_playground(ada, key)
        change(ada, {"Epochs": "4"})
        second = train_and_evaluate(ada)
        assert second != first
        release(ada, second, "Canary: it answers a share, the live adapter the rest")
        promote_and_roll_back(ada, first, second)
        assert ask() == "snow"
        for _ in range(2):
            for name in MENU:
                ada.open(name)
            for name, by, link in LINKED:
                ada.open_linked(name, by, link)
        sys.stdout.write(paints(ada))


def make_project(walk: Walk, base: Path) -> None:
    walk.page.get_by_label("Its folder").fill(str(base))
    walk.press("Make the project")
    assert "Made the project colours" in walk.said()


def add_rows(walk: Walk) -> None:
    walk.page.set_input_files("#file", {"name": "rows.csv", "mimeType": "text/csv", "buffer": table()})
    walk.press("Check the file")
    walk.page.get_by_label("Input", exact=True).select_option("Message")
    walk.page.get_by_label("Answer", exact=True).select_option("Colour")
    walk.press("Check the rows")
    assert "1 faulty row" in walk.said()
    walk.press("Write a corrected copy")
    walk.press("Add the file")
    assert f"{ROWS} rows" in walk.said()


def review_together(ada: Walk, ben: Walk) -> None:
    """Two people judge another row each, until both have judged five and a wrong answer has been corrected."""
    ada.open("Review")
    ben.open("Review")
    seen: list[str] = []
    corrected = 0
    while not corrected or len(seen) < 10:
        for walk in (ada, ben):
            seen.append(row_key(walk.page))
            corrected += judge(walk.page)
    assert len(set(seen)) == len(seen)
    ada.follow("Edits")
    ada.press("Make a new version with the edits")


def judge(page: Page) -> bool:
    """Judge the row on the page by its last word; return whether its answer was corrected."""
    question, answer = (page.locator(".conversation dd").nth(place).inner_text().strip() for place in (0, 1))
    right = question.split()[-1]
    if answer == right:
        press_to_next(page, "r")
        return False
    page.keyboard.press("e")
    page.get_by_label("The right answer").fill(right)
    press_to_next(page, "Control+Enter")
    return True


def change(walk: Walk, settings: dict[str, str]) -> None:
    walk.open("Settings")
    for label, value in settings.items():
        field = walk.page.get_by_label(label, exact=True)
        if field.evaluate("each => each.localName") == "select":
            field.select_option(value)
        else:
            field.fill(value)
    walk.press("Save")
    assert "Set in tunewright.yaml" in walk.said()


def train_and_evaluate(walk: Walk) -> str:
    """Train and evaluate an adapter; return its name."""
    walk.open("Train")
    walk.press("Train")
    walk.finish_job()
    walk.follow("Evaluate the adapter")
    walk.record("Evaluate")
    found = re.search(r"colours-[0-9a-f]{12}", walk.page.get_by_role("main").inner_html())
    assert found is not None
    walk.press("Evaluate")
    walk.finish_job()
    walk.follow("The result and the next step")
    assert walk.page.locator("#answered").inner_text().startswith("Ship: ")
    return found[0]


def compare_blind(walk: Walk) -> None:
    walk.open("Compare")
    walk.page.get_by_role("table").get_by_role("link").first.click()
    walk.page.wait_for_url("**/compare/*")
    while walk.page.locator("#judge").count():
        right = walk.page.locator("main p.text").first.inner_text().split()[-1]
        sides = [walk.page.locator(".sides p.text").nth(side).inner_text() for side in (0, 1)]
        click_to_next(walk.page, "AB"[sides.index(right)] if right in sides else "neither")
    assert "People prefer tuned" in walk.said()


def release(walk: Walk, adapter: str, traffic: str) -> None:
    walk.open("Deploy")
    walk.page.get_by_label("Adapter whose verdict is ship").select_option(adapter)
    walk.page.get_by_label("Traffic").select_option(label=traffic)
    walk.press("Check and release")
    walk.finish_job()


def add_tenant(walk: Walk) -> str:
    """Add a tenant that may call the alias; return its API key."""
    walk.open("Tenants")
    walk.page.get_by_label("Name, in lower-case").fill("shop")
    walk.page.get_by_label("colours", exact=True).check()
    walk.press("Add")
    walk.press("Make a key")
    return walk.page.get_by_role("textbox", name="API key").input_value()


def start_server(walk: Walk, key: str) -> Callable[[], str]:
    """Start the server on any free port; return what asks the live alias for a last word."""
    walk.open("Deploy")
    walk.page.get_by_label("Port").fill("0")
    walk.press("Start the server")
    url = walk.page.get_by_role("textbox", name="Base URL")
    wait_for(url).to_be_visible()
    address, model = url.input_value(), walk.page.get_by_role("textbox", name="Model name").input_value()
    assert model == "colours"

    def ask() -> str:
        body = {"model": model, "messages": [{"role": "user", "content": "4711 red plum snow"}]}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{address}/chat/completions", json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    return ask


def try_in_playground(walk: Walk, key: str) -> None:
    """Ask the live alias in the playground, and like its answer."""
    walk.open("Playground")
    walk.page.get_by_label("Input").fill("4711 red plum snow")
    walk.page.get_by_label("API key of a tenant").fill(key)
    walk.press("Ask Ctrl Enter")
    wait_for(walk.page.get_by_label("Answer", exact=True)).to_have_text("snow")
    walk.press("Thumb up")
    assert "Recorded thumb up on the answer of colours" in walk.said()


def promote_and_roll_back(walk: Walk, first: str, second: str) -> None:
    walk.open("Deploy")
    walk.follow(re.compile("^colours$"))
    walk.press("Check and promote")
    walk.finish_job()
    walk.follow("The alias colours")
    assert second in walk.said()
    walk.press("Roll back")
    assert first in walk.said()


def paints(walk: Walk) -> str:
    lines = [f"{'page':<14} {'first click':>12} {'warm click':>12}"]
    for name, times in walk.painted.items():
        lines.append(f"{name:<14} {times[0]:>9.0f} ms {times[-1]:>9.0f} ms")
    return "\n".join(["", *lines, ""])
