"""The results of an evaluation that are compared with those of a cluster, and a reporter that interferes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_helpers import Listener

from tunewright.core.progress import LogTask, Task


def results(folder: Path) -> dict[str, Any]:
    """The evidence without times, the items, and the answers of each journal."""
    (evaluation,) = (folder / "evaluations").glob("[!.]*/evidence.json")
    evidence = json.loads(evaluation.read_text())
    del evidence["lineage"]["created"], evidence["opening"]
    return {
        "evidence": evidence,
        "items": evaluation.with_name("items.jsonl").read_text(),
        "answers": {name: sorted(lines) for name, lines in journals(folder).items()},
    }


def journals(folder: Path) -> dict[str, list[str]]:
    files = (folder / ".tunewright" / "generations").glob("*.jsonl")
    return {file.name: [line for line in file.read_text().split("\n") if line] for file in files}


class Answering(Listener):
    """A reporter that calls a function at the first answer of an arm."""

    def __init__(self, arm: str, then: Callable[[], None]) -> None:
        super().__init__()
        self.arm, self.then, self.called = arm, then, False

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Task]:
        answering = self

        class Watching(LogTask):
            def advance(self, steps: int = 1, note: str = "") -> None:
                if answering.arm in note and not answering.called:
                    answering.called = True
                    answering.then()

        yield Watching()
