"""Datasets and evaluations that are compared with those of a cluster, and a reporter that interferes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_helpers import Listener, Pair, new_project, write_jsonl
from hypothesis import strategies as st

from tunewright.core.errors import UserError
from tunewright.core.progress import LogTask, Task
from tunewright.core.workers import Workers
from tunewright.data.add import add
from tunewright.data.dedup import decontaminate, partition, similarity

CONFIG = "data:\n  conflicts: accept\n  val_size: 0.2\n  test_size: 0.2\n"
TEMPLATES = (
    "What is the balance of account {number} held by {name} at the end of the month?",
    "Please transfer {number} euros from my savings account to {name}",
    "{name} {number}",
)
NAMES = ("anna smith", "ben jones", "clara of the north", "d", "anna smith, who moved here from abroad last summer")

rows_alike: st.SearchStrategy[list[Pair]] = st.lists(
    st.tuples(
        st.builds(
            lambda template, name, number: template.format(name=name, number=number),
            st.sampled_from(TEMPLATES),
            st.sampled_from(NAMES),
            st.integers(1, 400),
        ),
        st.one_of(
            st.sampled_from(["yes", "no"]),
            st.builds(lambda n: TEMPLATES[0].format(name="anna smith", number=n), st.integers(1, 40)),
        ),
    ),
    min_size=12,
    max_size=50,
)
"""Pairs near each other in many ways: texts at every similarity, equal answers, answers that are other inputs."""


def many_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs of random words, some of templates and some near the one before; a few dozen answers are frequent."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(5000)]
    made: dict[str, str] = {}
    last = ("none", "none")
    while len(made) < count:
        kind = draw.random()
        label = f"label {draw.randint(0, 20)}"
        if kind < 0.15:
            text = draw.choice(TEMPLATES).format(name=" ".join(draw.choices(words, k=2)), number=draw.randint(1, 9999))
            last = (text, label)
        elif kind < 0.3:
            last = (f"{last[0]} {draw.choice(words)}", last[1])
        else:
            answer = draw.choice([label, " ".join(draw.choices(words, k=12))])
            last = (" ".join(draw.choices(words, k=draw.randint(6, 40))), answer)
        made[last[0]] = last[1]
    return list(made.items())


def small_parts(patch: Any) -> None:
    """Give the workers a few rows at a time, so that a small dataset has many parts."""
    for module, name, size in (
        (similarity, "_ALIKE", 5),
        (similarity, "_TOGETHER", 8),
        (similarity, "_CHAINED", 7),
        (partition, "_FEW", 6),
        (decontaminate, "_ROWS", 7),
    ):
        patch.setattr(module, name, size)
    patch.setattr("tunewright.data.readers._ROWS", 5)
    patch.setattr("tunewright.data.pii.STEP", 9)


def built(folder: Path, pairs: Sequence[Pair], workers: Workers) -> tuple[dict[str, str], Listener]:
    """The digests of all files of a new dataset, or the error, and what was reported."""
    project, heard = new_project(folder, CONFIG), Listener()
    file = write_jsonl(folder / "pairs.jsonl", pairs)
    try:
        add(project, [file], heard, workers=workers)
    except UserError as error:
        heard.said.append(str(error))
    return digests(project.dataset), _without(heard, str(folder))


def _without(heard: Listener, folder: str) -> Listener:
    heard.said = [text.replace(folder, "") for text in heard.said]
    heard.warned = [text.replace(folder, "") for text in heard.warned]
    return heard


def digests(dataset: Path) -> dict[str, str]:
    """The SHA-256 of every file of a dataset; manifests without the time at which they were written."""
    return {
        path.relative_to(dataset).as_posix(): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    if path.name != "manifest.json":
        return path.read_bytes()
    manifest = json.loads(path.read_text(encoding="utf-8"))
    # The seal is the digest of the rest, the time included.
    return json.dumps({name: value for name, value in manifest.items() if name not in ("created", "seal")}).encode()


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
            def advance(self, steps: int = 1, note: str = "", *, kept: bool = False) -> None:
                if answering.arm in title and not answering.called:
                    answering.called = True
                    answering.then()

        yield Watching()
