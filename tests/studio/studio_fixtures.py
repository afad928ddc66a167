"""Browsers on a running studio of the test's project, without JavaScript and real ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from making.browser import chromium, signed_in
from making.studio_client import PASSWORD, Browser, opened
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def url(project: Path) -> Iterator[str]:
    """The studio's address."""
    with serving(Studio(project, "ada", password=PASSWORD).app()) as url:
        yield url


@pytest.fixture
def browser(url: str) -> Iterator[Browser]:
    """A signed-in browser on it."""
    with opened(url) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(project: Path) -> Iterator[str]:
    """The address that a studio for all tests of a file prints."""
    studio = Studio(project, "ada")
    with serving(studio.app()) as url:
        yield studio.address(url)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    """A tab of Chromium that has followed it."""
    with chromium() as browser:
        yield signed_in(browser, address)
