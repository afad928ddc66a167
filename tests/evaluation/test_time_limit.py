"""The rate of the answers so far, the arms that a time limit leaves out by it, and the work that is still to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from making.training_runs import Heard
from tunewright.config import EvaluateConfig
from tunewright.core.errors import UserError
from tunewright.core.io import digest
from tunewright.core.progress import LogReporter
from tunewright.evaluation import time_limit as module
from tunewright.evaluation import workload
from tunewright.evaluation.arms import ArmPlan, prompting_arms
from tunewright.evaluation.time_limit import AnswerRate, TimeLimit, Work
from tunewright.evaluation.workload import choice_works, contest_works

OPTIONAL = ("retrieved-2", "retrieved-8", "static-8-seed-1", "tuned+constrained", "tuned+retrieved")


class _Clock:
    """A clock that an arm's answers advance."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(module, "monotonic", found)
    return found


def test_time_of_missing_answers_follows_the_rate_of_the_answers_so_far(clock: _Clock) -> None:
    rate = AnswerRate(LogReporter())
    with pytest.raises(KeyboardInterrupt), rate.arm("an arm", 10):
        raise KeyboardInterrupt
    assert rate.seconds_with(100) is None
    with rate.arm("zero-shot on dev", 10):
        clock.now += 50.0
    assert (rate.seconds_with(100), rate.seconds_with(0)) == (50 + 100 * 5, 50)
    for seconds in (9.0, 11.0):
        with rate.arm("retrieved-8 on dev", 10):
            clock.now += seconds
    # The first arm loaded the model, so it counts only while it is the only one.
    assert rate.seconds_with(20) == pytest.approx(70 + 20)


class _Command:
    """A command on a machine that takes a second for each answer, and answers 60 for each arm: a minute."""

    def __init__(self, clock: _Clock, file: Path, minutes: float) -> None:
        self.clock, self.each = clock, 1.0
        self.heard, self.answered = Heard(), list[str]()
        self.rate = AnswerRate(self.heard)
        choice = [Work(arm, 60, optional=arm in OPTIONAL) for arm in ("zero-shot", "retrieved-1", *OPTIONAL[:3])]
        later = [Work(arm, 60, optional=arm in OPTIONAL) for arm in ("tuned", *OPTIONAL[3:])]
        self.limit = TimeLimit(minutes, file, self.rate, choice, later, self.heard)

    def choose(self) -> list[str]:
        """Answer the arms on dev that the limit allows, and return them."""
        for arm in ("zero-shot", "retrieved-1", *OPTIONAL[:3]):
            if self.limit.allows(arm):
                self.answer(arm)
        self.limit.settle()
        return self.answered

    def answer(self, arm: str) -> None:
        with self.rate.arm(arm, 60):
            self.clock.now += 60 * self.each
        self.answered.append(arm)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "budgets" / "decision.json"


@pytest.mark.parametrize("fitting", range(len(OPTIONAL) + 1))
def test_limit_leaves_out_the_last_arms_by_value(clock: _Clock, file: Path, fitting: int) -> None:
    command = _Command(clock, file, minutes=3 + fitting)
    assert command.choose() == ["zero-shot", "retrieved-1", *OPTIONAL[: min(fitting, 3)]]
    left_out = OPTIONAL[fitting:]
    assert [arm for arm in OPTIONAL if not command.limit.allows(arm)] == list(left_out)
    budget, warned = command.limit.budget, [line for line in command.heard.lines if "left out" in line]
    if not left_out:
        assert (budget, warned) == (None, [])
        return
    assert budget is not None
    # The first to be left out is named first.
    assert (budget.minutes, budget.expected, budget.left_out) == (3 + fitting, 3 + fitting, left_out[::-1])
    assert len(warned) == 1 and ", ".join(left_out[::-1]) in warned[0]


def test_limit_below_the_arms_that_are_never_left_out_is_refused(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=2.9)
    with pytest.raises(UserError, match=r"2\.9 .* 3, .*: tuned\n") as refused:
        command.choose()
    assert refused.value.where == "--minutes" and "--minutes 3" in str(refused.value.fix)
    assert not file.exists()


def test_slow_run_is_not_stopped(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=4)
    for arm in ("zero-shot", "retrieved-1", "retrieved-2"):
        assert command.limit.allows(arm)
        command.each = 10.0 if arm == "retrieved-2" else 1.0
        command.answer(arm)
    assert not command.limit.allows("retrieved-8")
    assert command.limit.budget is not None and command.limit.budget.expected > 4


@pytest.mark.parametrize(("minutes", "chosen"), [(4, OPTIONAL[:1]), (8, OPTIONAL[:3])])
def test_resumed_command_leaves_out_the_same_arms_on_another_machine(
    clock: _Clock, file: Path, minutes: int, chosen: tuple[str, ...]
) -> None:
    first = _Command(clock, file, minutes)
    first.choose()
    other = _Command(clock, file, minutes)
    other.each = 0.01 if minutes == 4 else 10.0
    assert other.choose() == ["zero-shot", "retrieved-1", *chosen]
    assert other.limit.budget == first.limit.budget
    assert other.limit.allows("tuned+retrieved") is (minutes == 8)


def test_limit_counts_the_choice_when_its_zero_shot_arm_cannot_answer(clock: _Clock, file: Path) -> None:
    rate, later = AnswerRate(Heard()), [Work("zero-shot", 60), Work("tuned", 60)]
    choice = [Work("retrieved-1", 60), Work("retrieved-2", 60, optional=True)]
    limit = TimeLimit(3, file, rate, choice, later, Heard())
    assert limit.allows("zero-shot") and limit.allows("retrieved-1")
    with rate.arm("retrieved-1", 60):
        clock.now += 60
    assert not limit.allows("retrieved-2")


