"""The work that a command still has to do, by the answers that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunewright.config import EvaluateConfig
from tunewright.evaluation import workload
from tunewright.evaluation.arms import ArmPlan, prompting_arms
from tunewright.evaluation.time_limit import Work
from tunewright.evaluation.workload import Workload

DEV = [SimpleNamespace(example=SimpleNamespace(input_key=number)) for number in range(40)]
FIRST = DEV[:10]


class _Runner:
    """Arms that have answered the first ``kept`` items of each split."""

    optimized = None

    def __init__(self, **settings: Any) -> None:
        self.settings = EvaluateConfig(num_fewshot=(1,), static_seeds=3, retrievers=("bm25",), **settings)
        self.prompting_arms = prompting_arms(self.settings)
        self.version = SimpleNamespace(examples=lambda _: DEV)
        self.kept: dict[str, int] = {}

    def infeasible_reason(self, plan: ArmPlan, rows: Sequence[Any]) -> None:
        """Every prompt fits."""

    def work(self, plan: ArmPlan, rows: Sequence[Any], adapter: object = None) -> Work:
        kept = min(self.kept.get(plan.name, 0), len(rows))
        return Work(plan.name, len(rows) - kept, kept, 10.0)


@pytest.fixture(autouse=True)
def _without_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("first_rows", FIRST), ("advice_file", Path()), ("known_advice", None), ("parent_of", None)):
        monkeypatch.setattr(workload, name, lambda *_, value=value: value)


def _works(runner: Any, contest: Any = None, without: Sequence[str] = ()) -> list[tuple[str, int, int]]:
    works = Workload(runner, contest).remaining(without, chosen=False)
    return [(work.arm, work.answers, work.kept) for work in works]


def test_finalists_are_at_most_one_of_the_draws_of_a_static_arm() -> None:
    works = _works(_Runner(finalists=3))
    assert [work for work in works if work[0] == "a finalist"] == [("a finalist", 30, 0)] * 2
    assert works[0] == ("zero-shot", 40, 0) and len(works) == 5 + 2


def test_finalists_lack_only_the_answers_that_are_not_kept() -> None:
    runner = _Runner(finalists=1)
    runner.kept = {plan.name: 40 for plan in runner.prompting_arms} | {"retrieved-1": 25}
    assert _works(runner)[-1] == ("a finalist", 15, 15)


def test_another_instruction_is_counted_only_with_an_arm_that_has_demonstrations() -> None:
    runner = _Runner(instructions=["Answer."])
    assert ("another instruction", 10, 0) in _works(runner)
    shown = [plan.name for plan in runner.prompting_arms if plan.shots]
    assert [name for name, *_ in _works(runner, without=shown) if name == "another instruction"] == []


def test_contest_on_dev_counts_the_kept_answers_of_the_adapter() -> None:
    runner = _Runner(tuned_retrieved=True)
    runner.kept = {"tuned": 12}
    assert _works(runner, ("adapter", "dev"))[-2:] == [("tuned", 28, 12), ("tuned+retrieved", 40, 0)]
    names = [name for name, *_ in _works(runner, ("adapter", "test"))]
    assert names[-5:] == ["zero-shot", "the best prompting arm", "tuned", "tuned+retrieved", "noise floor"]


@pytest.mark.parametrize(("best_retrieved", "optional"), [(None, []), ("retrieved-1", ["tuned+retrieved"])])
def test_tuned_retrieved_is_counted_only_with_a_best_retrieved_arm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, best_retrieved: str | None, optional: list[str]
) -> None:
    runner: Any = _Runner(tuned_retrieved=True)
    runner.folder = tmp_path
    comparison = SimpleNamespace(folder=tmp_path / "evidence", identity="new")
    monkeypatch.setattr(workload, "known_advice", lambda *_: SimpleNamespace(best_retrieved=best_retrieved))
    monkeypatch.setattr(workload, "plan_comparison", lambda *_: comparison)
    monkeypatch.setattr(workload, "AccessLog", lambda _: SimpleNamespace(openings=[]))
    works = Workload(runner, ("adapter", "test")).remaining((), chosen=True)  # type: ignore[arg-type]
    assert [work.arm for work in works if work.optional] == optional
