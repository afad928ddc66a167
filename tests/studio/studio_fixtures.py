"""A browser on a running studio of the test's project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from studio_client import PASSWORD, Browser, opened
from tunewright.serving.gateway.server import serving
from tunewright.studio import Studio


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
