"""The studio's pages. Each calls what the command line calls, and writes the same files."""

from __future__ import annotations

from tunewright.studio.pages import (
    data,
    deploy,
    evaluate,
    evaluation,
    evidence,
    judge,
    new_project,
    playground,
    project,
    review,
    rows,
    tenants,
    training,
)

HANDLERS = (
    *project.HANDLERS.items(),
    *new_project.HANDLERS.items(),
    *data.HANDLERS.items(),
    *rows.HANDLERS.items(),
    *review.HANDLERS.items(),
    *evaluate.HANDLERS.items(),
    *evaluation.HANDLERS.items(),
    *training.HANDLERS.items(),
    *evidence.HANDLERS.items(),
    *judge.HANDLERS.items(),
    *deploy.HANDLERS.items(),
    *tenants.HANDLERS.items(),
    *playground.HANDLERS.items(),
)
"""Each page's method and path, with its function."""
