"""The studio's pages. Each page calls the same functions as the command line, and writes the same files."""

from __future__ import annotations

from tunewright.studio.pages import (
    bulk,
    compare,
    data,
    deploy,
    evaluate,
    playground,
    project,
    review,
    rows,
    settings,
    shadow,
    tenants,
    training,
)
from tunewright.studio.visit import Handler

_PAGES = (project, data, bulk, rows, review, settings, evaluate, compare, training, deploy, shadow, tenants, playground)
HANDLERS: tuple[tuple[tuple[str, str], Handler], ...] = tuple(item for page in _PAGES for item in page.HANDLERS.items())
"""Each page's method and path, with its function."""