def test_no_arm_is_left_out_while_the_rate_is_unknown(clock: _Clock, file: Path) -> None:
    command = _Command(clock, file, minutes=0.01)
    assert command.limit.allows("retrieved-2")
    command.limit.warn_of_no_speed()
    assert any("--minutes 0.01" in line for line in command.heard.lines)


# The work of a choice and of a contest


DEV = [SimpleNamespace(example=SimpleNamespace(input_key=number)) for number in range(40)]


class _Runner:
    """Arms on 40 rows, of which they answer 10 first. They have answered the first ``kept`` ones."""

    optimized, limit, folder = None, 9, Path()

    def __init__(self, **settings: Any) -> None:
        self.settings = EvaluateConfig(num_fewshot=(1,), static_seeds=3, retrievers=("bm25",), **settings)
        self.prompting_arms = prompting_arms(self.settings)
        self.version = SimpleNamespace(examples=lambda _: DEV)
        self.kept: dict[str, int] = {}
        self.generator = SimpleNamespace(kept=self.answered)

    def infeasible_reason(self, plan: ArmPlan, rows: Sequence[Any]) -> None:
        """Every prompt fits."""

    def prompts(self, plan: ArmPlan, rows: Sequence[Any]) -> list[Any]:
        return [SimpleNamespace(ids=[plan.name, row.example.input_key]) for row in rows]

    def answered(self, limit: int, adapter: object = None, *, constrained: bool = False) -> frozenset[str]:
        return frozenset(digest([arm, number]) for arm, count in self.kept.items() for number in range(count))


@pytest.fixture(autouse=True)
def _without_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("first_rows", DEV[:10]), ("advice_file", None), ("known_advice", None), ("parent_of", None)):
        monkeypatch.setattr(workload, name, lambda *_, value=value: value)


def _named(works: Sequence[Work], *names: str) -> list[tuple[str, int, int]]:
    return [(work.arm, work.answers, work.kept) for work in works if not names or work.arm in names]


def test_choice_counts_first_items_and_at_most_one_finalist_of_the_draws_of_a_static_arm() -> None:
    runner: Any = _Runner(finalists=3, instructions=["Answer."])
    runner.kept = {"retrieved-1": 4}
    works = choice_works(runner)
    assert _named(works)[0] == ("zero-shot", 10, 0)
    assert _named(works, "retrieved-1") == [("retrieved-1", 6, 4)]
    # zero-shot, zero-shot-instruction-1, retrieved-1 and one of static-1
    assert _named(works, "a finalist") == [("a finalist", 30, 0)] * 4
    assert _named(works, "another instruction") == [("another instruction", 10, 0)]
    assert [work.arm for work in works if not work.optional][:2] == ["zero-shot", "retrieved-1"]


def test_resumed_command_makes_no_prompts_of_arms_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner: Any = _Runner()
    runner.project, runner.reporter = SimpleNamespace(work=tmp_path), Heard()
    runner.generator.rate = AnswerRate(runner.reporter)
    monkeypatch.setattr(workload, "advice_file", lambda _: tmp_path / "advice.json")
    first = workload.time_limit(runner, 5)
    assert first is not None
    first.settle()
    monkeypatch.setattr(runner, "prompts", None)
    again = workload.time_limit(runner, 5)
    assert again is not None and again.allows("retrieved-1") and again.budget == first.budget


def test_contest_before_the_choice_counts_its_arms_by_their_number() -> None:
    runner: Any = _Runner(tuned_retrieved=True)
    adapter: Any = "adapter"
    assert _named(contest_works(runner, (adapter, "dev"))) == [("tuned", 40, 0), ("tuned+retrieved", 40, 0)]
    names = [name for name, *_ in _named(contest_works(runner, (adapter, "test")))]
    assert names == ["zero-shot", "the best prompting arm", "tuned", "tuned+retrieved", "noise floor"]


def test_contest_after_the_choice_counts_kept_answers_once_the_split_is_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner: Any = _Runner()
    runner.kept = {"tuned": 12}
    plans = [ArmPlan("zero-shot"), ArmPlan("tuned"), ArmPlan("tuned-retrieved", 1, retriever="bm25")]
    comparison = SimpleNamespace(folder=tmp_path, identity="it", arms=[(plan, None) for plan in plans])
    log = SimpleNamespace(openings=list[Any]())
    monkeypatch.setattr(workload, "known_advice", lambda *_: "advice")
    monkeypatch.setattr(workload, "plan_comparison", lambda *_: comparison)
    monkeypatch.setattr(workload, "AccessLog", lambda _: log)
    closed, on_dev = (contest_works(runner, ("adapter", split)) for split in ("test", "dev"))  # type: ignore[arg-type]
    assert _named(closed, "tuned") == [("tuned", 40, 0)]
    assert _named(on_dev) == [("tuned", 28, 12), ("tuned+retrieved-1", 40, 0)]
    assert [work.arm for work in on_dev if work.optional] == ["tuned+retrieved-1"]
    log.openings.append(SimpleNamespace(evaluation="it"))
    opened = contest_works(runner, ("adapter", "test"))  # type: ignore[arg-type]
    assert _named(opened, "zero-shot", "tuned") == [("zero-shot", 40, 0), ("tuned", 28, 12)]
    (tmp_path / "evidence.json").touch()
    assert contest_works(runner, ("adapter", "test")) == []  # type: ignore[arg-type]
