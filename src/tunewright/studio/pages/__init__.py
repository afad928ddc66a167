"""The studio's pages. Each calls what the command line calls, and writes the same files."""

from __future__ import annotations

from tunewright.studio.pages import data, deploy, evaluation, playground, project, review, tenants

HANDLERS = (
    *project.HANDLERS.items(),
    *data.HANDLERS.items(),
    *review.HANDLERS.items(),
    *evaluation.HANDLERS.items(),
    *deploy.HANDLERS.items(),
    *tenants.HANDLERS.items(),
    *playground.HANDLERS.items(),
)
"""Each page's method and path, with its function."""
