"""Server-sent events of a training run: each row of its metrics file as it is written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from anyio import sleep, to_thread

from tunewright.adapters.registry import HISTORY, read_history
from tunewright.core.errors import UserError
from tunewright.evaluation.training_runs import TrainingRun

_EVERY_S = 0.5


async def run_events(run: TrainingRun) -> AsyncIterator[str]:
    """Yield a run's rows, then new ones, and `finished` when it is no longer running.

    `again` precedes rows that replace all earlier ones: a run that resumes rewrites the file from its checkpoint.
    """
    sent: list[str] = []
    stamp = None
    while True:
        running = run.state == "running"
        file = run.folder / HISTORY
        with suppress(FileNotFoundError):  # before the first step, or once it has become an adapter
            now = file.stat()
            if stamp != (now.st_ino, now.st_size):
                stamp = now.st_ino, now.st_size
                try:
                    rows = await to_thread.run_sync(_rows, file)
                except UserError as error:
                    yield f"event: fault\ndata: {error.what} ({error.where})\n\n"
                    return
                if not sent or rows[: len(sent)] != sent:
                    yield "event: again\ndata: \n\n"
                    sent = []
                for row in rows[len(sent) :]:
                    yield f"data: {row}\n\n"
                sent = rows
        if not running:
            yield f"event: finished\ndata: {run.state}\n\n"
            return
        await sleep(_EVERY_S)


def _rows(file: Path) -> list[str]:
    return [json.dumps(row) for row in read_history(file)]
