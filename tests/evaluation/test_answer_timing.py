"""The timing before an estimate: short answers, few prompts where minutes are few, and a word on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from command_line import tiny_project
from preference_helpers import Heard
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.evaluation.answer_journal import Answer
from tunewright.evaluation.generations import Generator, Prompt
from tunewright.evaluation.schedule import AnswersEstimate, Schedule

LIMIT = 500
ALONE = 3.0
"""Seconds of an answer in these tests."""


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Prompts and token limit of each batch that a base which never stops is timed on from now on."""
    found: list[tuple[int, int]] = []

    def timed(
        self: Generator, prompts: Sequence[Prompt], limit: int, adapter: object = None
    ) -> tuple[float, list[Answer]]:
        found.append((len(prompts), limit))
        return ALONE * len(prompts), [Answer("a", True, prompt, limit) for prompt in prompts]

    monkeypatch.setattr(Generator, "timed", timed)
    return found


def _estimated(folder: Path, base: Path, minutes: float | None = None) -> tuple[AnswersEstimate, Heard]:
    config = tiny_project(folder, base) / "tunewright.yaml"
    text = config.read_text().replace("pairs.jsonl]\n", "pairs.jsonl]\n  val_size: 0.3\n")
    config.write_text(text.replace("evaluate:\n", f"evaluate:\n  max_new_tokens: {LIMIT}\n"))
    heard = Heard()
    project = Project(ProjectFolder(folder), heard)
    project.data.add([folder / "pairs.jsonl"])
    arm_runner = project.arm_runner()
    return Schedule(arm_runner, minutes=minutes).estimate(measure=True), heard


def test_timed_answers_are_short_and_count_as_long_as_the_limit(
    tmp_path: Path, tiny_base_folder: Path, timings: list[tuple[int, int]]
) -> None:
    found, heard = _estimated(tmp_path / "project", tiny_base_folder)
    (short, one), (long, other) = timings
    assert one == other == 32
    assert short > 4 and long > 4
    assert found.seconds is not None
    # 32 tokens take 3 seconds; an answer that was cut is expected to have 500.
    assert found.seconds > 0.5 * found.missing * ALONE * LIMIT / 32
    assert sum("at most 32 tokens" in line for line in heard.lines) == 1


def test_timing_takes_about_a_tenth_of_the_minutes(
    tmp_path: Path, tiny_base_folder: Path, timings: list[tuple[int, int]]
) -> None:
    _estimated(tmp_path / "project", tiny_base_folder, minutes=6)
    assert timings == [(1, 32), (4, 32), (4, 32)]
    assert sum(rows for rows, _ in timings) * ALONE <= 6 * 60 / 10
