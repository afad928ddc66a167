"""The studio in a real browser: both themes, small windows, keys alone, no motion, a slow connection, and two tabs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

import tunewright as library
from making.browser import (
    AXE,
    EXECUTABLE,
    awake,
    axe_faults,
    faults,
    new_page,
    press_to_next,
    row_key,
    show,
    signed_in,
    wait_for,
)
from making.command_line import pairs, tiny_project, tunewright, write_jsonl
from making.evidence import make_history
from making.human_evaluations import evaluation
from tunewright.adapters.registry import HISTORY
from tunewright.core.errors import UserError
from tunewright.core.locks import locked_folder
from tunewright.data.review.reviews import ReviewLog, read_reviews
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio
from tunewright.studio.pages.data import UPLOADS

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest_plugins = ["studio_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]

EVALUATION = f"{7:012x}"
RUNS = ("0123456789ab", "ba9876543210")
LONG = "verylongwordwithoutanyspace" * 30
PAGES = (
    *("/", "/data", "/data/check?file=faulty.csv", "/data/check?file=long.csv", "/data/diff", "/data/leakage"),
    *("/rows?q=navy", "/rows?flag=edited", "/rows?flag=suspect", f"/rows?q={LONG}"),
    *("/review", "/review/suspects", "/review/second", "/review/conflicts", "/review/agreement", "/review/edits"),
    *(
        "/settings",
        "/train",
        f"/train/runs/{RUNS[0]}",
        "/evidence",
        f"/evidence/{EVALUATION}",
        f"/evidence/{EVALUATION}/1",
    ),
    *("/compare", f"/compare/{EVALUATION}", "/playground", "/deploy", "/tenants", "/tenants/acme", "/audit"),
)
# Numbers what can be used on a page, and records what gets the focus: its number, and whether it is outlined.
WATCH = """(() => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const usable = `a[href], button:not(:disabled), input:not([type=hidden], :disabled), select, textarea, summary,
    [tabindex="0"]`;
  const all = [...document.querySelectorAll(usable)].filter(
    each => each.checkVisibility() && !(each.type === "radio" && !each.checked));
  window.reached = [];
  addEventListener("focusin", event => {
    const style = getComputedStyle(event.target);
    if (all.includes(event.target)) reached.push([all.indexOf(event.target), style.outlineStyle !== "none"]);
  });
  return all.length;
})()"""
FIRST_PAINT_HAS_TEXT = """new Promise(resolve => new PerformanceObserver(list => {
  const [blank, text] = ["first-paint", "first-contentful-paint"].map(name => performance.getEntriesByName(name)[0]);
  if (text) resolve(blank === undefined || blank.startTime === text.startTime);
}).observe({ type: "paint", buffered: true }))"""
MOVES = """[...document.querySelectorAll("*")].flatMap(each => {
  const style = getComputedStyle(each);
  const moves = [style.transitionDuration, style.animationDuration].some(text => /[1-9]/.test(text));
  return moves || style.scrollBehavior === "smooth" ? [each.outerHTML.slice(0, 80)] : [];
})"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """Two versions with an edited row and long words, an evaluation, two runs, a tenant and uploaded files."""
    folder = tiny_project(tmp_path_factory.mktemp("studio-browser") / "project", tiny_base_folder)
    write_jsonl(folder / "pairs.jsonl", [*pairs(120), {"prompt": f"<b>{LONG}</b> \u05e9\u05dc", "completion": LONG}])
    assert tunewright("data", "add", folder / "pairs.jsonl", "-p", folder).code == 0
    write_jsonl(folder / "more.jsonl", [{"prompt": pairs(1)[0]["prompt"], "completion": f"{LONG} <b>"}])
    assert tunewright("data", "add", folder / "more.jsonl", "--replace", "-m", LONG, "-p", folder).code == 0
    assert tunewright("tenant", "add", "acme", "--alias", "colours", "-p", folder).code == 0
    evaluation(folder / "evaluations" / EVALUATION, count=12)
    for name in RUNS:
        run = folder / ".tunewright" / "training" / name
        run.mkdir(parents=True)
        (run / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in make_history(12)))
    (folder / UPLOADS).mkdir()
    (folder / UPLOADS / "faulty.csv").write_text(f"prompt,completion\nnavy blue 1,navy\n{LONG},\n")
    (folder / UPLOADS / "long.csv").write_text(f"{LONG};{LONG}2\n{LONG};x\n", encoding="utf-8")
    return folder


@pytest.fixture
def slow(page: Page, address: str) -> Iterator[Page]:
    """A tab whose connection has 50 kB/s and 400 ms of latency."""
    assert page.context.browser is not None
    slow = signed_in(page.context.browser, address)
    rate = {"downloadThroughput": 50_000, "uploadThroughput": 50_000}
    slow.context.new_cdp_session(slow).send(
        "Network.emulateNetworkConditions", {"offline": False, "latency": 400} | rate
    )
    yield slow
    slow.context.close()


def _reviews(project: Path) -> ReviewLog:
    return read_reviews(project / "dataset")


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1100, False)])
def test_pages_fit_can_be_read_and_ask_for_nothing_else(page: Page, project: Path, width: int, dark: bool) -> None:
    row = next(m for m in library.open(project).data.version().members if LONG in m.example.output)
    for path in (*PAGES, f"/rows/{row.key}", "/nowhere"):
        show(page, path, width=width, dark=dark)
        found = faults(page)
        assert found == [] or (path == "/nowhere" and "404" in found.pop() and not found), path
        assert page.locator("h1").count() == 1, path
        assert width == 360 or not AXE.exists() or axe_faults(page) == [], path


def test_new_project_page_fits_and_can_be_read(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / LONG[:200]
    folder.mkdir()
    with serving(Studio(folder, "ada", demo=True).app()) as url:
        for width, dark in ((360, False), (1100, True)):
            show(page, f"{url}/", width=width, dark=dark)
            assert page.title() == "New project: tunewright"
            assert faults(page) == []
            assert not AXE.exists() or axe_faults(page) == []


def test_address_asks_a_new_browser_for_the_name_of_its_person_once(page: Page, address: str) -> None:
    assert page.context.browser is not None
    ben = new_page(page.context.browser)
    ben.goto(address)
    assert ben.input_value("#reviewer") == "ada" and not ben.is_visible("#secret")
    ben.fill("#reviewer", "ben")
    ben.click("#sign-in button")
    wait_for(ben.locator("header summary")).to_have_text("Reviewer: ben")
    later = ben.context.new_page()
    later.goto(address)
    wait_for(later.locator("header summary")).to_have_text("Reviewer: ben")
    ben.context.close()


def test_tab_reaches_everything_on_each_page_in_its_order(page: Page) -> None:
    for path in PAGES:
        show(page, path, width=1100)
        usable = page.evaluate(WATCH)
        reached: list[tuple[int, bool]] = []
        while len(reached) < usable:
            before = len(reached)
            for _ in range(usable - before):
                page.keyboard.press("Tab")
            reached = page.evaluate("reached")
            assert len(reached) > before, path
        assert [number for number, _ in reached] == list(range(usable)), path
        assert all(outlined for _, outlined in reached), path


@pytest.mark.parametrize(("motion", "delay_ms"), [("no-preference", 4000), ("reduce", 20000)])
def test_charts_of_a_running_training_change_rarely_with_reduced_motion(
    page: Page, address: str, project: Path, motion: Literal["no-preference", "reduce"], delay_ms: int
) -> None:
    assert page.context.browser is not None
    still = signed_in(page.context.browser, address)
    still.emulate_media(reduced_motion=motion)
    still.clock.install()
    still.clock.pause_at(time.time() + 3600)
    folder = project / ".tunewright" / "training" / RUNS[1]
    with locked_folder(folder, UserError("Another process is training this adapter")):
        still.goto(f"/train/runs/{RUNS[1]}")
        shown = still.locator("figure svg")
        wait_for(shown).to_have_count(2)
        lines = (folder / HISTORY).read_text()
        with (folder / HISTORY).open("a") as more:
            more.write('{"step": 13, "epoch": 0.65, "loss": 0.125, "tokens_per_s": 512}\n')
        still.clock.run_for(delay_ms - 50)
        assert shown.count() == 2
        still.clock.run_for(100)
        wait_for(shown).to_have_count(3)
        steps = still.get_by_role("region", name="Last steps")
        wait_for(steps.locator("tbody th, tbody td").first).to_have_text("13")
    wait_for(still.locator("#run-state")).to_have_text("running")
    still.clock.run_for(delay_ms)
    wait_for(still.locator("#run-state")).to_have_text("stopped")
    (folder / HISTORY).write_text(lines)
    still.context.close()


def test_nothing_moves_on_any_page_with_reduced_motion(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    for path in PAGES:
        page.goto(path)
        assert page.evaluate(MOVES) == [], path
        assert page.evaluate("document.getAnimations().length") == 0, path
    page.emulate_media(reduced_motion="no-preference")


def test_text_is_on_the_page_before_its_scripts(page: Page) -> None:
    page.context.route("**/*.js", lambda route: None)
    for path in PAGES:
        page.goto(path, wait_until="commit")
        wait_for(page.get_by_role("heading", level=1)).to_be_visible()
    page.context.unroute_all()


def test_slow_connection_neither_loses_nor_doubles_a_keystroke(slow: Page, project: Path) -> None:
    slow.goto("/review")
    for key, verdict in (("r", "right"), ("w", "wrong"), ("s", "skip"), ("r", "right")):
        before, row = len(_reviews(project).stacks), row_key(slow)
        awake(slow)
        with slow.expect_navigation():
            slow.keyboard.press(key)
            slow.keyboard.press(key)
            slow.keyboard.press("w")  # meant for the next row, which nobody has seen yet
        found = _reviews(project)
        assert found.current_verdicts(row)["ada"].verdict == verdict
        assert len(found.stacks) == before + 1 and row_key(slow) != row
    row = row_key(slow)
    slow.keyboard.press("e")
    answer = "navy" if slow.input_value("#output") == "teal" else "teal"
    slow.fill("#output", answer)
    with slow.expect_navigation():
        slow.keyboard.press("Control+Enter")
        slow.keyboard.press("Control+Enter")
    found = _reviews(project)
    assert found.current_verdicts(row)["ada"].output == answer and len(found.stacks) == before + 2
    assert slow.evaluate(FIRST_PAINT_HAS_TEXT)
    sent = slow.evaluate("performance.getEntriesByType('resource').map(each => [each.name, each.transferSize])")
    assert len(sent) >= 2 and {size for _, size in sent} == {0}, "style and script are kept from page to page"


def test_slow_connection_sends_a_file_once(slow: Page, project: Path) -> None:
    rows = "".join(f"red {number} of a slow line,red\n" for number in range(900))
    slow.goto("/data")
    content = f"prompt,completion\n{rows}".encode()
    slow.set_input_files("#file", {"name": "slow.csv", "mimeType": "text/csv", "buffer": content})
    with slow.expect_navigation():
        slow.dblclick("text=Check the file")
    assert "900 examples" in slow.inner_text("main")
    assert (project / UPLOADS / "slow.csv").read_bytes() == content
    versions = len(library.open(project).data.log())
    with slow.expect_navigation():
        slow.dblclick("text=Add the file")
    assert len(library.open(project).data.log()) == versions + 1


def test_phone_shows_both_answers_above_the_buttons_and_the_page_in_the_menu(page: Page) -> None:
    show(page, f"/compare/{EVALUATION}", width=360)
    answers, buttons = page.locator(".sides").bounding_box(), page.locator(".verdicts").bounding_box()
    assert answers is not None and buttons is not None and answers["y"] + answers["height"] <= buttons["y"]
    inside = """(() => {
      const [menu, link] = ["ul", "[aria-current]"].map(
        each => document.querySelector(`header nav ${each}`).getBoundingClientRect());
      return menu.left <= link.left && link.right <= menu.right;
    })()"""
    for path in (f"/compare/{EVALUATION}", "/train", "/deploy", "/tenants"):
        page.goto(path)
        assert page.evaluate(inside), path
    show(page, "/data", width=1100)
    assert LONG in page.inner_text("main")
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(p => p.scrollWidth <= p.clientWidth)")


def test_comparison_by_keys_alone(page: Page) -> None:
    show(page, f"/compare/{EVALUATION}", width=1100)
    first = row_key(page)
    press_to_next(page, "v")
    assert "Reference" in page.inner_text("body")
    assert page.get_attribute("body", "data-keys") == "awake", "the same pair"
    press_to_next(page, "a")
    assert row_key(page) != first
    press_to_next(page, "u")
    assert row_key(page) == first and "Taken back: A on pair 1." in page.inner_text("main")
