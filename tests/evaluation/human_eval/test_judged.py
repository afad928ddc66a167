"""The judge's rows become preferences, unless the judge is vetoed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from making.evidence import make_evidence, make_items
from making.human_evaluations import begin, save, side_of_treatment
from tunewright.api import Project
from tunewright.config.project import ProjectFolder
from tunewright.core.io import write_text
from tunewright.core.progress import LogReporter
from tunewright.evaluation.access_log import AccessLog
from tunewright.evaluation.human_eval.results import accepted_judge
from tunewright.evaluation.judge.questions import ROWS_FILE, ArmPreference, JudgedItem, JudgedPair, Outcome
from tunewright.evidence.files import load_evidence
from tunewright.evidence.judge import Judgement, JudgeUsage
from tunewright.evidence.schema import Item

ITEMS = make_items(120, tuned=0.7, retrieved=0.3)


def _judgement(**changes: Any) -> Judgement:
    facts: dict[str, Any] = {
        "model": "m",
        "url": "http://127.0.0.1:1/v1",
        "parameters": {},
        "prompts": "0" * 64,
        "criteria": None,
        "created": "2026-01-01T00:00:00+00:00",
        "same_family": None,
        "reference_model": None,
        "controls": (),
        "vetoed": (),
        "spent": JudgeUsage(calls=0, prompt_tokens=0, completion_tokens=0, estimated=0, cost=None),
    }
    return Judgement(**{**facts, **changes})


def _outcome(item: Item) -> Outcome | None:
    outcomes: tuple[Outcome | None, ...] = ("win", "win", "tie", "loss", None)
    return outcomes[int(item.key[:8], 16) % 5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation with a judge's rows, whose verdicts follow from the keys."""
    folder = save(tmp_path / "evaluations" / "0123456789ab", ITEMS, make_evidence(ITEMS))
    rows = [
        JudgedItem(
            key=item.key,
            correctness={},
            pairs={
                "retrieved-4": JudgedPair(plain=ArmPreference(outcome=_outcome(item))),
                "zero-shot": JudgedPair(plain=ArmPreference(outcome="win")),
            },
        )
        for item in ITEMS
    ]
    write_text(folder / ROWS_FILE, "".join(f"{row.model_dump_json()}\n" for row in rows))
    AccessLog(folder.parent).amend(folder, judge=_judgement())
    return folder


def test_outcomes_against_the_deciding_control_become_preferences(folder: Path) -> None:
    found = accepted_judge(folder, load_evidence(folder), LogReporter())
    assert found is not None
    assert found.name == "judge m"
    signs = {"win": 1, "tie": 0, "loss": -1}
    assert found.preferences == {i.key: signs[message] for i in ITEMS if (message := _outcome(i)) is not None}


def test_vetoed_judge_is_ignored_and_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    AccessLog(folder.parent).amend(folder, judge=_judgement(vetoed=("it says yes to all",)))
    assert accepted_judge(folder, load_evidence(folder), LogReporter()) is None
    assert "vetoed" in caplog.text


def test_results_in_the_evidence_include_the_judge(folder: Path) -> None:
    review = begin(folder)
    while (pair := review.next()) is not None:
        message = _outcome(next(i for i in ITEMS if i.key == pair.key))
        ours = side_of_treatment(review, pair)
        review.answer(pair, "both" if message in ("tie", None) else "A" if (message == "win") == (ours == "A") else "B")
    found = Project(ProjectFolder(folder.parent.parent), LogReporter()).human_eval_results(folder.name)
    assert found == load_evidence(folder).human_eval
    assert found.powered is not None
    assert found.powered.tuning > 0.8
    (agreed,) = found.agreements
    assert agreed.raters == ("ada", "judge m")
    assert agreed.agreed == agreed.items
    unscored = sum(_outcome(i) is None for i in ITEMS if i.key in review.sample.order)
    assert agreed.items == len(review.sample.order) - unscored
