"""The system's Chromium, driven by Playwright, and the faults that no page may have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, LocatorAssertions, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)
AXE = Path(__file__).parents[2] / "build/clients/node/node_modules/axe-core/axe.min.js"
"""From `make test-clients`."""
WAIT_MS = 300_000
"""Limit of each wait: it only ends a hang."""

# Contrast of each element that has text of its own with what is behind it, by WCAG 2.2's formula.
_CONTRASTS = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const rgb = numbers(getComputedStyle(at).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("main *")) {
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.data.trim()) || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const colour = node.closest("svg") ? style.fill : style.color;
    const a = light(numbers(colour)), b = light(behind(node));
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.tagName + " " + node.textContent.slice(0, 30)]);
  }
  return found;
})()"""
_AXE_FAULTS = """axe.run().then(result => result.violations.map(
    each => each.id + ": " + each.nodes.map(node => node.html).join(" | ").slice(0, 400)))"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser, gone afterwards. Until then this thread cannot run an event loop of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--disable-gpu"])
        yield browser
        browser.close()


def new_page(browser: Browser, url: str | None = None) -> Page:
    """Return a tab with cookies of its own, whose paths are relative to ``url``."""
    page = browser.new_context(base_url=url).new_page()
    page.set_default_timeout(WAIT_MS)
    return page


def signed_in(browser: Browser, address: str, password: str = "", reviewer: str = "") -> Page:
    """Return a tab that is signed in to a studio: by its address, whose script fills in the token, or by the password.

    Without a ``reviewer``, the proposed name is taken; with a password there is no proposal.
    """
    page = new_page(browser, address.partition("/sign-in")[0])
    page.goto(address)
    if password:
        page.fill("#secret", password)
    if reviewer or password:
        page.fill("#reviewer", reviewer or "ada")
    page.click("#sign-in button")
    page.wait_for_url(lambda url: "/sign-in" not in url)
    return page


def wait_for(part: Locator) -> LocatorAssertions:
    """Return Playwright's assertions on a part of a page; each waits until it holds."""
    from playwright.sync_api import expect

    expect.set_options(timeout=WAIT_MS)
    return expect(part)


def show(page: Page, place: Path | str, *, width: int, dark: bool = False) -> None:
    """Show a file or an address in a window of this width, in CSS pixels."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme="dark" if dark else "light")
    page.goto(place.as_uri() if isinstance(place, Path) else place)


def contrasts(page: Page) -> list[tuple[float, str]]:
    """Return the contrast of each text."""
    return [(contrast, text) for contrast, text in page.evaluate(_CONTRASTS)]


def faults(page: Page) -> list[str]:
    """Return the faults of a page: what it logs or blocks, exceptions, scrolling sideways, and text that is dim."""
    found = [message.text for message in page.console_messages(filter="since-navigation")]
    found += [error.message for error in page.page_errors(filter="since-navigation")]
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    if width > window:
        found.append(f"{width} pixels wide in a window of {window}")
    return found + [f"contrast {contrast:.1f}: {text}" for contrast, text in contrasts(page) if contrast < 4.5]


def axe_faults(page: Page) -> list[str]:
    """Return the faults that axe-core finds: its rules for WCAG 2.2 AA and its best practices."""
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    found: list[str] = page.evaluate(_AXE_FAULTS)
    return found


def row_key(page: Page) -> str:
    """Return the key of the row or pair that a page asks about."""
    return page.locator("[name=key]").first.input_value()


def awake(page: Page) -> None:
    """Wait until keys press the page's buttons: they rest after a page change."""
    page.wait_for_selector("body[data-keys=awake]")


def press_to_next(page: Page, key: str) -> None:
    """Press a key that leads to the next page."""
    awake(page)
    with page.expect_navigation():
        page.keyboard.press(key)


def click_to_next(page: Page, action: str) -> None:
    """Press the button of a verdict with the mouse."""
    with page.expect_navigation():
        page.click(f"#judge button[value={action}]")
