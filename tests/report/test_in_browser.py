"""The page in a real browser: it fits, it can be reached by keys, and it can be read by day and by night."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from making.browser import EXECUTABLE, chromium, contrasts, faults, new_page, show
from making.evidence import make_history
from making.full_evidence import CURVE, ITEMS, full_evidence
from making.signals import make_signals
from tunewright.report.page import render_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    out.write_text(render_report(full_evidence(), ITEMS, make_history(), CURVE, make_signals()), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as browser:
        yield new_page(browser)


@pytest.mark.parametrize("width", [390, 1100])
def test_page_does_not_overflow_and_logs_nothing(page: Page, file: Path, width: int) -> None:
    show(page, file, width=width)
    assert faults(page) == []
    over = "[...document.querySelectorAll('main > *')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
    assert page.evaluate(over) == 0


def test_tab_reaches_every_section_link_in_the_pages_order(page: Page, file: Path) -> None:
    show(page, file, width=1100)
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    sections = page.evaluate("[...document.querySelectorAll('h2[id]')].map(h => '#' + h.id)")
    assert links == sections
    reached = []
    for _ in links:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.hash"))
    assert reached == links
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "FIGURE"  # it scrolls in a narrow window
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Table of contrasts"


def test_light_and_dark_themes_differ_and_are_readable(page: Page, file: Path) -> None:
    papers = []
    for dark in (False, True):
        show(page, file, width=1100, dark=dark)
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found = contrasts(page)
        assert len(found) > 200
        assert [each for each in found if each[0] < 4.5] == []
    assert papers == ["rgb(247, 246, 242)", "rgb(20, 24, 27)"]


def test_labels_of_figures_can_be_scrolled_to(page: Page, file: Path) -> None:
    show(page, file, width=390)
    outside = """[...document.querySelectorAll("figure svg text")].filter(text => {
      const own = text.getBoundingClientRect(), figure = text.closest("figure");
      const left = figure.getBoundingClientRect().left;
      const scrolls = figure.scrollWidth <= figure.clientWidth || getComputedStyle(figure).overflowX == "auto";
      return own.left < left || own.right > left + figure.scrollWidth || !scrolls;
    }).map(text => text.textContent.trim())"""
    assert page.evaluate(outside) == []


def test_lineage_has_room_for_its_values(page: Page, file: Path) -> None:
    show(page, file, width=360)
    widths = page.evaluate("[...document.querySelectorAll('.lineage td')].map(each => each.clientWidth)")
    assert len(widths) > 10 and min(widths) >= 200
    left = page.evaluate("document.querySelector('.lineage td').getBoundingClientRect().left")
    assert left < 200, "the value is in sight"
