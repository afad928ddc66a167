"""References that are longer than an answer may be are counted before anything is answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import Ran, tiny_project, tunewright
from tunewright.data.versions import load_version

pytestmark = pytest.mark.slow

TOLD = r"(\d+) of (\d+) {split} references are longer than the limit of 4 tokens.*? (\d+) tokens fit all of"


def _told(ran: Ran, split: str) -> list[re.Match[str]]:
    assert ran.code == 0, ran.stderr
    return list(re.finditer(TOLD.format(split=split), " ".join(ran.stderr.split())))


def test_train_and_evaluate_warn_of_longer_references_before_they_answer(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    config = folder / "tunewright.yaml"
    text = config.read_text().replace(
        "evaluate:\n  num_fewshot: [1, 2]\n", "evaluate:\n  num_fewshot: [1]\n  max_new_tokens: 4\n"
    )
    config.write_text(text.replace("  epochs: 2\n", "  epochs: 1\n"))
    assert tunewright("data", "add", folder / "pairs.jsonl", "--project", folder).code == 0
    version = load_version(folder / "dataset")
    trained = tunewright("train", "--project", folder)
    (dev,) = _told(trained, "dev")
    lengths = [len(m.example.output) + 1 for m in version.examples("dev")]  # bytes are tokens, and the end is one
    assert [int(n) for n in dev.groups()] == [sum(n > 4 for n in lengths), len(lengths), max(lengths)]
    on_dev = tunewright("evaluate", "--dev", "--project", folder)
    assert len(_told(on_dev, "dev")) == 1
    assert _told(on_dev, "test") == []
    evaluated = tunewright("evaluate", "--project", folder)
    assert len(_told(evaluated, "test")) == 1
    message = " ".join(evaluated.stderr.split())
    assert message.index("test references are longer") < message.index("The test split is opened")
