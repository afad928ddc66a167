"""Suspects that were found before: kept by the content of all that decides them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunewright.core.io import write_json, writing
from tunewright.core.progress import Reporter, Task
from tunewright.data.review.suspects import Found, Suspect

FOLDER = "suspects"
"""Below the project's working folder."""


def forget_suspects(root: Path) -> int:
    """Remove the lists that are kept below a project's folder, and return how many there were.

    They quote answers, also of rows that are not suspects themselves, so a purge cannot tell which quote its rows.
    """
    folder = root / ".tunewright" / FOLDER
    if not folder.is_dir():
        return 0
    count = len(list(folder.glob("[!.]*.json")))
    with writing(folder):
        shutil.rmtree(folder)
    return count


class _Recorder:
    """Passes everything on, and remembers messages and warnings."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)
        self._reporter.say(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)
        self._reporter.warn(message)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        with self._reporter.task(title, total, unit) as task:
            yield task


def kept_suspects(file: Path, find: Callable[[Reporter], Found], reporter: Reporter) -> Found:
    """Return the suspects in a file, with the messages of the call that found them; else find and keep them.

    Args:
        file: named by the content of all that decides the list; it is written whole or not at all.
        find: finds the suspects; what it tells the reporter is kept too.
        reporter: is told that the list was kept.
    """
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        reporter.say(f"Suspects of an earlier call with the same rows and settings, kept in {file}")
        for message in kept["said"]:
            reporter.say(message)
        for message in kept["warned"]:
            reporter.warn(message)
        return Found([Suspect(**suspect) for suspect in kept["suspects"]], kept["accuracy"])
    recorder = _Recorder(reporter)
    found = find(recorder)
    listed = [each.as_dict() for each in found.suspects]
    document = {"said": recorder.said, "warned": recorder.warned, "suspects": listed, "accuracy": found.accuracy}
    write_json(file, document)
    return found
