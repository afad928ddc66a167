"""Folds that choose different prompting arms: the control is of each fold its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunewright
from command_line import tiny_project, write_jsonl
from tunewright.evaluation.arm_runner import ArmRunner
from tunewright.evaluation.prompt_search import AdviseResult, advise
from tunewright.evidence.files import load_items
from tunewright.evidence.verdict import verdict
from tunewright.report.page import render_report

pytestmark = pytest.mark.slow


def test_crossval_control_is_each_folds_best_prompting_arm(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_project(tmp_path / "project", tiny_base_folder)
    rows = [{"prompt": f"{n * 7919 % 10007} {'xyz'[n % 3] * 9} {n}", "completion": f"{n}"} for n in range(120)]
    write_jsonl(folder / "pairs.jsonl", rows)
    project = tunewright.open(folder)
    project.data.add([folder / "pairs.jsonl"])
    chosen = iter(["retrieved-1", "zero-shot"])

    def choosing(arm_runner: ArmRunner) -> AdviseResult:
        measured = advise(arm_runner)
        best = measured.advice.model_copy(update={"best": next(chosen)})
        return AdviseResult(measured.file, best, measured.measured)

    monkeypatch.setattr("tunewright.evaluation.crossval.advise", choosing)
    result = project.crossval(folds=2, force=True)
    evidence, items = result.evidence, load_items(result.folder)
    assert [fold.best_prompting for fold in evidence.folds] == ["retrieved-1", "zero-shot"]
    assert (evidence.best_prompting, evidence.arm("best-prompting").kind) == ("best-prompting", "mixed")
    assert [c.control for c in evidence.contrasts] == ["best-prompting", "zero-shot", "tuned"]
    second = [item for item in items if item.fold == 2]
    assert all(item.answers["best-prompting"] == item.answers["zero-shot"] for item in second)
    # A fold that prompts with a demonstration has longer prompts, and its share of the arm's mean.
    assert evidence.arm("best-prompting").prompt_tokens > evidence.arm("zero-shot").prompt_tokens
    assert "best-prompting" in verdict(evidence).reasons[0]
    assert "best-prompting, the best prompting" in render_report(evidence, items, [])
